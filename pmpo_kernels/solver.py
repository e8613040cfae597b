"""`solve_power`: p for a given effective sample size, by Newton's method on the host in float64."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from pmpo_kernels import checks
from pmpo_kernels.config import POWER_LIMIT
from pmpo_kernels.impls import resolve_impl
from pmpo_kernels.ops import stage
from pmpo_kernels.scalars import expect


class PowerResults(NamedTuple):
    """How `solve_power` found the p of each trajectory.

    iterations (B,) int64: Newton steps, at most 20; 0 where an end of the bracket is the answer. residual (B,) float64:
    log(n / ESS(p)) - log(n / target_ess), which is 0 only where the target can be reached."""

    iterations: Tensor
    residual: Tensor


@overload
def solve_power(
    log_weights: Tensor, target_ess: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
    power_max: float = 1.0, impl: str | None = None, full_output: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def solve_power(
    log_weights: Tensor, target_ess: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
    power_max: float = 1.0, impl: str | None = None, full_output: Literal[True],
) -> tuple[Tensor, PowerResults]: ...  # fmt: skip
def solve_power(
    log_weights: Tensor,
    target_ess: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    power_max: float = 1.0,
    impl: str | None = None,
    full_output: bool = False,
) -> Tensor | tuple[Tensor, PowerResults]:
    """p in [0, power_max] at which ESS(p) = 1 / sum_t W_t(p)^2, W = softmax(p l), equals `target_ess` (arXiv 2601.22521).

    It is found on the host in float64, by Newton's method in u = p^2 on log(n / ESS(p)) inside a bracket. The first u is
    log(n / ESS*) / Var(l).

    Args:
        log_weights: l = log a, (B, T), or packed (N,) with cu_seqlens; float. -inf is a weight of 0.
        target_ess: (B,) float, in tokens. At or above n gives p = 0, at or below ESS(power_max) gives power_max, and so
            do weights that are all equal.
        mask, cu_seqlens: as in `pmpo_loss`.
        power_max: upper end of the bracket, in (0, 1e30].
        impl: "cpp", "reference", or None for the faster one that is there.
        full_output: also return `PowerResults`.

    Returns:
        p (B,) float64 on the device of `log_weights`; or (p, PowerResults).

    Raises:
        TypeError, ValueError: a wrong argument; NaN or +inf in an unmasked log weight; a NaN or negative target_ess.
        RuntimeError: the named `impl` cannot run here, with the reason; "triton" has no solver on the host.
    """
    if checks.check_dense("log_weights", log_weights).dim() not in (1, 2):
        raise ValueError(f"log_weights: expected shape (B, T) or (N,), got {tuple(log_weights.shape)}")
    checks.check_flag("full_output", full_output)
    device, shape = log_weights.device, log_weights.shape
    checks.check_tensor("log_weights", log_weights, dtypes=checks.FLOATS, device=device, shape=shape)
    power_max = checks.check_number("power_max", power_max)
    expect("power_max", power_max <= POWER_LIMIT, "a number in (0, 1e30]", power_max)
    mask = checks.check_constant("mask", mask, dtypes=checks.MASKS, device=device, shape=shape)
    offsets = checks.check_offsets("log_weights", log_weights, cu_seqlens).cpu()
    B = offsets.numel() - 1
    checks.check_tensor("target_ess", target_ess, dtypes=checks.FLOATS, device=device, shape=(B,))
    checks.check_cu_seqlens(offsets, log_weights.numel())
    impl = resolve_impl(impl, torch.device("cpu"))
    if impl == "triton":
        raise RuntimeError("impl='triton' cannot run solve_power: its solver is part of its trajectory kernel")

    flat = log_weights.detach().reshape(-1).cpu().double()
    valid = torch.ones_like(flat, dtype=torch.bool) if mask is None else mask.reshape(-1).cpu() != 0
    flat = torch.where(valid, flat, 0)
    target = target_ess.detach().cpu().double()
    if bool((flat.isnan() | (flat == torch.inf)).any()):
        raise ValueError("log_weights: expected finite values or -inf where mask is true, got NaN or +inf")
    checks.check_all("target_ess", target, lambda ess: ess >= 0, "numbers >= 0")
    p: Tensor
    p, iterations, residual = stage("solve_power", impl)(flat, valid, offsets, target, power_max)
    if not full_output:
        return p.to(device)
    return p.to(device), PowerResults(iterations.to(device), residual.to(device))
