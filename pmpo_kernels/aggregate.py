"""Stage `aggregate`: from the statistics of trajectories to the loss and the metrics. Here its specification, in eager PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pmpo_kernels.config import STATS, LossConfig

METRICS = (
    "clip_fraction_low",
    "clip_fraction_high",
    "ratio_mean",
    "approx_kl",
    "ref_kl",
    "entropy",
    "power_mean",
    "ess",
    "ess_target",
    "policy_loss",
    "tokens",
    "trajectories",
    "ratio_max",
    "power_max",
    "power_min",
    "clip_fraction",
)
"""The metrics of the stage, in the order of every implementation."""


class Aggregation(NamedTuple):
    """What of a `LossConfig` the stage reads, as numbers.

    Where |dlogp| + entropy_factor |dentropy| of a token is at most `limit`, the gradient of what it comes from is finite."""

    by_tokens: float
    beta: float
    entropy_coef: float
    limit: float = math.inf
    entropy_factor: float = 1.0

    @classmethod
    def of(cls, config: LossConfig, *limit: float) -> Aggregation:
        return cls(float(config.loss_agg_mode == "token-mean"), config.beta, config.entropy_coef, *limit)


def counts(tokens: Tensor, options: Aggregation) -> Tensor:
    """What D adds up, (B,) float64: each trajectory's tokens for "token-mean", else 1 for one that has any."""
    return tokens.double() if options.by_tokens else (tokens > 0).double()


def default_denominator(tokens: Tensor, options: Aggregation) -> Tensor:
    """D of design 2.6, 0-d float64, from each trajectory's tokens (B,); at least 1."""
    return counts(tokens, options).sum().clamp(min=1)


def total_loss(stats: Tensor, options: Aggregation, denominator: Tensor) -> Tensor:
    """Loss of design 2.6, 2.7, 0-d float64: (policy + beta KL - entropy_coef H), each weighted alike, over D."""
    row = dict(zip(STATS, stats.unbind(), strict=True))
    loss = (row["weight"] * row["policy_loss"]).sum()
    for factor, term in ((options.beta, row["kl"]), (-options.entropy_coef, row["entropy"])):
        if factor:
            loss = loss + factor * (row["weight"] / row["tokens"].clamp(min=1) * term).sum()
    return loss / denominator


def aggregate(
    stats: Tensor,
    denominator: Tensor | None,
    largest: Tensor | None,
    skipped: Tensor | None,
    options: Aggregation,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss (), D () float64, metrics (M,) in the order of `METRICS`, clipped fraction of each trajectory (B,) float64); loss and
    metrics in `dtype`. No host synchronisation.

    Of stats (S, B) float64; denominator () float64, None for that of these trajectories; largest () float64, the largest size of
    D dlogp, None not to ask: a finite loss is only given with a finite gradient. `skipped` (B,)
    bool: trajectories with A = 0 of which nothing but the tokens is known. Nothing of theirs is clipped; the other means
    leave them out. Means are over tokens, those of p and ESS over non-empty trajectories.
    """
    row = dict(zip(STATS, stats.unbind(), strict=True))
    tokens, some = row["tokens"], row["tokens"] > 0
    known = some if skipped is None else some & ~skipped
    D = default_denominator(tokens, options) if denominator is None else denominator.clone()
    loss = total_loss(stats, options, D).to(dtype)
    if largest is not None:
        a_token = torch.nn.functional.pad(row["weight"] / tokens.clamp(min=1), (0, 1))
        largest = largest + options.entropy_factor * abs(options.entropy_coef) * a_token.amax()
        loss = torch.where(largest / D <= options.limit, loss, loss + torch.inf)

    def mean(x: Tensor, over: Tensor) -> Tensor:
        return x.sum() / over.sum().clamp(min=1)

    def maximum(x: Tensor) -> Tensor:  # 0 of none
        return torch.where(
            known.any(), torch.nn.functional.pad(x.where(known, -torch.inf), (0, 1), value=-torch.inf).amax(), 0
        )

    of_tokens = torch.where(known, tokens, 0)
    power = torch.where(known, row["power"], 0)
    low, high = mean(row["clipped_low"], tokens), mean(row["clipped_high"], tokens)
    found = {
        "clip_fraction_low": low,
        "clip_fraction_high": high,
        "ratio_mean": mean(row["ratio_sum"], of_tokens),
        "approx_kl": mean(row["approx_kl"], of_tokens),
        "ref_kl": mean(row["kl"], of_tokens),
        "entropy": mean(row["entropy"], of_tokens),
        "power_mean": mean(power, known.double()),
        "ess": mean(row["ess"], known.double()),
        "ess_target": mean(row["ess_target"], known.double()),
        "policy_loss": (row["weight"] * row["policy_loss"]).sum() / D,
        "tokens": tokens.sum(),
        "trajectories": some.double().sum(),
        "ratio_max": maximum(row["ratio_max"]),
        "power_max": maximum(power),
        "power_min": 0 - maximum(0 - power),  # 0, not -0
        "clip_fraction": low + high,
    }
    clip_fraction = (row["clipped_low"] + row["clipped_high"]) / tokens.clamp(min=1)
    return loss, D, torch.stack([found[name] for name in METRICS]).to(dtype), clip_fraction
