"""Bad calls of the public functions: a row is a call, the exception and its whole message. Subjects in bad_calls_*.py.

The rows that every argument of a kind has in common (a list where a tensor belongs, an integer beyond float64) are made here.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GAP = "…"  # in a message: any text
FLOATS = "float16, bfloat16, float32, float64"
INTEGERS = "int32, int64"
MASKS = "bool, uint8, int8, int16, int32, int64"
DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64),
    *(
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.float8_e5m2,
        torch.complex64,
        torch.complex128,
    ),
)
CONSTANT = "expected a tensor without requires_grad (it is a constant of the loss), got one with it"


class Call(NamedTuple):
    """A function, and arguments by name with which it runs without an error."""

    function: Callable[..., Any]
    good: dict[str, Any]


class Row(NamedTuple):
    """A bad call: `call`, a name in `CALLS`, with `change` for some of its good arguments raises `error` with `message`."""

    call: str
    change: dict[str, Any]
    error: type[Exception]
    message: str


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def exotic(like: Tensor) -> dict[str, Tensor]:
    """Return tensors of this shape, as far as it matters, that have no strides or no plain numbers."""
    with warnings.catch_warnings():  # of prototypes, and of what is on its way out
        warnings.simplefilter("ignore")
        found = {
            "quint8": torch.quantize_per_tensor(torch.ones(like.shape), 0.1, 0, torch.quint8),
            "layout sparse_coo": like.to_sparse(),
            "a nested one": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        }
        return found | ({"layout sparse_csr": like.to_sparse_csr()} if like.dim() == 2 else {})


def tensor_rows(
    call: str,
    name: str,
    good: Tensor,
    dtypes: str = FLOATS,
    *,
    required: bool = False,
    constant: bool = True,
    leading: bool = False,
    number: bool = False,
    shapes: bool = True,
    or_one_a_trajectory: int | None = None,
    not_a_tensor: tuple[type[Exception], str] = (TypeError, "expected a tensor, got {}"),
) -> Iterator[Row]:
    """Yield what is wrong for any tensor. `leading` is the first tensor of the call, which says on which device the others are.
    With `number` a number will do instead, with `or_one_a_trajectory` shape (B,) will."""

    def row(value: Any, error: type[Exception], message: str) -> Row:
        return Row(call, {name: value}, error, f"{name}: {message}")

    none = [None] if required else []
    for value in ([1.0], "x", (good,), np.zeros(good.shape), *none, *([] if number else [1.5, True])):
        got = type(value).__name__
        if required and value is None and name == "advantages":
            got = "None"
        yield row(value, not_a_tensor[0], not_a_tensor[1].format(got))
    for dtype in DTYPES:
        if name_of(dtype) not in dtypes.split(", "):
            yield row(good.to(dtype), TypeError, f"expected dtype {dtypes}, got {name_of(dtype)}")
    for got, value in exotic(good).items():
        expected = f"dtype {dtypes}" if got == "quint8" else "a dense tensor"
        yield row(value, TypeError, f"expected {expected}, got {got}")
    meta = "expected a tensor with values, got one on meta" if leading else "expected a tensor on cpu, got one on meta"
    yield row(good.to("meta"), ValueError, meta)
    if constant and good.is_floating_point():
        yield row(good.clone().requires_grad_(), ValueError, CONSTANT)
    if not shapes:
        return
    want = str(tuple(good.shape))
    if or_one_a_trajectory is not None:
        want += f", or ({or_one_a_trajectory},) for all tokens of a trajectory"
    for bad in (good[..., None], good[:, None][:, :0], torch.cat([good, good[:1]]), good[0], good.new_zeros(())):
        if tuple(bad.shape) not in (tuple(good.shape), (or_one_a_trajectory,)) and not (
            name == "advantages" and bad.dim() == 2
        ):
            yield row(bad, ValueError, f"expected shape {want}, got {tuple(bad.shape)}")


NOT_NUMBERS: list[tuple[Any, str]] = [
    *((None, "None"), ("x", "'x'"), ([1.0], "[1.0]"), (True, "True"), (1j, "1j"), (torch.tensor(1.0), "tensor(1.)")),
    *((math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), (np.float32(1), f"{GAP}1.0{GAP}")),
    *((10**400, "an int of 1329 bits"), (-(10**400), "an int of 1329 bits"), (10**5000, "an int of 16610 bits")),
    *((np.ones(2), "array([1., 1.])"), (torch.zeros(100), f"tensor([0., 0.,{GAP}"), ("y" * 10**6, f"'yyy{GAP}")),
]  # fmt: skip


def number_rows(
    call: str, name: str, expected: str, bad: Sequence[float] = (), *, optional: bool = False, skip: Sequence[type] = ()
) -> Iterator[Row]:
    """Yield what is no finite number, and numbers out of range."""
    for value, got in (*NOT_NUMBERS, *((value, repr(value)) for value in bad)):
        if not (value is None and optional) and type(value) not in skip:
            yield Row(call, {name: value}, ValueError, f"{name}: expected {expected}, got {got}")


def positive_rows(call: str, name: str, **options: Any) -> Iterator[Row]:
    yield from number_rows(call, name, "a finite number > 0", (0, 0.0, -1.0, -5e-324), **options)


def count_rows(call: str, name: str, expected: str, **options: Any) -> Iterator[Row]:
    yield from number_rows(call, name, expected, (0, -1, 8.0, 2**63, -(2**64)), **options)


def choice_rows(call: str, name: str, choices: Sequence[str | None], expected: str = "one of {}") -> Iterator[Row]:
    """Yield what is no choice, among it what cannot be hashed or compares element by element."""
    words = expected.format(list(choices))
    bad: list[tuple[Any, str]] = [("no such", "'no such'"), ("", "''"), (1, "1"), (True, "True"), (b"x", "b'x'")]
    bad += [([choices[0]], repr([choices[0]])), (np.array(["a", "b"]), "array(['a', 'b']…"), ({}, "{}")]
    bad += [(torch.zeros(2), "tensor([0., 0.])"), (10**400, "an int of 1329 bits")]
    for value, got in (*bad, *([] if None in choices or "None" in words else [(None, "None")])):
        yield Row(call, {name: value}, ValueError, f"{name}: expected {words}, got {got}")


NOT_FLAGS: list[tuple[Any, str]] = [(1, "1"), (0, "0"), (None, "None"), ("True", "'True'"), (1.0, "1.0"), (torch.tensor(True), "tensor(True)"), (np.True_, f"{GAP}True{GAP}")]  # fmt: skip


def flag_rows(call: str, name: str) -> Iterator[Row]:
    for value, _ in NOT_FLAGS:
        yield Row(call, {name: value}, TypeError, f"{name}: expected a bool, got {type(value).__name__}")


class Finished(TorchDispatchMode):
    """Collects the names of the package's operators that gave a result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "pmpo_kernels":
            self.names.append(str(func))
        return result


def problem(calls: dict[str, Call], row: Row, **options: Any) -> str | None:
    """Return what the call does instead of raising as it should before anything runs, None if it does that."""
    function, good = calls[row.call]
    pattern = ".*".join(map(re.escape, row.message.split(GAP)))
    with Finished() as finished:
        try:
            function(**{**good, **options, **row.change})
        except Exception as error:
            if type(error) is not row.error or not re.fullmatch(pattern, str(error), re.S):
                return f"expected {row.error.__name__}: {row.message}\n     got {type(error).__name__}: {error}"
            return f"ran {finished.names} before {row.message}" if finished.names else None
    return f"expected {row.error.__name__}: {row.message}\n     got a result"
