"""What is measured: one batch with signal in it, and the ways of computing its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pmpo_kernels.api import pmpo_loss
from pmpo_kernels.baseline import eager_pmpo_loss
from pmpo_kernels.config import LossConfig
from pmpo_kernels.impls import IMPLS, USABLE, available_impls, interpreted


class Dtype(str, Enum):
    """Dtype of the logits."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Preset(str, Enum):
    """`LossConfig` constructors that need no further number."""

    pmpo = "pmpo"
    grpo = "grpo"
    dr_grpo = "dr_grpo"
    dapo = "dapo"
    gmpo = "gmpo"
    hmpo = "hmpo"
    gspo = "gspo"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shape (batch, tokens, vocab), dtype, loss and device of one comparison; the same case has the same inputs."""

    vocab: int
    batch: int
    tokens: int
    dtype: Dtype = Dtype.float32
    preset: Preset = Preset.pmpo
    device: str = "cpu"
    seed: int = 0

    @property
    def config(self) -> LossConfig:
        if self.preset is Preset.dr_grpo:
            return LossConfig.dr_grpo(max_length=self.tokens)
        config: LossConfig = getattr(LossConfig, self.preset.value)()
        return config

    @property
    def logits_bytes(self) -> int:
        return self.batch * self.tokens * self.vocab * (4 if self.dtype is Dtype.float32 else 2)

    @property
    def name(self) -> str:
        """Short and usable in a file name."""
        return f"v{self.vocab}-{self.dtype.value}"

    @property
    def needed_bytes(self) -> int:
        """Rough need of the widest variant: 14 float32 tensors of the logits' shape (10 measured, two copies kept)."""
        return 14 * 4 * self.batch * self.tokens * self.vocab


class Inputs(NamedTuple):
    """logits (B, T, V); token_ids, old_logp, mask (B, T); advantages (B,); power (B,) float64 where it is adaptive."""

    logits: Tensor
    token_ids: Tensor
    old_logp: Tensor
    advantages: Tensor
    mask: Tensor
    power: Tensor | None

    @property
    def zero_rows(self) -> float:
        """Fraction of the B T rows that are padding or have advantage 0."""
        return 1 - float((self.mask & (self.advantages != 0)[:, None]).double().mean())


def build_inputs(case: Case) -> Inputs:
    """Logits 2 N(0, 1), tokens sampled from their softmax, old_logp = logp + N(0, 0.2^2), a padded tail of 0-20 %.

    Advantages have both signs and are 0 for one trajectory in eight (the last of three to eight). The adaptive p is
    solved once, by the reference in float64. No token's log-ratio lies within 1e-3 of a clip bound, where
    rounding would decide whether the token is clipped.
    """
    B, T, config = case.batch, case.tokens, case.config
    generator = torch.Generator(case.device).manual_seed(case.seed)
    random: dict[str, Any] = {"generator": generator, "device": case.device}
    lengths = T - torch.randint(0, T // 5 + 1, (B,), **random)
    mask = torch.arange(T, device=case.device) < lengths[:, None]
    advantages = torch.randn(B, **random).abs() + 0.5
    advantages[1::2] *= -1
    advantages[7::8] = 0
    if 3 <= B < 8:
        advantages[-1] = 0

    logits = torch.empty(B, T, case.vocab, dtype=getattr(torch, case.dtype.value), device=case.device)
    token_ids = torch.empty(B, T, dtype=torch.int64, device=case.device)
    old_logp = torch.empty(B, T, device=case.device)
    power = torch.empty(B, dtype=torch.float64, device=case.device)
    for b in range(B):
        logits[b] = 2 * torch.randn(T, case.vocab, **random)
        log_q = logits[b].double().log_softmax(-1)
        token_ids[b] = torch.multinomial(log_q.exp(), 1, generator=generator)[:, 0]
        d = 0.2 * torch.randn(T, dtype=torch.float64, **random)
        for bound in (-config.clip_low, config.clip_high):
            d = torch.where((d - bound).abs() < 1e-3, d + 2e-3, d)
        old_logp[b] = log_q.gather(-1, token_ids[b, :, None])[:, 0] - d
        if config.power == "ess":
            one = slice(b, b + 1)
            exact = pmpo_loss(
                logits[one].double(),
                token_ids[one],
                old_logp[one],
                advantages[one],
                mask=mask[one],
                config=config,
                impl="reference",
            )
            power[b] = exact.power[0]
    return Inputs(logits, token_ids, old_logp, advantages, mask, power if config.power == "ess" else None)


@dataclass(frozen=True)
class Variant:
    """One way of computing the loss; `impl` is None for the two baselines."""

    name: str
    group: str
    impl: str | None = None
    inplace: bool = False


EAGER = Variant("eager PyTorch", "naive")
COMPILED = Variant("torch.compile", "compiled")


def variants(device: str) -> tuple[list[Variant], dict[str, str]]:
    """The baselines and each implementation that can be timed on `device`; and for the others the reason why not."""
    chosen, skipped = [EAGER, COMPILED], {}
    status = available_impls()
    fused = "triton" if device == "cuda" else "cpp"
    for impl in IMPLS:
        if not status[impl].startswith(USABLE):
            skipped[impl] = status[impl]
        elif impl == "triton" and (device != "cuda" or interpreted()):
            skipped[impl] = "Triton's interpreter runs the kernels in Python: its times say nothing about their speed"
        elif impl == "cpp" and device == "cuda":
            skipped[impl] = "runs on CPU tensors only"
        elif impl == "reference" and status[fused].startswith(USABLE):
            skipped[impl] = "the specification, not built for speed"
        else:
            chosen += [
                Variant(f"{impl}, in place" if inplace else impl, "fused", impl, inplace) for inplace in (False, True)
            ]
    return chosen, skipped


LossFunction = Callable[[Tensor, Inputs], Tensor]


def loss_function(variant: Variant, config: LossConfig) -> LossFunction:
    """`variant` as a function of (logits, the other inputs). The baselines get p, the fused variants solve it."""
    if variant.impl is None:
        # static shapes: the fastest code that the compiler has
        f = eager_pmpo_loss if variant == EAGER else torch.compile(eager_pmpo_loss, dynamic=False)
        return lambda logits, i: f(logits, i.token_ids, i.old_logp, i.advantages, i.mask, config, i.power)

    def fused(logits: Tensor, i: Inputs) -> Tensor:
        return pmpo_loss(
            logits,
            i.token_ids,
            i.old_logp,
            i.advantages,
            mask=i.mask,
            config=config,
            inplace=variant.inplace,
            impl=variant.impl,
        ).loss

    return fused
