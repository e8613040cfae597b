"""The losses that are compared, by name, and what each is given at a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pmpo_kernels import LossConfig
from pmpo_kernels.schedules import apmpo_clip, apmpo_power, holder_power

PRESETS = {
    "grpo": LossConfig.grpo,
    "dapo": LossConfig.dapo,
    "gmpo": LossConfig.gmpo,
    "gspo": LossConfig.gspo,
    "hmpo": LossConfig.hmpo,
    "holder": LossConfig.holder,
    "apmpo": LossConfig.apmpo,
    "pmpo": LossConfig.pmpo,
}
FAMILY = tuple(PRESETS)
RATES = {4: (1e-4, 2e-4), 16: (5e-5, 1e-4, 2e-4, 4e-4)}
"""Learning rates that are tried for each method on the small model, on validation problems, by staleness."""
LEARNING_RATES: dict[int, dict[str, float]] = {
    4: {
        "grpo": 0.0002,
        "dapo": 0.0001,
        "gmpo": 0.0001,
        "gspo": 0.0002,
        "hmpo": 0.0001,
        "holder": 0.0002,
        "apmpo": 0.0002,
        "pmpo": 0.0002,
    },
    16: {
        "grpo": 0.0002,
        "dapo": 0.0002,
        "gmpo": 0.0001,
        "gspo": 0.0002,
        "hmpo": 0.0001,
        "holder": 0.0001,
        "apmpo": 0.0002,
        "pmpo": 0.0001,
    },
}
"""What came out best; docs/experiment.md has the figures."""
ABLATION = (
    "pmpo",
    "pmpo:full_clip_fraction=0.05",
    "pmpo:full_clip_fraction=0.2",
    "pmpo:full_clip_fraction=0.5",
    "pmpo:ess_sharpness=0.5",
    "pmpo:ess_sharpness=2",
    "pmpo:ess_rule=absolute,ess_floor=0.5",
    "pmpo:ess_rule=absolute,ess_floor=0.9",
    "pmpo:clip_low=0.2,clip_high=0.2",
    "pmpo:clip_low=0.2,clip_high=0.4",
    "pmpo:clip_low=0.2,clip_high=0.2,full_clip_fraction=0.3",
    "pmpo:clip_sides=two",
    "gmpo",
    "gmpo:clip_low=0.2,clip_high=0.2",
    "pmpo:power_min=1",  # p = 1 at PMPO's clip: what the adaptation itself does
)
"""PMPO's rule and clip, one choice changed at a time, and what lies at the ends."""


@dataclass(frozen=True)
class Method:
    """A preset and options of `LossConfig` that replace its own, written `pmpo:full_clip_fraction=0.2,clip_low=0.2`.

    Raises:
        ValueError: an unknown preset, an option without a value, or what `LossConfig` refuses.
    """

    spec: str

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"method: expected one of {list(PRESETS)}, perhaps with :option=value, got {self.spec!r}")
        try:
            self.arguments(0.0, None)
        except TypeError as error:  # of a dataclass's constructor, which names the option
            raise ValueError(f"method: expected options of LossConfig, got {self.spec!r} ({error})") from None

    @property
    def preset(self) -> str:
        return self.spec.partition(":")[0]

    @property
    def file_stem(self) -> str:
        """The method as part of a file name."""
        return self.spec.replace(":", "__").replace(",", "_")

    def options(self) -> dict[str, Any]:
        """The options after the colon, as numbers where they are numbers."""
        _, colon, text = self.spec.partition(":")
        pairs = [item.partition("=") for item in text.split(",")] if colon else []
        if not all(name and value for name, _, value in pairs):
            raise ValueError(f"method: expected option=value after the colon, separated by commas, got {self.spec!r}")
        return {name: _number(value) for name, _, value in pairs}

    def arguments(self, progress: float, rewards: Tensor | None) -> tuple[LossConfig, float | None]:
        """Return `config` and `power` of a step. `progress` is the part of the training that is done, `rewards` (B,) are those of
        the step's rollouts, None if they are not known yet."""
        if self.preset == "holder":
            return PRESETS["holder"](0.0, **self.options()), holder_power(progress)
        if self.preset == "apmpo" and rewards is not None:
            return PRESETS["apmpo"](apmpo_power(rewards), apmpo_clip(rewards), **self.options()), None
        first = (1.0,) if self.preset == "apmpo" else ()
        return PRESETS[self.preset](*first, **self.options()), None


def learning_rate(preset: str, staleness: int) -> float:
    """The best learning rate that is known for the small model."""
    known = [k for k in LEARNING_RATES if k <= staleness]
    return LEARNING_RATES[max(known, default=min(LEARNING_RATES))][preset]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
