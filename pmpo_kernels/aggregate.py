"""From the statistics of the `trajectory` stage to the loss and the metrics: the one place where trajectories are averaged."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pmpo_kernels.config import LossConfig
from pmpo_kernels.reference import STATS


class Aggregation(NamedTuple):
    """What of a `LossConfig` decides here: an autograd Function under torch.compile of PyTorch 2.10 cannot take the dataclass."""

    loss_agg_mode: str
    beta: float
    entropy_coef: float

    @classmethod
    def of(cls, config: LossConfig) -> Aggregation:
        return cls(config.loss_agg_mode, config.beta, config.entropy_coef)


def default_denominator(tokens: Tensor, config: LossConfig | Aggregation) -> Tensor:
    """D of design 2.6, 0-d float64, from each trajectory's tokens (B,) float64: their sum for "token-mean", else the
    non-empty trajectories; at least 1."""
    count = tokens if config.loss_agg_mode == "token-mean" else (tokens > 0).double()
    return count.sum().clamp(min=1)


def total_loss(stats: Tensor, config: LossConfig | Aggregation, denominator: Tensor) -> Tensor:
    """Loss of design 2.6, 2.7, 0-d float64: (policy + beta KL - entropy_coef H), each weighted alike, over D."""
    row = dict(zip(STATS, stats.unbind(), strict=True))
    loss = (row["weight"] * row["policy_loss"]).sum()
    for factor, term in ((config.beta, row["kl"]), (-config.entropy_coef, row["entropy"])):
        if factor:
            loss = loss + factor * (row["weight"] / row["tokens"].clamp(min=1) * term).sum()
    return loss / denominator


def metrics(
    stats: Tensor,
    denominator: Tensor,
    *,
    has_ref_logp: bool,
    has_entropy: bool,
    dtype: torch.dtype,
    skipped: Tensor | None = None,
) -> dict[str, Tensor]:
    """Detached 0-d tensors; means over tokens, or over non-empty trajectories for p and ESS. No host synchronisation.

    `skipped` (B,): trajectories with A = 0 of which nothing but the tokens is known. Nothing of theirs is clipped; the other
    means leave them out.
    Few operations on whole rows: each is a kernel of its own on a GPU, and a dozen metrics one by one would be a hundred.
    """
    stats = stats.detach()
    row = dict(zip(STATS, stats.unbind(), strict=True))
    some = row["tokens"] > 0
    known = some if skipped is None else some & ~skipped
    known_tokens = row["tokens"] if skipped is None else torch.where(known, row["tokens"], 0)
    means = [row["clipped_low"], row["clipped_high"], row["ratio_sum"], row["approx_kl"], row["kl"], row["entropy"]]
    power = torch.where(known, row["power"], 0)
    policy = row["weight"] * row["policy_loss"]
    counted = [row["tokens"], some.double(), known_tokens, known.double()]
    sums = torch.stack([*means, power, row["ess"], row["ess_target"], policy, *counted]).sum(1)
    clips, per_token, per_trajectory, policy_sum, counts = sums.tensor_split((2, 6, 9, 10))
    tokens, _, measured_tokens, measured = counts.clamp(min=1).unbind()
    values = [
        clips / tokens,
        per_token / measured_tokens,
        per_trajectory / measured,
        policy_sum / denominator,
        counts[:2],
    ]
    ends = torch.stack([row["ratio_max"], row["power"], -row["power"]]).where(known, -torch.inf)
    if stats.shape[1]:
        values.append(ends.amax(1).where(counts[3] > 0, 0))
    else:
        values.append(sums.new_zeros(3))
    names = ("clip_fraction_low", "clip_fraction_high", "ratio_mean", "approx_kl", "ref_kl", "entropy", "power_mean",
             "ess", "ess_target", "policy_loss", "tokens", "trajectories", "ratio_max", "power_max", "power_min")  # fmt: skip
    out = dict(zip(names, torch.cat(values).to(dtype).unbind(), strict=True))
    out["power_min"] = 0 - out["power_min"]  # of no trajectories 0, not -0
    out["clip_fraction"] = out["clip_fraction_low"] + out["clip_fraction_high"]
    absent = {"ref_kl": not has_ref_logp, "entropy": not has_entropy}
    return {name: value for name, value in out.items() if not absent.get(name)}
