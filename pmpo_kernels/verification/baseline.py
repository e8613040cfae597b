"""The same loss as people write it today, in plain eager PyTorch: what the fused kernels are measured against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pmpo_kernels.batch import Batch
from pmpo_kernels.config import LossConfig
from pmpo_kernels.contract import STATS
from pmpo_kernels.reference import trajectory


def eager_token_logp(
    logits: Tensor, token_ids: Tensor, temperature: float, *, entropy_gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """Return logp and entropy, each (B, T): log-softmax in float32 (float64 for float64 logits), then gather, then entropy. Without
    `entropy_gradient` the entropy is only a metric and is computed without a graph, as trainers do."""
    scaled = logits if logits.dtype == torch.float64 else logits.float()
    log_q = torch.log_softmax(scaled if temperature == 1.0 else scaled / temperature, dim=-1)
    logp = log_q.gather(-1, token_ids[..., None])[..., 0]
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        return logp, -(log_q.exp() * log_q).sum(-1)


def eager_pmpo_loss(
    logits: Tensor,
    token_ids: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    config: LossConfig,
    power: Tensor | None = None,
) -> Tensor:
    """Loss (0-d) of padded logits (B, T, V), with its gradient left to autograd and without the KL term. `power` (B,) replaces
    config.power. Where that is "ess" and no power is given, the reference solves p."""
    logp, entropy = eager_token_logp(logits, token_ids, config.temperature, entropy_gradient=config.entropy_coef != 0)
    return eager_loss_from_logp(logp, entropy, old_logp, advantages, mask, config, power)


def eager_loss_from_logp(
    logp: Tensor,
    entropy: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    config: LossConfig,
    power: Tensor | None = None,
) -> Tensor:
    """Loss (0-d) from logp and entropy (B, T). It is computed in float64, because it costs only O(tokens)."""
    if config.beta:
        raise ValueError(f"config.beta: expected 0, the baseline has no KL term, got {config.beta}")
    old_logp = logp.detach() if old_logp is None else old_logp
    if power is not None:
        p = power.double()
    elif config.power == "ess":
        p = _solve(logp.detach(), old_logp, advantages, mask, config)
    else:
        p = torch.full_like(advantages, config.power, dtype=torch.float64)
    A, n = advantages.double(), mask.sum(-1).double()
    d = torch.where(mask, logp - old_logp, 0).double()
    if config.clip == "token":
        d = _clip(d, A[:, None], config)
    # log of the power mean over the response tokens, p -> 0 being the mean of the logs
    mean = torch.where(mask, d, 0).sum(-1) / n.clamp(min=1)
    power_sum = torch.where(mask | (n == 0)[:, None], p[:, None] * d, -torch.inf).logsumexp(-1)
    log_m = torch.where(p == 0, mean, (power_sum - n.clamp(min=1).log()) / torch.where(p == 0, 1, p))
    if config.clip == "sequence":
        log_m = _clip(log_m, A, config)
    loss = torch.where(n > 0, -A * log_m.exp(), 0)
    if config.entropy_coef:
        loss = loss - config.entropy_coef * torch.where(mask, entropy, 0).double().sum(-1) / n.clamp(min=1)
    if config.loss_agg_mode == "token-mean":
        total = (n * loss).sum() / n.sum().clamp(min=1)
    elif config.loss_agg_mode == "seq-mean-token-mean":
        total = loss.sum() / (n > 0).sum().clamp(min=1)
    else:
        assert config.max_length is not None
        total = (n * loss).sum() / config.max_length / (n > 0).sum().clamp(min=1)
    return total.to(logp.dtype)


def _solve(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, config: LossConfig) -> Tensor:
    """p (B,) float64, solved by the reference's trajectory stage."""
    B, T = logp.shape
    options = config.trajectory_options(has_power=False, has_target_ess=False)
    offsets = torch.arange(B + 1, device=logp.device) * T
    batch = Batch(advantages, offsets, old_logp=old_logp.flatten(), mask=mask.flatten())
    return trajectory(logp.flatten(), None, batch, options)[2][STATS.index("power")]


def _clip(d: Tensor, advantage: Tensor, config: LossConfig) -> Tensor:
    """Clip d by the advantage's sign, on one side or on both, and by the dual clip."""
    if config.clip_sides == "two":
        return torch.where(advantage == 0, d, d.clamp(-config.clip_low, config.clip_high))
    ceiling = math.inf if config.dual_clip is None else math.log(config.dual_clip)
    negative = d.clamp(min=-config.clip_low, max=ceiling)
    return torch.where(advantage > 0, d.clamp(max=config.clip_high), torch.where(advantage < 0, negative, d))
