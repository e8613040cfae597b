"""Fixtures of the pytest-benchmark cases. Inputs are built once for each (vocab, dtype), and every variant is checked against
float64 before it is timed."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from pmpo_kernels.benchmarking.accuracy import Exact, exact
from pmpo_kernels.benchmarking.cases import Case, Dtype
from pmpo_kernels.benchmarking.comparison import Row, check
from pmpo_kernels.benchmarking.inputs import build_inputs
from pmpo_kernels.benchmarking.measure import Bench
from pmpo_kernels.benchmarking.variants import LossFunction, Variant, variants

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = {"cpu": 8, "cuda": 512}
VOCABS = (8192, 49152)


@cache
def bench_of(vocab: int, dtype: Dtype) -> tuple[Case, Bench, Exact]:
    """Return the case, its inputs, and the right results in float64."""
    case = Case(vocab=vocab, batch=8, tokens=TOKENS[DEVICE], dtype=dtype, device=DEVICE)
    bench = Bench(build_inputs(case))
    return case, bench, exact(bench.inputs, case.config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that uses `checked` for each vocab, dtype and variant."""
    if "checked" in metafunc.fixturenames:
        chosen, _ = variants(DEVICE)
        metafunc.parametrize("vocab", VOCABS)
        metafunc.parametrize("dtype", list(Dtype), ids=lambda dtype: dtype.value)
        metafunc.parametrize("variant", chosen, ids=lambda variant: f"{variant.group}-{variant.name}".replace(" ", "_"))


@cache
def checked_once(vocab: int, dtype: Dtype, variant: Variant) -> tuple[Row, LossFunction]:
    """Return a variant's check and its function, compiled once for the three benchmarks that use it."""
    case, bench, want = bench_of(vocab, dtype)
    f = variant.build(case.config)
    row = Row(variant.name, variant.group)
    check(row, bench, f, case, want)
    return row, f


@pytest.fixture
def checked(vocab: int, dtype: Dtype, variant: Variant) -> tuple[Case, Bench, LossFunction]:
    """Case, inputs and function of a variant whose result is right. A wrong one fails here and is not timed."""
    row, f = checked_once(vocab, dtype, variant)
    assert not row.wrong, row
    if row.problem:
        pytest.skip(row.problem)
    case, bench, _ = bench_of(vocab, dtype)
    return case, bench, f
