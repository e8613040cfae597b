"""Stage `aggregate` in eager PyTorch: from statistics to loss and metrics. Section numbers are those of docs/mathematics.md."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pmpo_kernels.contract import METRICS, STATS, AggregateOptions


def default_denominator(
    tokens: Tensor, options: AggregateOptions, sum_over_ranks: Callable[[Tensor], Tensor] = lambda count: count
) -> Tensor:
    """D of section 7, 0-d float64, from each trajectory's tokens (B,): tokens for "token-mean", else trajectories that have any.

    It is at least 1. `sum_over_ranks` adds up the 0-d count of a batch that is spread over ranks.
    """
    counts = tokens.double() if options.by_tokens else (tokens > 0).double()
    return sum_over_ranks(counts.sum()).clamp(min=1)


def total_loss(stats: Tensor, options: AggregateOptions, denominator: Tensor) -> Tensor:
    """Loss of sections 7 and 8, 0-d float64: policy loss + beta KL - entropy_coef H, all weighted alike, over D."""
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
    options: AggregateOptions,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (), D () float64, metrics (M,) as in `METRICS`, and each trajectory's clipped fraction (B,) float64.

    Loss and metrics have `dtype`. Nothing waits for a GPU.

    Args:
        stats: (S, B) float64, as in `STATS`.
        denominator: D, () float64; None for the default of these trajectories.
        largest: () float64, the largest size of D dlogp: the loss is infinite where it is beyond `options.limit`, because a
            finite loss is only given with a finite gradient. None leaves that out.
        skipped: (B,) bool, trajectories with A = 0 of which nothing but the tokens is known. None of their tokens counts as
            clipped, and the other means leave them out.

    Means are over tokens; those of p and ESS are over trajectories that have any.
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
