"""Which tokens of a batch enter the products of the fused LM head, and in which chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pmpo_kernels.autograd import TrajectoryInputs
from pmpo_kernels.checks import check_cu_seqlens
from pmpo_kernels.memory import available_memory

ENOUGH_TOKENS = {"cpu": 1024}
"""Tokens a chunk with which the products run at full speed: 1,024 on a CPU (97 % of the rate at 2,048, 2 cores, float32 and
bfloat16), elsewhere 4,096, which is not measured yet."""
FEWEST_TOKENS = 128
MEMORY_SHARE = 4  # the logits of a chunk take at most this part of the free memory


class Work(NamedTuple):
    """The tokens that enter a product: response tokens of the B' trajectories that are not left out, empty ones among them."""

    rows: Tensor  # (K,) positions of the tokens, rising
    trajectories: Tensor  # (B',) indices
    ends: Tensor  # (B' + 1,) where each begins and ends in `rows`
    lengths: list[int]  # the same on the host: tokens of each
    tokens: Tensor  # (B,) response tokens of every trajectory
    skipped: Tensor  # (B,) bool: left out


def count_tokens(inputs: TrajectoryInputs) -> Tensor:
    """Response tokens of each trajectory (B,) int64."""
    offsets = inputs.cu_seqlens.long()
    if inputs.mask is None:
        return offsets.diff()
    before = torch.nn.functional.pad(inputs.mask.cumsum(0), (1, 0))
    return before[offsets.clamp(0, inputs.mask.numel())].diff()


def first(mask: Tensor, count: int) -> Tensor:
    """Indices (count,) of the first `count` true elements, without waiting for a GPU to count them."""
    return (~mask).int().argsort(stable=True)[:count]


def find_work(token_ids: Tensor, inputs: TrajectoryInputs, skip_zero_advantage: bool) -> Work:
    """Of token_ids (N,). Waits for a GPU twice: the sizes of the products depend on the data."""
    offsets, N = inputs.cu_seqlens.long(), token_ids.numel()
    tokens = count_tokens(inputs)
    skipped = (inputs.advantages == 0) & skip_zero_advantage
    values = torch.cat([offsets, tokens, skipped.long()]).cpu()
    check_cu_seqlens(values[: len(offsets)], N)
    counts, left_out = values[len(offsets) :].view(2, -1).tolist()
    valid = torch.ones_like(token_ids, dtype=torch.bool) if inputs.mask is None else inputs.mask
    if any(left_out):
        valid = valid & ~skipped.repeat_interleave(offsets.diff(), output_size=N)
    lengths = [n for n, out in zip(counts, left_out, strict=True) if not out]
    trajectories = first(~skipped, len(lengths))
    ends = torch.nn.functional.pad(tokens[trajectories].cumsum(0), (1, 0))
    return Work(valid.nonzero()[:, 0], trajectories, ends, lengths, tokens, skipped)


def pack(lengths: list[int], max_tokens: int) -> Iterator[slice]:
    """Slices of trajectories, in order, each as long as it fits into `max_tokens`; one that alone does not has its own."""
    start = total = 0
    for i, n in enumerate(lengths):
        if n and total and total + n > max_tokens:
            yield slice(start, i)
            start, total = i, 0
        total += n
    if lengths:
        yield slice(start, len(lengths))


def default_chunk_tokens(longest: int, bytes_a_token: int, device: torch.device) -> int:
    """Enough tokens for full speed, or the longest trajectory, which then is projected once; but not more than a quarter of
    the free memory holds, rounded down to a power of two so that it rarely differs from run to run."""
    wanted = max(longest, ENOUGH_TOKENS.get(device.type, 4096))
    free = available_memory(device)
    if free is None:
        return wanted
    room = max(free // MEMORY_SHARE // bytes_a_token, FEWEST_TOKENS)
    return min(wanted, 1 << (room.bit_length() - 1))
