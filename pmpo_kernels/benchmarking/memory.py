"""Peak memory of a variant beyond its inputs, and whether there is enough for a case."""

from __future__ import annotations

import gc
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pmpo_kernels.benchmarking.allocator import map_every_large_tensor
from pmpo_kernels.benchmarking.cases import Case
from pmpo_kernels.benchmarking.inputs import build_inputs
from pmpo_kernels.benchmarking.measure import Bench, Steps
from pmpo_kernels.benchmarking.variants import LossFunction, Variant
from pmpo_kernels.memory import available_memory

MEMORY_METHOD = {
    "cuda": "torch.cuda.max_memory_allocated during one forward and backward, less what was allocated before",
    "cpu": "peak resident set (VmHWM, reset after warm-up) during one forward and backward in a fresh process per "
    "variant, less the resident set before (inputs, code, thread pools)",
}
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory_problem(*cases: Case) -> str | None:
    """Why the largest of the cases cannot be measured, if it needs more memory than there is."""
    largest = max(cases, key=lambda case: case.needed_bytes)
    available = available_memory(largest.device)
    if available is None or largest.needed_bytes <= available:
        return None
    return (
        f"expected a shape that fits into the {available / 2**30:.1f} GiB available, got {largest.batch} x "
        f"{largest.tokens} x {largest.vocab}, which needs about {largest.needed_bytes / 2**30:.1f} GiB"
    )


def peak_memory(case: Case, variant: Variant, bench: Bench, f: LossFunction) -> int | None:
    """Return the bytes at the peak beyond the inputs, measured as `MEMORY_METHOD` says; None where the system does not tell."""
    return peak_allocated(bench, f) if bench.cuda else peak_resident(partial(_again, case, variant))


def _again(case: Case, variant: Variant) -> tuple[Steps, Callable[..., Tensor]]:
    return Bench(build_inputs(case), variant.one_more), variant.build(case.config)


def peak_allocated(bench: Steps, f: Callable[..., Tensor]) -> int:
    """Return the peak of a GPU's allocator in this process, beyond what was allocated before, in bytes."""
    bench.run(f)
    bench.restore()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    bench.run(f)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _resident(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert match is not None
    return 1024 * int(match[1])


Make = Callable[[], tuple[Steps, Callable[..., Tensor]]]


def peak_resident(make: Make, warmups: int = 2) -> int | None:
    """Return the peak of the resident set of a fresh process, beyond what it was before, in bytes; None where the system does not
    tell. `make()`, which the process must be able to unpickle, gives there what to run."""
    if not _CLEAR_REFS.exists():
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(_peak_of_this_process, make, warmups, torch.get_num_threads()).result()


def _peak_of_this_process(make: Make, warmups: int, threads: int) -> int:
    map_every_large_tensor()
    torch.set_num_threads(threads)
    bench, f = make()
    for _ in range(warmups):
        bench.run(f)
    gc.collect()
    _CLEAR_REFS.write_text("5")
    before = _resident("VmRSS")
    bench.run(f)
    return _resident("VmHWM") - before
