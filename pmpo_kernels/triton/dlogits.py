"""Stage `dlogits`: the gradient of the logits in one read and one write; rows without a gradient are written, not read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmpo_kernels.triton.launch import (
    VOCAB_OPTIONS,
    on_device,
    optional,
    optional_mask,
    row_vector,
    scalar,
    vocab_launch,
)


@triton.jit(
    do_not_specialize_on_alignment=[
        "token_ids_ptr",
        "mask_ptr",
        "row_max_ptr",
        "row_sum_ptr",
        "entropy_ptr",
        "dlogp_ptr",
        "dentropy_ptr",
    ],
    do_not_specialize=[
        "T",
        "S",
        "stride_logits_b",
        "stride_logits_t",
        "stride_out_b",
        "stride_out_t",
        "has_mask",
        "has_dlogp",
        "has_dentropy",
    ],
)
def _dlogits_bwd_kernel(
    logits_ptr,
    out_ptr,
    token_ids_ptr,
    mask_ptr,
    row_max_ptr,
    row_sum_ptr,
    entropy_ptr,
    dlogp_ptr,
    dentropy_ptr,
    T: tl.int64,
    S: tl.int64,
    stride_logits_b: tl.int64,
    stride_logits_t: tl.int64,
    stride_out_b: tl.int64,
    stride_out_t: tl.int64,
    has_mask: tl.int32,
    has_dlogp: tl.int32,
    has_dentropy: tl.int32,
    temperature: tl.float64,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VECTOR: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b = program // S
    t = program % S
    row = b * T + t
    inside = t < T
    dtype: tl.constexpr = row_max_ptr.dtype.element_ty
    out_row_ptr = out_ptr + (b * stride_out_b + t * stride_out_t) * VECTOR
    keep = inside & (tl.load(mask_ptr + row, mask=inside & (has_mask != 0), other=1) != 0)
    dlogp = tl.load(dlogp_ptr + row, mask=keep & (has_dlogp != 0), other=0.0)
    dentropy = tl.load(dentropy_ptr + row, mask=keep & (has_dentropy != 0), other=0.0)
    if (dlogp == 0) & (dentropy == 0):
        zeros = tl.zeros((BLOCK_V,), out_ptr.dtype.element_ty)
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            tl.store(out_row_ptr + cols, zeros, mask=cols < V)
    else:
        logits_row_ptr = logits_ptr + (b * stride_logits_b + t * stride_logits_t) * VECTOR
        inv_temperature = (1.0 / scalar(temperature)).to(dtype)
        row_max = tl.load(row_max_ptr + row)
        log_sum = tl.log(tl.load(row_sum_ptr + row))
        entropy = tl.load(entropy_ptr + row)
        token_id = tl.load(token_ids_ptr + row)
        dlogp = tl.where((token_id >= 0) & (token_id < V), dlogp, float("nan")) * inv_temperature
        dentropy = dentropy * inv_temperature
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            x = tl.load(logits_row_ptr + cols, mask=cols < V, other=float("-inf")).to(dtype) * inv_temperature
            log_q = x - row_max - log_sum
            q = tl.exp(log_q)
            grad = tl.where(cols == token_id, dlogp, 0.0) - q * dlogp
            grad -= tl.where(q > 0, q * (log_q + entropy), q) * dentropy
            tl.store(out_row_ptr + cols, grad.to(out_ptr.dtype.element_ty), mask=cols < V)


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
    """As `reference.dlogits`; `out` may be the logits themselves."""
    B, S, V = logits.shape
    out = torch.empty_like(logits) if out is None else out
    token_ids = token_ids.contiguous()
    mask, has_mask = optional_mask(mask, token_ids)
    dlogp, has_dlogp = optional(dlogp, row_max)
    dentropy, has_dentropy = optional(dentropy, row_max)
    vector = row_vector(logits, out)
    launch = vocab_launch(V, logits.element_size(), vector)
    if B * S:
        with on_device(logits):
            _dlogits_bwd_kernel[(B * S,)](
                logits,
                out,
                token_ids,
                mask,
                row_max.contiguous(),
                row_sum.contiguous(),
                entropy.contiguous(),
                dlogp,
                dentropy,
                token_ids.shape[1],
                S,
                logits.stride(0) // vector,
                logits.stride(1) // vector,
                out.stride(0) // vector,
                out.stride(1) // vector,
                has_mask,
                has_dlogp,
                has_dentropy,
                temperature,
                V=V,
                BLOCK_V=launch.BLOCK_V,
                VECTOR=vector,
                num_warps=launch.num_warps,
                **VOCAB_OPTIONS,
            )
    return out
