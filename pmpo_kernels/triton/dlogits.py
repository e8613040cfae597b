"""Stage `dlogits`: the gradient of the logits in one read and one write; rows without a gradient are written, not read.

A row is a body of whole 16-byte vectors, accessed 128 bits at a time, and up to a vector less one element before it and after it,
because rows may begin anywhere (V = 50,257). A column's gradient depends on nothing but its logit and the row's numbers, so neither
alignment nor the number of programs changes a bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmpo_kernels.contract import ELSEWHERE
from pmpo_kernels.triton.launch import OPTIONS, capability, launch_config, on_device, optional, optional_mask, scalar
from pmpo_kernels.triton.token_logp import exponent

_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)
_ELSEWHERE = tl.constexpr(ELSEWHERE)


@triton.jit
def _gradient(z, cols, token_id, row_max, scale, constant, slope, target):
    """Gradient of columns `cols`: exp(x) (constant + slope x log2(e)) with x = (z - row_max) / temperature, plus `target` in the
    token's column."""
    t = exponent(z.to(row_max.dtype), row_max, scale)
    return tl.fma(tl.exp2(t), tl.fma(slope, t, constant), tl.where(cols == token_id, target, 0.0))


@triton.jit
def _edge_columns(head, body, V: tl.constexpr, VECTOR: tl.constexpr):
    """Return the columns before and after a row's whole vectors, and which of them exist."""
    i = tl.arange(0, 2 * VECTOR)
    cols = tl.where(i < VECTOR, i, head + body + i - VECTOR)
    return cols, tl.where(i < VECTOR, i < head, cols < V)


_POINTERS = ["logits_ptr", "out_ptr", "token_ids_ptr", "mask_ptr", "row_max_ptr", "row_sum_ptr", "entropy_ptr",
             "dlogp_ptr", "dentropy_ptr"]  # fmt: skip
_RUN_TIME = ["T", "S", "stride_logits_b", "stride_logits_t", "stride_out_b", "stride_out_t", "first_element", "has_mask",
             "has_dlogp", "has_dentropy", "parts"]  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=_POINTERS, do_not_specialize=_RUN_TIME)
def _dlogits_bwd_kernel(
    logits_ptr, out_ptr, token_ids_ptr, mask_ptr, row_max_ptr, row_sum_ptr, entropy_ptr, dlogp_ptr, dentropy_ptr,
    T: tl.int64, S: tl.int64, stride_logits_b: tl.int64, stride_logits_t: tl.int64, stride_out_b: tl.int64,
    stride_out_t: tl.int64, first_element: tl.int64, has_mask: tl.int32, has_dlogp: tl.int32, has_dentropy: tl.int32,
    parts: tl.int32, temperature: tl.float64, V: tl.constexpr, BLOCK_V: tl.constexpr, VECTOR: tl.constexpr,
    STAGES: tl.constexpr, PREFETCH: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    position, part = (program // parts).to(tl.int64), program % parts
    b, t = position // S, position % S
    row = b * T + t
    dtype: tl.constexpr = row_max_ptr.dtype.element_ty
    out_offset = b * stride_out_b + t * stride_out_t
    head = tl.minimum((VECTOR - (first_element + out_offset) % VECTOR) % VECTOR, V).to(tl.int32)
    body = (V - head) // VECTOR * VECTOR
    ACCESS: tl.constexpr = VECTOR * out_ptr.dtype.element_ty.primitive_bitwidth // 8  # bytes
    out_row_ptr = out_ptr + out_offset
    out_body_ptr = tl.multiple_of(out_row_ptr + head, ACCESS)
    BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    share = (BLOCKS + parts - 1) // parts
    first = part * share
    last = tl.minimum(first + share, BLOCKS)
    cols = tl.arange(0, BLOCK_V)

    inside = t < T
    keep = inside & (tl.load(mask_ptr + row, mask=inside & (has_mask != 0), other=1) != 0)
    dlogp = tl.load(dlogp_ptr + row, mask=keep & (has_dlogp != 0), other=0.0)
    dentropy = tl.load(dentropy_ptr + row, mask=keep & (has_dentropy != 0), other=0.0)
    if (dlogp == 0) & (dentropy == 0):
        zero = tl.zeros((BLOCK_V,), out_ptr.dtype.element_ty)
        for block in range(first, last):
            offs = block * BLOCK_V + cols
            tl.store(out_body_ptr + offs, zero, mask=offs < body, eviction_policy=EVICT)
        if part == 0:
            edge, exists = _edge_columns(head, body, V, VECTOR)
            tl.store(out_row_ptr + edge, 0.0, mask=exists)
    else:
        logits_row_ptr = logits_ptr + b * stride_logits_b + t * stride_logits_t
        logits_body_ptr = tl.multiple_of(logits_row_ptr + head, ACCESS)
        inv_temperature = 1.0 / scalar(temperature)
        scale = (inv_temperature * _LOG2E).to(dtype)
        row_max, row_sum = tl.load(row_max_ptr + row), tl.load(row_sum_ptr + row)
        token_id = tl.load(token_ids_ptr + row)
        known = (token_id >= 0) & (token_id < V)
        named = known | (token_id == _ELSEWHERE)
        token_id = tl.where(known, token_id, -1).to(tl.int32)
        target = tl.where(named, dlogp, float("nan")) * inv_temperature.to(dtype)
        # -q (g + h (log q + H)) with q = exp(x) / row_sum and log q = x - log row_sum
        inv_sum = inv_temperature.to(dtype) / row_sum
        slope = -dentropy * inv_sum
        constant = -target / row_sum + slope * (tl.load(entropy_ptr + row) - tl.log(row_sum))
        slope = slope * _LN2
        # steps are other columns: in place too, a step's loads may go before the stores of those before it
        end = tl.minimum(last * BLOCK_V, body)
        if PREFETCH:
            offs = first * BLOCK_V + cols
            ahead = tl.load(logits_body_ptr + offs, mask=offs < end, eviction_policy=EVICT)
        for block in tl.range(first, last, num_stages=STAGES):
            offs = block * BLOCK_V + cols
            if PREFETCH:
                z, following = ahead, offs + BLOCK_V
                ahead = tl.load(logits_body_ptr + following, mask=following < end, eviction_policy=EVICT)
            else:
                z = tl.load(logits_body_ptr + offs, mask=offs < end, eviction_policy=EVICT)
            grad = _gradient(z, head + offs, token_id, row_max, scale, constant, slope, target)
            tl.store(out_body_ptr + offs, grad.to(out_ptr.dtype.element_ty), mask=offs < end, eviction_policy=EVICT)
        if part == 0:
            edge, exists = _edge_columns(head, body, V, VECTOR)
            z = tl.load(logits_row_ptr + edge, mask=exists)
            grad = _gradient(z, edge, token_id, row_max, scale, constant, slope, target)
            tl.store(out_row_ptr + edge, grad.to(out_ptr.dtype.element_ty), mask=exists)


def _same_alignment(logits: Tensor, out: Tensor) -> tuple[int, int]:
    """Return the elements of a 16-byte access and where, counted from such a boundary, the first element of `out` lies. That is
    (1, 0) unless every row of `out` lies to the boundaries as the same row of the logits does."""
    size = out.element_size()
    wide = 16 // size
    first = [t.data_ptr() // size % wide for t in (logits, out)]
    moved = [abs(logits.stride(d) - out.stride(d)) % wide for d in (0, 1) if out.shape[d] > 1]
    return (wide, first[1]) if first[0] == first[1] and not any(moved) else (1, 0)


def dlogits(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    entropy: Tensor,
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    temperature: float,
    out: Tensor | None = None,
) -> Tensor:
    """Do what `reference.dlogits` does; `out` may be the logits themselves."""
    B, S, V = logits.shape
    out = torch.empty_like(logits) if out is None else out
    token_ids = token_ids.contiguous()
    mask, has_mask = optional_mask(mask, token_ids)
    dlogp, has_dlogp = optional(dlogp, row_max)
    dentropy, has_dentropy = optional(dentropy, row_max)
    if not B * S:
        return out
    wide, first_element = _same_alignment(logits, out)
    launch = launch_config(V, logits.dtype, capability(logits.device), B * S).dlogits
    with on_device(logits):
        _dlogits_bwd_kernel[(B * S * launch.parts,)](
            logits, out, token_ids, mask, row_max.contiguous(), row_sum.contiguous(), entropy.contiguous(), dlogp, dentropy,
            token_ids.shape[1], S, logits.stride(0), logits.stride(1), out.stride(0), out.stride(1), first_element,
            has_mask, has_dlogp, has_dentropy, launch.parts, temperature,
            V=V, VECTOR=wide, **launch.constants, num_warps=launch.num_warps, **OPTIONS,
        )  # fmt: skip
    return out
