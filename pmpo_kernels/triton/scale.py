"""The gradient of the fused head times the incoming one: in place, in one read and one write; neither where that is 1."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pmpo_kernels.triton.launch import MULTIPROCESSORS, OPTIONS, capability, on_device

BLOCK, NUM_WARPS = 4096, 8  # 32 bytes a thread and step of a 16-bit gradient, as in `dlogits`
PROGRAMS = 8  # a multiprocessor: 2,048 threads


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["factor_ptr"])
def _scale_bwd_kernel(gradient_ptr, factor_ptr, count: tl.int64, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1:
        program, cols = tl.program_id(0), tl.arange(0, BLOCK)
        blocks = count // BLOCK  # whole ones, which need no mask
        share = tl.cdiv(blocks, tl.num_programs(0))
        first = program * share
        for block in range(first, tl.minimum(first + share, blocks)):
            block_ptr = gradient_ptr + block * BLOCK + cols
            x = tl.load(block_ptr).to(factor.dtype) * factor
            tl.store(block_ptr, x.to(gradient_ptr.dtype.element_ty))
        if program == 0:
            rest_ptr, rest = gradient_ptr + blocks * BLOCK + cols, cols < (count - blocks * BLOCK).to(tl.int32)
            x = tl.load(rest_ptr, mask=rest, other=0.0).to(factor.dtype) * factor
            tl.store(rest_ptr, x.to(gradient_ptr.dtype.element_ty), mask=rest)


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """As `reference.scale_`; `gradient` in one piece of memory."""
    if not gradient.numel():
        return
    most = PROGRAMS * MULTIPROCESSORS.get(capability(gradient.device), 128)
    with on_device(gradient):
        _scale_bwd_kernel[(min(most, triton.cdiv(gradient.numel(), BLOCK)),)](
            gradient, factor, gradient.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS, **OPTIONS
        )
