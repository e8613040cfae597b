"""The loss as its equations stand in docs/mathematics.md: float64, one trajectory after the other, gradient by autograd.

Nothing here is shared with the package's implementations or its reference: plain formulas, slow, with no care for small p
(`Bounds` of agreement.py says what that costs).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pmpo_kernels import LossConfig


class Trajectory(NamedTuple):
    """The response tokens of one trajectory, (n,) float64; None where not given."""

    logits: Tensor  # (n, V)
    token_ids: Tensor
    old_logp: Tensor | None
    advantage: float
    ref_logp: Tensor | None
    rollout_weights: Tensor | None
    policy: Tensor | None  # bool, the tokens of the policy term
    target_ess: float | None


class Defined(NamedTuple):
    """What the equations say of one trajectory."""

    log_q: Tensor  # (n, V)
    logp: Tensor  # (n,)
    entropy: Tensor  # (n,)
    log_a: Tensor  # (k,) of the tokens of the policy term
    clipped: int  # of these
    power: float
    surrogate: Tensor  # -A (k / n) M_p, ()
    kl: Tensor  # (n,)
    r: Tensor | None  # (n,) ref_logp - logp
    d: Tensor  # (n,) log-ratios
    margin: float  # distance of the nearest clipped quantity to its bound
    weight: float


def clip(x: Tensor, advantage: float, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Clip x to the bounds that apply for this sign of the advantage. Return it and which elements were outside."""
    low, high = -math.inf, math.inf
    if advantage > 0:
        high = config.clip_high
        low = -config.clip_low if config.clip_sides == "two" else low
    if advantage < 0:
        low = -config.clip_low
        high = config.clip_high if config.clip_sides == "two" else high
        high = math.log(config.dual_clip) if config.dual_clip is not None else high
    return x.clamp(low, high), (x < low) | (x > high)


def margin(x: Tensor, advantage: float, config: LossConfig) -> float:
    bounds = [-config.clip_low, config.clip_high]
    bounds += [] if config.dual_clip is None else [math.log(config.dual_clip)]
    x = x.detach().reshape(-1)
    return min((float((x - b).abs().min()) for b in bounds if len(x)), default=math.inf) if advantage else math.inf


def log_power_mean(log_a: Tensor, p: float) -> Tensor:
    """log M_p, which is -inf where M_p = 0."""
    alive = log_a[log_a > -math.inf]
    if len(alive) == 0 or (p <= 0 and len(alive) < len(log_a)):
        return log_a.new_tensor(-math.inf)
    if p == 0:
        return alive.mean()
    return (torch.logsumexp(p * alive, 0) - math.log(len(log_a))) / p


def log_deficit(log_a: Tensor, p: float) -> float:
    """log(n / ESS(p)), ESS = 1 / sum W^2, W = softmax(p log a); weights a of 0 have W = 0."""
    w = torch.softmax(p * log_a[log_a > -math.inf], 0)
    return math.log(len(log_a)) + math.log(float((w * w).sum()))


def ess(log_a: Tensor, p: float) -> float:
    """ESS(p), 0 where there are no weights above 0."""
    return (
        0.0 if float(log_power_mean(log_a.detach(), p)) == -math.inf else len(log_a) * math.exp(-log_deficit(log_a, p))
    )


def target_deficit(log_a: Tensor, clipped: int, target_ess: float | None, config: LossConfig) -> float:
    """log(n / ESS*), the target that the rule sets."""
    n = len(log_a)
    if target_ess is not None:
        return math.log(n) - math.log(target_ess)
    severity = min(1.0, clipped / n / config.full_clip_fraction) ** config.ess_sharpness
    if config.ess_rule == "absolute":
        return -math.log(config.ess_floor + (1 - config.ess_floor) * severity)
    share = math.exp(-log_deficit(log_a, config.power_max))
    return -math.log(share + severity * (1 - share))


def kl(r: Tensor, d: Tensor, config: LossConfig) -> Tensor:
    estimators = {"k1": -r, "k2": r * r / 2, "k3": torch.exp(r) - r - 1}
    value = estimators[config.kl_estimator]
    if config.kl_straight_through:
        value = value.detach() + estimators["k2"] - estimators["k2"].detach()
    return torch.exp(d) * value if config.kl_bias_correction else value


def define(x: Trajectory, config: LossConfig, power: float, logp: Tensor | None = None) -> Defined:
    """Evaluate the equations for one trajectory of at least one token at this p, differentiable in its logits, or in `logp` (n,)
    where that is given."""
    n, A = len(x.token_ids), x.advantage
    log_q = x.logits.new_zeros(n, 1)
    if logp is None:
        log_q = torch.log_softmax(x.logits / config.temperature, -1)
        logp = log_q[torch.arange(n), x.token_ids]
    entropy = -(log_q.exp() * torch.where(log_q > -math.inf, log_q, 0)).sum(-1)
    d = torch.where(logp > -math.inf, logp - logp.detach(), 0) if x.old_logp is None else logp - x.old_logp

    clips = config.clip == "token"
    log_a, outside = clip(d, A, config) if clips else (d, torch.zeros_like(d, dtype=torch.bool))
    if x.rollout_weights is not None:
        log_a = log_a + x.rollout_weights.log()
    policy = torch.ones(n, dtype=torch.bool) if x.policy is None else x.policy
    log_a, clipped = log_a[policy], int(outside[policy].sum())
    near = margin(d, A, config) if clips else math.inf
    surrogate = log_a.new_zeros(())
    if A != 0 and len(log_a):
        log_m = log_power_mean(log_a, power)
        if config.clip == "sequence":
            near = margin(log_m, A, config)
        if float(log_m.detach()) > -math.inf:
            log_m = clip(log_m, A, config)[0] if config.clip == "sequence" else log_m
            surrogate = -A * len(log_a) / n * log_m.exp()
    r = None if x.ref_logp is None else x.ref_logp - logp
    penalty = torch.zeros_like(logp) if r is None or not config.beta else kl(r, d, config)
    weight = {"seq-mean-token-mean": 1, "token-mean": n, "seq-mean-token-sum-norm": n / (config.max_length or 1)}
    return Defined(
        log_q, logp, entropy, log_a, clipped, power, surrogate, penalty, r, d, near, weight[config.loss_agg_mode]
    )


def denominator(trajectories: list[Trajectory], config: LossConfig) -> float:
    lengths = [len(x.token_ids) for x in trajectories]
    return max(1, sum(lengths) if config.loss_agg_mode == "token-mean" else sum(n > 0 for n in lengths))


def total(defined: list[Defined], config: LossConfig, D: float) -> Tensor:
    """The loss of the batch."""
    terms = [
        x.weight * (x.surrogate + config.beta * x.kl.mean() - config.entropy_coef * x.entropy.mean()) for x in defined
    ]
    return torch.stack(terms).sum() / D if terms else torch.zeros((), dtype=torch.float64)
