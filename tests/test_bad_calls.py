"""Every wrong call raises before a kernel starts and names the argument, what was expected and what was got."""

from __future__ import annotations

import bad_calls_loss
import pytest
from bad_calls import Finished, Row, problem

CALLS = {**bad_calls_loss.CALLS}
ROWS = [*bad_calls_loss.ROWS]
ABOUT = sorted({(row.call, next(iter(row.change))) for row in ROWS})


@pytest.mark.parametrize(("call", "argument"), ABOUT)
def test_bad_calls(call: str, argument: str) -> None:
    found = []
    for row in ROWS:
        if (row.call, next(iter(row.change))) == (call, argument):
            takes_impl = "impl" in CALLS[call].function.__code__.co_varnames
            for impl in ("reference", "cpp", "triton") if takes_impl else (None,):
                wrong = problem(CALLS, row, **({"impl": impl} if takes_impl else {}))
                found += [f"{impl}, {row.change}:\n{wrong}"] if wrong else []
    assert not found, "\n".join(found)
