"""The three stages as `torch.library` operators: one schema and one fake each, one overload per implementation.

`torch.ops.pmpo_kernels.token_logp.triton` and `.reference` are the same operator by different means. Lengths, strides
and options are run-time values. `dlogits_` is `dlogits` written over the logits.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pmpo_kernels.checks import check_cu_seqlens, check_token_ids
from pmpo_kernels.config import TrajectoryOptions
from pmpo_kernels.reference import STATS, compute_dtype

SCHEMAS = {
    "token_logp": "(Tensor logits, Tensor token_ids, Tensor? mask, float temperature)"
    " -> (Tensor logp, Tensor row_max, Tensor row_sum, Tensor entropy)",
    "trajectory": "(Tensor logp, Tensor? old_logp, Tensor advantages, Tensor? mask, Tensor cu_seqlens,"
    " Tensor? ref_logp, Tensor? rollout_weights, Tensor? entropy, Tensor? power, Tensor? target_ess, float[] options)"
    " -> (Tensor dlogp, Tensor dentropy, Tensor stats)",
    "dlogits": "(Tensor logits, Tensor token_ids, Tensor? mask, Tensor row_max, Tensor row_sum, Tensor entropy,"
    " Tensor? dlogp, Tensor? dentropy, float temperature) -> Tensor",
    "dlogits_": "(Tensor(a!) logits, Tensor token_ids, Tensor? mask, Tensor row_max, Tensor row_sum, Tensor entropy,"
    " Tensor? dlogp, Tensor? dentropy, float temperature) -> ()",
}
# impl -> (module with functions named like the stages, device keys)
IMPLEMENTATIONS = {
    "reference": ("pmpo_kernels.reference", ("CompositeExplicitAutograd",)),
    "triton": ("pmpo_kernels.triton", ("CUDA", "CPU")),
}


def _token_logp_fake(logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float) -> tuple[Tensor, ...]:
    return tuple(token_ids.new_empty(token_ids.shape, dtype=compute_dtype(logits.dtype)) for _ in range(4))


def _trajectory_fake(logp: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    advantages, entropy, options = args[1], args[6], TrajectoryOptions(*args[-1])
    with_entropy = entropy is not None and options.entropy_coef != 0
    return (
        logp.new_empty(logp.numel(), dtype=torch.float64),
        logp.new_empty(logp.numel() if with_entropy else 0, dtype=torch.float64),
        logp.new_empty(len(STATS), advantages.numel(), dtype=torch.float64),
    )


def _dlogits_fake(logits: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(logits)


FAKES: dict[str, Callable[..., Any]] = {
    "token_logp": _token_logp_fake,
    "trajectory": _trajectory_fake,
    "dlogits": _dlogits_fake,
    "dlogits_": lambda *args: None,
}


def stage(name: str, impl: str) -> Callable[..., Any]:
    """The operator of one stage and implementation."""
    return getattr(getattr(torch.ops.pmpo_kernels, name), impl)  # type: ignore[no-any-return]


def _run(module: str, name: str, args: tuple[Any, ...]) -> Any:
    """Check the values that only real tensors have, then call the implementation (imported on first use)."""
    if name == "token_logp":
        check_token_ids(args[1], args[2], args[0].shape[-1])
    if name == "trajectory":
        check_cu_seqlens(args[4], args[0].numel())
        args = (*args[:-1], TrajectoryOptions(*args[-1]))
    implementation = importlib.import_module(module)
    if name == "dlogits_":
        implementation.dlogits(*args, out=args[0])
        return None
    return getattr(implementation, name)(*args)


def _register() -> torch.library.Library:
    library = torch.library.Library("pmpo_kernels", "DEF")
    for name, schema in SCHEMAS.items():
        for impl, (module, keys) in IMPLEMENTATIONS.items():
            library.define(f"{name}.{impl}{schema}")
            for key in keys:
                library.impl(f"{name}.{impl}", lambda *args, m=module, n=name: _run(m, n, args), key)
            torch.library.register_fake(f"pmpo_kernels::{name}.{impl}", FAKES[name], lib=library)
    return library


_LIBRARY = _register()
