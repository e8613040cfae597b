"""Trajectories whose tokens are split over ranks: every rank gathers the few numbers of each token, and all compute the same.

All ranks then hold the same tokens in the same order, so that p and everything else are the same to the bit on all of them. For
contiguous pieces, and for zigzag pieces of equal lengths, it is the order on one device, and so are the bits. A rank keeps the
gradient of its own tokens; nothing is sent back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from pmpo_kernels.autograd import first_order
from pmpo_kernels.batch import Batch
from pmpo_kernels.distributed.ranks import all_gather, size
from pmpo_kernels.sharing import Split, Whole


class Placed(torch.autograd.Function):
    """Return `whole` (N,), whose values at `positions` (M,) are those of `own` (M,), with a gradient that flows to `own`."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, whole: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        return whole.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (positions,) = ctx.saved_tensors
        return grad[positions], None, None


def chunk_of_token(batch: Batch, tokens: int, rank: int, ranks: int, split: Split) -> Tensor:
    """Key of each token of this rank, (N,) int64: trajectory x chunks + chunk. It sorts the tokens of all ranks into their order.

    With "contiguous" a trajectory has R chunks, and rank r has chunk r. With "zigzag" it has 2 R, and rank r has chunk r, the first
    half of its tokens, rounded up, and then chunk 2 R - 1 - r, the second half."""
    offsets = batch.cu_seqlens.long()
    position = torch.arange(tokens, device=offsets.device)
    owner = torch.searchsorted(offsets[1:].contiguous(), position, right=True).clamp(max=max(len(offsets) - 2, 0))
    if split == "contiguous":
        return owner * ranks + rank
    begin, end = offsets[:-1][owner], offsets[1:][owner]
    second = 2 * (position - begin) >= end - begin
    return owner * 2 * ranks + torch.where(second, 2 * ranks - 1 - rank, rank)


def gather_tokens(
    logp: Tensor,
    entropy: Tensor | None,
    batch: Batch,
    group: ProcessGroup,
    split: Split,
    counts: list[int],
) -> Whole:
    """Gather the tokens of all ranks of the group, of which rank r has counts[r]. logp and entropy are this rank's (N,)."""
    R, rank, N = size(group), dist.get_rank(group), logp.numel()
    chunks = (2 if split == "zigzag" else 1) * R
    B = batch.cu_seqlens.numel() - 1
    names = ("old_logp", "mask", "ref_logp", "rollout_weights", "policy_mask")
    constants = {name: x for name in names if (x := getattr(batch, name)) is not None}
    columns = [logp, *([] if entropy is None else [entropy]), *constants.values()]
    sent = logp.new_full((1 + len(columns), max(counts, default=0)), B * chunks, dtype=torch.float64)
    sent[0, :N] = chunk_of_token(batch, N, rank, R, split)  # exact in float64
    for row, x in zip(sent[1:], columns, strict=True):
        row[:N] = x.detach()
    received = all_gather(sent, group, "the gathering of the trajectories' tokens")
    flat = received.transpose(0, 1).reshape(len(sent), -1)
    order = flat[0].argsort(stable=True)  # within a chunk by position; padding is last
    flat = flat[:, order[: sum(counts)]]
    offsets = torch.searchsorted(
        flat[0].contiguous(), chunks * torch.arange(B + 1, device=logp.device, dtype=torch.float64)
    )
    slot = torch.empty_like(order)
    slot[order] = torch.arange(len(order), device=order.device)
    own = slot[rank * sent.shape[1] :][:N]
    values = iter(flat[1:])
    whole_logp = Placed.apply(logp, next(values).to(logp.dtype), own)
    whole_entropy = None if entropy is None else Placed.apply(entropy, next(values).to(entropy.dtype), own)
    found = {name: value.to(x.dtype) for (name, x), value in zip(constants.items(), values, strict=True)}
    return Whole(whole_logp, whole_entropy, batch._replace(cu_seqlens=offsets, **found), own)
