"""The same loss as people write it today, in plain eager PyTorch: what the fused kernels are measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from pmpo_kernels.aggregate import default_denominator, total_loss
from pmpo_kernels.config import LossConfig
from pmpo_kernels.reference import trajectory


def eager_token_logp(
    logits: Tensor, token_ids: Tensor, temperature: float, *, entropy_gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-softmax in float32 (float64 for float64 logits), then gather, then entropy: (logp, entropy), each (B, T).

    An entropy that is only a metric is computed without a graph, as trainers do.
    """
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
    """Scalar loss on padded (B, T, V) logits, its gradient left to autograd; `power` (B,) replaces config.power."""
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
    """The rest of the loss, from logp and entropy (B, T): O(tokens), the reference's trajectory part.

    With config.power "ess" p is solved here unless it is given.
    """
    B, T = logp.shape
    _, _, stats = trajectory(
        logp.reshape(-1),
        None if old_logp is None else old_logp.reshape(-1),
        advantages,
        mask.reshape(-1),
        torch.arange(B + 1, device=logp.device) * T,
        None,
        None,
        entropy.reshape(-1),
        power,
        None,
        config.trajectory_options(has_power=power is not None, has_target_ess=False),
    )
    return total_loss(stats, config, default_denominator(stats.detach(), config)).to(logp.dtype)
