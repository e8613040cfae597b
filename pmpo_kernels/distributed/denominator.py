"""`denominator`: what the loss is divided by when a batch is spread over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from pmpo_kernels import checks
from pmpo_kernels.aggregate import default_denominator
from pmpo_kernels.config import LossConfig
from pmpo_kernels.distributed.ranks import ALONE, Ranks, agreement, all_reduce, find_ranks, mark, size


def denominator(
    lengths: Tensor | Sequence[Tensor], config: LossConfig, *, mesh: DeviceMesh | None = None, averaged: bool = False
) -> Tensor:
    """Return the whole step's count for the loss's `denominator`; gradients then add up to those of one big batch.

    Args:
        lengths: (B,) integers, the response tokens of each trajectory on this rank, such as `mask.sum(1)` or
            `cu_seqlens.diff()`; or one such tensor for each micro-batch. B may be 0. Where "cp" splits trajectories, the
            tokens of this rank's part alone.
        config: the loss's; its `loss_agg_mode` says what is counted.
        mesh: the loss's; None for micro-batches alone.
        averaged: the gradients of the ranks of "dp" and "cp" are averaged later, as DDP and FSDP do it, not added up.

    Returns:
        0-d float64 on the device of `lengths`, the same on every rank; at least 1 before it is divided by the number of
        averaged ranks.

    Raises:
        TypeError, ValueError: a wrong argument; RuntimeError on the other ranks then.
    """
    ranks = ALONE if mesh is None else find_ranks(None, mesh, "contiguous")._replace(vocabulary=None)
    with agreement(ranks) as mine:
        if not isinstance(lengths, (Tensor, Sequence)):
            raise TypeError(f"lengths: expected a tensor (B,) or a sequence of them, got {type(lengths).__name__}")
        parts = [lengths] if isinstance(lengths, Tensor) else list(lengths)
        if not parts:
            raise ValueError("lengths: expected a tensor (B,) or a sequence of them, got an empty sequence")
        for part in parts:
            if not isinstance(part, Tensor) or checks.check_dense("lengths", part).dim() != 1:
                got = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise ValueError(f"lengths: expected tensors (B,), got {got}")
            checks.check_tensor("lengths", part, dtypes=checks.INTEGERS, device=parts[0].device, shape=part.shape)
            checks.check_all("lengths", part, lambda n: n >= 0, "numbers of tokens >= 0")
        if not isinstance(config, LossConfig):
            raise TypeError(f"config: expected a LossConfig, got {type(config).__name__}")
        checks.check_flag("averaged", averaged)
        mine.same_batch = {"config.loss_agg_mode or averaged": mark(config.loss_agg_mode, averaged)}
        mine.same_trajectories = {"lengths": sum(len(part) for part in parts), **mine.same_batch}
    tokens = torch.cat(parts).double()
    if ranks.sequence is not None:
        all_reduce(tokens, ranks.sequence, "the sum of the trajectories' lengths")
    D = default_denominator(tokens, config.aggregate_options(), lambda count: sum_over_data(count, ranks))
    return D / (size(ranks.sequence) * data_size(ranks)) if averaged else D


def data_size(ranks: Ranks) -> int:
    n = 1
    for group in ranks.data:
        n *= size(group)
    return n


def sum_over_data(count: Tensor, ranks: Ranks) -> Tensor:
    """The sum of a count () over the ranks that have other trajectories of the batch, in place."""
    for group in ranks.data:
        all_reduce(count, group, "the sum of the batch's counts")
    return count
