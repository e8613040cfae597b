"""`PMPOConfig`: the options of the loss beside TRL's own, each with the help that TRL's command-line parser shows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, get_args

import torch
from torch import Tensor
from trl import GRPOConfig

from pmpo_kernels import checks
from pmpo_kernels.config import EssRule, KLEstimator, LossAggMode, LossConfig, Preset
from pmpo_kernels.impls import Impl
from pmpo_kernels.schedules import Shape, apmpo_clip, apmpo_power, holder_power

SCHEDULED = ("holder", "holder_token")
# Options of presets, and the arguments of the functions of `schedules` that they are given as.
HOLDER = {"power_start": "start", "power_end": "end", "power_schedule": "shape"}
APMPO_POWER = {"apmpo_gamma": "gamma"}
APMPO_CLIP = {"apmpo_eps_min": "eps_min", "apmpo_eps_max": "eps_max"}
SOLVED = ("power_min", "power_max", "ess_rule", "full_clip_fraction", "ess_sharpness", "ess_floor")
UNREAD_FAMILIES = ("sapo_", "vespo_", "entropy_target", "entropy_coef_")  # options of TRL's other losses
NO_CHOICE = {  # TRL's choices of a loss, which `preset` makes instead: the only value that changes nothing
    "loss_type": (None, "preset chooses the loss"),
    "importance_sampling_level": ("token", 'preset chooses the loss; at the level of the sequence it is "gspo"'),
    "use_adaptive_entropy": (False, "a constant entropy_coef is supported"),
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class PMPOConfig(GRPOConfig):
    """`GRPOConfig` with the power-mean losses in place of TRL's `loss_type`.

    All else of TRL's configuration keeps its meaning: generation, rewards, `beta` (with `use_bias_correction_kl`), `delta`,
    `temperature`, `mask_truncated_completions`, vLLM's importance-sampling correction, accumulation. What is None among the
    fields below is the preset's own value, see `pmpo_kernels.LossConfig`.

    Raises:
        ValueError: a value out of its range, or an option that the chosen preset would not read; names it, expected and got.
    """

    preset: Preset = _option(
        "pmpo",
        "Loss of the power-mean family, a constructor of LossConfig: 'pmpo' solves p per trajectory from its clipped fraction, "
        "'holder' and 'holder_token' have p on a schedule over training, 'apmpo' p and clip from the batch's rewards, the others "
        "a fixed p.",
    )
    power: float | None = _option(
        None, "Exponent p of the power mean for every trajectory, instead of the preset's rule or schedule."
    )
    power_start: float | None = _option(
        None, "p at the first step of the presets 'holder' and 'holder_token'; default 2."
    )
    power_end: float | None = _option(
        None, "p at the last step of the presets 'holder' and 'holder_token'; default -2."
    )
    power_schedule: Shape | None = _option(
        None, "Shape of p between the two, along the optimizer steps: 'linear' (default), 'square', 'cube' or 'sine'."
    )
    apmpo_gamma: float | None = _option(
        None, "Preset 'apmpo': p = exp(-gamma * mean reward), of rewards whose mean is >= 0; default 0.8."
    )
    apmpo_eps_min: float | None = _option(
        None, "Preset 'apmpo': upper clip of the ratio minus 1 without reward; default 0.2."
    )
    apmpo_eps_max: float | None = _option(
        None, "Preset 'apmpo': upper clip of the ratio minus 1 at high and stable rewards; default 0.4."
    )
    power_min: float | None = _option(None, "Preset 'pmpo': lower end of the solved p; default 0.")
    power_max: float | None = _option(None, "Preset 'pmpo': upper end of the solved p, without clipping; default 1.")
    ess_rule: EssRule | None = _option(
        None, "Preset 'pmpo': how a trajectory's clipped fraction sets its effective sample size; default 'relative'."
    )
    full_clip_fraction: float | None = _option(
        None, "Preset 'pmpo': clipped fraction in (0, 1] at which p reaches its minimum."
    )
    ess_sharpness: float | None = _option(None, "Preset 'pmpo': exponent > 0 of the severity of clipping; default 1.")
    ess_floor: float | None = _option(
        None, "Preset 'pmpo', rule 'absolute': effective sample size over n of an unclipped trajectory."
    )
    epsilon: float | None = _option(
        None, "Ratios are clipped from below at 1 - epsilon and, without epsilon_high, from above at 1 + epsilon."
    )
    epsilon_high: float | None = _option(None, "Ratios are clipped from above at 1 + epsilon_high.")
    clip_low: float | None = _option(None, "Lower clip in log space, log-ratio >= -clip_low; instead of epsilon.")
    clip_high: float | None = _option(None, "Upper clip in log space, log-ratio <= clip_high; instead of epsilon_high.")
    loss_agg_mode: LossAggMode | None = _option(
        None,
        "How trajectories are averaged: 'seq-mean-token-mean' (alike), 'token-mean' (by length), 'seq-mean-token-sum-norm' "
        "(by length over max_completion_length).",
    )
    kl_estimator: KLEstimator = _option(
        "k3", "Estimator of the KL divergence to the reference model, weighted by beta."
    )
    entropy_coef: float = _option(
        0.0, "Weight of the entropy bonus, averaged over tokens and trajectories as the policy loss is."
    )
    fused_head: bool = _option(
        True,
        "Compute the loss from hidden states, chunk by chunk: the logits of a batch never exist. False: from the logits of "
        "the completion.",
    )
    max_chunk_tokens: int | None = _option(None, "Tokens whose logits exist at a time with fused_head; None: chosen.")
    skip_zero_advantage: bool = _option(
        True,
        "With fused_head, completions whose advantage is 0 are not projected when nothing of them has a gradient; the "
        "logged entropy and ratios are then those of the others.",
    )
    impl: Impl | None = _option(None, "Implementation of the loss; None: the fastest for the device.")
    loss_type: str | None = _option(None, "Not used: preset chooses the loss.")
    importance_sampling_level: str = _option("token", "Not used: preset chooses the loss.")
    use_adaptive_entropy: bool = _option(False, "Not supported: entropy_coef is constant.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect("preset", self.preset in get_args(Preset), f"one of {list(get_args(Preset))}")
        for name, (value, why) in NO_CHOICE.items():
            self._expect(name, getattr(self, name) == value, f"{value!r}, because {why}")
        constant = self.power is not None
        self._unread(
            self.preset in SCHEDULED and not constant, HOLDER, "preset 'holder' or 'holder_token' without power"
        )
        self._unread(self.preset == "pmpo" and not constant, SOLVED, "preset 'pmpo' without power")
        self._unread(self.preset == "apmpo" and not constant, APMPO_POWER, "preset 'apmpo' without power")
        self._unread(self.preset == "apmpo", APMPO_CLIP, "preset 'apmpo'")
        self._unread(
            self.preset != "apmpo", ("epsilon_high", "clip_high"), "a preset other than 'apmpo', whose clip is solved"
        )
        self._unread(self.fused_head, ("max_chunk_tokens",), "fused_head")
        self._unread(self.epsilon is None, ("clip_low",), "epsilon=None")
        by_ratio = self.epsilon_high is not None or (self.epsilon is not None and self.preset != "apmpo")
        self._unread(not by_ratio, ("clip_high",), "epsilon and epsilon_high None")
        self._expect("epsilon", self.epsilon is None or 0 < self.epsilon < 1, "None or a number in (0, 1)")
        self._expect(
            "epsilon_high", self.epsilon_high is None or 0 < self.epsilon_high < math.inf, "None or a finite number > 0"
        )
        self._expect("delta", self.delta is None or self.delta < math.inf, "None or a finite ratio")
        shapes = get_args(Shape)
        self._expect("power_schedule", self.power_schedule in (None, *shapes), f"one of {list(shapes)}")
        for check, names in (
            (checks.check_finite, ("power_start", "power_end")),
            (checks.check_number, (*APMPO_POWER, *APMPO_CLIP)),
            (checks.check_count, ("max_chunk_tokens",)),
        ):
            for name in names:
                if getattr(self, name) is not None:
                    check(name, getattr(self, name))
        chosen = self.top_entropy_quantile < 1 or self.off_policy_mask_threshold is not None
        self._expect(
            "fused_head",
            not (self.fused_head and chosen),
            "False with top_entropy_quantile or off_policy_mask_threshold, which choose tokens by their log-probs before the loss",
        )
        self._expect("torch_compile", not (self.fused_head and self.torch_compile), "False with fused_head")
        self._unread(self.ess_rule == "absolute", ("ess_floor",), "ess_rule='absolute'")
        for option in fields(GRPOConfig):
            if option.name.startswith(UNREAD_FAMILIES):
                unset = getattr(self, option.name) == option.default
                self._expect(option.name, unset, f"{option.default!r}, because no loss of this trainer reads it")
        self._expect(
            "entropy_coef", not (self.entropy_coef and self.top_entropy_quantile < 1), "0 with top_entropy_quantile"
        )
        self.scheduled_power(0.0)
        above = (self.reward_rule(torch.ones(1)) or self.loss_config()).clip_high
        ok = self.delta is None or self.delta > math.exp(above)
        self._expect("delta", ok, f"None or a ratio above the upper clip, which is {math.exp(above):.6g}")

    def _expect(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def _unread(self, read: bool, names: Iterable[str], reader: str) -> None:
        """Raise for each of the options `names` that is set although nothing reads it."""
        for name in names:
            self._expect(name, read or getattr(self, name) is None, f"None, because only {reader} reads it")

    def _given(self, arguments: dict[str, str]) -> dict[str, Any]:
        """The options that are not None, as arguments."""
        return {
            argument: getattr(self, name) for name, argument in arguments.items() if getattr(self, name) is not None
        }

    def loss_config(self, **options: Any) -> LossConfig:
        """Return the loss as `pmpo_kernels` takes it, with these options in place of the configuration's own."""
        given = {name: getattr(self, name) for name in (*SOLVED, "power", "clip_low", "clip_high", "loss_agg_mode")}
        if self.epsilon is not None:
            given["clip_low"] = -math.log1p(-self.epsilon)
        above = self.epsilon if self.epsilon_high is None and self.preset != "apmpo" else self.epsilon_high
        if above is not None:
            given["clip_high"] = math.log1p(above)
        given = {name: value for name, value in given.items() if value is not None} | options
        if self.preset in (*SCHEDULED, "apmpo"):
            given.setdefault("power", 1.0)  # a step's own is given with the batch
        if self.preset == "dr_grpo":
            given.setdefault("loss_agg_mode", "seq-mean-token-sum-norm")
        if given.get("loss_agg_mode") == "seq-mean-token-sum-norm":
            given["max_length"] = self.max_completion_length
        make = LossConfig.grpo if self.preset == "dr_grpo" else getattr(LossConfig, self.preset)
        config = make(
            **given,
            dual_clip=self.delta,
            beta=self.beta,
            kl_estimator=self.kl_estimator,
            kl_bias_correction=bool(self.beta) and self.use_bias_correction_kl,
            entropy_coef=self.entropy_coef,
            temperature=self.temperature,
        )
        assert isinstance(config, LossConfig)
        return config

    def scheduled_power(self, progress: float) -> float | None:
        """Return p where `progress` (in [0, 1]) of the training is done, for the presets with a schedule; None for the others."""
        if self.preset not in SCHEDULED or self.power is not None:
            return None
        return holder_power(progress, **self._given(HOLDER))

    def reward_rule(self, rewards: Tensor) -> LossConfig | None:
        """Return the loss of a step with these rewards (B,), of all ranks, for the preset that depends on them; else None."""
        if self.preset != "apmpo":
            return None
        power = apmpo_power(rewards, **self._given(APMPO_POWER)) if self.power is None else self.power
        return self.loss_config(power=power, eps_high=apmpo_clip(rewards, **self._given(APMPO_CLIP)))
