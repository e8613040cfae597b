"""Stage `token_logp`: log-prob, logsumexp and entropy of each row in one read of the logits.

A row is taken in blocks. Each lane of a block, one a thread, has its own maximum m, sum s of exp(x) and sum u of exp(x) x log2(e)
with x = (z - m) / temperature. The lanes are merged with the same lanes of the next block, and at the end of the row with each
other. With few rows each block is a program of its own, and a second kernel merges them in the same order: same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmpo_kernels.contract import compute_dtype
from pmpo_kernels.triton.launch import (
    OPTIONS,
    capability,
    launch_config,
    on_device,
    optional_mask,
    scalar,
    vector,
)

_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)
_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def exponent(z, row_max, scale):
    """Exponent of logits z for exp2, (z - row_max) `scale` with scale = log2(e) / temperature. That of the largest is exactly 0. It
    is limited to one whose exp2 is 0 already, because 0 times -inf would give NaN."""
    lowest: tl.constexpr = -1100.0 if z.dtype == tl.float64 else -160.0
    return tl.maximum((z - row_max) * scale, lowest, propagate_nan=_NAN)


@triton.jit
def _no_lanes(LANES: tl.constexpr, dtype: tl.constexpr):
    """Return m, s, u of no logits. m is the smallest finite number, so that m - m is 0 even where every logit is -inf."""
    smallest: tl.constexpr = -1.7976931348623157e308 if dtype == tl.float64 else -3.4028234663852886e38
    return tl.full((LANES,), smallest, dtype), tl.zeros((LANES,), dtype), tl.zeros((LANES,), dtype)


@triton.jit
def _block_sums(z, scale, STEPS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Return m, s, u of one block, (LANES,) each. A lane has STEPS times VECTOR neighbours, which its thread loads itself."""
    z = tl.reshape(z, (STEPS, LANES, VECTOR))
    m = tl.maximum(tl.max(tl.max(z, axis=2), axis=0), _no_lanes(LANES, z.dtype)[0])
    t = exponent(z, m[None, :, None], scale)
    e = tl.exp2(t)
    return m, tl.sum(tl.sum(e, axis=2), axis=0), tl.sum(tl.sum(e * t, axis=2), axis=0)


@triton.jit
def _merge(m, s, u, block_m, block_s, block_u, scale):
    """Merge the lanes m, s, u of the blocks so far with those of one more block."""
    m_new = tl.maximum(m, block_m)
    moved, block_moved = exponent(m, m_new, scale), exponent(block_m, m_new, scale)
    alpha, beta = tl.exp2(moved), tl.exp2(block_moved)
    u = tl.fma(alpha, tl.fma(s, moved, u), beta * tl.fma(block_s, block_moved, block_u))
    return m_new, tl.fma(alpha, s, beta * block_s), u


@triton.jit
def _write_row(
    m, s, u, scale, row, logits_row_ptr, token_ids_ptr, logp_ptr, row_max_ptr, row_sum_ptr, entropy_ptr, V: tl.constexpr
):  # fmt: skip
    """Merge a row's lanes with each other and write its logp, row_max, row_sum and entropy."""
    row_max = tl.max(m, axis=0)
    moved = exponent(m, row_max, scale)
    alpha = tl.exp2(moved)
    row_sum = tl.sum(alpha * s, axis=0)
    log_sum = tl.log(row_sum)
    mean = tl.sum(alpha * tl.fma(s, moved, u), axis=0) * _LN2 / row_sum
    token_id = tl.load(token_ids_ptr + row)
    known = (token_id >= 0) & (token_id < V)
    target = tl.load(logits_row_ptr + token_id, mask=known, other=0.0).to(row_max.dtype)
    logp = (target - row_max) * (scale * _LN2) - log_sum
    tl.store(logp_ptr + row, tl.where(known, logp, float("nan")))
    tl.store(row_max_ptr + row, row_max)
    tl.store(row_sum_ptr + row, row_sum)
    tl.store(entropy_ptr + row, log_sum - mean)


@triton.jit
def _write_masked_row(row, logp_ptr, row_max_ptr, row_sum_ptr, entropy_ptr):
    tl.store(logp_ptr + row, 0.0)
    tl.store(row_max_ptr + row, 0.0)
    tl.store(row_sum_ptr + row, 1.0)
    tl.store(entropy_ptr + row, 0.0)


@triton.jit
def _row_ptr(logits_ptr, row, T, stride_logits_b, stride_logits_t, VECTOR: tl.constexpr):
    """Pointer to a row. It lies on a boundary of VECTOR elements, which the compiler cannot tell from the strides."""
    ACCESS: tl.constexpr = VECTOR * logits_ptr.dtype.element_ty.primitive_bitwidth // 8  # bytes
    return tl.multiple_of(logits_ptr + (row // T) * stride_logits_b + (row % T) * stride_logits_t, ACCESS)


_POINTERS = ["logits_ptr", "token_ids_ptr", "mask_ptr", "lanes_ptr"]
_RUN_TIME = ["T", "stride_logits_b", "stride_logits_t", "has_mask", "parts"]


@triton.jit(do_not_specialize_on_alignment=_POINTERS, do_not_specialize=_RUN_TIME)
def _token_logp_fwd_kernel(
    logits_ptr, token_ids_ptr, mask_ptr, logp_ptr, row_max_ptr, row_sum_ptr, entropy_ptr, lanes_ptr,
    T: tl.int64, stride_logits_b: tl.int64, stride_logits_t: tl.int64, has_mask: tl.int32, parts: tl.int32,
    temperature: tl.float64, V: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    STAGES: tl.constexpr, PREFETCH: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, part = (program // parts).to(tl.int64), program % parts
    dtype: tl.constexpr = logp_ptr.dtype.element_ty
    if tl.load(mask_ptr + row, mask=has_mask != 0, other=1) == 0:
        if parts == 1:
            _write_masked_row(row, logp_ptr, row_max_ptr, row_sum_ptr, entropy_ptr)
    else:
        logits_row_ptr = _row_ptr(logits_ptr, row, T, stride_logits_b, stride_logits_t, VECTOR)
        scale = (1.0 / scalar(temperature) * _LOG2E).to(dtype)
        STEPS: tl.constexpr = BLOCK_V // LANES // VECTOR
        BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
        FULL: tl.constexpr = V // BLOCK_V
        first = tl.where(parts == 1, 0, part)
        last = tl.where(parts == 1, BLOCKS, part + 1)
        m, s, u = _no_lanes(LANES, dtype)
        cols = tl.arange(0, BLOCK_V)
        full = tl.minimum(last, FULL)
        if PREFETCH:
            left = (full - first) * BLOCK_V
            ahead = tl.load(logits_row_ptr + first * BLOCK_V + cols, mask=cols < left, eviction_policy=EVICT)
        for block in tl.range(first, full, num_stages=STAGES):
            if PREFETCH:
                z, left = ahead, (full - block - 1) * BLOCK_V
                ahead = tl.load(logits_row_ptr + (block + 1) * BLOCK_V + cols, mask=cols < left, eviction_policy=EVICT)
            else:
                z = tl.load(logits_row_ptr + block * BLOCK_V + cols, eviction_policy=EVICT)
            block_m, block_s, block_u = _block_sums(z.to(dtype), scale, STEPS, LANES, VECTOR)
            m, s, u = _merge(m, s, u, block_m, block_s, block_u, scale)
        if last > FULL:
            tail = FULL * BLOCK_V + cols
            z = tl.load(logits_row_ptr + tail, mask=tail < V, other=float("-inf"), eviction_policy=EVICT).to(dtype)
            block_m, block_s, block_u = _block_sums(z, scale, STEPS, LANES, VECTOR)
            m, s, u = _merge(m, s, u, block_m, block_s, block_u, scale)
        if parts == 1:
            _write_row(
                m, s, u, scale, row, logits_row_ptr, token_ids_ptr, logp_ptr, row_max_ptr, row_sum_ptr, entropy_ptr, V
            )  # fmt: skip
        else:
            block_ptr = lanes_ptr + program.to(tl.int64) * 3 * LANES + tl.arange(0, LANES)
            tl.store(block_ptr, m)
            tl.store(block_ptr + LANES, s)
            tl.store(block_ptr + 2 * LANES, u)


@triton.jit(do_not_specialize_on_alignment=_POINTERS, do_not_specialize=_RUN_TIME)
def _token_logp_merge_kernel(
    logits_ptr, token_ids_ptr, mask_ptr, logp_ptr, row_max_ptr, row_sum_ptr, entropy_ptr, lanes_ptr,
    T: tl.int64, stride_logits_b: tl.int64, stride_logits_t: tl.int64, has_mask: tl.int32, parts: tl.int32,
    temperature: tl.float64, V: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Merge the blocks of a row that were programs of their own, as one program would have merged them."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = logp_ptr.dtype.element_ty
    if tl.load(mask_ptr + row, mask=has_mask != 0, other=1) == 0:
        _write_masked_row(row, logp_ptr, row_max_ptr, row_sum_ptr, entropy_ptr)
    else:
        logits_row_ptr = _row_ptr(logits_ptr, row, T, stride_logits_b, stride_logits_t, VECTOR)
        scale = (1.0 / scalar(temperature) * _LOG2E).to(dtype)
        block_ptr = lanes_ptr + row * parts * 3 * LANES + tl.arange(0, LANES)
        m, s, u = _no_lanes(LANES, dtype)
        for _ in range(0, parts):
            block_m, block_s, block_u = tl.load(block_ptr), tl.load(block_ptr + LANES), tl.load(block_ptr + 2 * LANES)
            m, s, u = _merge(m, s, u, block_m, block_s, block_u, scale)
            block_ptr += 3 * LANES
        _write_row(
            m, s, u, scale, row, logits_row_ptr, token_ids_ptr, logp_ptr, row_max_ptr, row_sum_ptr, entropy_ptr, V
        )  # fmt: skip


def token_logp(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what `reference.token_logp` does. Masked rows are not read."""
    V = logits.shape[2]
    token_ids = token_ids.contiguous()
    rows = token_ids.numel()
    mask, has_mask = optional_mask(mask, token_ids)
    dtype = compute_dtype(logits.dtype)
    logp, row_max, row_sum, entropy = results = tuple(
        torch.empty(token_ids.shape, dtype=dtype, device=logits.device) for _ in range(4)
    )
    if not rows:
        return logp, row_max, row_sum, entropy
    wide = vector(logits)
    launch = launch_config(V, logits.dtype, capability(logits.device), rows).token_logp
    scratch = logp if launch.parts == 1 else logp.new_empty(rows * launch.parts, 3, launch.threads)
    arguments = (
        logits, token_ids, mask, *results, scratch, token_ids.shape[1],
        logits.stride(0), logits.stride(1), has_mask, launch.parts, temperature,
    )  # fmt: skip
    common = {"V": V, "LANES": launch.threads, "VECTOR": wide, "num_warps": launch.num_warps, **OPTIONS}
    with on_device(logits):
        _token_logp_fwd_kernel[(rows * launch.parts,)](*arguments, **launch.constants, **common)
        if launch.parts > 1:
            _token_logp_merge_kernel[(rows,)](*arguments, **common)
    return logp, row_max, row_sum, entropy
