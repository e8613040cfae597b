"""Host time of a call: from the first line of Python to its return, whether or not a GPU is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pmpo_kernels.benchmarking.cases import Case
from pmpo_kernels.benchmarking.comparison import WARMUP_ROUNDS, Spread
from pmpo_kernels.benchmarking.inputs import build_inputs
from pmpo_kernels.benchmarking.measure import Bench
from pmpo_kernels.benchmarking.variants import COMPILED, Variant


def host_time(bench: Bench, f: Callable[..., Tensor]) -> float:
    """Return the microseconds until the calls of a forward and a backward have returned."""
    leaves = bench.restore()
    if bench.cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    gradient = torch.autograd.grad(f(*leaves, bench.inputs), leaves)
    elapsed = time.perf_counter() - start
    del gradient
    return 1e6 * elapsed


def host_overhead(case: Case, chosen: list[Variant], repeats: int) -> dict[str, Spread]:
    """Return each variant's host time of one forward and backward on a tiny batch, in microseconds.
    torch.compile is left out, because it would compile for this shape alone."""
    tiny = replace(case, vocab=256, batch=2, tokens=8)
    inputs = build_inputs(tiny)
    found: dict[str, Spread] = {}
    for variant in chosen:
        if variant != COMPILED and not variant.untimed:
            bench, f = Bench(inputs, variant.one_more), variant.build(tiny.config)
            times = [host_time(bench, f) for _ in range(WARMUP_ROUNDS + repeats)]
            found[variant.name] = Spread.of(times[WARMUP_ROUNDS:])
    return found
