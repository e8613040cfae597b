"""Time and memory of a variant: wall time on the CPU, events on a GPU; peak memory beyond the inputs."""

from __future__ import annotations

import gc
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pmpo_kernels.benchmarking.allocator import map_every_large_tensor, page_faults
from pmpo_kernels.benchmarking.cases import Case, Inputs, LossFunction, Variant, build_inputs, loss_function

MEMORY_METHOD = {
    "cuda": "torch.cuda.max_memory_allocated during one forward and backward, less what was allocated before",
    "cpu": "peak resident set (VmHWM, reset after warm-up) during one forward and backward in a fresh process per "
    "variant, less the resident set before (inputs, code, thread pools)",
}
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Times(NamedTuple):
    """Milliseconds of one forward and the backward that follows it, and the page faults of both."""

    forward: float
    backward: float
    page_faults: int | None


class Bench:
    """Inputs, and a working copy of the logits that is restored before each run (`inplace` writes over it)."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.logits = inputs.logits.clone().requires_grad_()

    def restore(self) -> Tensor:
        """The working copy as at the start: the same cache state for every variant, and not timed."""
        self.logits.detach().copy_(self.inputs.logits)
        return self.logits

    def run(self, f: LossFunction) -> tuple[Tensor, Tensor]:
        """(loss, gradient of the logits)."""
        loss = f(self.restore(), self.inputs)
        (gradient,) = torch.autograd.grad(loss, self.logits)
        return loss.detach(), gradient

    def time(self, f: LossFunction) -> Times:
        """One forward and backward, timed apart."""
        logits = self.restore()
        mark, milliseconds = _clock(logits.is_cuda)
        faults = page_faults()
        mark()
        loss = f(logits, self.inputs)
        mark()
        gradient = torch.autograd.grad(loss, logits)
        mark()
        forward, backward = milliseconds()
        after = page_faults()
        del gradient
        return Times(forward, backward, None if faults is None or after is None else after - faults)

    def floor(self) -> dict[str, float]:
        """Milliseconds of one read of the logits and of one copy into memory that is there already."""
        source, target = self.inputs.logits, self.logits.detach()
        words = source.flatten().view(torch.int32 if source.numel() % 2 == 0 else source.dtype)
        mark, milliseconds = _clock(source.is_cuda)
        mark()
        words.amax()
        mark()
        target.copy_(source)
        mark()
        return dict(zip(("read", "copy"), milliseconds(), strict=True))


def _clock(cuda: bool) -> tuple[Callable[[], None], Callable[[], list[float]]]:
    """(mark, intervals between the marks in ms). On a GPU events in the stream, read after the device is done."""
    if not cuda:
        at: list[float] = []
        return lambda: at.append(time.perf_counter()), lambda: [1e3 * (b - a) for a, b in pairwise(at)]
    events: list[torch.cuda.Event] = []
    torch.cuda.synchronize()

    def mark() -> None:
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()

    def milliseconds() -> list[float]:
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(events)]

    return mark, milliseconds


def rounds(bench: Bench, functions: dict[str, LossFunction], repeats: int) -> Iterator[tuple[str, Times]]:
    """Every function once a round, the first one rotating: a slow moment of the machine hits them all."""
    names = list(functions)
    for r in range(repeats):
        shift = r % len(names)
        for name in names[shift:] + names[:shift]:
            yield name, bench.time(functions[name])


def peak_memory(case: Case, variant: Variant, bench: Bench) -> int | None:
    """Bytes at the peak beyond the inputs, by `MEMORY_METHOD`; None where the system does not tell."""
    if case.device == "cuda":
        return _peak_allocated(bench, loss_function(variant, case.config))
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
    bench, f = Bench(build_inputs(case)), loss_function(variant, case.config)
    for _ in range(2):
        bench.run(f)
    gc.collect()
    _CLEAR_REFS.write_text("5")
    before = _resident("VmRSS")
    bench.run(f)
    return _resident("VmHWM") - before
