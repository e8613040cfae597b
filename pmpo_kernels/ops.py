"""The stages and `solve_power` as `torch.library` operators: one schema and one fake each, and an overload for each implementation.

`torch.ops.pmpo_kernels.token_logp.triton`, `.cpp` and `.reference` are the same operator by different means. Lengths,
strides and options are run-time values. `dlogits_` is `dlogits` written over the logits. `scale_` is the backward pass of the fused
head; on a CPU it is one operator of PyTorch, so C++ has none.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pmpo_kernels.batch import Batch
from pmpo_kernels.checks import FLOATS, check_cu_seqlens, check_token_ids
from pmpo_kernels.contract import METRICS, STATS, TARGET, AggregateOptions, TrajectoryOptions, compute_dtype

REQUIRED = set(Batch._fields) - set(Batch._field_defaults)
BATCH = ", ".join(f"Tensor{'' if name in REQUIRED else '?'} {name}" for name in Batch._fields)
SCHEMAS = {
    "token_logp": "(Tensor logits, Tensor token_ids, Tensor? mask, float temperature)"
    " -> (Tensor logp, Tensor row_max, Tensor row_sum, Tensor entropy)",
    "trajectory": f"(Tensor logp, Tensor? entropy, {BATCH}, float[] options)"
    " -> (Tensor dlogp, Tensor dentropy, Tensor stats)",
    "aggregate": "(Tensor stats, Tensor? denominator, Tensor? largest, Tensor? skipped, float[] options, ScalarType dtype)"
    " -> (Tensor loss, Tensor denominator, Tensor metrics, Tensor clip_fraction)",
    "dlogits": "(Tensor logits, Tensor token_ids, Tensor? mask, Tensor row_max, Tensor row_sum, Tensor entropy,"
    " Tensor? dlogp, Tensor? dentropy, float temperature) -> Tensor",
    "dlogits_": "(Tensor(a!) logits, Tensor token_ids, Tensor? mask, Tensor row_max, Tensor row_sum, Tensor entropy,"
    " Tensor? dlogp, Tensor? dentropy, float temperature) -> ()",
    "scale_": "(Tensor(a!) gradient, Tensor factor) -> ()",
    "solve_power": "(Tensor log_weights, Tensor? mask, Tensor cu_seqlens, Tensor target_ess, float power_max)"
    " -> (Tensor power, Tensor iterations, Tensor residual)",
}
NAMES = {name: re.findall(r"(\w+)[,)]", schema.partition(" -> ")[0]) for name, schema in SCHEMAS.items()}
OF_TOKENS = {"mask", "old_logp", "ref_logp", "rollout_weights", "policy_mask", "entropy"}
OF_TOKENS |= {"row_max", "row_sum", "dlogp", "dentropy"}
OF_TRAJECTORIES = {"advantages", "power", "target_ess", "skipped"}
SINGLE = {"denominator", "largest"}
STAGES = ("token_logp", "trajectory", "aggregate", "dlogits", "dlogits_")


class Implementation(NamedTuple):
    """An implementation: its operators, the module with functions of their names, and the device keys it serves.

    The compiled extension (`cpp`) registers its kernels itself, for CPU, and checks values itself.
    """

    operators: tuple[str, ...]
    module: str | None
    keys: tuple[str, ...]


IMPLEMENTATIONS = {
    "reference": Implementation(
        (*STAGES, "scale_", "solve_power"), "pmpo_kernels.reference", ("CompositeExplicitAutograd",)
    ),
    "triton": Implementation((*STAGES, "scale_"), "pmpo_kernels.triton", ("CUDA", "CPU")),
    "cpp": Implementation((*STAGES, "solve_power"), None, ()),
}


def _token_logp_fake(logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float) -> tuple[Tensor, ...]:
    return tuple(token_ids.new_empty(token_ids.shape, dtype=compute_dtype(logits.dtype)) for _ in range(4))


def _trajectory_fake(logp: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    entropy, advantages, options = args[0], args[1], TrajectoryOptions(*args[-1])
    with_entropy = entropy is not None and options.entropy_coef != 0
    return (
        logp.new_empty(logp.numel(), dtype=torch.float64),
        logp.new_empty(logp.numel() if with_entropy else 0, dtype=torch.float64),
        logp.new_empty(len(STATS), advantages.numel(), dtype=torch.float64),
    )


def _aggregate_fake(stats: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, metrics = (stats.new_empty(size, dtype=args[-1]) for size in ((), (len(METRICS),)))
    return loss, stats.new_empty(()), metrics, stats.new_empty(stats.shape[1])


def empty_gradient(logits: Tensor, *args: Any) -> Tensor:
    """Room for the gradient of logits (B, S, V), each row in one piece; strides like those of the logits if possible."""
    out = torch.empty_like(logits)  # of rows that overlap in memory it may permute the dimensions
    return out if out.stride(-1) == 1 else logits.new_empty(logits.shape)


def _solve_power_fake(log_weights: Tensor, mask: Tensor | None, cu_seqlens: Tensor, *args: Any) -> tuple[Tensor, ...]:
    B = cu_seqlens.numel() - 1
    return tuple(log_weights.new_empty(B, dtype=dtype) for dtype in (torch.float64, torch.int64, torch.float64))


FAKES: dict[str, Callable[..., Any]] = {
    "token_logp": _token_logp_fake,
    "trajectory": _trajectory_fake,
    "aggregate": _aggregate_fake,
    "dlogits": empty_gradient,
    "dlogits_": lambda *args: None,
    "scale_": lambda *args: None,
    "solve_power": _solve_power_fake,
}


def stage(name: str, impl: str) -> Callable[..., Any]:
    """The operator `name`, a stage, `scale_` or `solve_power`, of one implementation."""
    return getattr(getattr(torch.ops.pmpo_kernels, name), impl)  # type: ignore[no-any-return]


def check_operands(name: str, args: tuple[Any, ...]) -> None:
    """Check what an implementation in Python relies on: sizes, device, dtype of masks. Public calls have checked more."""
    given = dict(zip(NAMES[name], args, strict=True))
    first = args[0]
    if "logits" in given:
        z, ids = first.shape, given["token_ids"].shape
        if len(z) != 3 or len(ids) != 2 or ids[0] != z[0] or ids[1] > z[1] or z[2] == 0:
            expected = "shape (B, S, V) with token_ids (B, T), T <= S, V > 0"
            raise ValueError(f"logits: expected {expected}, got {tuple(z)} and {tuple(ids)}")
        if first.dtype not in FLOATS:
            raise ValueError(f"logits: expected a floating-point dtype, got {first.dtype}")
        if first.stride(2) != 1 and z[2] > 1:
            raise ValueError(f"logits: expected stride 1 in the vocabulary dimension, got strides {first.stride()}")
    if name == "scale_":
        if first.dtype not in FLOATS or not first.is_contiguous():
            raise ValueError(
                f"gradient: expected a contiguous floating-point tensor, got {first.dtype}, strides {first.stride()}"
            )
        if given["factor"].numel() != 1 or given["factor"].dtype not in FLOATS:
            raise ValueError(
                f"factor: expected one floating-point number, got {given['factor'].numel()} of {given['factor'].dtype}"
            )
    tokens = given["token_ids"].numel() if "logits" in given else first.numel()
    trajectories = given["cu_seqlens"].numel() - 1 if "cu_seqlens" in given else 0
    if "stats" in given:
        if first.dim() != 2 or first.shape[0] != len(STATS) or first.dtype != torch.float64:
            raise ValueError(
                f"stats: expected float64 of shape ({len(STATS)}, B), got {first.dtype} {tuple(first.shape)}"
            )
        trajectories = first.shape[1]
        if given["dtype"] not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: expected float32 or float64, got {given['dtype']}")
    for argument, x in given.items():
        if not isinstance(x, Tensor):
            continue
        other = 1 if argument in SINGLE else x.numel()
        wanted = tokens if argument in OF_TOKENS else trajectories if argument in OF_TRAJECTORIES else other
        if x.numel() != wanted:
            raise ValueError(f"{argument}: expected {wanted} elements, got {x.numel()}")
        if argument.endswith(("mask", "skipped")) and x.dtype != torch.bool:
            raise ValueError(f"{argument}: expected dtype bool, got {x.dtype}")
        if x.device != first.device:
            raise ValueError(f"{argument}: expected a tensor on {first.device}, got one on {x.device}")


def read_options(kind: Any, values: list[float]) -> Any:
    """Return an operator's options as the named tuple `kind`."""
    if len(values) != len(kind._fields):
        raise ValueError(f"options: expected those of {kind.__name__}, got {len(values)} numbers")
    return kind(*values)


def _run(module: str, name: str, args: tuple[Any, ...]) -> Any:
    """Check what only real tensors have, then call the implementation (imported on first use)."""
    check_operands(name, args)
    if name == "token_logp":
        check_token_ids(args[1], args[2], args[0].shape[-1])
    if name == "trajectory":
        batch, options = Batch(*args[2:-1]), read_options(TrajectoryOptions, args[-1])
        check_cu_seqlens(batch.cu_seqlens, args[0].numel())
        if options.rule == TARGET and batch.target_ess is None:
            raise ValueError("target_ess: expected a tensor with this rule of p, got None")
        args = (*args[:2], batch, options)
    if name == "aggregate":
        args = (*args[:-2], read_options(AggregateOptions, args[-2]), args[-1])
    if name == "solve_power":
        check_cu_seqlens(args[2], args[0].numel())
    implementation = importlib.import_module(module)
    if name == "dlogits":
        return implementation.dlogits(*args, out=empty_gradient(args[0]))
    if name == "dlogits_":
        implementation.dlogits(*args, out=args[0])
        return None
    return getattr(implementation, name)(*args)


def _register() -> torch.library.Library:
    library = torch.library.Library("pmpo_kernels", "DEF")
    for impl, (operators, module, keys) in IMPLEMENTATIONS.items():
        for name in operators:
            library.define(f"{name}.{impl}{SCHEMAS[name]}")
            for key in keys:
                library.impl(f"{name}.{impl}", lambda *args, m=module, n=name: _run(m, n, args), key)
            torch.library.register_fake(f"pmpo_kernels::{name}.{impl}", FAKES[name], lib=library)
    return library


LIBRARY = _register()
