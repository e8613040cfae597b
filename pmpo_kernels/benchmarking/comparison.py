"""One comparison: every variant is checked, its memory is measured, and all are timed round by round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from pmpo_kernels.benchmarking import accuracy
from pmpo_kernels.benchmarking.allocator import Allocator, using
from pmpo_kernels.benchmarking.cases import Case
from pmpo_kernels.benchmarking.inputs import Inputs, build_inputs
from pmpo_kernels.benchmarking.measure import Bench, Steps, Times, lap, rotating
from pmpo_kernels.benchmarking.memory import peak_memory
from pmpo_kernels.benchmarking.variants import COMPILED, EAGER, FUSED, PEER, LossFunction, Variant
from pmpo_kernels.config import LossConfig

WARMUP_ROUNDS = 2


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and extremes over the rounds, in milliseconds unless said otherwise."""

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
    """Times of one variant with one allocator setting. `page_faults` is the median number in a forward and backward, `speedup` the
    ratio of eager PyTorch's median of both to this one's."""

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
            Spread.of([t.both for t in samples]),
            statistics.median(faults) if faults else None,
            samples,
        )


@dataclass
class Row:
    """One variant's results. Without a `problem` it is right and is timed; with one it has no times. `gradient_error` is the
    largest of `parts`."""

    name: str
    group: str
    gradient_error: float | None = None
    gradient_bound: float | None = None
    parts: NamedTuple | None = None
    loss_error: float | None = None
    loss_bound: float | None = None
    wrong: bool = False
    problem: str | None = None
    peak_bytes: int | None = None
    timings: dict[Allocator, Timing] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """All results of a case, with `rows` in the order of the variants.

    `floor` are the times of one read and one copy of the logits, `stages`, if asked for, those of each stage of the first fused
    variant alone. `unmasked_rows` and `gradient_rows` are the numbers of rows of the logits that belong to a response token and
    whose gradient is not 0, `power` the smallest and the largest adaptive p where A is not 0."""

    rows: list[Row]
    floor: dict[str, Spread]
    stages: dict[str, Spread]
    unmasked_rows: int
    gradient_rows: int
    power: tuple[float, float] | None = None

    @property
    def wrong(self) -> bool:
        return any(row.wrong for row in self.rows)


Result = TypeVar("Result")
# `stages(impl, inputs, config)`: by name, calls that are timed alone
StageCalls = Callable[[str, Inputs, LossConfig], dict[str, Callable[[], object]]]


def attempt(row: Row, call: Callable[[], Result]) -> Result | None:
    """Return what the call returns. Where a peer fails or a GPU's memory is too small, return None and note why in the row."""
    try:
        return call()
    except torch.OutOfMemoryError:
        row.problem = "out of GPU memory"
    except Exception as error:
        if row.group not in (PEER, COMPILED.group):
            raise
        row.problem = f"{row.name} failed: {type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
    return None


def run_once(row: Row, bench: Steps, f: Callable[..., Tensor]) -> tuple[Tensor, ...] | None:
    """Run forward and backward once, as `attempt` does, and return loss and gradients."""
    return attempt(row, lambda: bench.run(f))


def judge(row: Row) -> None:
    """Mark the row as wrong, and note it as its problem, if an error exceeds its bound."""
    assert row.gradient_error is not None
    assert row.gradient_bound is not None
    assert row.loss_error is not None
    assert row.loss_bound is not None
    row.wrong = not (row.gradient_error <= row.gradient_bound and row.loss_error <= row.loss_bound)
    if row.wrong:
        row.problem = "wrong result: error above its bound, not timed"


def check(row: Row, bench: Bench, f: LossFunction, case: Case, want: accuracy.Exact) -> None:
    """Run the variant once and fill in its errors and bounds and, if one exceeds the other, the problem."""
    found = run_once(row, bench, f)
    if found is None:
        return
    loss, gradient = found
    row.parts, row.loss_error = accuracy.errors(loss, gradient, bench.inputs, want, case.config)
    row.gradient_error = max(row.parts)
    fused = row.group == FUSED
    row.gradient_bound, row.loss_bound = accuracy.bounds(gradient.dtype, case.vocab, want, case.config, fused=fused)
    judge(row)


def compare(
    case: Case,
    chosen: list[Variant],
    repeats: int,
    advance: Callable[[str], None],
    settings: list[Allocator],
    memory: bool = True,
    save: Callable[[Comparison], None] | None = None,
    stages: StageCalls | None = None,
) -> Comparison:
    """Build the inputs, check the variants, measure their memory, and time them under each setting of the allocator.

    `advance(what)` is called before each of `steps(...)` steps. `save` is called with what there is after each checked row, each
    memory figure and each timed round. With it the others are timed before torch.compile, which may take longer than all of them,
    begins, and then again beside it. Each of `stages` of the first fused variant is timed alone.
    """
    advance("building inputs")
    inputs = build_inputs(case)
    benches = {one_more: Bench(inputs, one_more) for one_more in {variant.one_more for variant in chosen}}
    want = accuracy.exact(inputs, case.config)
    rows = {variant: Row(variant.name, variant.group) for variant in chosen}
    found = Comparison(list(rows.values()), {}, {}, int(inputs.mask.sum()), want.gradient_rows, _powers(inputs))
    functions: dict[Variant, LossFunction] = {}
    for part in parts(chosen, save is not None):
        for variant in part:
            advance(f"checking {variant.name}")
            row = rows[variant]
            f = attempt(row, partial(variant.build, case.config))
            if f is not None:
                check(row, benches[variant.one_more], f, case, want)
                row.problem = row.problem or variant.untimed
            if f is not None and not row.problem:
                functions[variant] = f
            if save:
                save(found)
        for variant in part:
            advance(f"memory of {variant.name}")
            if memory and variant in functions:
                rows[variant].peak_bytes = peak_memory(case, variant, benches[variant.one_more], functions[variant])
                if save:
                    save(found)
        if any(variant in functions for variant in part):
            # rounds are saved as they are done, unless a whole set of them is saved already
            time_rows(
                found, case, benches, functions, repeats, advance, settings, None if found.floor else save, stages
            )
    return found


def parts(chosen: list[Variant], early: bool) -> list[list[Variant]]:
    """Split the variants into parts that are checked and timed one after the other: with `early`, torch.compile comes last."""
    late = [variant for variant in chosen if early and variant == COMPILED]
    return [part for part in ([variant for variant in chosen if variant not in late], late) if part]


def _powers(inputs: Inputs) -> tuple[float, float] | None:
    if inputs.power is None or not bool(inputs.advantages.any()):
        return None
    solved = inputs.power[inputs.advantages != 0]
    return float(solved.min()), float(solved.max())


def time_rows(
    found: Comparison,
    case: Case,
    benches: dict[bool, Bench],
    functions: dict[Variant, LossFunction],
    repeats: int,
    advance: Callable[[str], None],
    settings: list[Allocator],
    save: Callable[[Comparison], None] | None,
    stages: StageCalls | None,
) -> None:
    """Time the variants in `functions` under each setting of the allocator, and store the times in their rows. The times of floor
    and stages are taken over the rounds of all settings."""
    totals: tuple[Samples, Samples] = ({}, {})
    for allocator in settings:
        with using(allocator):
            for _ in _rounds(case, benches, functions, WARMUP_ROUNDS, advance, stages):
                pass
            before = [dict(total) for total in totals]
            for samples, *more in _rounds(case, benches, functions, repeats, advance, stages):
                summarise(found.rows, allocator, samples)
                for into, total, old, new in zip((found.floor, found.stages), totals, before, more, strict=True):
                    total |= {what: old.get(what, []) + values for what, values in new.items()}
                    into |= {what: Spread.of(values) for what, values in total.items()}
                if save:
                    save(found)


Samples = dict[str, list[float]]


def _rounds(
    case: Case,
    benches: dict[bool, Bench],
    functions: dict[Variant, LossFunction],
    repeats: int,
    advance: Callable[[str], None],
    stages: StageCalls | None,
) -> Iterator[tuple[dict[str, list[Times]], Samples, Samples]]:
    """Time round by round. After each round yield all samples so far, of every variant by name, of the floor, and of the stages of
    the first fused variant."""
    named = {variant.name: variant for variant in functions}
    times: dict[str, list[Times]] = {name: [] for name in named}
    cuda = case.device != "cpu"
    ours = next((variant for variant in functions if variant.impl), next(iter(functions)))
    bench = benches[ours.one_more]
    bench.restore()
    work = bench.inputs._replace(logits=bench.logits.detach()[:, : case.tokens])
    alone = stages(ours.impl, work, case.config) if stages and ours.impl else {}
    floor: Samples = {"read": [], "copy": []}
    of_stages: Samples = {name: [] for name in alone}
    for names in rotating(list(named), repeats):
        advance("timing")
        for name in names:
            times[name].append(benches[named[name].one_more].time(functions[named[name]]))
        for what, ms in bench.floor().items():
            floor[what].append(ms)
        for what, f in alone.items():
            bench.restore()
            of_stages[what].append(lap(f, cuda))
        yield times, floor, of_stages


def steps(chosen: list[Variant], repeats: int, settings: list[Allocator], early: bool = False) -> int:
    """How often `compare` calls `advance` at most; `early` if it has `save`."""
    rounds = (WARMUP_ROUNDS + repeats) * len(settings)
    return 1 + 2 * len(chosen) + rounds * len(parts(chosen, early))


def summarise(rows: list[Row], allocator: Allocator, samples: dict[str, list[Times]]) -> None:
    """Store in each timed row its timing with this allocator setting."""
    timings = {name: Timing.of(times) for name, times in samples.items()}
    eager = timings.get(EAGER.name)
    for row in rows:
        if row.name in timings:
            row.timings[allocator] = timings[row.name]
            if eager:
                timings[row.name].speedup = eager.both.median / timings[row.name].both.median
