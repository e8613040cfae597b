"""One comparison's shape, dtype, loss, and how much of the batch has a gradient."""

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
"""Largest value of each fraction of a `Case`; with padding evenly spread over a batch more than half has no room."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shape (batch, tokens, vocab), dtype, loss and device of one comparison; the same case has the same inputs.

    padded: fraction of the batch x tokens positions. zero_advantage: of the trajectories. clipped: of the response tokens
    whose advantage is not 0; where the preset clips whole trajectories, of those trajectories. As usual it is half of PMPO's
    full_clip_fraction, so that p is solved between its limits. `model` is a name for the vocabulary.

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
        """Usable in a file name; with a `model` it names everything but the seed and the device."""
        if self.model is None:
            return f"v{self.vocab}-{self.dtype.value}"
        fractions = {f"{name[0]}{getattr(self, name):g}": getattr(self, name) for name in LIMITS}
        usual = tuple(type(self).__dataclass_fields__[name].default for name in LIMITS)
        suffix = "" if tuple(fractions.values()) == usual else "-" + "-".join(fractions)
        return f"{self.model}-{self.batch}x{self.tokens}-{self.dtype.value}-{self.preset.value}{suffix}"

    @property
    def needed_bytes(self) -> int:
        """Rough need. On a CPU of the widest variant: 14 float32 tensors of the logits' shape (10 measured, two copies kept).
        On a GPU, where a variant may run out of memory, of what must fit: three copies and the gradient."""
        if self.device != "cpu":
            return 4 * self.logits_bytes
        return 14 * 4 * self.batch * self.tokens * self.vocab


@dataclass(frozen=True, kw_only=True)
class HeadCase(Case):
    """A loss from hidden states of width `hidden` and an LM head (V, H) of the same dtype, for losses that clip tokens.

    Raises:
        ValueError: as `Case`; or a preset that clips whole trajectories, whose bounds are below the rounding of 16-bit logits.
    """

    hidden: int
    padded: float = 0.375

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config.clip != "token":
            raise ValueError(f"preset: expected one that clips tokens, got {self.preset.value}")

    @property
    def title(self) -> str:
        hidden = f"({self.batch}, {self.tokens}, {self.hidden})"
        head = f"({self.vocab}, {self.hidden})"
        return f"{self.preset.value}, hidden states {hidden}, head {head}, {self.dtype.value}, {self.device}"

    @property
    def name(self) -> str:
        return f"{super().name}-h{self.hidden}"

    @property
    def gradient_bytes(self) -> int:
        """Of the response tokens' hidden states and of the head, up to the rounding of the lengths."""
        tokens = round(self.batch * self.tokens * (1 - self.padded))
        return (tokens + self.vocab) * self.hidden * (self.row_bytes // self.vocab)

    @property
    def needed_bytes(self) -> int:
        """Rough need, on a GPU of what must fit: float64 copies of the head, its gradient and chunks; on a CPU also of the
        widest row, eager PyTorch: seven float32 tensors of the response tokens' logits."""
        exact = 4 * 8 * self.vocab * self.hidden + 8 * 2**28
        return exact + (
            0 if self.device != "cpu" else round(28 * (1 - self.padded) * self.batch * self.tokens * self.vocab)
        )
