"""The same losses by TRL, verl and Liger, called as installed: do they agree with ours, in loss and gradient?

`trl`, `verl` and `liger` beside this file list the cases of the package they are named after and import it; only `find_peers`
imports them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pmpo_kernels.api import pmpo_loss, pmpo_loss_from_logp
from pmpo_kernels.config import LossConfig
from pmpo_kernels.impls import interpreted
from pmpo_kernels.linear import linear_pmpo_loss

__all__ = [
    "PEERS", "TOLERANCE", "Difference", "ParityBatch", "ParityCase", "Peer", "compare", "evaluate", "find_peers", "make_batch",
]  # fmt: skip

PEERS = {"trl": "trl", "verl": "verl", "liger": "liger-kernel"}  # module of this package: distribution

LENGTHS = (12, 0, 1, 7, 9, 12, 5, 8)  # padding, an empty row, a row of one token
ADVANTAGES = (1.2, 0.8, -0.6, -1.4, 0.9, 0.0, -0.7, 2.0)  # both signs, and a zero on a full row
HIDDEN_SIZE = 16
RATIO_SD, REF_SD, ROLLOUT_SD = 0.25, 0.3, 0.1
WIDE = (0.45, -0.45)  # log-ratios of two tokens a row, so that at bounds of 0.4 something clips whatever the seed

Source = Literal["logp", "logits", "hidden"]
# `loss(batch, *leaves)` returns a 0-d tensor, differentiable in the leaves.
Loss = Callable[..., Tensor]

# The difference that parity allows in float32. It is no derived bound: both sides read the same numbers and round their own sums,
# over up to 96 tokens and V columns. The largest difference measured is 2e-6 (V up to 100,000, some 150 seeds).
TOLERANCE = 1e-5


class ParityBatch(NamedTuple):
    """B = 8 trajectories of at most T = 12 tokens, float32 (token_ids int64, mask bool).

    `hidden` (B, T + 1, H) and `weight` (V, H) have the product `logits` (B, T + 1, V); advantages are (B,), all else (B, T).
    `logp` is that of `logits` at temperature 1; `old_logp` and `ref_logp` differ from it by normal noise.
    """

    hidden: Tensor
    weight: Tensor
    logits: Tensor
    token_ids: Tensor
    logp: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    advantages: Tensor
    mask: Tensor
    rollout_weights: Tensor


def make_batch(*, V: int = 201, seed: int = 0, device: str = "cpu") -> ParityBatch:
    """Make a `ParityBatch` with V logits of standard deviation 1 and log-ratios of 0.25. Some tokens of either sign clip, most do
    not, and no ratio is near an overflow. Raises ValueError for V < 1."""
    if V < 1:
        raise ValueError(f"V: expected an int > 0, got {V}")
    random = torch.Generator().manual_seed(seed)
    B, T = len(LENGTHS), max(LENGTHS)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    # first what does not depend on V, so that the same ratios clip at every V
    d, ref, rollout = RATIO_SD * normal(B, T), REF_SD * normal(B, T), ROLLOUT_SD * normal(B, T)
    d[:, 1:3] = torch.tensor(WIDE)
    hidden, weight = normal(B, T + 1, HIDDEN_SIZE), normal(V, HIDDEN_SIZE) / HIDDEN_SIZE**0.5
    logits = hidden @ weight.T
    token_ids = torch.randint(V, (B, T), generator=random)
    logp = torch.log_softmax(logits[:, :T].double(), -1).gather(-1, token_ids[..., None])[..., 0].float()
    batch = ParityBatch(
        hidden=hidden,
        weight=weight,
        logits=logits,
        token_ids=token_ids,
        logp=logp,
        old_logp=logp - d,
        ref_logp=logp + ref,
        advantages=torch.tensor(ADVANTAGES),
        mask=torch.arange(T) < torch.tensor(LENGTHS)[:, None],
        rollout_weights=rollout.exp(),
    )
    return ParityBatch(*(tensor.to(device) for tensor in batch))


def entropy(batch: ParityBatch) -> Tensor:
    """Entropy (B, T) of each token's distribution at temperature 1."""
    log_q = torch.log_softmax(batch.logits[:, :-1], -1)
    return -(log_q.exp() * log_q).sum(-1)


def token_weights(batch: ParityBatch) -> Tensor:
    """Rollout weights (B, T), one a token."""
    return batch.rollout_weights


def rows(batch: ParityBatch, part: slice) -> ParityBatch:
    """Return some trajectories of a batch: a micro-batch, or the share of a data-parallel rank."""
    return ParityBatch(*(tensor if tensor is batch.weight else tensor[part] for tensor in batch))


DENOMINATORS: dict[str, Callable[[ParityBatch], float] | None] = {
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
    given: Mapping[str, Callable[[ParityBatch], Tensor]] = field(default_factory=dict)

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

    def ours(self, batch: ParityBatch, *leaves: Tensor, impl: str | None = None) -> Tensor:
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


class Difference(NamedTuple):
    """Relative differences of loss and gradient, infinite where one side is not finite. That of the gradient is the larger of the
    differences by norm and by largest entry."""

    loss: float
    gradient: float

    @property
    def ok(self) -> bool:
        """Whether both are within `TOLERANCE`."""
        return max(self) <= TOLERANCE


def evaluate(loss: Loss, source: Source, batch: ParityBatch, **options: Any) -> Result:
    """Run forward and backward of one side on fresh leaves."""
    tensors = {"logp": (batch.logp,), "logits": (batch.logits,), "hidden": (batch.hidden, batch.weight)}[source]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = loss(batch, *leaves, **options)
    return Result(value.detach(), torch.autograd.grad(value, leaves))


def difference(got: Result, want: Result) -> Difference:
    """Return how far two results are apart, relative to the second, computed in float64."""

    def of_tensors(a: Tensor, b: Tensor) -> float:
        error, size = (a.double() - b.double()), b.double()
        norms = [error.norm() / size.norm(), error.abs().max() / size.abs().max()]
        worst = float(torch.stack(norms).max())
        return worst if math.isfinite(worst) else math.inf

    gradient = max(of_tensors(a, b) for a, b in zip(got.gradients, want.gradients, strict=True))
    return Difference(of_tensors(got.loss, want.loss), gradient)


def compare(case: ParityCase, batch: ParityBatch, *, impl: str | None = None) -> Difference:
    """Compare our loss and gradient with the peer's on one batch; `impl` as in `pmpo_loss`. Errors of either side are raised."""
    ours = evaluate(case.ours, case.source, batch, impl=impl)
    return difference(ours, evaluate(case.theirs, case.source, batch))


class Peer(NamedTuple):
    """A peer as installed: its distribution, version, cases, the device they run on, and the problem if it cannot be called. Then
    version and device are "", and there are no cases; otherwise `problem` is ""."""

    distribution: str
    version: str
    cases: list[ParityCase]
    device: str
    problem: str


def find_peers() -> dict[str, Peer]:
    """Return a `Peer` for every name in `PEERS`. Importing the installed ones takes seconds; a failure becomes the `problem`."""
    found = {}
    for name, distribution in PEERS.items():
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = Peer(distribution, "", [], "", f"not installed (pip install {distribution})")
            continue
        try:
            cases = importlib.import_module(f"pmpo_kernels.verification.{name}").cases()
        except Exception as error:  # of another package; told, with the reason
            found[name] = Peer(distribution, "", [], "", f"{distribution} {version}: {type(error).__name__}: {error}")
            continue
        on_gpu = name == "liger" and torch.cuda.is_available() and not interpreted()
        found[name] = Peer(distribution, version, cases, "cuda" if on_gpu else "cpu", "")
    return found
