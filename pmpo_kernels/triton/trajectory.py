"""Stage `trajectory`: clip, statistics, p, loss and per-token gradient, one program a trajectory, all in float64.

The order and the names are those of `reference`. A trajectory is looped over in blocks; the first pass leaves its log
weights l where the last one writes the gradient, so the passes between (for p, and one for each Newton step) read 8 bytes
a token and compute one exponential.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmpo_kernels.config import FIXED, STATS, TARGET, TrajectoryOptions
from pmpo_kernels.triton.launch import BLOCK_TOKENS, OPTIONS, on_device, optional_like, optional_mask, scalar
from pmpo_kernels.triton.power_mean import centred, choose_power, expm1, moments

_FIXED = tl.constexpr(FIXED)
_TARGET = tl.constexpr(TARGET)
_INF = tl.constexpr(float("inf"))
# Slices of a batch are aligned or not: no variant of the kernel for each.
_POINTERS = ["logp_ptr", "old_logp_ptr", "advantages_ptr", "mask_ptr", "cu_seqlens_ptr", "ref_logp_ptr",
             "rollout_weights_ptr", "entropy_ptr", "power_ptr", "target_ess_ptr", "policy_mask_ptr"]  # fmt: skip
_RUN_TIME = [
    "B",
    "N",
    "has_old_logp",
    "has_mask",
    "has_ref_logp",
    "has_rollout_weights",
    "has_entropy",
    "has_power",
    "has_policy_mask",
]


@triton.jit
def _clip_log_ratio(d, advantage, low, high, dual, under):
    floor = tl.where(advantage < 0, -low, tl.where(advantage > 0, -under, -_INF))
    ceiling = tl.where(advantage > 0, high, tl.where(advantage < 0, dual, _INF))
    below = d < floor
    above = d > ceiling
    return tl.where(above, ceiling, tl.where(below, floor, d)), below, above


@triton.jit
def _given(valid, has):
    """`valid` where an optional input is there. (The interpreter changes the type of a scalar bool that it broadcasts.)"""
    return valid.to(tl.int32) * has != 0


@triton.jit
def _log_ratio(offs, stop, advantage, tokens, bounds):
    """(log-ratio d, the same clipped, response token, token of the policy term, of these clipped below, clipped above) of one
    block of tokens."""
    logp_ptr, old_logp_ptr, mask_ptr, policy_mask_ptr, has_old_logp, has_mask, has_policy_mask = tokens
    low, high, dual, under = bounds
    valid = offs < stop
    valid = valid & (tl.load(mask_ptr + offs, mask=_given(valid, has_mask), other=1) != 0)
    logp = tl.load(logp_ptr + offs, mask=valid, other=0.0).to(tl.float64)
    old_logp = tl.load(old_logp_ptr + offs, mask=_given(valid, has_old_logp), other=0.0).to(tl.float64)
    on_policy = tl.where(logp == -_INF, 0.0, logp - logp)
    d = tl.where(has_old_logp != 0, logp - old_logp, on_policy)
    clipped, below, above = _clip_log_ratio(d, advantage, low, high, dual, under)
    counts = valid & (tl.load(policy_mask_ptr + offs, mask=_given(valid, has_policy_mask), other=1) != 0)
    return d, clipped, valid, counts, counts & below, counts & above


@triton.jit
def _reference_log_ratio(offs, valid, logp_ptr, ref_logp_ptr):
    """r = ref_logp - logp."""
    ref_logp = tl.load(ref_logp_ptr + offs, mask=valid, other=0.0).to(tl.float64)
    return ref_logp - tl.load(logp_ptr + offs, mask=valid, other=0.0).to(tl.float64)


@triton.jit
def _kl_penalty(r, d, estimator):
    """Estimators k1, k2, k3 of the KL and their derivative in logp, perhaps that of another; with `weighted` times exp(d)."""
    order, slope_order, weighted = estimator
    e = expm1(r, tl.exp(r))
    value = tl.where(order == 1, -r, tl.where(order == 2, r * r / 2, e - r))
    slope = tl.where(slope_order == 1, 1.0, tl.where(slope_order == 2, -r, -e))
    ratio = tl.where(weighted != 0, tl.exp(d), 1.0)
    return ratio * value, ratio * tl.where(weighted != 0, slope + value, slope)


@triton.jit
def _token_sums(
    start, stop, advantage, tokens, bounds, rollout_weights_ptr, has_rollout_weights, l_ptr, BLOCK: tl.constexpr
):
    """First pass: counts, sum and range of l, and l of each token, -inf where it has no weight."""
    n = tl.zeros((BLOCK,), tl.int32)
    counted = tl.zeros((BLOCK,), tl.int32)
    zeros = tl.zeros((BLOCK,), tl.int32)
    low = tl.zeros((BLOCK,), tl.int32)
    high = tl.zeros((BLOCK,), tl.int32)
    sum_l = tl.zeros((BLOCK,), tl.float64)
    l_min = tl.full((BLOCK,), _INF, tl.float64)
    l_max = tl.full((BLOCK,), -_INF, tl.float64)
    for first in range(start, stop, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        _, l, valid, counts, below, above = _log_ratio(offs, stop, advantage, tokens, bounds)
        if has_rollout_weights != 0:
            l += tl.log(tl.load(rollout_weights_ptr + offs, mask=valid, other=1.0).to(tl.float64))
        alive = counts & (l != -_INF)
        tl.store(l_ptr + offs, tl.where(alive, l, -_INF), mask=offs < stop)
        n += valid.to(tl.int32)
        counted += counts.to(tl.int32)
        zeros += (counts & (l == -_INF)).to(tl.int32)
        low += below.to(tl.int32)
        high += above.to(tl.int32)
        sum_l += tl.where(alive, l, 0.0)
        l_min = tl.where(alive & (l < l_min), l, l_min)
        l_max = tl.where(alive & (l > l_max), l, l_max)
    return (
        tl.sum(n, axis=0).to(tl.float64), tl.sum(counted, axis=0).to(tl.float64),
        tl.sum(zeros, axis=0).to(tl.float64), tl.sum(low, axis=0).to(tl.float64),
        tl.sum(high, axis=0).to(tl.float64), tl.sum(sum_l, axis=0), tl.min(l_min, axis=0), tl.max(l_max, axis=0),
    )  # fmt: skip


@triton.jit
def _metric_sums(start, stop, advantage, tokens, bounds, ref, entropy_ptr, has_entropy, BLOCK: tl.constexpr):
    """The sums over tokens that only metrics and the further terms of the loss need."""
    ratio_sum = tl.zeros((BLOCK,), tl.float64)
    ratio_max = tl.zeros((BLOCK,), tl.float64)
    approx_kl = tl.zeros((BLOCK,), tl.float64)
    kl = tl.zeros((BLOCK,), tl.float64)
    entropy = tl.zeros((BLOCK,), tl.float64)
    ref_logp_ptr, has_ref_logp, estimator = ref
    for first in range(start, stop, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        d, _, valid, _, _, _ = _log_ratio(offs, stop, advantage, tokens, bounds)
        exp_d = tl.exp(d)
        ratio = tl.where(valid, exp_d, 0.0)
        ratio_sum += ratio
        ratio_max = tl.where(ratio <= ratio_max, ratio_max, ratio)
        approx_kl += tl.where(valid, expm1(d, exp_d) - d, 0.0)
        if has_ref_logp != 0:
            r = _reference_log_ratio(offs, valid, tokens[0], ref_logp_ptr)
            kl += tl.where(valid, _kl_penalty(r, d, estimator)[0], 0.0)
        entropy += tl.load(entropy_ptr + offs, mask=_given(valid, has_entropy), other=0.0).to(tl.float64)
    total, largest = tl.sum(ratio_sum, axis=0), tl.max(ratio_max, axis=0)
    largest = tl.where(total == total, largest, total)  # a maximum passes over NaN
    return total, largest, tl.sum(approx_kl, axis=0), tl.sum(kl, axis=0), tl.sum(entropy, axis=0)


@triton.jit
def _write_gradient(
    start, stop, advantage, tokens, bounds, ref, p, mean, log_scale, policy_scale, kl_scale,
    entropy_scale, has_dentropy, dlogp_ptr, dentropy_ptr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Last pass: -w A M_p W_t on unclipped tokens, in place of l; the KL term's gradient, and that of the entropy."""
    ref_logp_ptr, has_ref_logp, estimator = ref
    for first in range(start, stop, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        d, _, valid, _, below, above = _log_ratio(offs, stop, advantage, tokens, bounds)
        x, alive = centred(first, stop, mean, dlogp_ptr, BLOCK)
        flows = alive & (below == 0) & (above == 0)
        dlogp = tl.where(flows, policy_scale * tl.exp(tl.where(flows, log_scale + p * x, 0.0)), 0.0)
        dlogp = tl.where(policy_scale == 0, 0.0, dlogp)
        if (has_ref_logp != 0) & (kl_scale != 0):
            r = _reference_log_ratio(offs, valid, tokens[0], ref_logp_ptr)
            dlogp += tl.where(valid, kl_scale * _kl_penalty(r, d, estimator)[1], 0.0)
        tl.store(dlogp_ptr + offs, dlogp, mask=offs < stop)
        if has_dentropy:
            tl.store(dentropy_ptr + offs, tl.where(valid, entropy_scale, 0.0), mask=offs < stop)


@triton.jit(do_not_specialize_on_alignment=_POINTERS, do_not_specialize=_RUN_TIME)
def _trajectory_fwd_kernel(
    logp_ptr, old_logp_ptr, advantages_ptr, mask_ptr, cu_seqlens_ptr, ref_logp_ptr, rollout_weights_ptr, entropy_ptr,
    power_ptr, target_ess_ptr, policy_mask_ptr, dlogp_ptr, dentropy_ptr, stats_ptr,
    B: tl.int64, N: tl.int64,
    has_old_logp: tl.int32, has_mask: tl.int32, has_ref_logp: tl.int32, has_rollout_weights: tl.int32,
    has_entropy: tl.int32, has_power: tl.int32, has_policy_mask: tl.int32,
    rule: tl.float64, power: tl.float64, power_min: tl.float64, power_max: tl.float64, full_clip_fraction: tl.float64,
    ess_sharpness: tl.float64, ess_floor: tl.float64, token_low: tl.float64, token_high: tl.float64,
    token_dual: tl.float64, token_under: tl.float64, sequence_low: tl.float64, sequence_high: tl.float64,
    sequence_dual: tl.float64, sequence_under: tl.float64, by_length: tl.float64, length_norm: tl.float64, beta: tl.float64,
    kl_order: tl.float64, kl_slope_order: tl.float64, kl_weighted: tl.float64, entropy_coef: tl.float64,
    BLOCK: tl.constexpr, NUM_STATS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    start = tl.maximum(tl.load(cu_seqlens_ptr + i).to(tl.int64), 0)
    stop = tl.minimum(tl.load(cu_seqlens_ptr + i + 1).to(tl.int64), N)
    A = tl.load(advantages_ptr + i).to(tl.float64)
    tokens = (logp_ptr, old_logp_ptr, mask_ptr, policy_mask_ptr, has_old_logp, has_mask, has_policy_mask)
    bounds = (scalar(token_low), scalar(token_high), scalar(token_dual), scalar(token_under))
    ess_rule = (scalar(rule), scalar(power_min), scalar(power_max), scalar(full_clip_fraction), scalar(ess_sharpness),
                scalar(ess_floor))  # fmt: skip
    ref = (ref_logp_ptr, has_ref_logp, (scalar(kl_order), scalar(kl_slope_order), scalar(kl_weighted)))
    by_length, length_norm, power = scalar(by_length), scalar(length_norm), scalar(power)
    beta, entropy_coef = scalar(beta), scalar(entropy_coef)

    count, counted, zeros, low, high, sum_l, l_min, l_max = _token_sums(
        start, stop, A, tokens, bounds, rollout_weights_ptr, has_rollout_weights, dlogp_ptr, BLOCK
    )
    ratio_sum, ratio_max, approx_kl, kl, entropy = _metric_sums(
        start, stop, A, tokens, bounds, ref, entropy_ptr, has_entropy, BLOCK
    )
    tl.debug_barrier()  # what one thread has stored of l, another may load
    some = count > 0
    n = tl.maximum(count, 1.0)
    k = tl.maximum(counted, 1.0)
    share = counted / n
    alive = counted - zeros
    has_zero = zeros > 0
    mean = sum_l / tl.maximum(alive, 1.0)
    x_min = tl.where(alive > 0, l_min - mean, 0.0)
    x_max = tl.where(alive > 0, l_max - mean, 0.0)

    p = tl.load(power_ptr + i, mask=has_power != 0, other=0.0).to(tl.float64)
    p = tl.where(has_power != 0, p, power)
    deficit_target = p * 0.0
    if ess_rule[0] != _FIXED:
        target_ess = tl.load(target_ess_ptr + i, mask=ess_rule[0] == _TARGET, other=1.0).to(tl.float64)
        p, deficit_target = choose_power(
            ess_rule, low + high, target_ess, mean, x_min, x_max, has_zero, k, alive, start, stop, dlogp_ptr, BLOCK,
        )  # fmt: skip
    log_mean, deficit, _ = moments(p, mean, x_min, x_max, has_zero, k, start, stop, dlogp_ptr, BLOCK)

    log_m = mean + tl.where(p == 0, 0.0, log_mean / tl.where(p == 0, 1.0, p))
    nothing_left = has_zero & ((p <= 0) | (alive == 0))
    log_m = tl.where(nothing_left, -_INF, log_m)
    clipped_m, m_below, m_above = _clip_log_ratio(
        log_m, A, scalar(sequence_low), scalar(sequence_high), scalar(sequence_dual), scalar(sequence_under)
    )
    acts = (counted > 0) & (A != 0) & (log_m != -_INF)
    policy_loss = tl.where(acts, -A * share * tl.exp(tl.where(acts, clipped_m, 0.0)), 0.0)
    weight = tl.where(some, tl.where(by_length != 0, count, 1.0) / length_norm, 0.0)

    _write_gradient(
        start, stop, A, tokens, bounds, ref, p, mean, log_m - log_mean - tl.log(k),
        tl.where(acts & (m_below == 0) & (m_above == 0), -weight * A * share, 0.0), beta * weight / n,
        -entropy_coef * weight / n, (has_entropy != 0) & (entropy_coef != 0), dlogp_ptr, dentropy_ptr, BLOCK,
    )  # fmt: skip

    ess = tl.where((counted > 0) & (nothing_left == 0), k * tl.exp(-deficit), 0.0)
    ess_target = tl.where(ess_rule[0] == _FIXED, ess, tl.where(counted > 0, k * tl.exp(-deficit_target), 0.0))
    low = tl.where(m_below, counted, low)
    high = tl.where(m_above, counted, high)
    stats = (
        count, weight, policy_loss, kl, entropy, p, ess, ess_target, low, high, ratio_sum, ratio_max, approx_kl
    )  # fmt: skip
    for k in tl.static_range(NUM_STATS):
        tl.store(stats_ptr + k * B + i, stats[k])


def trajectory(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    ref_logp: Tensor | None,
    rollout_weights: Tensor | None,
    entropy: Tensor | None,
    power: Tensor | None,
    target_ess: Tensor | None,
    policy_mask: Tensor | None,
    options: TrajectoryOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.trajectory`."""
    B, N = advantages.numel(), logp.numel()
    logp = logp.contiguous()
    old_logp, has_old_logp = optional_like(old_logp, logp)
    mask, has_mask = optional_mask(mask, cu_seqlens)
    policy_mask, has_policy_mask = optional_mask(policy_mask, cu_seqlens)
    ref_logp, has_ref_logp = optional_like(ref_logp, logp)
    rollout_weights, has_rollout_weights = optional_like(rollout_weights, logp)
    entropy, has_entropy = optional_like(entropy, logp)
    # zeros, because offsets that were not checked may leave tokens to no trajectory
    dlogp = torch.zeros(N, dtype=torch.float64, device=logp.device)
    dentropy = dlogp.new_zeros(N if has_entropy and options.entropy_coef else 0)
    stats = dlogp.new_empty(len(STATS), B)
    power, has_power = optional_like(power, stats)
    target_ess, _ = optional_like(target_ess, stats)
    if B:
        with on_device(logp):
            _trajectory_fwd_kernel[(B,)](
                logp,
                old_logp,
                advantages.contiguous(),
                mask,
                cu_seqlens.contiguous(),
                ref_logp,
                rollout_weights,
                entropy,
                power,
                target_ess,
                policy_mask,
                dlogp,
                dentropy,
                stats,
                B,
                N,
                has_old_logp,
                has_mask,
                has_ref_logp,
                has_rollout_weights,
                has_entropy,
                has_power,
                has_policy_mask,
                **options._asdict(),
                BLOCK=BLOCK_TOKENS,
                NUM_STATS=len(STATS),
                num_warps=8,
                **OPTIONS,
            )
    return dlogp, dentropy, stats
