"""`Case`: shape, dtype and loss of one comparison, and how much of its batch has a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pmpo_kernels.config import LossConfig


class Dtype(str, Enum):
    """Dtype of the logits."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Preset(str, Enum):
    """The constructors of `LossConfig` that need no p; `max_length` is the tokens of the case."""

    pmpo = "pmpo"
    grpo = "grpo"
    dr_grpo = "dr_grpo"
    dapo = "dapo"
    bnpo = "bnpo"
    gmpo = "gmpo"
    hmpo = "hmpo"
    gspo = "gspo"


LIMITS = {"padded": 0.5, "clipped": 1.0, "zero_advantage": 1.0}
"""Largest value of each fraction of a `Case`. Lengths are spread evenly below `tokens`; half padded, the shortest is near 0."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shape (batch, tokens, vocab), dtype, loss and device of one comparison. The same case has the same inputs.

    padded is a fraction of the batch x tokens positions, zero_advantage one of the trajectories. clipped is a fraction of the
    response tokens whose advantage is not 0 or, where the preset clips whole trajectories, of those trajectories. Its default is
    half of PMPO's full_clip_fraction, so that p is solved between its limits. `model` is a name for the vocabulary.

    Raises:
        ValueError: a fraction out of its range.
    """

    vocab: int
    batch: int
    tokens: int
    dtype: Dtype = Dtype.float32
    preset: Preset = Preset.pmpo
    device: str = "cpu"
    seed: int = 0
    padded: float = 0.1
    clipped: float = 0.05
    zero_advantage: float = 0.125
    model: str | None = None

    def __post_init__(self) -> None:
        for name, most in LIMITS.items():
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise ValueError(f"{name}: expected a fraction from 0 to {most}, got {value}")

    @property
    def title(self) -> str:
        shape = f"({self.batch}, {self.tokens}, {self.vocab})"
        return f"{self.preset.value}, logits {shape} {self.dtype.value}, {self.device}"

    @property
    def config(self) -> LossConfig:
        if self.preset is Preset.dr_grpo:
            return LossConfig.dr_grpo(max_length=self.tokens)
        config: LossConfig = getattr(LossConfig, self.preset.value)()
        return config

    @property
    def logits_bytes(self) -> int:
        return self.batch * self.tokens * self.row_bytes

    @property
    def row_bytes(self) -> int:
        return self.vocab * (4 if self.dtype is Dtype.float32 else 2)

    @property
    def name(self) -> str:
        """Name for a file. With a `model` it tells everything but the seed and the device."""
        if self.model is None:
            return f"v{self.vocab}-{self.dtype.value}"
        fractions = {f"{name[0]}{getattr(self, name):g}": getattr(self, name) for name in LIMITS}
        usual = tuple(type(self).__dataclass_fields__[name].default for name in LIMITS)
        suffix = "" if tuple(fractions.values()) == usual else "-" + "-".join(fractions)
        return f"{self.model}-{self.batch}x{self.tokens}-{self.dtype.value}-{self.preset.value}{suffix}"

    @property
    def needed_bytes(self) -> int:
        """Bytes needed, roughly. On a CPU they are those of the widest variant, 14 float32 tensors of the logits' shape (10
        measured, two copies kept). On a GPU, where a variant may run out of memory, three copies and the gradient must fit."""
        if self.device != "cpu":
            return 4 * self.logits_bytes
        return 14 * 4 * self.batch * self.tokens * self.vocab
