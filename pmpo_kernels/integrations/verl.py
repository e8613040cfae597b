"""Policy losses for verl: importing this module registers "pmpo", "gmpo" and "holder" in verl's registry; docs/verl.md.

verl imports it in each of its processes through the entry point `verl.plugins`, and wherever its configuration names
`PowerMeanLossConfig`. Checked against verl 0.9.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, register_policy_loss
from verl.workers.config import ActorConfig, PolicyLossConfig

from pmpo_kernels import checks
from pmpo_kernels.api import pmpo_loss_from_logp
from pmpo_kernels.config import LossConfig
from pmpo_kernels.impls import IMPLS

# Fields of LossConfig that cannot be set here, because verl has a field of its own for them or does it outside the loss.
VERL_DECIDES = {
    "loss_agg_mode": "actor.loss_agg_mode",
    "max_length": "actor.loss_scale_factor",
    "beta": "actor.kl_loss_coef",
    "kl_estimator": "actor.kl_loss_type",
    "kl_straight_through": 'actor.kl_loss_type, such as "k3+"',
    "kl_bias_correction": "nothing: verl has no such KL",
    "entropy_coef": "actor.entropy_coeff",
    "temperature": "rollout.temperature",
}
OPTIONS = [*sorted({f.name for f in fields(LossConfig)} - set(VERL_DECIDES)), "impl"]
# Fields that verl's own policy losses read. A value that the losses here would not obey raises.
UNREAD_ACTOR = ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "tau_pos", "tau_neg")
UNREAD_POLICY = ("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef", "dro_beta")
METRICS = ("power_mean", "power_min", "power_max", "ess", "ess_target", "ratio_mean", "ratio_max")
# verl's mode: the mode of LossConfig, and whether D counts tokens (else trajectories).
MODES = {
    "token-mean": ("token-mean", True),
    "token-sum": ("token-mean", True),
    "seq-mean-token-mean": ("seq-mean-token-mean", False),
    "seq-mean-token-sum": ("seq-mean-token-sum-norm", False),
    "seq-mean-token-sum-norm": ("seq-mean-token-sum-norm", False),
}

_losses: dict[str, Callable[..., LossConfig]] = {}  # by its name in verl: makes the loss's LossConfig from options


@dataclass
class PowerMeanLossConfig(PolicyLossConfig):  # type: ignore[misc]
    """verl's `policy_loss` section with `options` for the losses of this module. On verl's command line::

        actor_rollout_ref.actor.policy_loss._target_=pmpo_kernels.integrations.verl.PowerMeanLossConfig
        actor_rollout_ref.actor.policy_loss.loss_mode=pmpo
        +actor_rollout_ref.actor.policy_loss.options.full_clip_fraction=0.2

    verl imports the `_target_` in every process that reads the section, so this also registers the losses there.

    Args:
        options: fields of `LossConfig` over those of the preset `loss_mode` (bounds of clips are in log space), except
            those verl decides on; and `impl`: "triton", "cpp", "reference" or None as in `pmpo_loss`.

    Raises:
        ValueError: a `loss_mode` that is not registered here, since verl's own losses would ignore `options`; an unknown
            option, one that verl decides on, or a value out of its range. Raised when verl reads its configuration.
    """

    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _expect("policy_loss.loss_mode", self.loss_mode in _losses, f"one of {sorted(_losses)}", self.loss_mode)
        _resolve(self.loss_mode, self)


def register(name: str, config: LossConfig) -> None:
    """Register `config` as verl's policy loss `name`, for `actor.policy_loss.loss_mode=name`.

    Call it in a module that every worker imports (docs/verl.md). A name of this module's may be registered anew.

    Args:
        name: not the name of a loss of verl's.
        config: what verl decides on (aggregation, KL, entropy, temperature) must be left at `LossConfig`'s defaults.

    Raises:
        TypeError, ValueError: a wrong argument.
    """
    if not isinstance(config, LossConfig):
        raise TypeError(f"config: expected a LossConfig, got {type(config).__name__}")
    for f in fields(LossConfig):
        if f.name in VERL_DECIDES:
            value = getattr(config, f.name)
            expected = f"{f.default!r} (in verl set {VERL_DECIDES[f.name]})"
            _expect(f"config.{f.name}", value == f.default, expected, value)
    _add(name, partial(replace, config))


def power_mean_policy_loss(
    name: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Compute the loss registered as `name`, called as verl calls its policy losses.

    The loss is -sum_i w_i A_i M_p. The weights w_i follow verl's `agg_loss`: with n_i response tokens and dp_size R they are::

        "token-mean"               n_i R / batch_num_tokens
        "token-sum"                n_i R
        "seq-mean-token-mean"      R / global_batch_size
        "seq-mean-token-sum"       n_i R / global_batch_size
        "seq-mean-token-sum-norm"  n_i R / (global_batch_size loss_scale_factor)

    so that micro-batches add up, and ranks average, to the loss and gradient of the whole batch. A count that verl does not give
    is taken from the arguments (of trajectories: those with tokens, as in `agg_loss`). A fully masked row has loss and gradient 0.

    Args:
        old_log_prob, log_prob: (B, T), floating point; `log_prob` carries the gradient.
        advantages: (B, T), the same number on all response tokens of a row; what stands elsewhere is not read.
        response_mask: (B, T) bool or integer, non-zero on response tokens.
        loss_agg_mode: one of the five above.
        config: verl's `ActorConfig`. Its clips are not read: see Raises.
        rollout_is_weights: (B, T) v_t >= 0 or None. They enter the power mean, a_t = exp(d'_t) v_t; where v_t = 0 the token is
            out of the mean and counts as a term of 0 (`policy_mask` of `pmpo_loss`).

    Returns:
        The loss (0-d) and metrics as floats, moved to the host at once: actor/pg_clipfrac (clipped tokens, at either bound),
        actor/pg_clipfrac_lower (those at the lower one), actor/ppo_kl (mean of -d), and `actor/pmpo/*`.

    Raises:
        TypeError, ValueError: a wrong argument; advantages that vary in a row; a field of verl's (`clip_ratio_low`, ...)
            that differs from both verl's default and what the loss does.
    """
    checks.check_choice("loss_agg_mode", loss_agg_mode, tuple(MODES))
    if config is None:
        raise TypeError("config: expected verl's ActorConfig, got None")
    policy = config.get("policy_loss", None) or PolicyLossConfig(loss_mode=name)
    loss_config, impl = _resolve(name, policy)
    _check_unread(config, policy, loss_config)
    if not isinstance(log_prob, Tensor) or log_prob.dim() != 2:
        got = tuple(log_prob.shape) if isinstance(log_prob, Tensor) else type(log_prob).__name__
        raise ValueError(f"log_prob: expected a tensor of shape (B, T), got {got}")
    device, shape = log_prob.device, log_prob.shape
    checks.check_tensor("advantages", advantages, dtypes=checks.FLOATS, device=device, shape=shape)
    checks.check_tensor("response_mask", response_mask, dtypes=checks.MASKS, device=device, shape=shape)
    checks.check_tensor("old_log_prob", old_log_prob, dtypes=checks.FLOATS, device=device, shape=shape)
    if rollout_is_weights is not None:
        checks.check_tensor("rollout_is_weights", rollout_is_weights, dtypes=checks.FLOATS, device=device, shape=shape)
    mask = response_mask != 0
    A, varies = _per_trajectory(advantages, mask)
    out = pmpo_loss_from_logp(
        log_prob,
        old_log_prob,
        A,
        mask=mask,
        rollout_weights=rollout_is_weights,
        policy_mask=None if rollout_is_weights is None else ~(rollout_is_weights == 0),
        config=_with_mode(loss_config, MODES[loss_agg_mode][0]),
        denominator=_denominator(loss_agg_mode, mask, config),
        impl=impl,
    )
    d = torch.where(mask, log_prob.detach().double() - old_log_prob.double(), 0)
    found = {
        "actor/pg_clipfrac": out.metrics["clip_fraction"],
        "actor/pg_clipfrac_lower": out.metrics["clip_fraction_low"],
        "actor/ppo_kl": -d.sum() / mask.sum().clamp(min=1),
        **{f"actor/pmpo/{key}": out.metrics[key] for key in METRICS},
    }
    # the one wait for the device, for the check too
    *values, varying = torch.stack([value.double() for value in (*found.values(), varies.sum())]).tolist()
    if varying:
        row, column = varies.nonzero()[0].tolist()
        raise ValueError(
            "advantages: expected one number on all response tokens of a row (an outcome advantage, such as "
            f"algorithm.adv_estimator=grpo), got {A[row].item()} and {advantages[row, column].item()} in row {row}"
        )
    return out.loss, dict(zip(found, values, strict=True))


def _per_trajectory(advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the advantage (B,) of each row's first response token, 0 without one, and which of its tokens (B, T) differ."""
    first = mask.int().argmax(1, keepdim=True)
    A = torch.where(mask.any(1), advantages.gather(1, first).squeeze(1), 0)
    return A, mask & (advantages != A[:, None])


def _denominator(mode: str, mask: Tensor, config: Any) -> Tensor | float:
    """Return D, 0-d and positive: the count of the whole batch as `agg_loss` has it, over dp_size, because ranks average."""
    info = config.get("global_batch_info", None) or {}
    dp_size = info.get("dp_size", 1)
    checks.check_count("global_batch_info.dp_size", dp_size)
    if mode == "token-sum":
        return float(1 / dp_size)
    key = "batch_num_tokens" if MODES[mode][1] else "global_batch_size"
    count = info.get(key)
    if count is None:
        if dp_size > 1:
            raise ValueError(f"global_batch_info.{key}: expected a count because dp_size is {dp_size}, got None")
        count = (mask if MODES[mode][1] else mask.any(1)).sum()
    # without tokens the loss is 0 whatever D is
    count = count.double().clamp(min=1) if isinstance(count, Tensor) else max(float(count), 1.0)
    if mode == "seq-mean-token-sum-norm":
        scale = info.get("loss_scale_factor", config.get("loss_scale_factor", None))
        if scale is None:
            # verl takes the width T of the padding, which differs from one micro-batch to the next
            raise ValueError(
                f'actor.loss_scale_factor: expected a number > 0 with loss_agg_mode="{mode}", such as the longest response, '
                "got None"
            )
        dp_size /= checks.check_number("actor.loss_scale_factor", scale)
    D: Tensor | float = count / dp_size
    return D


def _resolve(name: str, policy: Any) -> tuple[LossConfig, str | None]:
    """Return the LossConfig of the loss `name` with the options of verl's `policy_loss` section, and the option `impl`."""
    options = policy.get("options", None) or {}
    _expect("policy_loss.options", isinstance(options, Mapping), "a mapping", options)
    for option, value in options.items():
        where = f"policy_loss.options.{option}"
        _expect(where, option not in VERL_DECIDES, f"none: in verl set {VERL_DECIDES.get(option)}", value)
        _expect(where, option in OPTIONS, f"one of {OPTIONS}", value)
    ours = {option: value for option, value in options.items() if option != "impl"}
    if _losses[name] == LossConfig.holder and "power" not in ours:
        raise ValueError(
            'policy_loss.options.power: expected a finite number with loss_mode="holder" (verl tells a loss no training step, '
            "so p cannot follow HölderPO's schedule), got None"
        )
    impl = options.get("impl")
    _expect("policy_loss.options.impl", impl is None or impl in IMPLS, f"None or one of {list(IMPLS)}", impl)
    try:
        loss = _losses[name](**ours)
    except ValueError as error:
        raise ValueError(f"policy_loss.options.{error}") from error
    ok = loss.power != "ess" or loss.clip == "token"
    _expect("policy_loss.options.clip", ok, '"token" with power "ess", which follows the clipped tokens', loss.clip)
    return loss, impl


@lru_cache(maxsize=64)
def _with_mode(config: LossConfig, mode: Any) -> LossConfig:
    """Return the configuration with this mode. max_length is 1, because `_denominator` holds verl's scale."""
    return replace(config, loss_agg_mode=mode, max_length=1 if mode == "seq-mean-token-sum-norm" else None)


def _check_unread(config: Any, policy: Any, loss: LossConfig) -> None:
    """Raise unless verl's fields for other losses have verl's default or ask for what this loss does anyway."""
    low, high = (loss.clip_low, -math.expm1(-loss.clip_low)), (loss.clip_high, math.expm1(loss.clip_high))
    same = {"clip_ratio": (*low, *high), "clip_ratio_low": low, "clip_ratio_high": high} if loss.clip != "none" else {}
    if loss.dual_clip is not None:
        same["clip_ratio_c"] = (loss.dual_clip,)
    options = {"clip_ratio_low": "clip_low", "clip_ratio_high": "clip_high", "clip_ratio_c": "dual_clip"}
    for section, kind, names in ((config, ActorConfig, UNREAD_ACTOR), (policy, PolicyLossConfig, UNREAD_POLICY)):
        defaults = {f.name: f.default for f in fields(kind)}
        for name in names:
            value, default = section.get(name, None), defaults.get(name)
            if value is None or value == default or any(math.isclose(value, x) for x in same.get(name, ())):
                continue
            option = options.get(name, "clip_low and clip_high" if name == "clip_ratio" else None)
            hint = f"set policy_loss.options.{option}" if option else "no loss of pmpo_kernels reads it"
            raise ValueError(f"actor {name}: expected verl's default {default} ({hint}), got {value}")


def _add(name: str, preset: Callable[..., LossConfig]) -> None:
    taken = name in POLICY_LOSS_REGISTRY and name not in _losses
    _expect("name", isinstance(name, str) and not taken, "a str that is not a loss of verl's", name)
    _losses[name] = preset
    register_policy_loss(name)(partial(power_mean_policy_loss, name))


def _expect(name: str, ok: bool, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


_add("pmpo", LossConfig.pmpo)
_add("gmpo", LossConfig.gmpo)
_add("holder", LossConfig.holder)
