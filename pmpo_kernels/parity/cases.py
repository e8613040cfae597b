"""`ParityCase`: a loss as a peer computes it beside the call that computes it here, and the comparison of the two."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pmpo_kernels.api import pmpo_loss, pmpo_loss_from_logp
from pmpo_kernels.config import LossConfig
from pmpo_kernels.linear import linear_pmpo_loss
from pmpo_kernels.parity.batch import Batch

Source = Literal["logp", "logits", "hidden"]
# `loss(batch, *leaves)` returns a 0-d tensor, differentiable in the leaves.
Loss = Callable[..., Tensor]

# The difference that parity allows in float32. It is no derived bound: both sides read the same numbers and round their own sums,
# over up to 96 tokens and V columns. The largest difference measured is 2e-6 (V up to 100,000, some 150 seeds).
TOLERANCE = 1e-5

DENOMINATORS: dict[str, Callable[[Batch], float] | None] = {
    "default": None,
    "rows": lambda batch: len(batch.mask),
    "4 rows": lambda batch: 4 * len(batch.mask),
    "1.5 tokens": lambda batch: 1.5 * float(batch.mask.sum()),
    "1.5 non-empty rows": lambda batch: 1.5 * float(batch.mask.any(1).sum()),
    "1": lambda batch: 1.0,
}


@dataclass(frozen=True)
class ParityCase:
    """One loss of a peer and its counterpart here.

    Args:
        name: the peer's name for it, with the options that matter.
        theirs: `theirs(batch, *leaves)` runs the peer's own code and returns its loss (0-d).
        preset, options: our configuration, `LossConfig.<preset>(**options)`.
        source: the leaves, whose gradients are compared: "logp" (B, T), "logits" (B, T + 1, V), or "hidden" (B, T + 1, H) and
            weight (V, H).
        denominator: a name in `DENOMINATORS`, for the `denominator` of our call.
        given: further arguments of our call by name, each with a function that makes it from the batch.
    """

    name: str
    theirs: Loss
    preset: str
    options: Mapping[str, Any] = field(default_factory=dict)
    source: Source = "logp"
    denominator: str = "default"
    given: Mapping[str, Callable[[Batch], Tensor]] = field(default_factory=dict)

    @property
    def config(self) -> LossConfig:
        """The configuration of our call."""
        config = getattr(LossConfig, self.preset)(**self.options)
        assert isinstance(config, LossConfig)
        return config

    @property
    def call(self) -> str:
        """Our configuration and denominator as text for a table."""
        options = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v!r}" for k, v in self.options.items()]
        text = f"{self.preset}({', '.join(options)})" + "".join(f", {name}" for name in self.given)
        return text if self.denominator == "default" else f"{text}, denominator {self.denominator}"

    def ours(self, batch: Batch, *leaves: Tensor, impl: str | None = None) -> Tensor:
        """Compute our loss (0-d) from the same leaves. It raises what `pmpo_loss` raises."""
        count = DENOMINATORS[self.denominator]
        config = self.config
        rest: dict[str, Any] = {
            "mask": batch.mask,
            "ref_logp": batch.ref_logp if config.beta else None,
            "config": config,
            "denominator": count and count(batch),
            "impl": impl,
        }
        rest |= {name: make(batch) for name, make in self.given.items()}
        given = (batch.old_logp, batch.advantages)
        if self.source == "logp":
            return pmpo_loss_from_logp(leaves[0], *given, **rest).loss
        if self.source == "logits":
            return pmpo_loss(leaves[0], batch.token_ids, *given, **rest).loss
        return linear_pmpo_loss(leaves[0], leaves[1], batch.token_ids, *given, **rest).loss


class Result(NamedTuple):
    """A loss (0-d) and its gradient in each leaf, detached."""

    loss: Tensor
    gradients: tuple[Tensor, ...]


class Agreement(NamedTuple):
    """Relative differences of loss and gradient, infinite where one side is not finite. That of the gradient is the larger of the
    differences by norm and by largest entry."""

    loss: float
    gradient: float

    @property
    def ok(self) -> bool:
        """Whether both are within `TOLERANCE`."""
        return max(self) <= TOLERANCE


def evaluate(loss: Loss, source: Source, batch: Batch, **options: Any) -> Result:
    """Run forward and backward of one side on fresh leaves."""
    tensors = {"logp": (batch.logp,), "logits": (batch.logits,), "hidden": (batch.hidden, batch.weight)}[source]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = loss(batch, *leaves, **options)
    return Result(value.detach(), torch.autograd.grad(value, leaves))


def difference(got: Result, want: Result) -> Agreement:
    """Return how far two results are apart, relative to the second, computed in float64."""

    def of_tensors(a: Tensor, b: Tensor) -> float:
        error, size = (a.double() - b.double()), b.double()
        norms = [error.norm() / size.norm(), error.abs().max() / size.abs().max()]
        worst = float(torch.stack(norms).max())
        return worst if math.isfinite(worst) else math.inf

    gradient = max(of_tensors(a, b) for a, b in zip(got.gradients, want.gradients, strict=True))
    return Agreement(of_tensors(got.loss, want.loss), gradient)


def compare(case: ParityCase, batch: Batch, *, impl: str | None = None) -> Agreement:
    """Compare our loss and gradient with the peer's on one batch; `impl` as in `pmpo_loss`. Errors of either side are raised."""
    ours = evaluate(case.ours, case.source, batch, impl=impl)
    return difference(ours, evaluate(case.theirs, case.source, batch))
