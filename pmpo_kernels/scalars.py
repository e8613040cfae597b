"""Numbers, flags and choices as a caller passes them: checked, and told in an error by argument, expected and got."""

from __future__ import annotations

import reprlib
import sys
from typing import Any, get_args

LARGEST = sys.float_info.max
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120


def shown(value: object) -> str:
    """`value` in a message: short, whatever it is (Python refuses to write out integers of thousands of digits)."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    return " ".join(_REPR.repr(value).split())


def expect(name: str, ok: bool, expected: str, got: object) -> None:
    """ValueError unless `ok`."""
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {shown(got)}")


def is_number(value: object) -> bool:
    """An int or float, no bool, that is a finite number of float64: integers beyond its range are compared exactly."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def finite_number(name: str, value: Any, expected: str) -> float:
    """`value` as a float, if it is a finite number."""
    expect(name, is_number(value), expected, value)
    return float(value)


def is_one_of(value: object, choices: Any) -> bool:
    """Of a tuple or a Literal of strings and None. What compares element by element, such as an array, is none."""
    choices = choices if isinstance(choices, tuple) else get_args(choices)
    return (value is None or isinstance(value, str)) and value in choices


def is_count(value: object) -> bool:
    """An int > 0, no bool, of 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63
