"""The random batch that every peer gets. It looks like that of a training step some updates after sampling."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LENGTHS = (12, 0, 1, 7, 9, 12, 5, 8)  # padding, an empty row, a row of one token
ADVANTAGES = (1.2, 0.8, -0.6, -1.4, 0.9, 0.0, -0.7, 2.0)  # both signs, and a zero on a full row
HIDDEN_SIZE = 16
RATIO_SD, REF_SD, ROLLOUT_SD = 0.25, 0.3, 0.1
WIDE = (0.45, -0.45)  # log-ratios of two tokens in each row, so that at bounds of 0.4 something clips whatever the seed


class Batch(NamedTuple):
    """B = 8 trajectories of at most T = 12 tokens, float32 (token_ids int64, mask bool).

    `hidden` (B, T + 1, H) and `weight` (V, H) have the product `logits` (B, T + 1, V); advantages are (B,), all else (B, T).
    `logp` is that of `logits` at temperature 1; `old_logp` and `ref_logp` differ from it by normal noise.
    """

    hidden: Tensor
    weight: Tensor
    logits: Tensor
    token_ids: Tensor
    logp: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    advantages: Tensor
    mask: Tensor
    rollout_weights: Tensor


def make_batch(*, V: int = 201, seed: int = 0, device: str = "cpu") -> Batch:
    """Make a `Batch` with V logits of standard deviation 1 and log-ratios of standard deviation 0.25. Some tokens of either sign
    clip, most do not, and no ratio is near an overflow. Raises ValueError for V < 1."""
    if V < 1:
        raise ValueError(f"V: expected an int > 0, got {V}")
    random = torch.Generator().manual_seed(seed)
    B, T = len(LENGTHS), max(LENGTHS)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    # what does not depend on V is drawn first, so that the same ratios clip at every V
    d, ref, rollout = RATIO_SD * normal(B, T), REF_SD * normal(B, T), ROLLOUT_SD * normal(B, T)
    d[:, 1:3] = torch.tensor(WIDE)
    hidden, weight = normal(B, T + 1, HIDDEN_SIZE), normal(V, HIDDEN_SIZE) / HIDDEN_SIZE**0.5
    logits = hidden @ weight.T
    token_ids = torch.randint(V, (B, T), generator=random)
    logp = torch.log_softmax(logits[:, :T].double(), -1).gather(-1, token_ids[..., None])[..., 0].float()
    batch = Batch(
        hidden=hidden,
        weight=weight,
        logits=logits,
        token_ids=token_ids,
        logp=logp,
        old_logp=logp - d,
        ref_logp=logp + ref,
        advantages=torch.tensor(ADVANTAGES),
        mask=torch.arange(T) < torch.tensor(LENGTHS)[:, None],
        rollout_weights=rollout.exp(),
    )
    return Batch(*(tensor.to(device) for tensor in batch))


def entropy(batch: Batch) -> Tensor:
    """Entropy (B, T) of each token's distribution at temperature 1."""
    log_q = torch.log_softmax(batch.logits[:, :-1], -1)
    return -(log_q.exp() * log_q).sum(-1)


def token_weights(batch: Batch) -> Tensor:
    """Rollout weights (B, T), one a token."""
    return batch.rollout_weights


def rows(batch: Batch, part: slice) -> Batch:
    """Return some trajectories of a batch: a micro-batch, or the share of a data-parallel rank."""
    return Batch(*(tensor if tensor is batch.weight else tensor[part] for tensor in batch))
