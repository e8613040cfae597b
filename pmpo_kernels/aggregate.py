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
    per_token = row["weight"] / row["tokens"].clamp(min=1)
    loss = (row["weight"] * row["policy_loss"]).sum()
    if config.beta:
        loss = loss + config.beta * (per_token * row["kl"]).sum()
    if config.entropy_coef:
        loss = loss - config.entropy_coef * (per_token * row["entropy"]).sum()
    return loss / denominator


def metrics(
    stats: Tensor, denominator: Tensor, *, has_ref_logp: bool, has_entropy: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Detached 0-d tensors; means over tokens, or over non-empty trajectories for p and ESS. No host synchronisation."""
    row = dict(zip(STATS, stats.unbind(), strict=True))
    some = row["tokens"] > 0
    tokens, trajectories = row["tokens"].sum(), some.double().sum()
    per_token, per_trajectory = 1 / tokens.clamp(min=1), 1 / trajectories.clamp(min=1)
    low, high = row["clipped_low"].sum() * per_token, row["clipped_high"].sum() * per_token

    def extreme(x: Tensor, sign: float) -> Tensor:
        least = x.new_full((1,), -torch.inf)
        return sign * torch.where(trajectories > 0, torch.cat([torch.where(some, sign * x, least), least]).amax(), 0)

    out = {
        "policy_loss": (row["weight"] * row["policy_loss"]).sum() / denominator,
        "clip_fraction": low + high,
        "clip_fraction_low": low,
        "clip_fraction_high": high,
        "ratio_mean": row["ratio_sum"].sum() * per_token,
        "ratio_max": extreme(row["ratio_max"], 1.0),
        "approx_kl": row["approx_kl"].sum() * per_token,
        "power_mean": torch.where(some, row["power"], 0).sum() * per_trajectory,
        "power_min": extreme(row["power"], -1.0),
        "power_max": extreme(row["power"], 1.0),
        "ess": row["ess"].sum() * per_trajectory,
        "ess_target": row["ess_target"].sum() * per_trajectory,
        "tokens": tokens,
        "trajectories": trajectories,
    }
    if has_ref_logp:
        out["ref_kl"] = row["kl"].sum() * per_token
    if has_entropy:
        out["entropy"] = row["entropy"].sum() * per_token
    return {name: value.detach().to(dtype) for name, value in out.items()}
