"""Whether a call agrees with the definition: every entry of the gradient within a bound derived from the rounding of each step."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from definition import Defined, define, log_deficit, target_deficit, total
from definition import denominator as default_denominator
from strategies import Batch, Call, Layout, call
from torch import Tensor

from pmpo_kernels import LossConfig
from pmpo_kernels.verification import error_bound


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the arithmetic. 16-bit logits are computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


U64 = torch.finfo(torch.float64).eps / 2
SOLVED = 1e-10  # |g| at which Newton's iteration for p ends: docs/mathematics.md


class Wanted(NamedTuple):
    """The definition's loss, gradient (N, V), logp (N,) and, for the bounds, the sizes of what was added up."""

    loss: float
    grad: Tensor
    logp: Tensor
    loss_terms: float  # sum of the absolute values of the loss's terms
    policy: Tensor  # (N,) |d loss / d logp| of the policy term
    row: Tensor  # (N,) the same and the KL term's, with its own derivative
    entropy_weight: Tensor  # (N,) |d loss / d entropy|
    log_q: Tensor  # (N, V)
    entropy: Tensor  # (N,)
    trajectories: list[Defined | None]  # None where there are no tokens


def majorant(r: Tensor, d: Tensor, config: LossConfig) -> Tensor:
    """Return a bound on |k|, |k'| and |k''| of each estimator at r, and of its product with exp(d), which has the sum of three of
    them."""
    size = 1 + r.abs() + r * r / 2 + r.exp()
    return 4 * d.exp() * size if config.kl_bias_correction else size


def wanted(batch: Batch, config: LossConfig, power: Tensor, D: float | None = None) -> Wanted:
    """Evaluate the definition at this p (B,)."""
    trajectories = batch.trajectories()
    D = default_denominator(trajectories, config) if D is None else D
    found = [
        define(x, config, float(p)) if len(x.token_ids) else None for x, p in zip(trajectories, power, strict=True)
    ]
    some = [x for x in found if x is not None]
    N = len(batch.token_ids)
    none = torch.zeros(0, dtype=torch.float64)
    if not some:
        empty = batch.logits.double()
        return Wanted(0.0, empty, none, 0.0, none, none, none, empty, none, found)
    loss = total(some, config, D)
    z = [x.logits for x in trajectories if len(x.token_ids)]
    logp = torch.cat([x.logp for x in some])
    policy_loss = torch.stack([x.weight * x.surrogate for x in some]).sum() / D
    tokens = [x.logp for x in some]
    policy = torch.zeros(N, dtype=torch.float64)
    if policy_loss.requires_grad:
        parts = torch.autograd.grad(policy_loss, tokens, retain_graph=True, allow_unused=True)
        policy = torch.cat([torch.zeros_like(x) if g is None else g for g, x in zip(parts, tokens, strict=True)]).abs()
    grads: tuple[Tensor | None, ...] = (None,) * len(z)
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, z, allow_unused=True)
    grad = torch.cat([torch.zeros_like(x) if g is None else g for g, x in zip(grads, z, strict=True)])
    with torch.no_grad():
        per_token = torch.cat([torch.full_like(x.logp, x.weight / len(x.logp) / D) for x in some])
        row, terms = policy.clone(), float(sum(x.weight * x.surrogate.abs() for x in some) / D)
        entropy = torch.cat([x.entropy for x in some])
        if config.beta:
            sizes = torch.cat([majorant(x.r, x.d, config) for x in some])
            row += abs(config.beta) * per_token * sizes
            terms += abs(config.beta) * float((per_token * sizes).sum())
        entropy_weight = abs(config.entropy_coef) * per_token
        terms += float((entropy_weight * (1 + entropy)).sum())
        log_q = torch.cat([x.log_q for x in some])
    return Wanted(float(loss.detach()), grad, logp.detach(), terms, policy, row, entropy_weight, log_q, entropy, found)


class Bounds(NamedTuple):
    """The relative bounds of `assert_agrees`: `logits` on log q, `rows` on coefficients, `deficit` on log(n / ESS)."""

    logits: float
    loss: float
    rows: float
    row_sum: float
    deficit: float


def bounds(batch: Batch, config: LossConfig, want: Wanted) -> Bounds:
    """Derive the bounds, from `verification.error_bound`, whose derivation they keep, and from what float64 rounds after it.

    - log q: `delta`, that of `error_bound` at p = 0, halved (it has 2 delta), is a relative error of q;
    - rows, and the loss without stored rounding: `error_bound` with the largest |p|: (2 + 5 |p|) delta, 16 roundings, stored rounding;
    - the trajectory stage and the definition add n terms of up to l = max |log a| and multiply them by p in float64:
      2 (n + 16) (1 + l) (1 + 2 |p|) u64, and the definition divides log n + |p| l by p: 4 (2 + log n + |p| l) / |p| u64;
    - log(n / ESS) = 2 LSE(p l) - LSE(2 p l) moves by 4 |p| delta; the target does so too, at power_max.
    """
    some = [x for x in want.trajectories if x is not None and len(x.log_a)]
    V, finite = batch.logits.shape[-1], batch.logits.double()
    finite = finite[finite.isfinite()]
    x = float(finite.abs().max()) / config.temperature if len(finite) else 0.0
    p = max([abs(y.power) for y in some], default=0.0)
    noise = 0.0
    for y in some:
        alive = y.log_a.detach()[y.log_a > -math.inf]
        l, n = float(alive.abs().max()) if len(alive) else 0.0, len(y.log_a)
        noise = max(noise, 2 * (n + 16) * (1 + l) * (1 + 2 * abs(y.power)) * U64)
        if y.power:
            noise += 4 * (2 + math.log(n) + abs(y.power) * l) / abs(y.power) * U64
    u = torch.finfo(compute_dtype(batch.logits.dtype)).eps / 2
    delta = u * (6 * x + math.log(V) + 64 + math.log2(V))
    dtype = batch.logits.dtype
    stored = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    row_sum = 2 * stored + u * (2 * (64 + math.log2(V)) + 4 * math.log(V) + 16)
    pmax = max(p, config.power_max)
    return Bounds(
        delta,
        error_bound(compute_dtype(dtype), V, x, p) + noise,
        error_bound(dtype, V, x, p) + noise,
        row_sum,
        8 * pmax * delta + 4 * noise * (1 + pmax) + SOLVED,
    )


def floors(batch: Batch, want: Wanted, scale: float) -> Tensor:
    """Return what an entry may lose below the smallest normal number: a q of the dtype of the arithmetic, and of that of the
    logits."""
    dtype = batch.logits.dtype
    arithmetic = torch.finfo(compute_dtype(dtype)).tiny
    size = want.row + want.entropy_weight * (110 + want.entropy)
    stored = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the spacing of subnormal numbers
    return (arithmetic * (1 + size) + stored / scale)[:, None]


def row_size(want: Wanted, config: LossConfig) -> float:
    """Bound on the entries of the gradient."""
    size = want.row + want.entropy_weight * (1 + want.entropy)
    return float(size.max()) / config.temperature if len(size) else 0.0


def call_and_want(
    batch: Batch, layout: Layout, config: LossConfig, impl: str, device: str, **kwargs: Any
) -> tuple[Call, Wanted, float]:
    """Return a call, the definition at its p, and the scale of the call's gradient. The gradient of float16 would fall below its
    normal numbers, so the loss is scaled, as trainers do, until the largest entry is 2^12 or the factor is."""
    call_ = call(batch, layout, config, impl, device, **kwargs)
    want = wanted(batch, config, call_.out.power.cpu(), kwargs.get("denominator"))
    size = row_size(want, config)
    if batch.logits.dtype != torch.float16 or not 0 < size < 2**12:
        return call_, want, 1.0
    scale = 2.0 ** min(12, math.floor(12 - math.log2(size)))
    return call(batch, layout, config, impl, device, scale, **kwargs), want, scale


def assert_agrees(batch: Batch, config: LossConfig, call: Call, want: Wanted, scale: float = 1.0) -> None:
    """Assert that loss and each entry of the gradient (of `scale` times the loss) are within their bounds, and rows of no weight
    exactly 0."""
    b, T = bounds(batch, config, want), config.temperature
    assert call.others_are_zero
    loss = float(call.out.loss.detach())
    lost = torch.finfo(call.out.loss.dtype).tiny
    assert abs(loss - want.loss) <= b.loss * want.loss_terms + lost, (loss, want.loss)
    if not len(want.logp):
        return
    # logp: two delta, one for each part, and its own rounding
    assert bool(((call.logp.double() - want.logp).abs() <= 2 * b.logits + 1e-300)[want.logp > -math.inf].all())
    grad, ids = call.grad.double() / scale, _ids(batch)
    nothing = (want.row == 0) & (want.entropy_weight == 0)
    assert bool((grad[nothing] == 0).all()), "a row of no weight has a gradient"
    q, floor = want.log_q.detach().exp(), floors(batch, want, scale)
    log_q = torch.where(q > 0, want.log_q.detach(), 0).abs()
    h, H, c = want.entropy_weight[:, None], want.entropy[:, None], want.row[:, None]
    allowed = b.rows * (q * (c + h * (log_q + 2 * H + 2))) / T + floor / T
    allowed.scatter_add_(1, ids, b.rows * c / T)
    error = (grad - want.grad).abs()
    worst = (error / allowed.clamp(min=1e-320))[~nothing]
    assert bool((error <= allowed)[~nothing].all()), ("entries", float(worst.nan_to_num(math.inf).max()))
    off = b.row_sum * (c + h * max(1.0, math.log(q.shape[1])))[:, 0] / T + q.shape[1] * floor[:, 0] / T
    assert bool((grad.sum(1).abs() <= off)[~nothing].all()), "row sum"


def _ids(batch: Batch) -> Tensor:
    return batch.token_ids[:, None]


def assert_power(batch: Batch, config: LossConfig, call: Call, want: Wanted) -> None:
    """Assert that p, ESS and clipped fraction are right. A solved p is judged by its residual: ESS(p) = ESS*, or p is the nearer
    end."""
    b = bounds(batch, config, want)
    solved = config.power == "ess" and batch.power is None
    targets = [None] * len(batch.lengths) if batch.target_ess is None else batch.target_ess.tolist()
    for i, x in enumerate(want.trajectories):
        p, found = float(call.out.power[i]), float(call.out.ess[i])
        if x is None or not len(x.log_a):
            assert found == 0
            continue
        n, alive = len(x.log_a), int((x.log_a > -math.inf).sum())
        if config.clip == "token":
            assert abs(float(call.out.clip_fraction[i]) - x.clipped / len(x.logp)) <= 4 * U64
        if not solved:
            expected = batch.power[i] if batch.power is not None else config.power
            assert p == float(expected)
        if alive == 0 or (p <= 0 and alive < n):
            assert found == 0, "weights of 0 have no sample size"
            continue
        log_a = x.log_a.detach()
        at = log_deficit(log_a, p)
        assert abs(math.log(n / found) - at) <= b.deficit, (found, n * math.exp(-at))
        if not solved or log_deficit(log_a, config.power_max) <= b.deficit:  # equal weights have any p
            continue
        goal = target_deficit(log_a, x.clipped, targets[i], config)
        assert config.power_min <= p <= config.power_max
        if p == config.power_max:
            assert at <= goal + b.deficit
        elif p == config.power_min:
            assert at >= goal - b.deficit
        else:
            assert abs(at - goal) <= b.deficit, (p, at, goal)


def well_posed(batch: Batch, config: LossConfig, want: Wanted) -> bool:
    """Whether rounding decides no clip, a first-order bound says something, and the gradient does not overflow."""
    b = bounds(batch, config, want)
    nearest = min([x.margin for x in want.trajectories if x is not None], default=math.inf)
    fits = row_size(want, config) < torch.finfo(batch.logits.dtype).max / 2
    return fits and b.logits < 0.01 and b.rows < 0.1 and nearest > 4 * b.logits + 4 * b.deficit
