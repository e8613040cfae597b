"""Launch settings of the vocabulary kernels, and what the launchers share: alignment, optional inputs, the device."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Given explicitly, because Triton's default differs between versions. The vocabulary kernels subtract row_max before they
# multiply, so fusing cannot tear a row's sums, target and gradient apart.
OPTIONS = {"enable_fp_fusion": True}

# Trajectory tokens a step: fixed, so that a trajectory's sums have the same order in every batch.
BLOCK_TOKENS = 1024

# What a thread of token_logp loads a step: four 16-byte loads in flight, and the work on the running sums spread over 32
# (bfloat16) elements.
BYTES_A_THREAD = 64


class VocabLaunch(NamedTuple):
    """One kernel over (rows, V): `BLOCK_V` columns a step, `num_warps`, `parts` programs a row."""

    BLOCK_V: int
    num_warps: int
    parts: int


class LaunchConfig(NamedTuple):
    """Settings of the two stages that read the logits."""

    token_logp: VocabLaunch
    dlogits: VocabLaunch


# Multiprocessors of the largest product of each architecture.
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx90a": 110, "gfx942": 304}


def launch_config(V: int, dtype: torch.dtype, capability: str, rows: int) -> LaunchConfig:
    """Settings for logits (rows, V) on an architecture such as "sm_90" or "gfx942"; pure, needs no GPU.

    Of these only `parts` depends on the number of rows, and it changes no bit: `token_logp` merges block by block in one
    order however many programs share a row, and the columns of `dlogits` do not depend on each other. No setting has been
    timed (benchmarks/results/PENDING.md); the reasons are figures of the binaries, see docs/performance-gpu.md.
    """
    warp = 64 if capability.startswith("gfx") else 32

    def launch(bytes_a_thread: int) -> tuple[int, int]:
        most = 256 * bytes_a_thread // dtype.itemsize
        block = min(max(triton.next_power_of_2(V), 64), most)
        return block, max(1, 256 * block // most // warp)

    # dlogits keeps results beside inputs: half as much.
    forward, backward = launch(BYTES_A_THREAD), launch(BYTES_A_THREAD // 2)
    # Two programs of 8 warps with 64 bytes a thread in flight are 32 KiB a multiprocessor, about what the memory latency
    # asks for; with fewer rows than that, several programs share a row.
    wanted = 2 * MULTIPROCESSORS.get(capability, 128)
    blocks = triton.cdiv(V, forward[0])
    split = 1 if rows >= wanted else blocks
    parts = 1 if rows >= wanted else min(triton.cdiv(wanted, max(rows, 1)), triton.cdiv(V, backward[0]))
    return LaunchConfig(VocabLaunch(*forward, split), VocabLaunch(*backward, parts))


@functools.cache
def capability(device: torch.device) -> str:
    """Architecture of a GPU; on a CPU, under the interpreter, that of the GPU whose settings it runs with."""
    if device.type != "cuda":
        return "sm_90"
    properties = torch.cuda.get_device_properties(device)
    name: str = getattr(properties, "gcnArchName", "").split(":")[0]
    return name if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def vector(*rows: Tensor) -> int:
    """Elements of one 16-byte access if every row of these (B, S, V) tensors starts and ends on such a boundary, else 1.

    Row strides are passed in this unit and multiplied by it, a constant, inside the kernel: so the compiler knows that
    rows are aligned, and masked accesses are 128 bits wide.
    """
    wide = 16 // rows[0].element_size()
    sizes = [size for t in rows for size in (t.shape[-1], t.stride(0), t.stride(1))]
    aligned = all(size % wide == 0 for size in sizes) and all(t.data_ptr() % 16 == 0 for t in rows)
    return wide if aligned else 1


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
