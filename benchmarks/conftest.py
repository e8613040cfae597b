"""Inputs are built once per (vocab, dtype); every variant is checked against float64 before it is timed."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from pmpo_kernels.benchmarking.cases import (
    EAGER,
    Case,
    Dtype,
    LossFunction,
    Variant,
    build_inputs,
    loss_function,
    variants,
)
from pmpo_kernels.benchmarking.comparison import Row, check
from pmpo_kernels.benchmarking.measure import Bench

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = {"cpu": 8, "cuda": 512}
VOCABS = (8192, 49152)


@cache
def bench_of(vocab: int, dtype: Dtype) -> tuple[Case, Bench, float | None]:
    """The case, its inputs, and the gradient error of eager PyTorch, which bounds the others' in bfloat16."""
    case = Case(vocab=vocab, batch=8, tokens=TOKENS[DEVICE], dtype=dtype, device=DEVICE)
    bench = Bench(build_inputs(case))
    row = Row(EAGER.name, EAGER.group)
    check(row, bench, loss_function(EAGER, case.config), case, None)
    assert not row.problem, row
    return case, bench, row.gradient_error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that uses `checked` runs for each vocab, dtype and variant."""
    if "checked" in metafunc.fixturenames:
        chosen, _ = variants(DEVICE)
        metafunc.parametrize("vocab", VOCABS)
        metafunc.parametrize("dtype", list(Dtype), ids=lambda dtype: dtype.value)
        metafunc.parametrize("variant", chosen, ids=lambda variant: f"{variant.group}-{variant.name}".replace(" ", "_"))


@cache
def checked_once(vocab: int, dtype: Dtype, variant: Variant) -> tuple[Row, LossFunction]:
    """A variant's check and its function, compiled once for the three benchmarks that use it."""
    case, bench, eager_error = bench_of(vocab, dtype)
    f = loss_function(variant, case.config)
    row = Row(variant.name, variant.group)
    check(row, bench, f, case, None if variant == EAGER else eager_error)
    return row, f


@pytest.fixture
def checked(vocab: int, dtype: Dtype, variant: Variant) -> tuple[Case, Bench, LossFunction]:
    """(case, inputs, function) of a variant whose result is right; a wrong one fails here and is not timed."""
    row, f = checked_once(vocab, dtype, variant)
    assert not row.wrong, row
    if row.problem:
        pytest.skip(row.problem)
    case, bench, _ = bench_of(vocab, dtype)
    return case, bench, f
