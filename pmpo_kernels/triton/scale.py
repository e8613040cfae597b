"""`scale_`: multiply the gradient of the fused head by the incoming one, in place. A factor of 1 reads and writes nothing."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pmpo_kernels.triton.launch import MULTIPROCESSORS, OPTIONS, capability, on_device

BLOCK, NUM_WARPS = 4096, 8  # 16-bit gradients: 32 bytes a thread in each step, as in `dlogits`
PROGRAMS = 8  # on a multiprocessor: 2,048 threads


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
    """Do what `reference.scale_` does. The gradient must be contiguous."""
    if not gradient.numel():
        return
    most = PROGRAMS * MULTIPROCESSORS.get(capability(gradient.device), 128)
    with on_device(gradient):
        _scale_bwd_kernel[(min(most, triton.cdiv(gradient.numel(), BLOCK)),)](
            gradient, factor, gradient.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS, **OPTIONS
        )
