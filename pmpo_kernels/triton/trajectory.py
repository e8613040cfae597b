"""Stage `trajectory`: clip, statistics, p, loss and per-token gradient, in three kernels, all in float64.

The order and the names are those of `reference`. A trajectory is cut into blocks of BLOCK_TOKENS tokens from its own start, so that
its bits depend on nothing that stands beside it. The kernels `sums` and `gradient` take a block a program, `power` a trajectory a
program. `power` adds the sums of the blocks in their order and chooses p; it reads the log weights l, which `sums` has left in the
memory that `gradient` writes to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmpo_kernels.batch import Batch
from pmpo_kernels.contract import FIXED, STATS, TARGET, TrajectoryOptions
from pmpo_kernels.triton.blocks import SUMS, add_metrics, add_weights, block_of, bounds_of, first_slot
from pmpo_kernels.triton.launch import (
    BLOCK_THREADS,
    BLOCK_TOKENS,
    OPTIONS,
    POWER_THREADS,
    STEP_TOKENS,
    on_device,
    optional_like,
    optional_mask,
    scalar,
)
from pmpo_kernels.triton.power_mean import centred, choose_power, expm1, moments
from pmpo_kernels.triton.tokens import clip_log_ratio, given, kl_penalty, log_ratio, reference_log_ratio

_FIXED = tl.constexpr(FIXED)
_TARGET = tl.constexpr(TARGET)
_INF = tl.constexpr(float("inf"))
# Rows of the scratch (SCALES, B): what the gradient needs of each trajectory.
SCALES = ("power", "mean", "log_scale", "policy_scale", "kl_scale", "entropy_scale")
_SUMS, _SCALES = tl.constexpr(len(SUMS)), tl.constexpr(len(SCALES))
# One compiled kernel serves every alignment, every length and every choice of optional inputs.
_ANY = {
    "do_not_specialize_on_alignment": [
        "logp_ptr", "old_logp_ptr", "advantages_ptr", "mask_ptr", "cu_seqlens_ptr", "ref_logp_ptr", "rollout_weights_ptr",
        "entropy_ptr", "power_ptr", "target_ess_ptr", "policy_mask_ptr",
    ],
    "do_not_specialize": [
        "B", "N", "has_old_logp", "has_mask", "has_ref_logp", "has_rollout_weights", "has_entropy", "has_power",
        "has_policy_mask", "has_dentropy",
    ],
}  # fmt: skip


@triton.jit(**_ANY)
def _trajectory_sums_kernel(
    logp_ptr, old_logp_ptr, advantages_ptr, mask_ptr, cu_seqlens_ptr, ref_logp_ptr, rollout_weights_ptr, entropy_ptr,
    policy_mask_ptr, l_ptr, sums_ptr,
    B: tl.int64, N: tl.int64,
    has_old_logp: tl.int32, has_mask: tl.int32, has_ref_logp: tl.int32, has_rollout_weights: tl.int32,
    has_entropy: tl.int32, has_policy_mask: tl.int32,
    token_low: tl.float64, token_high: tl.float64, token_dual: tl.float64, token_under: tl.float64,
    kl_order: tl.float64, kl_slope_order: tl.float64, kl_weighted: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    """For one block of tokens write l of each, -inf where its weight is 0, and the sums over them."""
    slot = tl.program_id(0).to(tl.int64)
    i, first, stop = block_of(slot, cu_seqlens_ptr, B, N, BLOCK)
    if first >= stop:
        return
    A = tl.load(advantages_ptr + i).to(tl.float64)
    tokens = (logp_ptr, old_logp_ptr, mask_ptr, policy_mask_ptr, has_old_logp, has_mask, has_policy_mask)
    bounds = (scalar(token_low), scalar(token_high), scalar(token_dual), scalar(token_under))
    offs = first + tl.arange(0, BLOCK)
    d, l, valid, counts, below, above = log_ratio(offs, stop, A, tokens, bounds)
    if has_rollout_weights != 0:
        l += tl.log(tl.load(rollout_weights_ptr + offs, mask=valid, other=1.0).to(tl.float64))
    alive = counts & (l != -_INF)
    tl.store(l_ptr + offs, tl.where(alive, l, -_INF), mask=offs < stop)

    exp_d = tl.exp(d)
    kl = tl.zeros((BLOCK,), tl.float64)
    if has_ref_logp != 0:
        r = reference_log_ratio(offs, valid, logp_ptr, ref_logp_ptr)
        estimator = (scalar(kl_order), scalar(kl_slope_order), scalar(kl_weighted))
        kl = tl.where(valid, kl_penalty(r, d, estimator)[0], 0.0)
    entropy = tl.load(entropy_ptr + offs, mask=given(valid, has_entropy), other=0.0).to(tl.float64)
    sums = (
        tl.sum(valid.to(tl.int32), axis=0).to(tl.float64),
        tl.sum(counts.to(tl.int32), axis=0).to(tl.float64),
        tl.sum((counts & (l == -_INF)).to(tl.int32), axis=0).to(tl.float64),
        tl.sum(below.to(tl.int32), axis=0).to(tl.float64),
        tl.sum(above.to(tl.int32), axis=0).to(tl.float64),
        tl.sum(tl.where(alive, l, 0.0), axis=0),
        tl.min(tl.where(alive & (l < _INF), l, _INF), axis=0),
        tl.max(tl.where(alive & (l > -_INF), l, -_INF), axis=0),
        tl.sum(tl.where(valid, exp_d, 0.0), axis=0),
        tl.max(tl.where(valid & (exp_d >= 0), exp_d, 0.0), axis=0),
        tl.sum(tl.where(valid, expm1(d, exp_d) - d, 0.0), axis=0),
        tl.sum(kl, axis=0),
        tl.sum(entropy, axis=0),
    )
    for k in tl.static_range(_SUMS):
        tl.store(sums_ptr + k * tl.num_programs(0).to(tl.int64) + slot, sums[k])


@triton.jit(**_ANY)
def _trajectory_power_kernel(
    advantages_ptr, cu_seqlens_ptr, power_ptr, target_ess_ptr, l_ptr, sums_ptr, scales_ptr, stats_ptr,
    B: tl.int64, N: tl.int64, has_power: tl.int32,
    rule: tl.float64, power: tl.float64, power_min: tl.float64, power_max: tl.float64, full_clip_fraction: tl.float64,
    ess_sharpness: tl.float64, ess_floor: tl.float64, sequence_low: tl.float64, sequence_high: tl.float64,
    sequence_dual: tl.float64, sequence_under: tl.float64, by_length: tl.float64, length_norm: tl.float64,
    beta: tl.float64, entropy_coef: tl.float64,
    BLOCK: tl.constexpr, STEP: tl.constexpr, NUM_STATS: tl.constexpr,
):  # fmt: skip
    """For one trajectory add the sums of its blocks, choose p, and write its statistics and what the gradient needs (`SCALES`)."""
    i = tl.program_id(0).to(tl.int64)
    start, stop = bounds_of(i, cu_seqlens_ptr, N)
    blocks, slots = (stop - start + BLOCK - 1) // BLOCK, N // BLOCK + B
    sums_ptr += first_slot(i, start, BLOCK)
    ess_rule = (scalar(rule), scalar(power_min), scalar(power_max), scalar(full_clip_fraction), scalar(ess_sharpness),
                scalar(ess_floor))  # fmt: skip

    counted, zeros, clipped, sum_l, l_min, l_max = add_weights(blocks, slots, sums_ptr)
    k = tl.maximum(counted, 1.0)
    alive = counted - zeros
    has_zero = zeros > 0
    mean = sum_l / tl.maximum(alive, 1.0)
    x_min = tl.where(alive > 0, l_min - mean, 0.0)
    x_max = tl.where(alive > 0, l_max - mean, 0.0)

    p = tl.load(power_ptr + i, mask=has_power != 0, other=0.0).to(tl.float64)
    p = tl.where(has_power != 0, p, scalar(power))
    deficit_target = p * 0.0
    if ess_rule[0] != _FIXED:
        target_ess = tl.load(target_ess_ptr + i, mask=ess_rule[0] == _TARGET, other=1.0).to(tl.float64)
        p, deficit_target = choose_power(
            ess_rule, clipped, target_ess, mean, x_min, x_max, has_zero, k, alive, start, stop, l_ptr, STEP,
        )  # fmt: skip
    log_mean, deficit, _ = moments(p, mean, x_min, x_max, has_zero, k, start, stop, l_ptr, STEP)

    # what p does not depend on comes after it, because registers are full before
    count, low, high, kl, entropy, ratio_sum, ratio_max, approx_kl = add_metrics(blocks, slots, sums_ptr)
    A = tl.load(advantages_ptr + i).to(tl.float64)
    n = tl.maximum(count, 1.0)
    share = counted / n
    log_m = mean + tl.where(p == 0, 0.0, log_mean / tl.where(p == 0, 1.0, p))
    nothing_left = has_zero & ((p <= 0) | (alive == 0))
    log_m = tl.where(nothing_left, -_INF, log_m)
    clipped_m, m_below, m_above = clip_log_ratio(
        log_m, A, scalar(sequence_low), scalar(sequence_high), scalar(sequence_dual), scalar(sequence_under)
    )
    acts = (counted > 0) & (A != 0) & (log_m != -_INF)
    policy_loss = tl.where(acts, -A * share * tl.exp(tl.where(acts, clipped_m, 0.0)), 0.0)
    weight = tl.where(count > 0, tl.where(scalar(by_length) != 0, count, 1.0) / scalar(length_norm), 0.0)
    scales = (
        p, mean, log_m - log_mean - tl.log(k), tl.where(acts & (m_below == 0) & (m_above == 0), -weight * A * share, 0.0),
        scalar(beta) * weight / n, -scalar(entropy_coef) * weight / n,
    )  # fmt: skip
    for row in tl.static_range(_SCALES):
        tl.store(scales_ptr + row * B + i, scales[row])

    ess = tl.where((counted > 0) & (nothing_left == 0), k * tl.exp(-deficit), 0.0)
    ess_target = tl.where(ess_rule[0] == _FIXED, ess, tl.where(counted > 0, k * tl.exp(-deficit_target), 0.0))
    low = tl.where(m_below, counted, low)
    high = tl.where(m_above, counted, high)
    stats = (
        count, weight, policy_loss, kl, entropy, p, ess, ess_target, low, high, ratio_sum, ratio_max, approx_kl
    )  # fmt: skip
    for row in tl.static_range(NUM_STATS):
        tl.store(stats_ptr + row * B + i, stats[row])


@triton.jit(**_ANY)
def _trajectory_gradient_kernel(
    logp_ptr, old_logp_ptr, advantages_ptr, mask_ptr, cu_seqlens_ptr, ref_logp_ptr, policy_mask_ptr, scales_ptr, dlogp_ptr,
    dentropy_ptr,
    B: tl.int64, N: tl.int64,
    has_old_logp: tl.int32, has_mask: tl.int32, has_ref_logp: tl.int32, has_policy_mask: tl.int32, has_dentropy: tl.int32,
    token_low: tl.float64, token_high: tl.float64, token_dual: tl.float64, token_under: tl.float64,
    kl_order: tl.float64, kl_slope_order: tl.float64, kl_weighted: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    """For one block of tokens write dlogp over l: -w A M_p W_t where nothing is clipped, and the KL term's. Write dentropy."""
    i, first, stop = block_of(tl.program_id(0).to(tl.int64), cu_seqlens_ptr, B, N, BLOCK)
    if first >= stop:
        return
    A = tl.load(advantages_ptr + i).to(tl.float64)
    p = tl.load(scales_ptr + i)
    mean = tl.load(scales_ptr + B + i)
    log_scale = tl.load(scales_ptr + 2 * B + i)
    policy_scale = tl.load(scales_ptr + 3 * B + i)
    kl_scale = tl.load(scales_ptr + 4 * B + i)
    tokens = (logp_ptr, old_logp_ptr, mask_ptr, policy_mask_ptr, has_old_logp, has_mask, has_policy_mask)
    bounds = (scalar(token_low), scalar(token_high), scalar(token_dual), scalar(token_under))
    offs = first + tl.arange(0, BLOCK)
    d, _, valid, _, below, above = log_ratio(offs, stop, A, tokens, bounds)
    x, alive = centred(first, stop, mean, dlogp_ptr, BLOCK)
    flows = alive & (below == 0) & (above == 0)
    dlogp = tl.where(flows, policy_scale * tl.exp(tl.where(flows, log_scale + p * x, 0.0)), 0.0)
    dlogp = tl.where(policy_scale == 0, 0.0, dlogp)
    if (has_ref_logp != 0) & (kl_scale != 0):
        r = reference_log_ratio(offs, valid, logp_ptr, ref_logp_ptr)
        estimator = (scalar(kl_order), scalar(kl_slope_order), scalar(kl_weighted))
        dlogp += tl.where(valid, kl_scale * kl_penalty(r, d, estimator)[1], 0.0)
    tl.store(dlogp_ptr + offs, dlogp, mask=offs < stop)
    if has_dentropy != 0:
        entropy_scale = tl.load(scales_ptr + 5 * B + i)
        tl.store(dentropy_ptr + offs, tl.where(valid, entropy_scale, 0.0), mask=offs < stop)


def trajectory(
    logp: Tensor, entropy: Tensor | None, batch: Batch, options: TrajectoryOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `reference.trajectory` does."""
    B, N = batch.advantages.numel(), logp.numel()
    slots = N // BLOCK_TOKENS + B
    logp, advantages, cu_seqlens = logp.contiguous(), batch.advantages.contiguous(), batch.cu_seqlens.contiguous()
    old_logp, has_old_logp = optional_like(batch.old_logp, logp)
    mask, has_mask = optional_mask(batch.mask, cu_seqlens)
    policy_mask, has_policy_mask = optional_mask(batch.policy_mask, cu_seqlens)
    ref_logp, has_ref_logp = optional_like(batch.ref_logp, logp)
    rollout_weights, has_rollout_weights = optional_like(batch.rollout_weights, logp)
    entropy, has_entropy = optional_like(entropy, logp)
    has_dentropy = int(has_entropy and options.entropy_coef != 0)
    # zeros, because offsets that were not checked may leave tokens to no trajectory
    dlogp = torch.zeros(N, dtype=torch.float64, device=logp.device)
    dentropy = dlogp.new_zeros(N if has_dentropy else 0)
    stats = dlogp.new_empty(len(STATS), B)
    sums, scales = dlogp.new_empty(len(SUMS), slots), dlogp.new_empty(len(SCALES), B)
    power, has_power = optional_like(batch.power, stats)
    target_ess, _ = optional_like(batch.target_ess, stats)
    if not B:
        return dlogp, dentropy, stats
    o = options
    clip = (o.token_low, o.token_high, o.token_dual, o.token_under, o.kl_order, o.kl_slope_order, o.kl_weighted)
    warp = 64 if torch.version.hip else 32
    block = {"BLOCK": BLOCK_TOKENS, "num_warps": BLOCK_THREADS // warp, **OPTIONS}
    with on_device(logp):
        _trajectory_sums_kernel[(slots,)](
            logp, old_logp, advantages, mask, cu_seqlens, ref_logp, rollout_weights, entropy, policy_mask, dlogp, sums, B, N,
            has_old_logp, has_mask, has_ref_logp, has_rollout_weights, has_entropy, has_policy_mask, *clip, **block,
        )  # fmt: skip
        _trajectory_power_kernel[(B,)](
            advantages, cu_seqlens, power, target_ess, dlogp, sums, scales, stats, B, N, has_power, o.rule, o.power,
            o.power_min, o.power_max, o.full_clip_fraction, o.ess_sharpness, o.ess_floor, o.sequence_low, o.sequence_high,
            o.sequence_dual, o.sequence_under, o.by_length, o.length_norm, o.beta, o.entropy_coef, BLOCK=BLOCK_TOKENS,
            STEP=STEP_TOKENS, NUM_STATS=len(STATS), num_warps=POWER_THREADS // warp, **OPTIONS,
        )  # fmt: skip
        _trajectory_gradient_kernel[(slots,)](
            logp, old_logp, advantages, mask, cu_seqlens, ref_logp, policy_mask, scales, dlogp, dentropy, B, N, has_old_logp,
            has_mask, has_ref_logp, has_policy_mask, has_dentropy, *clip, **block,
        )  # fmt: skip
    return dlogp, dentropy, stats
