"""Inputs of the comparisons: batches whose logits look like a language model's, built in chunks of rows on their device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pmpo_kernels.batch import Batch
from pmpo_kernels.benchmarking.cases import Case
from pmpo_kernels.config import LossConfig
from pmpo_kernels.contract import STATS
from pmpo_kernels.reference import trajectory

CHUNK_ELEMENTS = 2**25  # 256 MiB in float64, in which chunks are computed
PEAKS = 16  # number of likely tokens in a row
NOISE = 0.1  # standard deviation of log-ratios that are not clipped
MARGIN = 2e-3  # distance of a token's log-ratio from the clip bounds


class Inputs(NamedTuple):
    """logits (B, T, V); token_ids, old_logp, mask (B, T); advantages (B,); power (B,) float64 is the solved p, or None."""

    logits: Tensor
    token_ids: Tensor
    old_logp: Tensor
    advantages: Tensor
    mask: Tensor
    power: Tensor | None


def chunks(rows: int, vocab: int) -> Iterator[slice]:
    """Yield slices of at most `CHUNK_ELEMENTS` / V rows, but at least one row."""
    size = max(1, CHUNK_ELEMENTS // vocab)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def build_inputs(case: Case) -> Inputs:
    """Make the inputs of a case: tokens sampled from the softmax of `language_logits`, and old_logp = logp - d by `log_ratios`.

    Lengths are spread evenly from T (1 - 2 padded) to T, in random order. Advantages have both signs, and those of the last
    trajectories are 0. An adaptive p is solved once, by the reference in float64.
    """
    B, T, V = case.batch, case.tokens, case.vocab
    generator = torch.Generator(case.device).manual_seed(case.seed)
    random: dict[str, Any] = {"generator": generator, "device": case.device}
    mask, advantages = trajectories(case, random)
    logits = torch.empty(B, T, V, dtype=getattr(torch, case.dtype.value), device=case.device)
    token_ids = torch.empty(B, T, dtype=torch.int64, device=case.device)
    logp = torch.empty(B, T, dtype=torch.float64, device=case.device)
    for rows in chunks(B * T, V):
        z = logits.view(B * T, V)[rows]
        z.copy_(language_logits(z.shape[0], V, random))
        log_q = z.double().log_softmax(-1)
        ids = torch.multinomial(log_q.exp(), 1, generator=generator)
        token_ids.view(-1)[rows] = ids[:, 0]
        logp.view(-1)[rows] = log_q.gather(-1, ids)[:, 0]
    old_logp = (logp - log_ratios(case, mask, advantages, random)).float()
    power = None
    if case.config.power == "ess":
        power = flat_trajectory(logp, old_logp, advantages, mask, case.config)[2][STATS.index("power")]
    return Inputs(logits, token_ids, old_logp, advantages, mask, power)


def trajectories(case: Case, random: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return mask (B, T) and advantages (B,) of a case, as `build_inputs` describes them."""
    B, T = case.batch, case.tokens
    even = (torch.randperm(B, **random) + 0.5) / B
    lengths = T - (2 * case.padded * T * even).round().long()
    mask = torch.arange(T, device=case.device) < lengths[:, None]
    advantages = torch.randn(B, **random).abs() + 0.5
    advantages[1::2] *= -1
    advantages[B - _count(case.zero_advantage, B) :] = 0
    return mask, advantages


def language_logits(rows: int, V: int, random: dict[str, Any]) -> Tensor:
    """Logits (rows, V) float32 that are spread like a language model's: entropies from near 0 to some nats.

    They are 2 N(0, 1), with 16 random columns raised by log V + 4 - 1.5 log k to compete with all others together. The sampled
    token is mostly one of these.
    """
    z = 2 * torch.randn(rows, V, **random)
    peaks = torch.randint(0, V, (rows, PEAKS), **random)
    raised = math.log(V) + 4 - 1.5 * torch.arange(1, PEAKS + 1, device=z.device).log()
    return z.scatter_add_(1, peaks, raised.expand(rows, -1))


def log_ratios(case: Case, mask: Tensor, advantages: Tensor, random: dict[str, Any], margin: float = MARGIN) -> Tensor:
    """Log-ratios d (B, T) float64: noise of 0.1, with exactly the case's fraction clipped.

    No token lies within half of `margin` of a clip bound, where rounding would decide whether it is clipped. Where the preset clips
    whole trajectories, by their mean (p = 0) at bounds of a few 1e-4, no mean lies within half of a bound of it.
    """
    config, sign = case.config, advantages.double().sign()
    low, high = config.clip_low, config.clip_high
    bound = torch.where(sign > 0, high, low)
    noise = NOISE * torch.randn(mask.shape, dtype=torch.float64, **random)
    if config.clip == "token":
        limit = min(low, high) - margin
        chosen = _choose(mask & (sign != 0)[:, None], case.clipped, random)
        beyond = sign[:, None] * (bound[:, None] + margin + noise.abs())
        return torch.where(chosen, beyond, limit * torch.tanh(noise / limit))
    chosen = _choose(sign != 0, case.clipped, random)
    inside = min(low, high) * (torch.rand(sign.shape, dtype=torch.float64, **random) - 0.5)
    mean = torch.where(chosen, 2 * sign * bound, inside)
    noise_mean = torch.where(mask, noise, 0).sum(-1) / mask.sum(-1)
    return noise + (mean - noise_mean)[:, None]


def _choose(candidates: Tensor, fraction: float, random: dict[str, Any]) -> Tensor:
    """Return a random bool tensor that is true for exactly this fraction of the candidates, rounded."""
    score = torch.where(candidates, torch.rand(candidates.shape, **random), 2).flatten()
    chosen = torch.zeros_like(candidates).flatten()
    chosen[score.argsort()[: _count(fraction, int(candidates.sum()))]] = True
    return chosen.view(candidates.shape)


def _count(fraction: float, total: int) -> int:
    return math.floor(fraction * total + 0.5)


def flat_trajectory(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, config: LossConfig, power: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the reference's trajectory stage on padded (B, T) tensors. Returns dlogp (B T,), dentropy and stats (S, B)."""
    B, T = logp.shape
    offsets = torch.arange(B + 1, device=logp.device) * T
    batch = Batch(advantages, offsets, old_logp=old_logp.flatten(), mask=mask.flatten(), power=power)
    options = config.trajectory_options(has_power=power is not None, has_target_ess=False)
    return trajectory(logp.flatten(), None, batch, options)
