"""Argument checks: a wrong call raises before any kernel starts, with the argument's name, what was expected and what it got."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import Tensor

from pmpo_kernels.config import TEMPERATURE_RANGE, representable
from pmpo_kernels.scalars import expect, is_count, is_number, is_one_of

# asked once, on import, because torch.compile of PyTorch 2.10 cannot trace the question
_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "xla", "mtia", "maia", "ipu", torch._C._get_privateuse1_backend_name())
AUTOCAST_DEVICES = {name for name in _DEVICES if torch.amp.is_autocast_available(name)}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_dense(name: str, value: object) -> Tensor:
    """Return `value` if it is a tensor with sizes and strides; otherwise raise TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if hasattr(value, "device_mesh"):
        how = "with FSDP2 call the loss in the forward pass of the module whose fully_shard group holds it: docs/pytorch.md"
        raise TypeError(f"{name}: expected a plain tensor, got a DTensor; {how}")
    if value.is_nested or value.layout != torch.strided:
        got = "a nested one" if value.is_nested else f"layout {str(value.layout).removeprefix('torch.')}"
        raise TypeError(f"{name}: expected a dense tensor, got {got}")
    return value


def check_tensor(
    name: str, value: object, *, dtypes: Sequence[torch.dtype], device: torch.device, shape: Sequence[int]
) -> Tensor:
    """Return `value` if it is a dense tensor of one of `dtypes` with this shape on this device. Otherwise raise TypeError for the
    kind of tensor or its dtype, ValueError for its device or shape."""
    value = check_dense(name, value)
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {names}, got {str(value.dtype).removeprefix('torch.')}")
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {value.device}")
    if device.type == "meta":
        raise ValueError(f"{name}: expected a tensor with values, got one on meta")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
    return value


def check_constant(
    name: str, value: object, *, dtypes: Sequence[torch.dtype], device: torch.device, shape: Sequence[int]
) -> Tensor | None:
    """Do what `check_tensor` does, for an optional argument through which no gradient flows. None passes."""
    if value is None:
        return None
    tensor = check_tensor(name, value, dtypes=dtypes, device=device, shape=shape)
    if tensor.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor without requires_grad (it is a constant of the loss), got one with it"
        )
    return tensor


def check_logits(logits: object, token_ids: object, inplace: object) -> None:
    """Raise unless logits and token_ids fit together: (B, T, V) or (B, T + 1, V) with (B, T), or (N, V) with (N,).

    The vocabulary dimension must have stride 1, because the kernels read whole rows. `inplace` must be a bool; True also needs
    logits whose elements all lie at different places in memory.
    """
    logits, token_ids = check_dense("logits", logits), check_dense("token_ids", token_ids)
    if logits.dim() not in (2, 3):
        raise ValueError(f"logits: expected shape (B, T, V), (B, T + 1, V) or (N, V), got {tuple(logits.shape)}")
    shape = list(logits.shape[:-1])
    if token_ids.dim() == 2 and logits.dim() == 3 and token_ids.shape[1] + 1 == logits.shape[1]:
        shape[1] -= 1
    check_tensor("logits", logits, dtypes=FLOATS, device=logits.device, shape=logits.shape)
    check_tensor("token_ids", token_ids, dtypes=INTEGERS, device=logits.device, shape=shape)
    if logits.shape[-1] == 0:
        raise ValueError(f"logits: expected a vocabulary of at least 1, got shape {tuple(logits.shape)}")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(f"logits: expected stride 1 in the vocabulary dimension, got strides {logits.stride()}")
    check_flag("inplace", inplace)
    if inplace and logits.numel() and overlaps(logits):
        raise ValueError(f"logits: expected rows that do not overlap with inplace=True, got strides {logits.stride()}")


def overlaps(tensor: Tensor) -> bool:
    """True if two elements of a tensor may lie at one place in memory."""
    dims = [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    for i, (stride, _) in enumerate(dims):
        below = [(s, n) for j, (s, n) in enumerate(dims) if j != i and s <= stride]
        if stride <= sum(s * (n - 1) for s, n in below):
            return True
    return False


def check_head(hidden: object, weight: object, bias: object, token_ids: object) -> torch.dtype:
    """Check the arguments of an LM head and return the dtype of its products.

    Shapes: hidden (B, T, H) or (B, T + 1, H) with token_ids (B, T), or (N, H) with (N,); weight (V, H), bias (V,). Hidden, weight
    and bias share a dtype, which is returned. Under autocast they may differ, and autocast's dtype is returned, unless hidden or
    weight is float64."""
    hidden, weight = check_dense("hidden", hidden), check_dense("weight", weight)
    token_ids = check_dense("token_ids", token_ids)
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden: expected shape (B, T, H), (B, T + 1, H) or (N, H), got {tuple(hidden.shape)}")
    shape, device = list(hidden.shape[:-1]), hidden.device
    if token_ids.dim() == 2 and hidden.dim() == 3 and token_ids.shape[1] + 1 == hidden.shape[1]:
        shape[1] -= 1
    check_tensor("hidden", hidden, dtypes=FLOATS, device=device, shape=hidden.shape)
    check_tensor("token_ids", token_ids, dtypes=INTEGERS, device=device, shape=shape)
    if hidden.shape[-1] == 0:
        raise ValueError(f"hidden: expected H at least 1, got shape {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight: expected shape (V, {hidden.shape[-1]}), V at least 1, got {tuple(weight.shape)}")
    autocast = device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type)
    autocast = autocast and torch.float64 not in (hidden.dtype, weight.dtype)
    dtypes = FLOATS[:-1] if autocast else (hidden.dtype,)
    check_tensor("weight", weight, dtypes=dtypes, device=device, shape=weight.shape)
    if bias is not None:
        check_tensor("bias", bias, dtypes=dtypes, device=device, shape=weight.shape[:1])
    return torch.get_autocast_dtype(device.type) if autocast else hidden.dtype


def check_number(name: str, value: Any) -> float:
    """Return `value` as a float if it is a finite number > 0; otherwise raise ValueError."""
    expect(name, is_number(value) and value > 0, "a finite number > 0", value)
    return float(value)


def check_finite(name: str, value: Any) -> float:
    """Return `value` as a float if it is a finite number; otherwise raise ValueError."""
    expect(name, is_number(value), "a finite number", value)
    return float(value)


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise ValueError unless `value` is one of `choices`, which is a tuple or a Literal."""
    choices = choices if isinstance(choices, tuple) else get_args(choices)
    expect(name, is_one_of(value, choices), f"one of {list(choices)}", value)


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a bool. The numbers 0 and 1 are not."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_count(name: str, value: object) -> None:
    """Raise ValueError unless `value` is an int > 0 that fits into 64 bits."""
    expect(name, is_count(value), "an int > 0 and below 2^63", value)


def check_factor(name: str, value: object) -> float:
    """Return `value` as a float if float32 can multiply and divide by it, as by a temperature; otherwise raise ValueError."""
    factor = check_number(name, value)
    expect(name, representable(factor), TEMPERATURE_RANGE, value)
    return factor


def checks_values(tensor: Tensor) -> bool:
    """Whether the values of this tensor are checked: always on a CPU, elsewhere only with PMPO_KERNELS_CHECK=1. Reading values from
    a GPU waits for it."""
    return tensor.device.type == "cpu" or os.environ.get("PMPO_KERNELS_CHECK") == "1"


def check_token_ids(token_ids: Tensor, mask: Tensor | None, vocabulary: int) -> None:
    """Raise ValueError unless all ids where `mask` is true lie in [0, vocabulary), if values are checked (`checks_values`)."""
    if not checks_values(token_ids):
        return
    bad = (token_ids < 0) | (token_ids >= vocabulary)
    bad = bad if mask is None else bad & mask
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        got = int(token_ids[tuple(at)])
        raise ValueError(f"token_ids: expected ids in [0, {vocabulary}) where mask is true, got {got} at {at}")


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> None:
    """Raise ValueError unless the offsets start at 0, never fall and end at `tokens`, if values are checked (`checks_values`)."""
    if not checks_values(cu_seqlens):
        return
    expected = f"non-decreasing offsets from 0 to the {tokens} tokens"
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != tokens or any(a > b for a, b in pairwise(values)):
        shown = values if len(values) <= 16 else [*values[:8], "...", *values[-7:]]
        raise ValueError(f"cu_seqlens: expected {expected}, got {shown}")


def check_offsets(name: str, tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return the offsets (B + 1,) at which the trajectories begin and end in the flat order of the tokens.

    Padded tokens (B, T) have the offsets 0, T, ..., B T. Packed tokens (N,) need `cu_seqlens`, which is checked and returned.
    Messages call the tokens `name`."""
    if cu_seqlens is None:
        if tokens.dim() != 2:
            raise ValueError(
                f"cu_seqlens: expected offsets (B + 1,) because {name} has shape {tuple(tokens.shape)}, got None"
            )
        B, T = tokens.shape
        return torch.arange(B + 1, device=tokens.device) * T
    if tokens.dim() != 1:
        raise ValueError(
            f"cu_seqlens: expected None because {name} is padded, of shape {tuple(tokens.shape)}, got a value"
        )
    if isinstance(cu_seqlens, Tensor):
        check_dense("cu_seqlens", cu_seqlens)
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        got = tuple(cu_seqlens.shape) if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise ValueError(f"cu_seqlens: expected a tensor of shape (B + 1,), got {got}")
    check_tensor("cu_seqlens", cu_seqlens, dtypes=INTEGERS, device=tokens.device, shape=cu_seqlens.shape)
    if not torch.compiler.is_compiling():
        check_cu_seqlens(cu_seqlens, tokens.numel())
    return cu_seqlens


def check_all(name: str, value: Tensor | None, good: Callable[[Tensor], Tensor], expected: str) -> None:
    """Raise ValueError unless `good` is true for every element of `value`. Nothing is read for None, under torch.compile, or where
    values are not checked (`checks_values`)."""
    if value is None or torch.compiler.is_compiling() or not checks_values(value):
        return
    bad = ~good(value)
    if bool(bad.any()):
        raise ValueError(f"{name}: expected {expected}, got {float(value[bad][0])}")
