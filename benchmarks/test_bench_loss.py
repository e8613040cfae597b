"""Loss of one batch as pytest-benchmark cases: naive, compiled and fused, one group per (vocab, dtype).

pytest benchmarks --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from pmpo_kernels.benchmarking.cases import Case
from pmpo_kernels.benchmarking.measure import Bench
from pmpo_kernels.benchmarking.variants import LossFunction

ROUNDS = 8


def _finish(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()


def _run(benchmark: BenchmarkFixture, case: Case, setup: Callable[[], Any], step: Callable[..., Any]) -> None:
    def prepared() -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = setup()
        _finish(case)
        return (given,), {}

    def timed(given: Any) -> None:
        step(given)
        _finish(case)

    benchmark.pedantic(timed, setup=prepared, rounds=ROUNDS, warmup_rounds=1)  # type: ignore[no-untyped-call]


def _group(benchmark: BenchmarkFixture, stage: str, case: Case) -> None:
    benchmark.group = f"{stage}, V={case.vocab} {case.dtype.value} {case.device}"
    benchmark.extra_info.update(batch=case.batch, tokens=case.tokens, preset=case.preset.value)


def test_forward(benchmark: BenchmarkFixture, checked: tuple[Case, Bench, LossFunction]) -> None:
    case, bench, f = checked
    _group(benchmark, "forward", case)
    _run(benchmark, case, bench.restore, lambda logits: f(logits, bench.inputs))


def test_backward(benchmark: BenchmarkFixture, checked: tuple[Case, Bench, LossFunction]) -> None:
    case, bench, f = checked
    _group(benchmark, "backward", case)
    _run(
        benchmark,
        case,
        lambda: f(*bench.restore(), bench.inputs),
        lambda loss: torch.autograd.grad(loss, bench.logits),
    )


def test_both(benchmark: BenchmarkFixture, checked: tuple[Case, Bench, LossFunction]) -> None:
    case, bench, f = checked
    _group(benchmark, "forward and backward", case)
    _run(benchmark, case, bench.restore, lambda logits: torch.autograd.grad(f(logits, bench.inputs), bench.logits))
