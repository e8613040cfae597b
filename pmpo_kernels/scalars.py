"""Checks of the plain numbers and choices that a caller passes, and how such a value is shown in an error message."""

from __future__ import annotations

import reprlib
import sys
from typing import Any, get_args

LARGEST = sys.float_info.max
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120


def shown(value: object) -> str:
    """Return a short text for `value` in a message, whatever it is. Python refuses to write out integers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    return " ".join(_REPR.repr(value).split())


def expect(name: str, ok: bool, expected: str, got: object) -> None:
    """Raise a ValueError that names argument, expected and got, unless `ok`."""
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {shown(got)}")


def is_number(value: object) -> bool:
    """Whether `value` is an int or a float, no bool, within the range of float64. NaN and infinity are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def finite_number(name: str, value: Any, expected: str) -> float:
    """Return `value` as a float if it is a finite number; otherwise raise ValueError with the text `expected`."""
    expect(name, is_number(value), expected, value)
    return float(value)


def is_one_of(value: object, choices: Any) -> bool:
    """Whether `value` is one of `choices`, a tuple or a Literal of strings and None. The type is asked first, because an array
    would compare element by element."""
    choices = choices if isinstance(choices, tuple) else get_args(choices)
    return (value is None or isinstance(value, str)) and value in choices


def is_count(value: object) -> bool:
    """Whether `value` is an int > 0, no bool, that fits into 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63
