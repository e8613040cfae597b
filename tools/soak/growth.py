"""The loop of `soak.py`: many steps in a fresh process, what that process holds after them, and whether it grows."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import sys
import types
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from loss_steps import FIRST, bits, run_step
from torch import Tensor

TENSORS, OBJECTS, BLOCKS, CACHED = "tensors", "objects", "Python's blocks", "cached results"
GRAPHS, VARIANTS, HEAP, RESIDENT, CUDA = "graphs", "Triton variants", "heap bytes", "resident bytes", "torch.cuda bytes"

# By how much each may grow over half of the steps. Objects: what a context variable or a waiting thread holds just then.
# Blocks: 64 of Python's allocator. Bytes of the C heap: a page. Resident: 64 pages, since a page is kept for one chunk on it.
ALLOWED = {
    TENSORS: 0,
    OBJECTS: 8,
    BLOCKS: 64,
    CACHED: 0,
    GRAPHS: 0,
    VARIANTS: 0,
    HEAP: 4096,
    RESIDENT: 64 * 4096,
    CUDA: 0,
}

# What is kept to be used again hides what leaks, so it is switched off. On a CPU PyTorch keeps what it made for 1,024 bfloat16
# products of different sizes, and oneDNN as many, some 0.3 MB each; MKL keeps the buffers of its products, a large one of a rare
# size for good. The C library keeps freed chunks that it counts as in use.
WITHOUT_CACHES = {
    "LRU_CACHE_CAPACITY": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
    "MKL_DISABLE_FAST_MM": "1",
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
}

RunStep = Callable[[int, int, str | None, str], list[Tensor]]


class Mallinfo2(ctypes.Structure):
    """The struct that glibc's `mallinfo2` returns, which is there since 2.33."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names)


class Gauges:
    """What the process holds, as far as the system tells. Objects and tensors are counted from the last `gc.freeze()` on."""

    def __init__(self, device: str) -> None:
        libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
        self.libc = libc if hasattr(libc, "mallinfo2") else None
        statm = Path("/proc/self/statm")
        self.gauges: dict[str, Callable[[], int]] = {BLOCKS: sys.getallocatedblocks}
        if self.libc is not None:
            self.libc.mallinfo2.restype = Mallinfo2
            self.gauges[HEAP] = self._heap
        if statm.exists():
            self.gauges[RESIDENT] = lambda: int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if device == "cuda":
            self.gauges[CUDA] = torch.cuda.memory_allocated
        self.gauges |= {OBJECTS: lambda: len(gc.get_objects()), TENSORS: live_tensors}
        self.gauges |= {CACHED: cached_results, GRAPHS: graphs, VARIANTS: compiled_variants}

    def _heap(self) -> int:
        info = self.libc.mallinfo2()  # of all arenas, and of what has a mapping of its own
        return int(info.uordblks + info.hblkhd)

    def read(self, row: np.ndarray) -> None:
        """Read all gauges into `row`, after what Python, PyTorch and the C library keep to use again has been given back."""
        sys._clear_type_cache()  # up to 4,096 attributes' names
        gc.collect()
        if CUDA in self.gauges:
            torch.cuda.synchronize()
        if self.libc is not None:
            self.libc.malloc_trim(0)
        for i, gauge in enumerate(self.gauges.values()):
            row[i] = gauge()


def live_tensors() -> int:
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


def cached_results() -> int:
    """Number of results in every functools cache that is a module's global: the package's, PyTorch's and Triton's."""
    names = [vars(module) for module in list(sys.modules.values()) if type(module) is types.ModuleType]
    found = {id(x): x for module in names for x in list(module.values()) if type(x).__name__ == "_lru_cache_wrapper"}
    return sum(cache.cache_info().currsize for cache in found.values())


def graphs() -> int:
    """Number of graphs that torch.compile has compiled so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0


def compiled_variants() -> int:
    """Number of compiled variants of the package's Triton kernels, on all devices. The interpreter compiles none."""
    names = [vars(module) for name, module in list(sys.modules.items()) if name.startswith("pmpo_kernels.triton.")]
    kernels = {id(x): x for module in names for x in list(module.values()) if hasattr(x, "device_caches")}
    return sum(len(cache[0]) for kernel in kernels.values() for cache in kernel.device_caches.values())


class Soaked(NamedTuple):
    """The readings: each gauge, one value a sample, after `at` steps; and which of the first steps gave other bits later."""

    at: list[int]
    held: dict[str, list[int]]
    changed: list[int]

    def growth(self) -> dict[str, dict[str, float | bool]]:
        """Return how each gauge grows over half of the steps.

        That is the largest value of the last quarter less that of the second, and the median slope (Theil, Sen) from the second
        quarter on. Neither may be more than `ALLOWED`. The first quarter is to warm up."""
        at = np.array(self.at)
        quarter = np.ceil(4 * at / at[-1]).astype(int)
        out = {}
        for name, values in self.held.items():
            held = np.array(values)
            rise = int(held[quarter == 4].max() - held[quarter == 2].max())
            x, y = at[quarter > 1], held[quarter > 1]
            i, j = np.triu_indices(len(x), 1)
            trend = float(np.median((y[j] - y[i]) / (x[j] - x[i])) * at[-1] / 2)
            out[name] = {"rise": rise, "trend": trend, "flat": max(rise, trend) <= ALLOWED[name]}
        return out

    @property
    def ok(self) -> bool:
        return not self.changed and all(found["flat"] for found in self.growth().values())


def soak(
    steps: int,
    samples: int,
    seed: int,
    impl: str | None,
    device: str,
    step: RunStep = run_step,
    told: Callable[[int], object] = lambda done: None,
) -> Soaked:
    """Run `steps` steps, with a reading after every `steps` / `samples` of them, and then the first steps again.

    Before a reading step 0 runs again, so that what a step leaves behind does not differ with the step."""
    gauges, every = Gauges(device), steps // samples
    held = np.zeros((samples, len(gauges.gauges)), dtype=np.int64)  # all of it now: a reading must leave nothing behind
    first = [bits(step(seed, i, impl, device)) for i in range(FIRST)]
    gc.collect()
    gc.freeze()
    changed = set()
    for sample in range(samples):
        for i in range(sample * every, (sample + 1) * every):
            step(seed, i, impl, device)
        if bits(step(seed, 0, impl, device)) != first[0]:
            changed.add(0)
        gauges.read(held[sample])
        told((sample + 1) * every)
    changed |= {i for i in range(FIRST) if bits(step(seed, i, impl, device)) != first[i]}
    columns = {name: held[:, i].tolist() for i, name in enumerate(gauges.gauges)}
    return Soaked([(i + 1) * every for i in range(samples)], columns, sorted(changed))


def _child(connection: Connection, *arguments: Any) -> None:
    connection.send(soak(*arguments, told=connection.send))


def soak_in_fresh_process(told: Callable[[int], object], *arguments: Any) -> Soaked:
    """Run `soak(*arguments)` in a fresh process, where nothing else allocates. `told` is called after every sample."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with mock.patch.dict(os.environ, WITHOUT_CACHES):  # read when PyTorch is loaded
        process = context.Process(target=_child, args=(sender, *arguments), daemon=True)
        process.start()
    sender.close()
    try:
        while isinstance(found := receiver.recv(), int):
            told(found)
        process.join()
        return Soaked(*found)
    except EOFError:
        process.join()
        raise RuntimeError(f"the process that ran the steps ended with exit code {process.exitcode}") from None
    finally:
        process.terminate()
        process.join()
