"""What the launchers share: block sizes, alignment, the current device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Trajectory tokens a step: fixed, so that a trajectory's sums have the same order in every batch.
BLOCK_TOKENS = 1024


# x = logits / temperature must be rounded before row_max is subtracted: fused, the largest x - row_max would not be 0, and
# the sums, the target and the gradient would not belong to one softmax.
VOCAB_OPTIONS = {"enable_fp_fusion": False}


class VocabLaunch(NamedTuple):
    """Compile-time settings of the kernels that loop over the vocabulary."""

    BLOCK_V: int
    num_warps: int


def vocab_launch(V: int, itemsize: int, vector: int) -> VocabLaunch:
    """16 bytes a thread and step for 256 threads, doubled for 2-byte logits; smaller blocks for small V."""
    most = 16384 // max(itemsize, 4)
    if vector == 1:
        most //= 2  # each element is then a lane with accumulators of its own: more of them spill on sm_80
    block = min(max(triton.next_power_of_2(V), 64), most)
    return VocabLaunch(block, max(1, min(8, block // 256)))


def row_vector(*rows: Tensor) -> int:
    """Elements of one 16-byte access if every row of these (B, S, V) tensors starts and ends on such a boundary, else 1.

    Row strides are passed in this unit and multiplied by it, a constant, inside the kernel: so the compiler knows that
    rows are aligned, and masked accesses are 128 bits wide.
    """
    vector = 16 // rows[0].element_size()
    sizes = [size for t in rows for size in (t.shape[-1], t.stride(0), t.stride(1))]
    aligned = all(size % vector == 0 for size in sizes) and all(t.data_ptr() % 16 == 0 for t in rows)
    return vector if aligned else 1


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch on the tensor's device; nothing to do on the CPU, under the interpreter."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def optional(tensor: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int]:
    """A pointer that is always valid, and whether it may be read."""
    return (stand_in, 0) if tensor is None else (tensor.contiguous(), 1)


def optional_like(tensor: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int]:
    """As `optional`, in the stand-in's dtype where that is wider, so that presence changes no pointer type."""
    if tensor is not None and tensor.dtype.itemsize < stand_in.dtype.itemsize:
        tensor = tensor.to(stand_in.dtype)
    return optional(tensor, stand_in)


def optional_mask(mask: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int]:
    """As `optional`, always a byte pointer, so that a missing mask compiles nothing new."""
    tensor, has = optional(mask, stand_in.contiguous())
    return tensor.view(torch.uint8), has


@triton.jit
def scalar(x):
    """A float argument as a float64 scalar (the interpreter passes Python floats, which it would round to float32)."""
    return tl.full((), x, tl.float64)
