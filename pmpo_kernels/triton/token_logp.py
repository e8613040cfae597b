"""Stage `token_logp`: log-prob, logsumexp and entropy of each row in one read of the logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmpo_kernels.triton.launch import VOCAB_OPTIONS, on_device, optional_mask, row_vector, scalar, vocab_launch


@triton.jit(
    do_not_specialize_on_alignment=["token_ids_ptr", "mask_ptr"],
    do_not_specialize=["T", "stride_logits_b", "stride_logits_t", "has_mask"],
)
def _token_logp_fwd_kernel(
    logits_ptr,
    token_ids_ptr,
    mask_ptr,
    logp_ptr,
    row_max_ptr,
    row_sum_ptr,
    entropy_ptr,
    T: tl.int64,
    stride_logits_b: tl.int64,
    stride_logits_t: tl.int64,
    has_mask: tl.int32,
    temperature: tl.float64,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = logp_ptr.dtype.element_ty
    if tl.load(mask_ptr + row, mask=has_mask != 0, other=1) == 0:
        tl.store(logp_ptr + row, 0.0)
        tl.store(row_max_ptr + row, 0.0)
        tl.store(row_sum_ptr + row, 1.0)
        tl.store(entropy_ptr + row, 0.0)
    else:
        logits_row_ptr = logits_ptr + ((row // T) * stride_logits_b + (row % T) * stride_logits_t) * VECTOR
        inv_temperature = (1.0 / scalar(temperature)).to(dtype)
        LANES: tl.constexpr = BLOCK_V // VECTOR
        # Each lane keeps its own maximum m, sum s of exp(x - m) and sum u of exp(x - m) (x - m): one exp an element.
        m = tl.full((LANES,), float("-inf"), dtype)
        s = tl.zeros((LANES,), dtype)
        u = tl.zeros((LANES,), dtype)
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            x = tl.load(logits_row_ptr + cols, mask=cols < V, other=float("-inf")).to(dtype) * inv_temperature
            x = tl.reshape(x, (LANES, VECTOR))
            m_new = tl.maximum(m, tl.max(x, axis=1))
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            moved = tl.where(m == float("-inf"), 0.0, m - shift)
            alpha = tl.exp(moved)
            centred = x - shift[:, None]
            e = tl.exp(centred)
            # alpha = 0 where a lane was far below, down to -finfo.max: its u would overflow
            u = tl.where(alpha > 0, alpha * (u + s * moved), 0.0) + tl.sum(tl.where(e > 0, e * centred, 0.0), axis=1)
            s = alpha * s + tl.sum(e, axis=1)
            m = m_new
        row_max = tl.max(m, axis=0)
        moved = tl.where(m == float("-inf"), 0.0, m - row_max)
        scale = tl.exp(moved)
        row_sum = tl.sum(scale * s, axis=0)
        log_sum = tl.log(row_sum)
        entropy = log_sum - tl.sum(tl.where(scale > 0, scale * (u + s * moved), 0.0), axis=0) / row_sum
        token_id = tl.load(token_ids_ptr + row)
        known = (token_id >= 0) & (token_id < V)
        target = tl.load(logits_row_ptr + token_id, mask=known, other=0.0).to(dtype) * inv_temperature
        tl.store(logp_ptr + row, tl.where(known, target - row_max - log_sum, float("nan")))
        tl.store(row_max_ptr + row, row_max)
        tl.store(row_sum_ptr + row, row_sum)
        tl.store(entropy_ptr + row, entropy)


def token_logp(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.token_logp`; masked rows are not read."""
    V = logits.shape[2]
    token_ids = token_ids.contiguous()
    mask, has_mask = optional_mask(mask, token_ids)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logp, row_max, row_sum, entropy = (
        torch.empty(token_ids.shape, dtype=dtype, device=logits.device) for _ in range(4)
    )
    vector = row_vector(logits)
    launch = vocab_launch(V, logits.element_size(), vector)
    if token_ids.numel():
        with on_device(logits):
            _token_logp_fwd_kernel[(token_ids.numel(),)](
                logits,
                token_ids,
                mask,
                logp,
                row_max,
                row_sum,
                entropy,
                token_ids.shape[1],
                logits.stride(0) // vector,
                logits.stride(1) // vector,
                has_mask,
                temperature,
                V=V,
                BLOCK_V=launch.BLOCK_V,
                VECTOR=vector,
                num_warps=launch.num_warps,
                **VOCAB_OPTIONS,
            )
    return logp, row_max, row_sum, entropy
