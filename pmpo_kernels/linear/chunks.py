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
"""Tokens a chunk that are wanted: 1,024 on a CPU, where the products then run at full speed (97 % of the rate at 2,048, 2 cores,
float32 and bfloat16); elsewhere 16,384, because each chunk reads and writes the float32 sum of the weight's gradient once more."""
FEWEST_TOKENS = 128
# the logits of a chunk take at most this part of the free memory: of enough tokens, of a longer trajectory
ENOUGH_SHARE, LONGEST_SHARE = 8, 4


class Work(NamedTuple):
    """The tokens that enter a product: response tokens of the B' trajectories that are not left out, empty ones among them."""

    rows: Tensor  # (K,) positions of the tokens, rising
    trajectories: Tensor  # (B',) indices
    ends: Tensor  # (B' + 1,) where each begins and ends in `rows`
    lengths: list[int]  # the same on the host: tokens of each
    tokens: Tensor  # (B,) response tokens of every trajectory
    skipped: Tensor  # (B,) bool: left out


def first(mask: Tensor, count: int) -> Tensor:
    """Indices (count,) of the first `count` true elements, without waiting for a GPU to count them."""
    return (~mask).int().argsort(stable=True)[:count]


def find_work(token_ids: Tensor, batch: Batch, skip_zero_advantage: bool) -> Work:
    """The work of a batch with token_ids (N,). Waits for a GPU twice, because the sizes of the products depend on the data."""
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
    """Slices of trajectories, in order, of at most `max_tokens` tokens each: as few as possible, and of these ways one whose
    largest is smallest. A trajectory that alone is longer has a slice of its own."""
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
    """Slices each as long as `max_tokens` allow, at least one trajectory with tokens; `ends` begins with 0."""
    start, last = 0, len(ends) - 1
    while start < last:
        stop = bisect_right(ends, ends[start] + max_tokens) - 1
        if ends[stop] == ends[start] and stop < last:
            stop = bisect_right(ends, ends[stop + 1]) - 1
        yield slice(start, stop)
        start = stop


def even(tokens: int, max_tokens: int) -> int:
    """Tokens of the largest of as few pieces as `max_tokens` allow, all of a size but for one token; at least 1."""
    return math.ceil(tokens / max(math.ceil(tokens / max_tokens), 1)) or 1


def default_chunk_tokens(longest: int, bytes_a_token: int, device: torch.device) -> int:
    """Enough tokens, as far as their logits take at most an eighth of the free memory; or the longest trajectory, which then is
    projected once, as far as it takes a quarter. What memory limits is rounded down to a power of two, so that it rarely differs
    from run to run."""
    enough, free = ENOUGH_TOKENS.get(device.type, 16_384), available_memory(device)
    if free is None:
        return max(enough, longest)

    def within(wanted: int, share: int) -> int:
        room = max(free // share // bytes_a_token, FEWEST_TOKENS)
        return min(wanted, 1 << (room.bit_length() - 1))

    return max(within(enough, ENOUGH_SHARE), within(longest, LONGEST_SHARE))
