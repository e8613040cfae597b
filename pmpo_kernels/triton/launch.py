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

# The trajectory stage: tokens of a block, which a program of the passes over tokens has, and tokens a step of the program that
# chooses p; threads of either. All fixed, so that a trajectory's sums have one order whatever stands beside it. Blocks are small
# because a batch of few tokens shall reach many multiprocessors; 512 threads leave 128 registers each, which p just fits.
BLOCK_TOKENS, BLOCK_THREADS = 256, 256
STEP_TOKENS, POWER_THREADS = 1024, 512

# Multiprocessors of the largest product of each architecture.
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx90a": 110, "gfx942": 304}


class VocabLaunch(NamedTuple):
    """One kernel over (rows, V): `BLOCK_V` columns a step by `threads` in `num_warps`, `parts` programs a row, `evict` the
    cache's policy for logits and gradient ("" is the default one)."""

    BLOCK_V: int
    threads: int
    num_warps: int
    parts: int
    evict: str = ""


class LaunchConfig(NamedTuple):
    """Settings of the two stages that read the logits."""

    token_logp: VocabLaunch
    dlogits: VocabLaunch


def launch_config(
    V: int,
    dtype: torch.dtype,
    capability: str,
    rows: int,
    *,
    threads: int = 256,
    bytes_a_thread: tuple[int, int] = (64, 32),
) -> LaunchConfig:
    """Settings for logits (rows, V) on an architecture such as "sm_90" or "gfx942"; pure, needs no GPU.

    Of these only `parts` depends on the number of rows, and it changes no bit: `token_logp` merges block by block in one
    order however many programs share a row, and the columns of `dlogits` do not depend on each other. `threads` a program
    and what each loads a step, in bytes (token_logp, dlogits), can be given to compare. None of the defaults has been timed
    (benchmarks/results/PENDING.md): their reasons are figures of the binaries, in docs/performance.md.
    """
    warp = 64 if capability.startswith("gfx") else 32

    # token_logp, 64 bytes: four 16-byte loads under way, and the work on a lane's sums spread over 32 bfloat16 columns (9.8
    # instructions each; 10.4 with 32 bytes; 9.5 with 128, but 128 registers, so that 512 threads are resident instead of
    # 768). dlogits, 32 bytes: 32 registers, so that 2,048 threads are resident; with 64 the compiler no longer starts every
    # load before the first use.
    def launch(size: int) -> tuple[int, int, int]:
        most = threads * size // dtype.itemsize
        block = min(max(triton.next_power_of_2(V), 64), most)
        return block, threads * block // most, max(1, threads * block // most // warp)

    forward, backward = (launch(size) for size in bytes_a_thread)
    # Two programs of 256 threads with 64 bytes each under way are 32 KiB a multiprocessor, which at an H200's 36 bytes a ns
    # and multiprocessor covers 0.9 us of latency; with fewer rows than that, several programs share a row.
    wanted = 2 * MULTIPROCESSORS.get(capability, 128)
    many = rows >= wanted
    split = 1 if many else triton.cdiv(V, forward[0])
    parts = 1 if many else min(triton.cdiv(wanted, max(rows, 1)), triton.cdiv(V, backward[0]))
    return LaunchConfig(VocabLaunch(*forward, split), VocabLaunch(*backward, parts))


@functools.cache
def capability(device: torch.device) -> str:
    """Architecture of a GPU; on a CPU, under the interpreter, that of the GPU whose settings it runs with."""
    if device.type != "cuda":
        return "sm_90"
    properties = torch.cuda.get_device_properties(device)
    name: str = getattr(properties, "gcnArchName", "").split(":")[0]
    return name if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def vector(logits: Tensor) -> int:
    """Elements of one 16-byte access if every row of (B, S, V) logits starts and ends on such a boundary, else 1."""
    wide = 16 // logits.element_size()
    sizes = (logits.shape[-1], logits.stride(0), logits.stride(1))
    return wide if all(size % wide == 0 for size in sizes) and logits.data_ptr() % 16 == 0 else 1


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
    tensor, has = optional(mask, stand_in.as_strided((min(stand_in.numel(), 1),), (1,)))
    return tensor.view(torch.uint8), has


@triton.jit
def scalar(x):
    """A float argument as a float64 scalar (the interpreter passes Python floats, which it would round to float32)."""
    return tl.full((), x, tl.float64)
