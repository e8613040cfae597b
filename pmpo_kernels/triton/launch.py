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


class Step(NamedTuple):
    """What a program does at a time, free to choose: `threads`, bytes that each of them loads, and what is under way meanwhile:
    `num_stages` of asynchronous copies (1: none), or the next step's loads into registers (`prefetch`). `evict` is the cache's
    policy for logits and gradient ("" is the default one). Results depend on the first two alone, those of `dlogits` on none."""

    threads: int
    bytes_a_thread: int
    num_stages: int = 1
    prefetch: bool = False
    evict: str = ""


class VocabLaunch(NamedTuple):
    """One kernel over (rows, V): `BLOCK_V` columns a step by `threads` in `num_warps`, `parts` programs a row; the rest as in
    `Step`."""

    BLOCK_V: int
    threads: int
    num_warps: int
    parts: int
    num_stages: int = 1
    prefetch: bool = False
    evict: str = ""

    @property
    def constants(self) -> dict[str, int | bool | str]:
        """What a kernel is compiled for besides V, dtype and where rows begin."""
        names = ("BLOCK_V", "STAGES", "PREFETCH", "EVICT")
        return dict(zip(names, (self.BLOCK_V, self.num_stages, self.prefetch, self.evict), strict=True))


class LaunchConfig(NamedTuple):
    """Settings of the two stages that read the logits."""

    token_logp: VocabLaunch
    dlogits: VocabLaunch


# bfloat16 on sm_90, triton 3.6 / 3.9; KiB: under way on a multiprocessor where its threads wait for memory.
# token_logp: 160 / 96 KiB at 10.4 / 10.8 instructions a column, half of it while a thread computes. Without copies 72 / 48 KiB,
# none while it computes, at 9.4 / 9.8; that with 256 threads 64 / 48 KiB. 64 bytes share the work on a lane's sums among 32
# columns: with 32 bytes 11.8 / 12.3 instructions.
# dlogits: 32 KiB at 12.4 / 13.0 instructions, during all but 16 / 19 % of them too; 2,048 threads have 32 registers each, which
# hold no more. Copies in 3 stages: 64 KiB, half of it while a thread computes, at 15.1 / 16.6. 32 bytes without prefetch:
# 32 / 64 KiB, almost none while it computes, at 12.6 / 13.1.
TOKEN_LOGP = Step(128, 64, num_stages=3)
DLOGITS = Step(256, 16, prefetch=True)
ENOUGH = 2**15  # bytes a multiprocessor under way: at an H200's 36 bytes a ns they cover 0.9 us of latency


def launch_config(
    V: int, dtype: torch.dtype, capability: str, rows: int, *, token_logp: Step = TOKEN_LOGP, dlogits: Step = DLOGITS
) -> LaunchConfig:
    """Settings for logits (rows, V) on an architecture such as "sm_90" or "gfx942"; pure, needs no GPU.

    Of these only `parts` depends on the number of rows, and it changes no bit: `token_logp` merges block by block in one
    order however many programs share a row, and the columns of `dlogits` do not depend on each other. The steps can be given
    to compare. None of the defaults has been timed (benchmarks/results/PENDING.md): their reasons are figures of the binaries,
    in docs/performance.md.
    """
    warp = 64 if capability.startswith("gfx") else 32

    def launch(step: Step) -> VocabLaunch:
        most = step.threads * step.bytes_a_thread // dtype.itemsize
        block = min(max(triton.next_power_of_2(V), 64), most)
        threads = step.threads * block // most
        # programs whose loads are enough; with fewer rows than that, several share one
        program = step.threads * step.bytes_a_thread * max(step.num_stages - 1, 1)
        wanted = MULTIPROCESSORS.get(capability, 128) * triton.cdiv(ENOUGH, program)
        parts = min(triton.cdiv(wanted, max(rows, 1)), triton.cdiv(V, block))
        return VocabLaunch(block, threads, max(1, threads // warp), parts, *step[2:])

    forward, backward = launch(token_logp), launch(dlogits)
    if forward.parts > 1:  # each block a program
        forward = forward._replace(parts=triton.cdiv(V, forward.BLOCK_V))
    return LaunchConfig(forward, backward)


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
