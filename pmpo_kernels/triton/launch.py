"""Launch settings of the vocabulary kernels, and what the launchers share: alignment, optional inputs, the device."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Given explicitly, because Triton's default differs between versions. Fusing is safe: the vocabulary kernels subtract row_max
# before they multiply, so a row's sums, target and gradient are made of the same numbers.
OPTIONS = {"enable_fp_fusion": True}

# The trajectory stage: the kernels that pass over tokens take a block a program, the one that chooses p a trajectory a program, in
# steps. All sizes are fixed, so that a trajectory's sums have one order whatever stands beside it. Blocks are small, so that few
# tokens reach many multiprocessors. 512 threads have 128 registers each, which the choice of p just fits into.
BLOCK_TOKENS, BLOCK_THREADS = 256, 256
STEP_TOKENS, POWER_THREADS = 1024, 512

# Multiprocessors of the largest GPU of each architecture.
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx90a": 110, "gfx942": 304}


class Step(NamedTuple):
    """One step of a program along a row, as it may be chosen: `threads`, and the bytes that each of them loads.

    Loads can be under way meanwhile: asynchronous copies in `num_stages` (1 for none), or the next step's loads into registers
    (`prefetch`). `evict` is the cache's policy for logits and gradient, "" the default one. The bits of `token_logp` depend on
    threads and bytes alone, those of `dlogits` on none of it."""

    threads: int
    bytes_a_thread: int
    num_stages: int = 1
    prefetch: bool = False
    evict: str = ""


class VocabLaunch(NamedTuple):
    """Settings of one kernel over (rows, V): `BLOCK_V` columns a step by `threads` in `num_warps`, and `parts` programs a row. The
    rest is that of `Step`."""

    BLOCK_V: int
    threads: int
    num_warps: int
    parts: int
    num_stages: int = 1
    prefetch: bool = False
    evict: str = ""

    @property
    def constants(self) -> dict[str, int | bool | str]:
        """The constants that a kernel is compiled for, besides V, the dtype and the alignment of rows."""
        names = ("BLOCK_V", "STAGES", "PREFETCH", "EVICT")
        return dict(zip(names, (self.BLOCK_V, self.num_stages, self.prefetch, self.evict), strict=True))


class LaunchConfig(NamedTuple):
    """Settings of the two kernels that read the logits."""

    token_logp: VocabLaunch
    dlogits: VocabLaunch


# Why these steps: figures of the binaries for bfloat16 on sm_90, by Triton 3.6 / 3.9. KiB are those under way on a multiprocessor
# while its threads wait for memory; instructions are those of a column.
# token_logp: 160 / 96 KiB and 10.4 / 10.8 instructions; half of the bytes are under way while a thread computes, too. Without
# copies: 72 / 48 KiB, none of it while a thread computes, and 9.4 / 9.8 instructions; with 256 threads instead 64 / 48 KiB. With 64
# bytes a thread 32 columns share the work on a lane's sums; with 32 bytes it is 11.8 / 12.3 instructions.
# dlogits: 32 KiB, under way during all but 16 / 19 % of the instructions too, and 12.4 / 13.0 instructions; 2,048 threads have 32
# registers each, which hold no more. Copies in 3 stages: 64 KiB, half of it while a thread computes, and 15.1 / 16.6 instructions.
# 32 bytes a thread without prefetch: 32 / 64 KiB, almost none of it while a thread computes, and 12.6 / 13.1 instructions.
TOKEN_LOGP = Step(128, 64, num_stages=3)
DLOGITS = Step(256, 16, prefetch=True)
ENOUGH = 2**15  # bytes under way on a multiprocessor: at an H200's 36 bytes a ns they cover 0.9 us of latency


def launch_config(
    V: int, dtype: torch.dtype, capability: str, rows: int, *, token_logp: Step = TOKEN_LOGP, dlogits: Step = DLOGITS
) -> LaunchConfig:
    """Choose the settings for logits (rows, V) on an architecture such as "sm_90" or "gfx942". No GPU is needed.

    Only `parts` depends on the number of rows, and it changes no bit: `token_logp` merges block by block in one order however
    many programs share a row, and the columns of `dlogits` do not depend on each other. Other steps can be given to compare them.
    None of the defaults has been timed (benchmarks/results/PENDING.md): they rest on figures of the binaries
    (docs/performance.md).
    """
    warp = 64 if capability.startswith("gfx") else 32

    def launch(step: Step) -> VocabLaunch:
        most = step.threads * step.bytes_a_thread // dtype.itemsize
        block = min(max(triton.next_power_of_2(V), 64), most)
        threads = step.threads * block // most
        # so many programs have enough bytes under way; where there are fewer rows, several share a row
        program = step.threads * step.bytes_a_thread * max(step.num_stages - 1, 1)
        wanted = MULTIPROCESSORS.get(capability, 128) * triton.cdiv(ENOUGH, program)
        parts = min(triton.cdiv(wanted, max(rows, 1)), triton.cdiv(V, block))
        return VocabLaunch(block, threads, max(1, threads // warp), parts, *step[2:])

    forward, backward = launch(token_logp), launch(dlogits)
    if forward.parts > 1:  # then each block is a program of its own
        forward = forward._replace(parts=triton.cdiv(V, forward.BLOCK_V))
    return LaunchConfig(forward, backward)


@functools.cache
def capability(device: torch.device) -> str:
    """Architecture of a GPU, such as "gfx942". On a CPU, under the interpreter, it is "sm_90", whose settings are then used."""
    if device.type != "cuda":
        return "sm_90"
    properties = torch.cuda.get_device_properties(device)
    name: str = getattr(properties, "gcnArchName", "").split(":")[0]
    return name if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def vector(logits: Tensor) -> int:
    """Number of elements of a 16-byte access if every row of logits (B, S, V) starts and ends on such a boundary, else 1."""
    wide = 16 // logits.element_size()
    sizes = (logits.shape[-1], logits.stride(0), logits.stride(1))
    return wide if all(size % wide == 0 for size in sizes) and logits.data_ptr() % 16 == 0 else 1


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one, as a launch needs it. Under the interpreter, on a CPU, nothing is to be done."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def optional(tensor: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int]:
    """Return what a kernel is given for an optional tensor: a tensor, itself or `stand_in`, and 1 if it may be read, else 0."""
    return (stand_in, 0) if tensor is None else (tensor.contiguous(), 1)


def optional_like(tensor: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int]:
    """Do what `optional` does, in the stand-in's dtype where that is wider, so that a missing tensor changes no pointer type."""
    if tensor is not None and tensor.dtype.itemsize < stand_in.dtype.itemsize:
        tensor = tensor.to(stand_in.dtype)
    return optional(tensor, stand_in)


def optional_mask(mask: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int]:
    """Do what `optional` does for a mask, always as bytes, so that a missing mask compiles no other kernel."""
    tensor, has = optional(mask, stand_in.as_strided((min(stand_in.numel(), 1),), (1,)))
    return tensor.view(torch.uint8), has


@triton.jit
def scalar(x):
    """Make a float argument a float64 scalar. The interpreter passes Python floats, and would round them to float32."""
    return tl.full((), x, tl.float64)
