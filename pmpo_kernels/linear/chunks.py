"""Which tokens of a batch enter the products of the fused LM head, and in which chunks."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from pmpo_kernels.batch import Batch
from pmpo_kernels.checks import check_cu_seqlens
from pmpo_kernels.memory import available_memory

ENOUGH_TOKENS = {"cpu": 1024}
"""Tokens that a chunk should have. On a CPU 1,024, with which the products run at full speed (97 % of the rate at 2,048, on 2
cores, in float32 and bfloat16). Elsewhere 16,384, because each chunk reads and writes the float32 sum of the weight's gradient."""
FEWEST_TOKENS = 128  # that a chunk has room for, however little memory is free
# The logits of enough tokens take at most an eighth of the free memory, those of a longer trajectory at most a quarter.
ENOUGH_SHARE, LONGEST_SHARE = 8, 4


class Work(NamedTuple):
    """The tokens that enter the products: the K response tokens of the B' trajectories that are not left out. Trajectories without
    response tokens are among the B'."""

    rows: Tensor  # (K,) flat positions of the tokens, rising
    trajectories: Tensor  # (B',) their indices in the batch, rising
    ends: Tensor  # (B' + 1,) where each begins and ends in `rows`
    lengths: list[int]  # B' numbers of tokens, on the host
    tokens: Tensor  # (B,) response tokens of every trajectory of the batch
    skipped: Tensor  # (B,) bool: whether it is left out


def first(mask: Tensor, count: int) -> Tensor:
    """Indices (count,) of the first `count` true elements of a mask. `nonzero` would wait for a GPU to count them."""
    return (~mask).int().argsort(stable=True)[:count]


def find_work(token_ids: Tensor, batch: Batch, skip_zero_advantage: bool) -> Work:
    """Find which of the tokens, token_ids (N,), enter the products. `skip_zero_advantage` leaves out trajectories with advantage 0.
    It waits for a GPU twice, because the sizes of the products depend on the data."""
    offsets, N = batch.cu_seqlens.long(), token_ids.numel()
    tokens = batch.count_tokens()
    skipped = (batch.advantages == 0) & skip_zero_advantage
    values = torch.cat([offsets, tokens, skipped.long()]).cpu()
    check_cu_seqlens(values[: len(offsets)], N)
    counts, left_out = values[len(offsets) :].view(2, -1).tolist()
    valid = torch.ones_like(token_ids, dtype=torch.bool) if batch.mask is None else batch.mask
    if any(left_out):
        valid = valid & ~skipped.repeat_interleave(offsets.diff(), output_size=N)
    lengths = [n for n, out in zip(counts, left_out, strict=True) if not out]
    trajectories = first(~skipped, len(lengths))
    ends = torch.nn.functional.pad(tokens[trajectories].cumsum(0), (1, 0))
    return Work(valid.nonzero()[:, 0], trajectories, ends, lengths, tokens, skipped)


def pack(lengths: list[int], max_tokens: int) -> list[slice]:
    """Cut the trajectories, in order, into slices of at most `max_tokens` tokens. There are as few slices as possible, and among
    such ways it is one whose largest slice is smallest. A trajectory that is longer than `max_tokens` has a slice of its own."""
    ends = list(accumulate(lengths, initial=0))
    low, high = max((n for n in lengths if n <= max_tokens), default=0), max_tokens
    fewest = len(list(_as_they_fit(ends, high)))
    while low < high:
        middle = (low + high) // 2
        if len(list(_as_they_fit(ends, middle))) > fewest:
            low = middle + 1
        else:
            high = middle
    return list(_as_they_fit(ends, high))


def _as_they_fit(ends: list[int], max_tokens: int) -> Iterator[slice]:
    """Yield slices that are each as long as `max_tokens` allows, but hold at least one trajectory with tokens. `ends` are the
    cumulated lengths, with a 0 in front."""
    start, last = 0, len(ends) - 1
    while start < last:
        stop = bisect_right(ends, ends[start] + max_tokens) - 1
        if ends[stop] == ends[start] and stop < last:
            stop = bisect_right(ends, ends[stop + 1]) - 1
        yield slice(start, stop)
        start = stop


def even(tokens: int, max_tokens: int) -> int:
    """Number of tokens of the largest piece, at least 1, when `tokens` are cut evenly into as few pieces as `max_tokens` allows."""
    return math.ceil(tokens / max(math.ceil(tokens / max_tokens), 1)) or 1


def default_chunk_tokens(longest: int, bytes_a_token: int, device: torch.device) -> int:
    """Choose how many tokens a chunk may have.

    It is `ENOUGH_TOKENS`, or the length of the longest trajectory if that is more, because a trajectory in one chunk is projected
    once. Either is limited by its share of the free memory, rounded down to a power of two, so that the choice rarely differs from
    run to run."""
    enough, free = ENOUGH_TOKENS.get(device.type, 16_384), available_memory(device)
    if free is None:
        return max(enough, longest)

    def within(wanted: int, share: int) -> int:
        room = max(free // share // bytes_a_token, FEWEST_TOKENS)
        return min(wanted, 1 << (room.bit_length() - 1))

    return max(within(enough, ENOUGH_SHARE), within(longest, LONGEST_SHARE))
