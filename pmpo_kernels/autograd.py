"""Two autograd Functions: logits -> log-probs, log-probs -> loss. Each composes operators and holds no mathematics."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pmpo_kernels.batch import Call
from pmpo_kernels.ops import stage


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`once_differentiable`, but create_graph=True raises at once instead of giving a gradient cut off from its graph."""
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("pmpo_kernels: expected a first-order backward, got create_graph=True (not supported)")
        return once(ctx, *grads)

    return wrapper


class Parts(Protocol):
    """A vocabulary of which each rank has a part; see `distributed.vocabulary`."""

    def local_ids(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The ids within this rank's part that the stage `token_logp` reads, and those that `dlogits` reads."""
        ...

    def combine(
        self, token_ids: Tensor, mask: Tensor | None, temperature: float, found: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """The results of `token_logp` for the whole vocabulary, from those `found` in this rank's part."""
        ...


class TokenLogpFunction(torch.autograd.Function):
    """(logits, token_ids, mask, temperature, inplace, impl, parts) -> (logp, entropy), both differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        token_ids: Tensor,
        mask: Tensor | None,
        temperature: float,
        inplace: bool,
        impl: str,
        parts: Parts | None,
    ) -> tuple[Tensor, Tensor]:
        any_ids, targets = (token_ids, token_ids) if parts is None else parts.local_ids(token_ids)
        try:
            found = stage("token_logp", impl)(logits, any_ids, mask, temperature)
        except RuntimeError as error:  # from PyTorch 2.15 on, whatever the C++ kernels raise
            if not str(error).startswith("token_ids: "):
                raise
            raise ValueError(str(error).partition("\n")[0]) from None
        found = found if parts is None else parts.combine(token_ids, mask, temperature, found)
        logp, row_max, row_sum, entropy = found
        ctx.save_for_backward(logits, targets, mask, row_max, row_sum, entropy)
        ctx.temperature, ctx.inplace, ctx.impl = temperature, inplace, impl
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @first_order
    def backward(ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dlogp is None and dentropy is None:
            return (None,) * 7
        try:
            logits, token_ids, mask, row_max, row_sum, entropy = ctx.saved_tensors
        except RuntimeError as error:
            raise RuntimeError(
                "logits: expected them and the returned entropy unchanged since the forward pass, got one modified in "
                "place (with inplace=True the first backward writes the gradient over them, so there is no second one)"
            ) from error
        args = (logits, token_ids, mask, row_max, row_sum, entropy, dlogp, dentropy, ctx.temperature)
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)  # a second backward raises, even if this one is interrupted
            stage("dlogits_", ctx.impl)(*args)
            return logits.detach(), *(None,) * 6
        return stage("dlogits", ctx.impl)(*args), *(None,) * 6


class TrajectoryFunction(torch.autograd.Function):
    """(logp, entropy, call) -> (loss, stats, metrics, clip fractions); the loss is differentiable in logp and entropy.

    logp and entropy are flat (N,). The loss is infinite where a gradient is beyond the limit of `call.aggregate_options`.
    """

    @staticmethod
    def forward(ctx: Any, logp: Tensor, entropy: Tensor | None, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dlogp, dentropy, stats = stage("trajectory", call.impl)(
            logp, entropy, *call.batch, list(call.trajectory_options)
        )
        # A gradient may overflow further on where the loss, a sum in float64, does not: a finite loss needs a finite gradient.
        largest = torch.linalg.vector_norm(dlogp, torch.inf) if dlogp.numel() else None
        loss, denominator, metrics, clip_fraction = stage("aggregate", call.impl)(
            stats, call.denominator, largest, None, list(call.aggregate_options), logp.dtype
        )
        coefficients = torch.stack([dlogp, dentropy]) if dentropy.numel() else dlogp[None]
        ctx.save_for_backward(coefficients, denominator)
        ctx.mark_non_differentiable(stats, metrics, clip_fraction)
        ctx.set_materialize_grads(False)
        ctx.dtype = logp.dtype
        return loss, stats, metrics, clip_fraction

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 3
        coefficients, denominator = ctx.saved_tensors
        dlogp, *dentropy = (coefficients * (grad_loss.double() / denominator)).to(ctx.dtype).unbind()
        return dlogp, *(dentropy or [None]), None
