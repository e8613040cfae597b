"""Trajectories in blocks of tokens: how a program finds its block, and how the sums over blocks become those of a trajectory.

The host does not know the lengths. So there is a program for each slot that a block may have: block j of trajectory i has slot
`first_slot` + j, and the program of a slot finds i and j by bisection in the offsets.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Rows of the scratch (SUMS, slots): of each block the sum over its tokens, the least or the largest.
SUMS = ("tokens", "counted", "zeros", "low", "high", "l", "l_min", "l_max", "ratio", "ratio_max", "approx_kl", "kl",
        "entropy")  # fmt: skip
_INF = tl.constexpr(float("inf"))
_PARTIALS = tl.constexpr(32)  # blocks added in a step: one by each lane of a warp, so that warps exchange nothing


@triton.jit
def bounds_of(i, cu_seqlens_ptr, N):
    """Return the first token of trajectory i and the one behind its last, in [0, N] whatever the offsets are."""
    start = tl.load(cu_seqlens_ptr + i).to(tl.int64)
    stop = tl.load(cu_seqlens_ptr + i + 1).to(tl.int64)
    return tl.minimum(tl.maximum(start, 0), N), tl.minimum(tl.maximum(stop, 0), N)


@triton.jit
def first_slot(i, start, BLOCK: tl.constexpr):
    """Return the slot of the first block of trajectory i, whose tokens begin at `start`.

    It rises strictly with i and leaves room for the blocks of the trajectories before: n tokens from `start` on are
    ceil(n / BLOCK) <= (start + n) // BLOCK - start // BLOCK + 1 blocks, so N // BLOCK + B slots are enough.
    """
    return start // BLOCK + i


@triton.jit
def block_of(slot, cu_seqlens_ptr, B, N, BLOCK: tl.constexpr):
    """Return a slot's trajectory, the first token of its block, and the token behind the trajectory's last. A slot that is not in
    use has no tokens: its first token is the one behind the last."""
    i = slot * 0
    after = i + B
    while after - i > 1:
        middle = (i + after) // 2
        start, _ = bounds_of(middle, cu_seqlens_ptr, N)
        here = first_slot(middle, start, BLOCK) <= slot
        i = tl.where(here, middle, i)
        after = tl.where(here, after, middle)
    start, stop = bounds_of(i, cu_seqlens_ptr, N)
    block = slot - first_slot(i, start, BLOCK)
    return i, tl.where(block < 0, stop, start + block * BLOCK), stop


@triton.jit
def _row(k, offs, blocks, slots, sums_ptr, other):
    """Load row k of `SUMS` for the blocks `offs`; `other` beyond the trajectory's last block."""
    return tl.load(sums_ptr + k * slots + offs, mask=offs < blocks, other=other)


@triton.jit
def add_weights(blocks, slots, sums_ptr):
    """Add up what p depends on over the blocks of a trajectory.

    Returns the tokens of the policy term, those of weight 0, the clipped ones; the sum, the least and the largest l."""
    counted = tl.zeros((_PARTIALS,), tl.float64)
    zeros = tl.zeros((_PARTIALS,), tl.float64)
    clipped = tl.zeros((_PARTIALS,), tl.float64)
    sum_l = tl.zeros((_PARTIALS,), tl.float64)
    l_min = tl.full((_PARTIALS,), _INF, tl.float64)
    l_max = tl.full((_PARTIALS,), -_INF, tl.float64)
    for first in range(0, blocks, _PARTIALS):
        offs = first + tl.arange(0, _PARTIALS)
        counted += _row(1, offs, blocks, slots, sums_ptr, 0.0)
        zeros += _row(2, offs, blocks, slots, sums_ptr, 0.0)
        clipped += _row(3, offs, blocks, slots, sums_ptr, 0.0) + _row(4, offs, blocks, slots, sums_ptr, 0.0)
        sum_l += _row(5, offs, blocks, slots, sums_ptr, 0.0)
        l_min = tl.minimum(l_min, _row(6, offs, blocks, slots, sums_ptr, _INF))
        l_max = tl.maximum(l_max, _row(7, offs, blocks, slots, sums_ptr, -_INF))
    return (
        tl.sum(counted, axis=0), tl.sum(zeros, axis=0), tl.sum(clipped, axis=0), tl.sum(sum_l, axis=0),
        tl.min(l_min, axis=0), tl.max(l_max, axis=0),
    )  # fmt: skip


@triton.jit
def add_metrics(blocks, slots, sums_ptr):
    """Add up what p does not depend on over the blocks of a trajectory.

    Returns tokens, those clipped below and above, KL, entropy, ratio, largest ratio, approx_kl."""
    n = tl.zeros((_PARTIALS,), tl.float64)
    low = tl.zeros((_PARTIALS,), tl.float64)
    high = tl.zeros((_PARTIALS,), tl.float64)
    ratio = tl.zeros((_PARTIALS,), tl.float64)
    ratio_max = tl.zeros((_PARTIALS,), tl.float64)
    approx_kl = tl.zeros((_PARTIALS,), tl.float64)
    kl = tl.zeros((_PARTIALS,), tl.float64)
    entropy = tl.zeros((_PARTIALS,), tl.float64)
    for first in range(0, blocks, _PARTIALS):
        offs = first + tl.arange(0, _PARTIALS)
        n += _row(0, offs, blocks, slots, sums_ptr, 0.0)
        low += _row(3, offs, blocks, slots, sums_ptr, 0.0)
        high += _row(4, offs, blocks, slots, sums_ptr, 0.0)
        ratio += _row(8, offs, blocks, slots, sums_ptr, 0.0)
        ratio_max = tl.maximum(ratio_max, _row(9, offs, blocks, slots, sums_ptr, 0.0))
        approx_kl += _row(10, offs, blocks, slots, sums_ptr, 0.0)
        kl += _row(11, offs, blocks, slots, sums_ptr, 0.0)
        entropy += _row(12, offs, blocks, slots, sums_ptr, 0.0)
    total, largest = tl.sum(ratio, axis=0), tl.max(ratio_max, axis=0)
    largest = tl.where(total == total, largest, total)  # a maximum passes over NaN
    return (
        tl.sum(n, axis=0), tl.sum(low, axis=0), tl.sum(high, axis=0), tl.sum(kl, axis=0), tl.sum(entropy, axis=0), total,
        largest, tl.sum(approx_kl, axis=0),
    )  # fmt: skip
