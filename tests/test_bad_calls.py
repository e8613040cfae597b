"""Every wrong call raises before a kernel starts and names the argument, what was expected and what was got."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import bad_calls_config
import bad_calls_host
import bad_calls_loss
import bad_calls_operators
import pytest
import torch
from bad_calls import Finished, Row, problem
from torch import Tensor

import pmpo_kernels
from pmpo_kernels import LossConfig, distributed, pmpo_loss, schedules
from pmpo_kernels.impls import IMPLS

CALLS = {**bad_calls_loss.CALLS, **bad_calls_config.CALLS, **bad_calls_host.CALLS, **bad_calls_operators.CALLS}
ROWS = [*bad_calls_loss.ROWS, *bad_calls_config.ROWS, *bad_calls_host.ROWS, *bad_calls_operators.ROWS]


def about(row: Row) -> tuple[str, str]:
    return row.call, next(iter(row.change))


BY_ARGUMENT = {key: list(rows) for key, rows in groupby(sorted(ROWS, key=about), about)}


def parameters(call: Callable[..., Any]) -> list[str]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [p.name for p in inspect.signature(call).parameters.values() if p.kind not in kinds]


@pytest.mark.parametrize(("call", "argument"), BY_ARGUMENT)
def test_bad_calls(call: str, argument: str) -> None:
    takes_impl = "impl" in parameters(CALLS[call].function)
    impls = bad_calls_operators.IMPLS["solve_power"] if call.startswith("solve_power") else IMPLS
    found = []
    for row in BY_ARGUMENT[call, argument]:
        for options in ({"impl": impl} for impl in impls) if takes_impl else ({},):
            wrong = problem(CALLS, row, **options)
            found += [f"{options} {row.change}:\n{wrong}"] if wrong else []
    assert not found, "\n".join(found)


def test_what_is_no_tensor_is_checked_where_values_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: numbers, words and flags of the losses are refused all the same."""
    monkeypatch.setattr("pmpo_kernels.checks.checks_values", lambda tensor: False)
    rows = [
        row
        for row in ROWS
        if row.call in bad_calls_loss.CALLS and not any(isinstance(x, Tensor) for x in row.change.values())
    ]
    assert len(rows) > 500
    found = [problem(CALLS, row, impl="reference") for row in rows]
    assert [wrong for wrong in found if wrong] == []


@pytest.mark.parametrize("call", CALLS)
def test_the_calls_that_are_changed_are_good(call: str) -> None:
    function, good = CALLS[call]
    function(**good)


@pytest.mark.parametrize("impl", IMPLS)
def test_kernels_that_run_are_noticed(impl: str) -> None:
    """What `problem` says of a call that is right."""
    with Finished() as finished:
        pmpo_loss(**CALLS["pmpo_loss"].good, impl=impl)
    assert finished.names == [f"pmpo_kernels.{name}.{impl}" for name in ("token_logp", "trajectory", "aggregate")]


def public() -> Iterator[Callable[..., Any]]:
    """Every public function, constructor and preset that has arguments. `reference` is the specification of the stages: it checks
    nothing. Results (named tuples) are made by the package."""
    for module in (pmpo_kernels, distributed):
        yield from (x for x in map(vars(module).get, module.__all__) if inspect.isfunction(x))
    yield from (
        x
        for x in vars(schedules).values()
        if getattr(x, "__module__", "") == schedules.__name__ and x.__name__[0] != "_"
    )
    yield LossConfig
    for name, value in vars(LossConfig).items():
        if isinstance(value, (classmethod, staticmethod)) and not name.startswith("_"):
            yield getattr(LossConfig, name)


def test_every_parameter_has_a_bad_call() -> None:
    """One whose message is about it. A new function, option or argument without one fails."""
    functions = list(public())
    assert len(functions) >= 25  # found, not listed
    for function in functions:
        rows = [row for row in ROWS if CALLS[row.call].function == function]
        refused = {name for row in rows for name in row.change if row.message.partition(":")[0].endswith(name)}
        assert set(parameters(function)) - refused == set(), f"no bad call of {function.__qualname__}"


def test_logits_without_rows_do_not_overlap() -> None:
    """Whatever strides they have."""
    empty = torch.zeros(1, 0, 5).expand(2, 0, 5)
    assert empty.stride()[0] == 0
    ids, none = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0)
    assert pmpo_loss(empty, ids, none, torch.ones(2), inplace=True).loss == 0
