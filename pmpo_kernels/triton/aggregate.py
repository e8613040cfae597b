"""Stage `aggregate`: one program makes loss and metrics of the trajectories' statistics, all in float64.

The order and the names are those of `pmpo_kernels.aggregate`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmpo_kernels.contract import METRICS, STATS, AggregateOptions
from pmpo_kernels.triton.launch import OPTIONS, on_device, optional, optional_mask, scalar
from pmpo_kernels.triton.tokens import given

BLOCK_TRAJECTORIES, NUM_WARPS = 256, 4
# Rows of the statistics, `STATS` in its order.
(_TOKENS, _WEIGHT, _POLICY_LOSS, _KL, _ENTROPY, _POWER, _ESS, _ESS_TARGET, _CLIPPED_LOW, _CLIPPED_HIGH, _RATIO_SUM, _RATIO_MAX,
 _APPROX_KL) = map(tl.constexpr, range(len(STATS)))  # fmt: skip
_INF = tl.constexpr(float("inf"))


@triton.jit
def _load(ROW: tl.constexpr, stats_ptr, offs, B):
    """Load row ROW of the statistics (`STATS`) for a block of trajectories; 0 beyond B."""
    return tl.load(stats_ptr + ROW * B + offs, mask=offs < B, other=0.0)


@triton.jit
def _maximum(values, total, known):
    """The largest of the values; those not known are -inf, and it is 0 if none is known. It is NaN if one of them is, which `total`
    tells, a sum that they are in."""
    largest = tl.max(values, axis=0)
    return tl.where(known > 0, tl.where(total == total, largest, total), 0.0)


@triton.jit(
    do_not_specialize=["B", "has_denominator", "has_largest", "has_skipped"],
    do_not_specialize_on_alignment=["denominator_ptr", "largest_ptr", "skipped_ptr"],
)
def _aggregate_fwd_kernel(
    stats_ptr, denominator_ptr, largest_ptr, skipped_ptr, loss_ptr, divisor_ptr, metrics_ptr, clip_fraction_ptr,
    B: tl.int64, has_denominator: tl.int32, has_largest: tl.int32, has_skipped: tl.int32, by_tokens: tl.float64,
    beta: tl.float64, entropy_coef: tl.float64, limit: tl.float64, entropy_factor: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    zeros = tl.zeros((BLOCK,), tl.float64)
    n_sum, some_sum, known_tokens, known_sum = zeros, zeros, zeros, zeros
    policy_sum, kl_loss, entropy_loss, low_sum, high_sum, ratio_sum = zeros, zeros, zeros, zeros, zeros, zeros
    approx_kl_sum, kl_sum, entropy_sum, power_sum, ess_sum, target_sum = zeros, zeros, zeros, zeros, zeros, zeros
    ratio_max, power_max, power_low, dentropy_max = zeros - _INF, zeros - _INF, zeros - _INF, zeros
    for first in range(0, B, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        tokens, weight = _load(_TOKENS, stats_ptr, offs, B), _load(_WEIGHT, stats_ptr, offs, B)
        kl, entropy = _load(_KL, stats_ptr, offs, B), _load(_ENTROPY, stats_ptr, offs, B)
        power, largest_ratio = _load(_POWER, stats_ptr, offs, B), _load(_RATIO_MAX, stats_ptr, offs, B)
        low, high = _load(_CLIPPED_LOW, stats_ptr, offs, B), _load(_CLIPPED_HIGH, stats_ptr, offs, B)
        some = tokens > 0
        skipped = tl.load(skipped_ptr + offs, mask=given(offs < B, has_skipped), other=0) != 0
        known = some & (skipped == 0)
        n = tl.maximum(tokens, 1.0)
        tl.store(clip_fraction_ptr + offs, (low + high) / n, mask=offs < B)
        n_sum += tokens
        some_sum += some.to(tl.float64)
        known_tokens += tl.where(known, tokens, 0.0)
        known_sum += known.to(tl.float64)
        policy_sum += weight * _load(_POLICY_LOSS, stats_ptr, offs, B)
        kl_loss += weight / n * kl
        entropy_loss += weight / n * entropy
        low_sum += low
        high_sum += high
        ratio_sum += _load(_RATIO_SUM, stats_ptr, offs, B)
        approx_kl_sum += _load(_APPROX_KL, stats_ptr, offs, B)
        kl_sum += kl
        entropy_sum += entropy
        power_sum += tl.where(known, power, 0.0)
        ess_sum += _load(_ESS, stats_ptr, offs, B)
        target_sum += _load(_ESS_TARGET, stats_ptr, offs, B)
        ratio_max = tl.maximum(ratio_max, tl.where(known, largest_ratio, -_INF))
        power_max = tl.maximum(power_max, tl.where(known, power, -_INF))
        dentropy_max = tl.maximum(dentropy_max, weight / n)
        power_low = tl.maximum(power_low, tl.where(known, -power, -_INF))

    tokens, trajectories, known = tl.sum(n_sum, axis=0), tl.sum(some_sum, axis=0), tl.sum(known_sum, axis=0)
    count = tl.maximum(tl.where(by_tokens != 0, tokens, trajectories), 1.0)
    D = tl.load(denominator_ptr, mask=has_denominator != 0, other=1.0).to(tl.float64)
    D = tl.where(has_denominator != 0, D, count)
    policy = tl.sum(policy_sum, axis=0)
    loss = policy + tl.where(beta != 0, scalar(beta) * tl.sum(kl_loss, axis=0), 0.0)
    loss -= tl.where(entropy_coef != 0, scalar(entropy_coef) * tl.sum(entropy_loss, axis=0), 0.0)
    largest = tl.load(largest_ptr, mask=has_largest != 0, other=0.0).to(tl.float64)
    largest += scalar(entropy_factor) * tl.abs(scalar(entropy_coef)) * tl.max(dentropy_max, axis=0)
    tl.store(loss_ptr, tl.where((largest / D <= scalar(limit)) | (has_largest == 0), loss / D, loss + _INF))
    tl.store(divisor_ptr, D)

    per_token, per_known = tl.maximum(tokens, 1.0), tl.maximum(tl.sum(known_tokens, axis=0), 1.0)
    each = tl.maximum(known, 1.0)
    low, high, ratios = (
        tl.sum(low_sum, axis=0) / per_token,
        tl.sum(high_sum, axis=0) / per_token,
        tl.sum(ratio_sum, axis=0),
    )
    powers = tl.sum(power_sum, axis=0)
    metrics = (
        low, high, ratios / per_known, tl.sum(approx_kl_sum, axis=0) / per_known, tl.sum(kl_sum, axis=0) / per_known,
        tl.sum(entropy_sum, axis=0) / per_known, powers / each, tl.sum(ess_sum, axis=0) / each,
        tl.sum(target_sum, axis=0) / each, policy / D, tokens, trajectories, _maximum(ratio_max, ratios, known),
        _maximum(power_max, powers, known), 0.0 - _maximum(power_low, powers, known), low + high,
    )  # fmt: skip
    for m in tl.static_range(len(metrics)):
        tl.store(metrics_ptr + m, metrics[m])


def aggregate(
    stats: Tensor,
    denominator: Tensor | None,
    largest: Tensor | None,
    skipped: Tensor | None,
    options: AggregateOptions,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what `pmpo_kernels.aggregate.aggregate` does."""
    B = stats.shape[1]
    stats = stats.contiguous()
    loss, metrics = (stats.new_empty(size, dtype=dtype) for size in ((), (len(METRICS),)))
    divisor, clip_fraction = stats.new_empty(()), stats.new_empty(B)
    denominator, has_denominator = optional(denominator, divisor)
    largest, has_largest = optional(largest, divisor)
    skipped, has_skipped = optional_mask(skipped, stats)
    with on_device(stats):
        _aggregate_fwd_kernel[(1,)](
            stats, denominator, largest, skipped, loss, divisor, metrics, clip_fraction, B, has_denominator, has_largest,
            has_skipped, **options._asdict(), BLOCK=BLOCK_TRAJECTORIES, num_warps=NUM_WARPS, **OPTIONS,
        )  # fmt: skip
    return loss, divisor, metrics, clip_fraction
