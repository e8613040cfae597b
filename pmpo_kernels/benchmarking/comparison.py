"""One comparison: check every variant, measure memory, then time them round by round."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from pmpo_kernels.benchmarking import accuracy
from pmpo_kernels.benchmarking.allocator import Allocator, allocators, using
from pmpo_kernels.benchmarking.cases import COMPILED, EAGER, Case, LossFunction, Variant, loss_function
from pmpo_kernels.benchmarking.measure import Bench, Times, peak_memory, rounds

WARMUP_ROUNDS = 2


@dataclass(frozen=True)
class Spread:
    """Milliseconds over the rounds: median, quartiles, extremes."""

    median: float
    q1: float
    q3: float
    min: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median, q1, q3, min(values), max(values))


@dataclass
class Timing:
    """One variant with one allocator setting; `speedup` over eager by medians of forward + backward, `page_faults` the
    median of a forward and backward."""

    forward: Spread
    backward: Spread
    both: Spread
    page_faults: float | None
    samples: list[Times]
    speedup: float | None = None

    @classmethod
    def of(cls, samples: list[Times]) -> Timing:
        faults = [t.page_faults for t in samples if t.page_faults is not None]
        return cls(
            Spread.of([t.forward for t in samples]),
            Spread.of([t.backward for t in samples]),
            Spread.of([t.forward + t.backward for t in samples]),
            statistics.median(faults) if faults else None,
            samples,
        )


@dataclass
class Row:
    """One variant's results; without `problem` it is correct and timed, with one it has no times."""

    name: str
    group: str
    gradient_error: float | None = None
    gradient_bound: float | None = None
    loss_error: float | None = None
    loss_bound: float | None = None
    wrong: bool = False
    problem: str | None = None
    peak_bytes: int | None = None
    timings: dict[Allocator, Timing] = field(default_factory=dict)


def check(row: Row, bench: Bench, f: LossFunction, case: Case, eager_error: float | None) -> None:
    """Fill in the errors of one run and, if they exceed their bounds, the problem. `eager_error` is None for eager."""
    try:
        loss, gradient = bench.run(f)
    except torch.OutOfMemoryError:
        row.problem = "out of GPU memory"
        return
    except Exception as error:
        if row.name != COMPILED.name:
            raise
        row.problem = f"torch.compile failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return
    found = accuracy.errors(loss, gradient, bench.inputs, case.config)
    row.gradient_error, row.loss_error = found
    row.gradient_bound = accuracy.gradient_bound(gradient.dtype, case.vocab, eager_error)
    row.loss_bound = accuracy.float32_bound(case.vocab)
    row.wrong = not (found.gradient <= row.gradient_bound and found.loss <= row.loss_bound)
    if row.wrong:
        row.problem = "wrong result: error above its bound, not timed"


def compare(
    case: Case, bench: Bench, chosen: list[Variant], repeats: int, advance: Callable[[str], None]
) -> tuple[list[Row], dict[str, Spread]]:
    """(rows in the order of `chosen`, ms of one read and one copy of the logits); `advance(what)` is called before each
    of `steps(...)` steps."""
    rows, functions = [], {}
    eager_error: float | None = None
    for variant in chosen:
        advance(f"checking {variant.name}")
        row, f = Row(variant.name, variant.group), loss_function(variant, case.config)
        if variant != EAGER and eager_error is None and case.dtype == "bfloat16":
            row.problem = "no bound: eager PyTorch gave no result to compare with"
        else:
            check(row, bench, f, case, eager_error)
        if variant == EAGER and not row.problem:
            eager_error = row.gradient_error
        if not row.problem:
            functions[variant.name] = f
        rows.append(row)

    for variant, row in zip(chosen, rows, strict=True):
        advance(f"memory of {variant.name}")
        if not row.problem:
            row.peak_bytes = peak_memory(case, variant, bench)

    floor: dict[str, list[float]] = {"read": [], "copy": []}
    for allocator in allocators(case.device) if functions else []:
        samples: dict[str, list[Times]] = {name: [] for name in functions}
        with using(allocator):
            for _ in rounds(bench, functions, WARMUP_ROUNDS):
                pass
            for name, times in rounds(bench, functions, repeats):
                advance(f"timing, {allocator.value} allocator")
                samples[name].append(times)
                for what, ms in bench.floor().items():
                    floor[what].append(ms)
        summarise(rows, allocator, samples)
    return rows, {what: Spread.of(values) for what, values in floor.items() if values}


def steps(case: Case, chosen: list[Variant], repeats: int) -> int:
    """How often `compare` calls `advance` at most."""
    return len(chosen) * (2 + repeats * len(allocators(case.device)))


def summarise(rows: list[Row], allocator: Allocator, samples: dict[str, list[Times]]) -> None:
    """Add the timing of each timed row with this allocator."""
    timings = {name: Timing.of(times) for name, times in samples.items()}
    eager = timings.get(EAGER.name)
    for row in rows:
        if row.name in timings:
            row.timings[allocator] = timings[row.name]
            if eager:
                timings[row.name].speedup = eager.both.median / timings[row.name].both.median
