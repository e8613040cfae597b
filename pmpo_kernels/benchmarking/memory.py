"""Peak memory of a variant beyond its inputs."""

from __future__ import annotations

import gc
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from pmpo_kernels.benchmarking.allocator import map_every_large_tensor
from pmpo_kernels.benchmarking.cases import Case
from pmpo_kernels.benchmarking.inputs import build_inputs
from pmpo_kernels.benchmarking.measure import Bench
from pmpo_kernels.benchmarking.variants import LossFunction, Variant

MEMORY_METHOD = {
    "cuda": "torch.cuda.max_memory_allocated during one forward and backward, less what was allocated before",
    "cpu": "peak resident set (VmHWM, reset after warm-up) during one forward and backward in a fresh process per "
    "variant, less the resident set before (inputs, code, thread pools)",
}
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(case: Case, variant: Variant, bench: Bench, f: LossFunction) -> int | None:
    """Bytes at the peak beyond the inputs, by `MEMORY_METHOD`; None where the system does not tell."""
    if case.device == "cuda":
        return _peak_allocated(bench, f)
    if not _CLEAR_REFS.exists():
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(_peak_resident, case, variant, torch.get_num_threads()).result()


def _peak_allocated(bench: Bench, f: LossFunction) -> int:
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


def _peak_resident(case: Case, variant: Variant, threads: int) -> int:
    map_every_large_tensor()
    torch.set_num_threads(threads)
    bench, f = Bench(build_inputs(case), variant.one_more), variant.build(case.config)
    for _ in range(2):
        bench.run(f)
    gc.collect()
    _CLEAR_REFS.write_text("5")
    before = _resident("VmRSS")
    bench.run(f)
    return _resident("VmHWM") - before
