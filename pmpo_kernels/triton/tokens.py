"""What the kernels of the trajectory stage compute for each token: its log-ratio, the clip, the KL penalty, in float64."""

from __future__ import annotations

import triton
import triton.language as tl

from pmpo_kernels.triton.power_mean import expm1

_INF = tl.constexpr(float("inf"))


@triton.jit
def clip_log_ratio(d, advantage, low, high, dual, under):
    floor = tl.where(advantage < 0, -low, tl.where(advantage > 0, -under, -_INF))
    ceiling = tl.where(advantage > 0, high, tl.where(advantage < 0, dual, _INF))
    below = d < floor
    above = d > ceiling
    return tl.where(above, ceiling, tl.where(below, floor, d)), below, above


@triton.jit
def given(valid, has):
    """`valid` if an optional input is there, else false everywhere. (The interpreter changes the type of a scalar bool that it
    broadcasts.)"""
    return valid.to(tl.int32) * has != 0


@triton.jit
def log_ratio(offs, stop, advantage, tokens, bounds):
    """Return, for one block of tokens, the log-ratio d, d clipped, and four masks: response tokens, tokens of the policy term, and
    those of the policy term that are clipped below or above."""
    logp_ptr, old_logp_ptr, mask_ptr, policy_mask_ptr, has_old_logp, has_mask, has_policy_mask = tokens
    low, high, dual, under = bounds
    valid = offs < stop
    valid = valid & (tl.load(mask_ptr + offs, mask=given(valid, has_mask), other=1) != 0)
    logp = tl.load(logp_ptr + offs, mask=valid, other=0.0).to(tl.float64)
    old_logp = tl.load(old_logp_ptr + offs, mask=given(valid, has_old_logp), other=0.0).to(tl.float64)
    on_policy = tl.where(logp == -_INF, 0.0, logp - logp)
    d = tl.where(has_old_logp != 0, logp - old_logp, on_policy)
    clipped, below, above = clip_log_ratio(d, advantage, low, high, dual, under)
    counts = valid & (tl.load(policy_mask_ptr + offs, mask=given(valid, has_policy_mask), other=1) != 0)
    return d, clipped, valid, counts, counts & below, counts & above


@triton.jit
def reference_log_ratio(offs, valid, logp_ptr, ref_logp_ptr):
    """r = ref_logp - logp."""
    ref_logp = tl.load(ref_logp_ptr + offs, mask=valid, other=0.0).to(tl.float64)
    return ref_logp - tl.load(logp_ptr + offs, mask=valid, other=0.0).to(tl.float64)


@triton.jit
def kl_penalty(r, d, estimator):
    """Return each token's KL estimate and its derivative in logp, as `reference.kl_penalty` does."""
    order, slope_order, weighted = estimator
    e = expm1(r, tl.exp(r))
    value = tl.where(order == 1, -r, tl.where(order == 2, r * r / 2, e - r))
    slope = tl.where(slope_order == 1, 1.0, tl.where(slope_order == 2, -r, -e))
    ratio = tl.where(weighted != 0, tl.exp(d), 1.0)
    return ratio * value, ratio * tl.where(weighted != 0, slope + value, slope)
