"""The loss and its gradient on one batch of real logits: each implementation and plain eager against float64."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rollouts import Rollouts
from time_and_memory import peak_memory, timed
from torch import Tensor

from pmpo_kernels.api import pmpo_loss, pmpo_loss_from_logp
from pmpo_kernels.config import LossConfig
from pmpo_kernels.contract import STATS
from pmpo_kernels.impls import IMPLS, interpreted, resolve_impl
from pmpo_kernels.verification import Case, Oracle, oracle, three_part_error, tolerance
from pmpo_kernels.verification.baseline import eager_pmpo_loss, eager_token_logp

REPEATS = 3
INTERPRETED_TRAJECTORIES = 2
Run = Callable[[Tensor, Rollouts], tuple[Tensor, Tensor]]
"""(logits (B, T + 1, V), rollouts) -> (loss (), p (B,) or empty where the caller does not see it)."""


@dataclass(frozen=True)
class Row:
    """One way of computing the loss. Errors are relative and against float64; times are seconds."""

    name: str
    trajectories: int
    loss: float
    loss_error: float
    gradient_error: float  # |g - g64| / |g64|, both with the p that they solved
    worst_part: float  # largest of `verification.three_part_error`, at this row's p
    power_residual: float  # |log ESS(p) - log ESS*| in float64
    power_error: float  # |p - p64|
    tolerance: float
    seconds: float
    timed_runs: int
    interpreter: bool
    peak_bytes: int | None

    @property
    def ok(self) -> bool:
        """Whether every error is within the tolerance; NaN is not."""
        return all(e <= self.tolerance for e in (self.loss_error, self.worst_part, self.power_residual))


def fused(impl: str, power: float | None = None) -> Run:
    """Make a function that runs `pmpo_loss` with this implementation."""

    def run(logits: Tensor, r: Rollouts) -> tuple[Tensor, Tensor]:
        out = pmpo_loss(logits, r.token_ids, r.old_logp, r.advantages, mask=r.mask, power=power, impl=impl)
        return out.loss, out.power

    return run


def eager(logits: Tensor, r: Rollouts) -> tuple[Tensor, Tensor]:
    """Compute the loss in plain PyTorch with autograd, on the slice of the logits that a trainer takes."""
    config = LossConfig.pmpo()
    return eager_pmpo_loss(logits[:, :-1], r.token_ids, r.old_logp, r.advantages, r.mask, config), logits.new_empty(0)


def eager_power(logits: Tensor, r: Rollouts) -> Tensor:
    """The p (B,) that `eager` solves and does not return."""
    logp, _ = eager_token_logp(logits[:, :-1], r.token_ids, 1.0)
    return pmpo_loss_from_logp(logp, r.old_logp, r.advantages, mask=r.mask, impl="reference").power


def gradient(run: Run, logits: Tensor, r: Rollouts) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, p and the gradient of the logits, which are made a fresh leaf that shares their memory."""
    leaf = logits.detach().requires_grad_()
    loss, power = run(leaf, r)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), power, grad


def usable(device: torch.device) -> list[str]:
    """Names of the implementations that run on this device, the default (impl=None) first."""
    default, names = resolve_impl(None, device), []
    for name in IMPLS:
        try:
            names.append(resolve_impl(name, device))
        except RuntimeError:
            continue
    return sorted(names, key=lambda name: name != default)


def compare(logits: Tensor, rollouts: Rollouts, advance: Callable[[str], None]) -> list[Row]:
    """Make a row for each of `usable`, then one for eager. Interpreted kernels get the trajectories whose p is most in between.

    logits (B, T + 1, V) are those of the updated policy. `advance(what)` is called before each row.
    """
    case = make_case(logits, rollouts)
    exact = oracle(case, LossConfig.pmpo())
    default = resolve_impl(None, logits.device)
    rows = []
    for impl in usable(logits.device):
        advance(f"comparing {impl} with float64")
        if impl == "triton" and interpreted():
            few = in_between(exact_power(exact), rollouts)[:INTERPRETED_TRAJECTORIES]
            rows.append(measure(f"{impl} (interpreter)", fused(impl), logits[few], rollouts.take(few), None, True))
        else:
            name = f"{impl} (default)" if impl == default else impl
            rows.append(measure(name, fused(impl), logits, rollouts, exact))
    advance("comparing eager PyTorch with float64")
    return [*rows, measure("eager PyTorch", eager, logits, rollouts, exact)]


def make_case(logits: Tensor, r: Rollouts) -> Case:
    """Return the batch as `verification` takes it. The terms that PMPO does not have are neutral."""
    ref_logp, weights = torch.zeros_like(r.old_logp), torch.ones_like(r.old_logp)
    return Case(logits[:, :-1], r.token_ids, r.old_logp, r.advantages, r.mask, ref_logp, weights)


def exact_power(exact: Oracle) -> Tensor:
    """Return the solved p (B,) in float64."""
    return exact.stats[STATS.index("power")]


def in_between(power: Tensor, rollouts: Rollouts) -> Tensor:
    """Indices of the trajectories by the distance of p from 1/2, those with A = 0 last; in a tie the longer first."""
    distance = (power - 0.5).abs() + (rollouts.advantages == 0)
    return torch.argsort(distance - 1e-9 * rollouts.mask.sum(-1))


def measure(
    name: str, run: Run, logits: Tensor, r: Rollouts, exact: Oracle | None = None, interpreter: bool = False
) -> Row:
    """Measure errors, time and memory of one way. `exact` is the float64 result where the caller has it."""
    config, case = LossConfig.pmpo(), make_case(logits, r)
    exact = exact or oracle(case, config)

    def once() -> tuple[Tensor, Tensor, Tensor]:
        return gradient(run, logits, r)

    runs, (seconds, (loss, power, grad)) = 1, timed(once, logits.device)
    peak = None
    if not interpreter:
        runs, seconds = REPEATS, statistics.median(timed(once, logits.device)[0] for _ in range(REPEATS))
        peak = peak_memory(once, logits.device)
    power = power if power.numel() else eager_power(logits, r)
    at_power = oracle(case, config, power)
    grad, beyond = grad[:, :-1].double(), grad[:, -1]
    solved, reached = (o.stats[STATS.index(s)] for o, s in ((exact, "ess_target"), (at_power, "ess")))
    free = (power > config.power_min) & (power < config.power_max)
    residual = torch.where(free, (reached / solved).log(), 0).abs().max()
    bound = tolerance(case, config)
    worst = max(three_part_error(grad, at_power, r.token_ids))
    return Row(
        name=name,
        trajectories=len(r),
        loss=float(loss),
        loss_error=float((loss.double() - at_power.loss).abs()) / (at_power.loss_scale or 1.0),
        gradient_error=float((grad - exact.grad).norm() / exact.grad.norm()),
        worst_part=worst if bool((beyond == 0).all()) else float("inf"),
        power_residual=float(residual),
        power_error=float((power - exact_power(exact)).abs().max()),
        tolerance=bound,
        seconds=seconds,
        timed_runs=runs,
        interpreter=interpreter,
        peak_bytes=peak,
    )


def gradient_changes(logits: Tensor, r: Rollouts, powers: tuple[float, ...]) -> dict[float, float]:
    """How far the gradient moves, relative to its norm, when one power replaces the p of each trajectory."""
    impl = resolve_impl(None, logits.device)
    adaptive = gradient(fused(impl), logits, r)[2].double()
    return {p: float((gradient(fused(impl, p), logits, r)[2] - adaptive).norm() / adaptive.norm()) for p in powers}
