"""From the statistics of the `trajectory` stage to the loss and the metrics: the one place where trajectories are averaged."""

from __future__ import annotations

import torch
from torch import Tensor

from pmpo_kernels.config import LossConfig
from pmpo_kernels.reference import STATS


def default_denominator(stats: Tensor, config: LossConfig) -> Tensor:
    """D of design 2.6, 0-d float64: tokens for "token-mean", else non-empty trajectories; at least 1."""
    tokens = stats[STATS.index("tokens")]
    count = tokens if config.loss_agg_mode == "token-mean" else (tokens > 0).double()
    return count.sum().clamp(min=1)


def total_loss(stats: Tensor, config: LossConfig, denominator: Tensor) -> Tensor:
    """Loss of design 2.6, 2.7, 0-d float64: (policy + beta KL - entropy_coef H), each weighted alike, over D."""
    row = dict(zip(STATS, stats.unbind(), strict=True))
    loss = (row["weight"] * row["policy_loss"]).sum()
    for factor, term in ((config.beta, row["kl"]), (-config.entropy_coef, row["entropy"])):
        if factor:
            loss = loss + factor * (row["weight"] / row["tokens"].clamp(min=1) * term).sum()
    return loss / denominator


def metrics(
    stats: Tensor, denominator: Tensor, *, has_ref_logp: bool, has_entropy: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Detached 0-d tensors; means over tokens, or over non-empty trajectories for p and ESS. No host synchronisation.

    Few operations on whole rows: each is a kernel of its own on a GPU, and a dozen metrics one by one would be a hundred.
    """
    stats = stats.detach()
    row = dict(zip(STATS, stats.unbind(), strict=True))
    some = row["tokens"] > 0
    means = [row["clipped_low"], row["clipped_high"], row["ratio_sum"], row["approx_kl"], row["kl"], row["entropy"]]
    power = torch.where(some, row["power"], 0)
    policy = row["weight"] * row["policy_loss"]
    sums = torch.stack([*means, power, row["ess"], row["ess_target"], policy, row["tokens"], some.double()]).sum(1)
    per_token, per_trajectory, policy_sum, counts = sums.tensor_split((6, 9, 10))
    tokens, trajectories = counts.clamp(min=1).unbind()
    values = [per_token / tokens, per_trajectory / trajectories, policy_sum / denominator, counts]
    ends = torch.stack([row["ratio_max"], row["power"], -row["power"]]).where(some, -torch.inf)
    if stats.shape[1]:
        values.append(ends.amax(1).where(counts[1] > 0, 0))
    else:
        values.append(sums.new_zeros(3))
    names = ("clip_fraction_low", "clip_fraction_high", "ratio_mean", "approx_kl", "ref_kl", "entropy", "power_mean",
             "ess", "ess_target", "policy_loss", "tokens", "trajectories", "ratio_max", "power_max", "power_min")  # fmt: skip
    out = dict(zip(names, torch.cat(values).to(dtype).unbind(), strict=True))
    out["power_min"] = 0 - out["power_min"]  # of no trajectories 0, not -0
    out["clip_fraction"] = out["clip_fraction_low"] + out["clip_fraction_high"]
    absent = {"ref_kl": not has_ref_logp, "entropy": not has_entropy}
    return {name: value for name, value in out.items() if not absent.get(name)}
