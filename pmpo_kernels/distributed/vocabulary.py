"""Log-probs and entropies of logits whose vocabulary is split over ranks. Each rank reads its own part and sends 4 numbers a row.

Let m_r, s_r, H_r be the maximum, sum and entropy of rank r's part, M and S the maximum and sum of the whole, and
w_r = s_r exp((m_r - M)/T) / S the part's share of the probability. Then, by the chain rule of the entropy,

    logp = logp_r + log w_r  with r the rank of the target,    H = sum_r w_r (H_r - log w_r),

in which nothing large cancels. The gradient of a part needs M, S and H alone.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from pmpo_kernels.contract import ELSEWHERE
from pmpo_kernels.distributed.ranks import all_gather


class Vocabulary(NamedTuple):
    """A vocabulary in parts: the group of ranks that hold them, and their sizes in the order of the ranks."""

    group: ProcessGroup
    sizes: list[int]

    @property
    def starts(self) -> list[int]:
        return [0, *accumulate(self.sizes)]

    def local_ids(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return token_ids counted from this rank's part: for `token_logp`, with any id where the target is on another rank, and
        for `dlogits`, with `ELSEWHERE` there."""
        rank = dist.get_rank(self.group)
        ids = token_ids.long() - self.starts[rank]
        here = (ids >= 0) & (ids < self.sizes[rank])
        return torch.where(here, ids, 0), torch.where(here, ids, ELSEWHERE)

    def combine(
        self, token_ids: Tensor, mask: Tensor | None, temperature: float, found: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Make logp, row_max, row_sum and entropy of the whole vocabulary from those of this part, `found`, (B, T) each. Every rank
        gets the same bits."""
        logp, row_max, row_sum, entropy = all_gather(
            torch.stack(found), self.group, "the sum over the vocabulary"
        ).unbind(1)
        M = row_max.amax(0)
        empty = ((row_max == -torch.inf) | (row_sum == 0)) & (-torch.inf < M)  # a part of nothing but -inf
        logp = torch.where(empty, 0, logp)
        log_share = torch.where(empty, -torch.inf, (row_max - M) / temperature + row_sum.log())
        share = log_share.exp()
        S = share.sum(0)
        log_share, share = log_share - S.log(), share / S
        H = torch.where(share > 0, share * (entropy - log_share), share.clamp(max=0)).sum(0)
        owner = torch.zeros_like(token_ids, dtype=torch.int64)
        for start in self.starts[1:-1]:  # numbers of the host, not a tensor that would have to be sent to a GPU
            owner += token_ids >= start
        unknown = (token_ids < 0) | (token_ids >= self.starts[-1])
        owner = owner[None]
        logp = (logp.gather(0, owner) + log_share.gather(0, owner))[0]
        logp = torch.where(unknown, torch.nan, logp)
        if mask is not None:
            logp, M, S, H = (torch.where(mask, x, other) for x, other in ((logp, 0), (M, 0), (S, 1), (H, 0)))
        return logp, M, S, H
