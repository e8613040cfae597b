"""What a training step computes before the loss and passes to it: p, the upper clip, advantages, rollout weights.

These are functions of numbers and small tensors on any device. None of them carries a gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from pmpo_kernels import checks
from pmpo_kernels.batch import as_bool
from pmpo_kernels.contract import compute_dtype
from pmpo_kernels.reference import Segments

Shape = Literal["linear", "square", "cube", "sine"]
Baseline = Literal["mean", "leave-one-out"]
Level = Literal["token", "sequence", "geometric"]
Mode = Literal["truncate", "mask"]


def holder_power(progress: float, *, start: float = 2.0, end: float = -2.0, shape: Shape = "linear") -> float:
    """p of HölderPO's schedule over training (arXiv 2605.12058, section 3.4 and appendix E), for `power=`.

    p = start + (end - start) f(x) with x = progress, falling or rising, `start` exactly at x = 0 and `end` exactly at x = 1:

    - "linear": f = x.
    - "square": f = x^2. Stays near `start` longer: at x = 1/2 a quarter of the way is done.
    - "cube": f = (1 + (2x - 1)^3) / 2. Leaves both ends fast and stays near the middle of `start` and `end`.
    - "sine": f = sin^2(pi x / 2). Stays near both ends, `start` as long as `end`, and passes the middle fast.

    To stay near `end` longer, run "square" backwards: `holder_power(1 - x, start=end, end=start, shape="square")`.

    Args:
        progress: the part of the training that is done, a number in [0, 1], such as step / (steps - 1).
        start, end: p at the two ends, finite numbers; 2 and -2 as in the paper's mathematical tasks.
        shape: "linear", "square", "cube" or "sine".

    Raises:
        ValueError: a number that is not finite or, for `progress`, outside [0, 1]; an unknown shape.
    """
    x = checks.check_finite("progress", progress)
    if not 0 <= x <= 1:
        raise ValueError(f"progress: expected a number in [0, 1], got {progress!r}")
    start, end = checks.check_finite("start", start), checks.check_finite("end", end)
    checks.check_finite("end - start", end - start)
    checks.check_choice("shape", shape, Shape)
    fraction = {"linear": x, "square": x**2, "cube": (1 + (2 * x - 1) ** 3) / 2, "sine": math.sin(math.pi * x / 2) ** 2}
    p = start + (end - start) * fraction[shape]
    # the sum may be one rounding short of `end`, or beyond it
    return end if x == 1 else min(max(p, min(start, end)), max(start, end))


def apmpo_power(rewards: Tensor, *, gamma: float = 0.8) -> float:
    """p = exp(-gamma mean(rewards)) of APMPO (arXiv 2605.04066): 1 without reward, towards 0 as rewards grow. For `power=`.

    Args:
        rewards: (B,) float, all rewards of the step (of all ranks, so that p is the same on each). Read on the host: pass them
            on the CPU to wait for no GPU.
        gamma: finite, > 0.

    Raises:
        TypeError, ValueError: a wrong argument; no rewards, rewards that are not finite, or a negative mean, for which the
            method has no meaning (p would leave [0, 1]): shift such rewards first.
    """
    mean, _ = _reward_statistics(rewards)
    return math.exp(-checks.check_number("gamma", gamma) * mean)


def apmpo_clip(rewards: Tensor, *, eps_min: float = 0.2, eps_max: float = 0.4, delta: float = 1e-6) -> float:
    """Upper clip of APMPO (arXiv 2605.04066): eps_min + (eps_max - eps_min) tanh(mean(rewards) / (std(rewards) + delta)).

    For `LossConfig.apmpo(power, eps_high=...)`: ratios are clipped to [1 - 0.2, 1 + eps_high]. High and stable rewards widen
    the clip towards eps_max; without reward it is eps_min.

    Args:
        rewards: as in `apmpo_power`; their standard deviation is that of the B values (divided by B, 0 for one).
        eps_min, eps_max: 0 < eps_min <= eps_max, finite.
        delta: finite, > 0; keeps the quotient finite where all rewards are equal.

    Raises:
        TypeError, ValueError: as in `apmpo_power`; bounds out of their ranges.
    """
    mean, std = _reward_statistics(rewards)
    low, high = checks.check_number("eps_min", eps_min), checks.check_number("eps_max", eps_max)
    if low > high:
        raise ValueError(f"eps_max: expected a number >= eps_min, which is {eps_min}, got {eps_max}")
    return low + (high - low) * math.tanh(mean / (std + checks.check_number("delta", delta)))


def group_advantages(
    rewards: Tensor,
    groups: Tensor | int,
    *,
    baseline: Baseline = "mean",
    scale: Literal["std"] | None = "std",
    delta: float = 1e-6,
) -> Tensor:
    """Advantages relative to the other trajectories of the same prompt, for the loss's `advantages`.

    With n rewards r in a group, mean m and standard deviation s (divided by n - 1):

    - baseline "mean", scale "std": (r - m) / (s + delta), GRPO (arXiv 2402.03300, 4.1.2; the paper has no delta).
    - baseline "mean", scale None: r - m, Dr. GRPO (arXiv 2503.20783).
    - baseline "leave-one-out", scale None: r minus the mean of the other n - 1 rewards, that is (r - m) n / (n - 1), RLOO
      (arXiv 2402.14740). With scale "std" that is divided by s + delta.

    A group of equal rewards has advantage exactly 0, and so has a group of one, whose reward has nothing to be compared with,
    whatever the baseline. Groups do not touch one another. Nothing waits for a GPU.

    Args:
        rewards: (B,) float, one a trajectory.
        groups: (B,) int32 or int64, any ids in any order, equal within a group; or a size: every `groups` rows in a row
            are one group.
        baseline: "mean" or "leave-one-out".
        scale: "std" or None.
        delta: finite, > 0; added to the standard deviation.

    Returns:
        (B,), float64 for float64 rewards, else float32; computed in float64.

    Raises:
        TypeError, ValueError: a wrong argument; a size that does not divide B; rewards that are not finite (on the CPU, on a
            GPU with PMPO_KERNELS_CHECK=1; otherwise their own group becomes NaN).
    """
    r, dtype = _check_rewards(rewards).double(), compute_dtype(rewards.dtype)
    checks.check_all("rewards", r, Tensor.isfinite, "finite numbers")
    checks.check_choice("baseline", baseline, Baseline)
    checks.check_choice("scale", scale, ("std", None))
    delta = checks.check_number("delta", delta)
    order, seg = _by_group(groups, rewards)
    r = r[order]
    n = seg.sum(torch.ones_like(r))
    centred = r - seg.spread(seg.sum(r / seg.spread(n)))
    others = (n - 1).clamp(min=1)
    advantages = centred * seg.spread(n / others) if baseline == "leave-one-out" else centred
    if scale == "std":
        unit = seg.max(centred.abs())  # squares of large numbers would overflow
        unit = seg.spread(torch.where(unit > 0, unit, 1))
        advantages = advantages / (unit * (seg.spread(seg.sum((centred / unit) ** 2) / others)).sqrt() + delta)
    equal = (seg.max(r) == -seg.max(-r)) & seg.max(r.abs()).isfinite()
    advantages = torch.where(seg.spread(equal), 0, advantages)
    return torch.empty_like(advantages).scatter_(0, order, advantages).to(dtype)


def rollout_weights(
    logp: Tensor,
    rollout_logp: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    level: Level = "token",
    mode: Mode = "truncate",
    low: float | None = None,
    high: float = 2.0,
) -> Tensor:
    """Weights v for the loss's `rollout_weights`, where the engine that sampled has other log-probs than the trainer.

    With d_t = logp_t - rollout_logp_t on the n response tokens of a trajectory, the ratio of a token is

    - level "token": exp(d_t);
    - level "sequence": exp(sum_t d_t), the same for every token (unbiased, of high variance);
    - level "geometric": exp(sum_t d_t / n), the same for every token;

    then mode "truncate" limits it to [low, high] (truncated importance sampling), and mode "mask" sets it to 0 outside
    [low, high] (masked importance sampling). Bounds act before `exp`: nothing overflows. TRL calls the four pairs of its levels
    `vllm_importance_sampling_mode="token_truncate"`, "token_mask", "sequence_truncate", "sequence_mask" (`high` 3); verl
    has `rollout_is="token"` and "sequence", truncated for one threshold (2), masked for two.

    A weight multiplies the ratio inside the power mean, a_t = exp(d'_t) v_t. One v for all tokens multiplies the trajectory's
    loss. A weight of 0 on some tokens: for p > 0 each still counts as a token, with a_t = 0; for p <= 0 the whole trajectory
    has loss and gradient 0. To leave tokens out of a mean instead, take them out of the mask: `mask=mask & (weights > 0)`.

    Args:
        logp: (B, T), or packed (N,) with cu_seqlens; float. The trainer's log-probs of the policy that sampled (the loss's
            `old_logp`). No gradient flows through it.
        rollout_logp: the sampling engine's log-probs of the same tokens, shaped like logp; float.
        mask, cu_seqlens: as in `pmpo_loss`. What stands in masked slots, NaN included, has no effect.
        level: "token", "sequence" or "geometric".
        mode: "truncate" or "mask".
        low: None for no lower bound, or a finite number > 0.
        high: finite, > 0, above `low`.

    Returns:
        v >= 0, shaped like logp, float64 for float64 logp, else float32; 0 where masked. Computed in float64.

    Raises:
        TypeError, ValueError: a wrong argument; NaN in logp - rollout_logp where mask is true (on the CPU, on a GPU with
            PMPO_KERNELS_CHECK=1). An engine's missing log-prob: put logp there for a weight of 1, or mask the token.
    """
    high = checks.check_factor("high", high)
    low = 0.0 if low is None else checks.check_number("low", low)
    if low >= high:
        raise ValueError(f"low: expected a number below high, which is {high}, got {low}")
    checks.check_choice("level", level, Level)
    checks.check_choice("mode", mode, Mode)
    d, valid, seg = _log_ratio(logp, rollout_logp, mask, cu_seqlens)
    if level != "token":
        n = seg.sum(valid.double()).clamp(min=1) if level == "geometric" else 1
        d = seg.spread(seg.sum(d) / n)
        checks.check_all(
            "logp - rollout_logp", d, lambda d: ~d.isnan(), "numbers, without both infinities in a trajectory"
        )
    log_low, log_high = -math.inf if low == 0 else math.log(low), math.log(high)
    weights = d.clamp(log_low, log_high).exp().clamp(low, high)
    keep = valid if mode == "truncate" else valid & (d >= log_low) & (d <= log_high)
    return torch.where(keep, weights, 0).view(logp.shape).to(compute_dtype(logp.dtype))


def _check_rewards(rewards: Tensor) -> Tensor:
    """Return `rewards` if they are a float tensor (B,) without a gradient; otherwise raise."""
    if checks.check_dense("rewards", rewards).dim() != 1:
        raise ValueError(f"rewards: expected shape (B,), got {tuple(rewards.shape)}")
    checks.check_constant("rewards", rewards, dtypes=checks.FLOATS, device=rewards.device, shape=rewards.shape)
    return rewards


def _reward_statistics(rewards: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a batch's rewards, computed in float64 on the host. A negative mean raises."""
    r = _check_rewards(rewards).cpu().double()
    if r.numel() == 0:
        raise ValueError(f"rewards: expected at least one, got shape {tuple(rewards.shape)}")
    checks.check_all("rewards", r, Tensor.isfinite, "finite numbers")
    # sums and squares of large numbers would overflow; a power of two divides without rounding, so that a mean of 0 stays 0
    unit = torch.ldexp(torch.ones(()).double(), torch.frexp(r.abs().max().clamp(min=1)).exponent - 1)
    mean = float((r / unit).mean() * unit)
    if mean < 0:
        raise ValueError(f"rewards: expected a mean >= 0, got {mean}")
    return mean, float((r / unit).std(correction=0) * unit)


def _by_group(groups: Tensor | int, rewards: Tensor) -> tuple[Tensor, Segments]:
    """Return the order (B,) that puts the rewards of a group side by side, and the groups as segments in that order.

    There are always B segments, so that nothing waits for a GPU to count the groups; the last ones are empty."""
    B, device = rewards.numel(), rewards.device
    if isinstance(groups, Tensor):
        checks.check_tensor("groups", groups, dtypes=checks.INTEGERS, device=device, shape=(B,))
    else:
        checks.check_count("groups", groups)
        if B % groups:
            raise ValueError(f"groups: expected a size that divides the {B} rewards, got {groups}")
        groups = torch.arange(B, device=device) // groups
    ids, order = groups.sort(stable=True)
    slot = torch.zeros_like(order)
    slot[1:] = (ids[1:] != ids[:-1]).cumsum(0)
    return order, Segments(torch.searchsorted(slot, torch.arange(B + 1, device=device)), B)


def _log_ratio(
    logp: Tensor, rollout_logp: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Segments]:
    """Check the arguments of `rollout_weights` and return them flat.

    d = logp - rollout_logp (N,) float64, without a gradient and 0 where masked; the mask (N,) bool; the trajectories."""
    if checks.check_dense("logp", logp).dim() not in (1, 2):
        raise ValueError(f"logp: expected shape (B, T) or (N,), got {tuple(logp.shape)}")
    device, shape = logp.device, logp.shape
    checks.check_tensor("logp", logp, dtypes=checks.FLOATS, device=device, shape=shape)
    checks.check_tensor("rollout_logp", rollout_logp, dtypes=checks.FLOATS, device=device, shape=shape)
    valid = as_bool(checks.check_constant("mask", mask, dtypes=checks.MASKS, device=device, shape=shape))
    offsets = checks.check_offsets("logp", logp, cu_seqlens)
    valid = torch.ones(shape, dtype=torch.bool, device=device) if valid is None else valid
    d = torch.where(valid, (logp.double() - rollout_logp.double()).detach(), 0)
    checks.check_all("logp - rollout_logp", d, lambda d: ~d.isnan(), "numbers where mask is true")
    return d.reshape(-1), valid.reshape(-1), Segments(offsets, d.numel())
