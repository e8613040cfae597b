"""The ways of computing the loss that are compared, each as a function of logits and the other inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pmpo_kernels.api import pmpo_loss
from pmpo_kernels.benchmarking.inputs import Inputs
from pmpo_kernels.config import LossConfig
from pmpo_kernels.impls import IMPLS, USABLE, available_impls, interpreted
from pmpo_kernels.verification.baseline import eager_pmpo_loss

INTERPRETED = "Triton's interpreter runs the kernels in Python: its times say nothing about their speed"
FUSED = "fused"
PEER = "peer"  # what other packages compute: a failure of theirs is reported, one of ours is raised
LossFunction = Callable[[Tensor, Inputs], Tensor]


@dataclass(frozen=True)
class Variant:
    """One way of computing the loss: `build(config)` returns its function of logits and inputs.

    `impl` is the implementation of a fused variant. With `one_more` the logits have T + 1 positions. `untimed` is the reason why
    the variant is checked but not timed, if there is one.
    """

    name: str
    group: str
    build: Callable[[LossConfig], LossFunction]
    impl: str | None = None
    one_more: bool = False
    untimed: str | None = None


def build_eager(config: LossConfig) -> LossFunction:
    """Build the eager baseline. It is given p."""
    return lambda z, i: eager_pmpo_loss(z, i.token_ids, i.old_logp, i.advantages, i.mask, config, i.power)


def build_compiled(config: LossConfig) -> LossFunction:
    """Build the baseline under torch.compile, with static shapes, which give the fastest code. It is given p."""
    f = torch.compile(eager_pmpo_loss, dynamic=False)
    return lambda z, i: f(z, i.token_ids, i.old_logp, i.advantages, i.mask, config, i.power)


def build_fused(impl: str, inplace: bool, config: LossConfig) -> LossFunction:
    """Build `pmpo_loss`. It solves p."""

    def fused(logits: Tensor, i: Inputs) -> Tensor:
        return pmpo_loss(
            logits,
            i.token_ids,
            i.old_logp,
            i.advantages,
            mask=i.mask,
            config=config,
            inplace=inplace,
            impl=impl,
        ).loss

    return fused


EAGER = Variant("eager PyTorch", "naive", build_eager)
COMPILED = Variant("torch.compile", "compiled", build_compiled)


def fused_variants(impl: str, untimed: str | None = None) -> list[Variant]:
    """Return `pmpo_loss` by one implementation, out of place and in place."""
    return [
        Variant(name, FUSED, partial(build_fused, impl, inplace), impl, untimed=untimed)
        for name, inplace in ((impl, False), (f"{impl}, in place", True))
    ]


def variants(device: str, *, check_interpreted: bool = False) -> tuple[list[Variant], dict[str, str]]:
    """Return the baselines and the implementations that can be timed on `device`, and for the others the reason why not. With
    `check_interpreted` Triton under its interpreter is among them, to be checked but not timed."""
    chosen, skipped = [EAGER, COMPILED], {}
    status = available_impls()
    fused = "triton" if device == "cuda" else "cpp"
    for impl in IMPLS:
        if not status[impl].startswith(USABLE):
            skipped[impl] = status[impl]
        elif impl == "triton" and (device != "cuda" or interpreted()):
            skipped |= {} if check_interpreted else {impl: INTERPRETED}
            chosen += fused_variants(impl, INTERPRETED) if check_interpreted else []
        elif impl == "cpp" and device == "cuda":
            skipped[impl] = "runs on CPU tensors only"
        elif impl == "reference" and status[fused].startswith(USABLE):
            skipped[impl] = "the specification, not built for speed"
        else:
            chosen += fused_variants(impl)
    return chosen, skipped
