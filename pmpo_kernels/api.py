"""The public calls: check, bring padded and packed inputs to one form, compose the two autograd Functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pmpo_kernels import checks
from pmpo_kernels.aggregate import metrics
from pmpo_kernels.autograd import TokenLogpFunction, TrajectoryFunction, TrajectoryInputs
from pmpo_kernels.config import LossConfig
from pmpo_kernels.impls import resolve_impl
from pmpo_kernels.reference import STATS, compute_dtype


class TokenLogp(NamedTuple):
    """Per-token results, shaped like `token_ids`, float32 (float64 for float64 logits); 0 where masked."""

    logp: Tensor
    entropy: Tensor


class PMPOOutput(NamedTuple):
    """Result of a loss call. Only `loss` carries a gradient; everything else is detached.

    `logp` and `entropy` (None if not given to `pmpo_loss_from_logp`) are shaped like the tokens, 0 where masked.
    `power`, `ess` and `clip_fraction` are (B,) float64: p, effective sample size in tokens (0 for an empty
    trajectory) and clipped fraction of each trajectory.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logp: Tensor
    entropy: Tensor | None
    power: Tensor
    ess: Tensor
    clip_fraction: Tensor


def token_logp(
    logits: Tensor,
    token_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    inplace: bool = False,
    impl: str | None = None,
) -> TokenLogp:
    """Log-probability of each token and entropy of its distribution, in one read of the logits; differentiable in both.

    Args and errors as in `pmpo_loss`. Saves nothing of the logits' size but the logits themselves.
    """
    checks.check_logits(logits, token_ids)
    temperature = checks.check_temperature(temperature)
    if not isinstance(inplace, bool):
        raise TypeError(f"inplace: expected a bool, got {type(inplace).__name__}")
    if inplace:
        checks.check_inplace(logits)
    mask = _as_bool(
        checks.check_constant("mask", mask, dtypes=checks.MASKS, device=logits.device, shape=token_ids.shape)
    )
    impl = resolve_impl(impl, logits.device)
    shape = token_ids.shape
    if logits.dim() == 2:
        logits, token_ids = logits[None], token_ids[None]
        mask = None if mask is None else mask[None]
    logp, entropy = TokenLogpFunction.apply(logits, token_ids, mask, temperature, inplace, impl)
    return TokenLogp(logp.view(shape), entropy.view(shape))


def pmpo_loss(
    logits: Tensor,
    token_ids: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logp: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    power: Tensor | float | None = None,
    target_ess: Tensor | None = None,
    config: LossConfig | None = None,
    denominator: Tensor | float | None = None,
    inplace: bool = False,
    impl: str | None = None,
) -> PMPOOutput:
    """Power-mean policy loss of a batch of trajectories, from logits (PMPO, arXiv 2601.22521, and its whole family).

    Per trajectory with n tokens, log-ratios d_t = logp_t - old_logp_t clipped to d'_t, a_t = exp(d'_t) v_t:

        loss = - sum_i w_i A_i M_p(a),    M_p(a) = ( (1/n) sum_t a_t^p )^(1/p),
        dloss/dlogp_t = - w_i A_i M_p W_t on unclipped tokens,    W = softmax(p log a).

    Logits cost two reads and one write in all; rows without a gradient (masked, clipped, A = 0) are written, not read.

    Args:
        logits: (B, T, V), or (B, T + 1, V) as a model returns them (the last position is ignored and gets a zero
            gradient), or packed (N, V); float64, float32, bfloat16 or float16, any row strides. `logits[:, t]`
            predicts `token_ids[:, t]`: the caller shifts.
        token_ids: (B, T) or (N,), int64 or int32, in [0, V) where the mask is true.
        old_logp: log-probs of the policy that sampled, shaped like token_ids; None means on-policy (all ratios 1).
        advantages: (B,), one number a trajectory. Trajectories with advantage 0 have no policy loss or gradient.
        mask: bool or integer, shaped like token_ids; non-zero marks response tokens. Whatever stands in the other
            slots, NaN included, has no effect.
        cu_seqlens: (B + 1,) int32 or int64 offsets of the trajectories of a packed batch; None for a padded one.
        ref_logp: log-probs of the reference policy; required by config.beta != 0, otherwise only the metric ref_kl.
        rollout_weights: v_t >= 0, constant factors on the ratios (train/inference mismatch), shaped like token_ids.
        power: p of each trajectory, (B,) or one number; replaces config.power.
        target_ess: (B,) effective sample size in tokens to solve p for; needs config.power "ess". A target out of
            reach gives the nearest end of [power_min, power_max].
        config: `LossConfig`, default `LossConfig.pmpo()`.
        denominator: replaces D of the aggregation (0-d tensor or number > 0). Give the whole step's count to every
            micro-batch or rank and their summed gradients equal those of one big batch.
        inplace: the gradient is written over the logits (no second tensor of their size); a second backward raises.
        impl: "triton", "cpp", "reference", or None for the fastest that runs on this device.

    Returns:
        `PMPOOutput`; see there. `metrics`: policy_loss, clip_fraction, clip_fraction_low, clip_fraction_high,
        ratio_mean, ratio_max, approx_kl, power_mean, power_min, power_max, ess, ess_target, tokens, trajectories,
        entropy, and ref_kl where ref_logp is given: 0-d tensors on the same device.

    Raises:
        TypeError, ValueError: a wrong argument; names it, what was expected and what was got. The values of
            tensors are checked on the CPU always and on a GPU with PMPO_KERNELS_CHECK=1; unchecked ids give NaN.
        RuntimeError: the named `impl` cannot run here, with the reason.
    """
    config = _check_config(config)
    checks.check_logits(logits, token_ids)
    # The loss's own arguments are checked before the first kernel starts.
    trajectory = _trajectory_inputs(
        "token_ids",
        token_ids,
        old_logp=old_logp,
        advantages=advantages,
        mask=mask,
        cu_seqlens=cu_seqlens,
        ref_logp=ref_logp,
        rollout_weights=rollout_weights,
        power=power,
        target_ess=target_ess,
        config=config,
        denominator=denominator,
        impl=impl,
    )
    logp, entropy = token_logp(
        logits, token_ids, mask=mask, temperature=config.temperature, inplace=inplace, impl=trajectory.impl
    )
    return _loss(logp, entropy, trajectory)


def pmpo_loss_from_logp(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logp: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    power: Tensor | float | None = None,
    target_ess: Tensor | None = None,
    config: LossConfig | None = None,
    denominator: Tensor | float | None = None,
    impl: str | None = None,
) -> PMPOOutput:
    """`pmpo_loss` for trainers that already have log-probs: `logp` (B, T) or (N,), differentiable.

    `entropy`, shaped like logp and differentiable, is required by config.entropy_coef != 0, otherwise only a metric.
    config.temperature belongs to the logits and must be 1 here. All else as in `pmpo_loss`.
    """
    config = _check_config(config)
    if config.temperature != 1.0:
        raise ValueError(f"config.temperature: expected 1 for a loss from log-probs, got {config.temperature}")
    if not isinstance(logp, Tensor):
        raise TypeError(f"logp: expected a tensor, got {type(logp).__name__}")
    if logp.dim() not in (1, 2):
        raise ValueError(f"logp: expected shape (B, T) or (N,), got {tuple(logp.shape)}")
    checks.check_tensor("logp", logp, dtypes=checks.FLOATS, device=logp.device, shape=logp.shape)
    if entropy is not None:
        checks.check_tensor("entropy", entropy, dtypes=checks.FLOATS, device=logp.device, shape=logp.shape)
    elif config.entropy_coef:
        raise ValueError(f"entropy: expected a tensor because config.entropy_coef is {config.entropy_coef}, got None")
    trajectory = _trajectory_inputs(
        "logp",
        logp,
        old_logp=old_logp,
        advantages=advantages,
        mask=mask,
        cu_seqlens=cu_seqlens,
        ref_logp=ref_logp,
        rollout_weights=rollout_weights,
        power=power,
        target_ess=target_ess,
        config=config,
        denominator=denominator,
        impl=impl,
    )
    out = _loss(logp, entropy, trajectory)
    if mask is None:
        return out
    keep = mask != 0
    return out._replace(
        logp=torch.where(keep, out.logp, 0), entropy=None if out.entropy is None else torch.where(keep, out.entropy, 0)
    )


def _check_config(config: LossConfig | None) -> LossConfig:
    if config is not None and not isinstance(config, LossConfig):
        raise TypeError(f"config: expected a LossConfig or None, got {type(config).__name__}")
    return LossConfig.pmpo() if config is None else config


def _as_bool(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.dtype == torch.bool else mask != 0


def _trajectory_inputs(
    name: str,
    tokens: Tensor,
    *,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logp: Tensor | None,
    rollout_weights: Tensor | None,
    power: Tensor | float | None,
    target_ess: Tensor | None,
    config: LossConfig,
    denominator: Tensor | float | None,
    impl: str | None,
) -> TrajectoryInputs:
    """Check everything but `tokens` (argument `name`, shaped like the tokens) and bring it to the flat form."""
    device, shape = tokens.device, tokens.shape
    offsets = checks.check_offsets(name, tokens, cu_seqlens)
    B = offsets.numel() - 1

    def per_token(name: str, value: object, dtypes: tuple[torch.dtype, ...] = checks.FLOATS) -> Tensor | None:
        tensor = checks.check_constant(name, value, dtypes=dtypes, device=device, shape=shape)
        return None if tensor is None else tensor.reshape(-1)

    def per_trajectory(name: str, value: object) -> Tensor | None:
        return checks.check_constant(name, value, dtypes=checks.FLOATS, device=device, shape=(B,))

    if isinstance(advantages, Tensor) and advantages.dim() == 2:
        raise ValueError(
            f"advantages: expected shape ({B},), one number a trajectory, got {tuple(advantages.shape)}; "
            "if they are constant along each trajectory, pass one column"
        )
    A = per_trajectory("advantages", advantages)
    if A is None:
        raise TypeError("advantages: expected a tensor, got None")
    if power is not None and target_ess is not None:
        raise ValueError("target_ess: expected None when power is given, got both")
    if target_ess is not None and config.power != "ess":
        raise ValueError(f'target_ess: expected None unless config.power is "ess", got it with power {config.power}')
    if config.power == "ess" and power is None and target_ess is None and config.clip != "token":
        raise ValueError(f'config.power: "ess" needs clip="token" or an explicit target_ess, got clip="{config.clip}"')
    if config.beta and ref_logp is None:
        raise ValueError(f"ref_logp: expected a tensor because config.beta is {config.beta}, got None")
    if isinstance(power, (int, float)):
        if isinstance(power, bool) or not -float("inf") < power < float("inf"):
            raise ValueError(f"power: expected a finite number or a tensor of shape ({B},), got {power!r}")
        power = torch.full((B,), power, dtype=torch.float64, device=device)
    if isinstance(denominator, Tensor):
        checks.check_constant(
            "denominator", denominator, dtypes=(*checks.FLOATS, *checks.INTEGERS), device=device, shape=()
        )
        denominator = denominator.double()
    elif denominator is not None:
        denominator = torch.full(
            (), checks.check_number("denominator", denominator), dtype=torch.float64, device=device
        )
    checked = {
        "mask": _as_bool(per_token("mask", mask, checks.MASKS)),
        "rollout_weights": per_token("rollout_weights", rollout_weights),
        "power": per_trajectory("power", power),
        "target_ess": per_trajectory("target_ess", target_ess),
    }
    _check_values(**checked, denominator=denominator)
    return TrajectoryInputs(
        per_token("old_logp", old_logp),
        A,
        checked["mask"],
        offsets,
        per_token("ref_logp", ref_logp),
        checked["rollout_weights"],
        checked["power"],
        checked["target_ess"],
        denominator,
        config,
        config.trajectory_options(has_power=power is not None, has_target_ess=target_ess is not None),
        resolve_impl(impl, device),
    )


def _check_values(
    mask: Tensor | None,
    rollout_weights: Tensor | None,
    power: Tensor | None,
    target_ess: Tensor | None,
    denominator: Tensor | None,
) -> None:
    """The ranges of tensors whose bad values would only show in the loss, or not at all."""
    if rollout_weights is not None and mask is not None:
        rollout_weights = torch.where(mask, rollout_weights, 0)
    checks.check_all(
        "rollout_weights", rollout_weights, lambda v: (v >= 0) & v.isfinite(), "finite weights >= 0 where mask is true"
    )
    checks.check_all("power", power, Tensor.isfinite, "finite numbers")
    checks.check_all("target_ess", target_ess, lambda ess: ess >= 0, "numbers >= 0")
    checks.check_all("denominator", denominator, lambda d: (d > 0) & d.isfinite(), "a finite number > 0")


def _loss(logp: Tensor, entropy: Tensor | None, inputs: TrajectoryInputs) -> PMPOOutput:
    dtype = compute_dtype(logp.dtype)
    flat_entropy = None if entropy is None else entropy.reshape(-1).to(dtype)
    loss, stats, denominator = TrajectoryFunction.apply(logp.reshape(-1).to(dtype), flat_entropy, inputs)
    row = dict(zip(STATS, stats.unbind(), strict=True))
    return PMPOOutput(
        loss,
        metrics(
            stats,
            denominator,
            has_ref_logp=inputs.ref_logp is not None,
            has_entropy=entropy is not None,
            dtype=dtype,
        ),
        logp.detach(),
        None if entropy is None else entropy.detach(),
        row["power"],
        row["ess"],
        (row["clipped_low"] + row["clipped_high"]) / row["tokens"].clamp(min=1),
    )
