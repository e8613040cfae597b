"""`LossConfig`: every choice of the loss, validated once, and as the numbers that the stages read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pmpo_kernels.contract import ABSOLUTE, FIXED, RELATIVE, TARGET, AggregateOptions, TrajectoryOptions
from pmpo_kernels.scalars import expect, finite_number, is_count, is_one_of

ClipMode = Literal["token", "sequence", "none"]
EssRule = Literal["relative", "absolute"]
ClipSides = Literal["one", "two"]
KLEstimator = Literal["k1", "k2", "k3"]
LossAggMode = Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"]
Preset = Literal[
    "pmpo", "grpo", "dr_grpo", "dapo", "bnpo", "gmpo", "hmpo", "gspo", "holder", "holder_token", "apmpo"
]  # fmt: skip
"""The constructors of `LossConfig`."""

TEMPERATURE_RANGE = "a number from 1e-30 to 1e30"
POWER_LIMIT = 1e30  # beyond it p^2 and p log a overflow float64


def representable(temperature: float) -> bool:
    """Whether float32 can hold a temperature and its inverse as normal numbers, with room for another factor."""
    return 1e-30 <= temperature <= 1e30


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """All options of the power-mean policy loss. `LossConfig()` is `LossConfig.pmpo()`.

    Args:
        power: exponent p of the mean of a trajectory's importance ratios, any real number up to 1e30 in size; or "ess" to solve
            p per trajectory from its clipped fraction (PMPO, arXiv 2601.22521).
        power_min, power_max: bracket of the solved p, 0 <= power_min <= power_max <= 1e30, power_max > 0.
        ess_rule: "relative": ESS* = ESS(power_max) + s (n - ESS(power_max)); "absolute": ESS*/n = ess_floor +
            (1 - ess_floor) s, with s = min(1, clipped fraction / full_clip_fraction) ** ess_sharpness. The paper's
            abstract fixes that clipping sets a target ESS; the exact form of the rule is this package's choice.
        full_clip_fraction: clipped fraction in (0, 1] at which p reaches its minimum.
        ess_sharpness: exponent > 0 of the severity s.
        ess_floor: target ESS/n of an unclipped trajectory in (0, 1], rule "absolute" only.
        clip: "token" clips each log-ratio, "sequence" clips log M_p, "none" clips nothing. One-sided by the sign of
            the advantage, as in PPO (arXiv 1707.06347, eq. 7).
        clip_low, clip_high: positive bounds in log space: d >= -clip_low for A < 0, d <= clip_high for A > 0.
        clip_sides: "one": as above; "two": both bounds whatever the sign of the advantage, so that a ratio outside them has no
            gradient even where that would bring it back.
        dual_clip: ratio > 1 that bounds the ratio from above for A < 0 (arXiv 1912.09729, eq. 5); None for no bound.
        loss_agg_mode: weight of a trajectory; "seq-mean-token-mean": 1/D, D non-empty trajectories (GRPO);
            "token-mean": n/D, D tokens (DAPO); "seq-mean-token-sum-norm": n/(max_length D), D non-empty trajectories
            (Dr. GRPO).
        max_length: tokens, an int below 2^63, required by (and only read by) "seq-mean-token-sum-norm".
        beta: weight of the KL penalty to the reference policy.
        kl_estimator: with r = ref_logp - logp: "k1" = -r, "k2" = r^2/2, "k3" = exp(r) - r - 1.
        kl_straight_through: the value of kl_estimator with the gradient of k2, which on samples of the policy is that of the KL in
            expectation (verl's "k1+", "k3+").
        kl_bias_correction: each token's penalty times its unclipped ratio exp(d), through which gradient flows too: samples of
            the old policy then estimate the KL of the current one (DeepSeek-V3.2, arXiv 2512.02556).
        entropy_coef: weight of the entropy bonus.
        temperature: from 1e-30 to 1e30; the logits are divided by it before the softmax.

    Raises:
        ValueError: a value out of its range, or options that do not combine; names the option, expected and got.
    """

    power: float | Literal["ess"] = "ess"
    power_min: float = 0.0
    power_max: float = 1.0
    ess_rule: EssRule = "relative"
    full_clip_fraction: float = 0.1
    ess_sharpness: float = 1.0
    ess_floor: float = 0.5
    clip: ClipMode = "token"
    clip_low: float = 0.4
    clip_high: float = 0.4
    clip_sides: ClipSides = "one"
    dual_clip: float | None = None
    loss_agg_mode: LossAggMode = "seq-mean-token-mean"
    max_length: int | None = None
    beta: float = 0.0
    kl_estimator: KLEstimator = "k3"
    kl_straight_through: bool = False
    kl_bias_correction: bool = False
    entropy_coef: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, choices in (
            ("ess_rule", EssRule),
            ("clip", ClipMode),
            ("clip_sides", ClipSides),
            ("kl_estimator", KLEstimator),
            ("loss_agg_mode", LossAggMode),
        ):
            value = getattr(self, name)
            expect(name, is_one_of(value, choices), f"one of {list(get_args(choices))}", value)
        if not is_one_of(self.power, ("ess",)):
            power = self._number("power", 'a finite number or "ess"')
            expect("power", abs(power) <= POWER_LIMIT, "a number from -1e30 to 1e30", self.power)
        for name in ("clip_low", "clip_high", "temperature", "ess_sharpness", "power_max"):
            value = self._number(name, "a finite number > 0")
            expect(name, value > 0, "a finite number > 0", value)
        expect("temperature", representable(self.temperature), TEMPERATURE_RANGE, self.temperature)
        for name in ("full_clip_fraction", "ess_floor"):
            value = self._number(name, "a number in (0, 1]")
            expect(name, 0 < value <= 1, "a number in (0, 1]", value)
        for name in ("beta", "entropy_coef", "power_min"):
            self._number(name, "a finite number")
        expect("power_max", self.power_max <= POWER_LIMIT, "a number in (0, 1e30]", self.power_max)
        expect("power_min", 0 <= self.power_min <= self.power_max, "0 <= power_min <= power_max", self.power_min)
        if self.dual_clip is not None:
            value = self._number("dual_clip", "a ratio > 1")
            expect("dual_clip", value > 1, "a ratio > 1", value)
            expect("dual_clip", self.clip != "none", 'None when clip="none"', value)
            expect("dual_clip", self.clip_sides == "one", 'None with clip_sides="two", which bounds the ratio', value)
        expect("clip_sides", self.clip_sides == "one" or self.clip != "none", '"one" when clip="none"', self.clip_sides)
        for name in ("kl_straight_through", "kl_bias_correction"):
            value = getattr(self, name)
            expect(name, isinstance(value, bool), "a bool", value)
        if self.kl_straight_through:
            expect("kl_straight_through", self.kl_estimator != "k2", 'False with kl_estimator="k2", which it is', True)
            expect("kl_bias_correction", not self.kl_bias_correction, "False with kl_straight_through", True)
        given = self.max_length
        if self.loss_agg_mode == "seq-mean-token-sum-norm":
            expected = 'an int > 0 and below 2^63 with loss_agg_mode="seq-mean-token-sum-norm"'
            expect("max_length", is_count(given), expected, given)
        else:
            expect("max_length", given is None, f'None with loss_agg_mode="{self.loss_agg_mode}"', given)

    def _number(self, name: str, expected: str) -> float:
        """Return the option as a float, and store it as one, because the operators take no integer beyond 64 bits."""
        value = finite_number(name, getattr(self, name), expected)
        object.__setattr__(self, name, value)
        return value

    @staticmethod
    def ratio_clip(eps_low: float, eps_high: float) -> dict[str, float]:
        """Return `clip_low` and `clip_high` (log space), for `LossConfig`, that clip ratios to [1 - eps_low, 1 + eps_high]."""
        low = finite_number("eps_low", eps_low, "a number in (0, 1)")
        expect("eps_low", 0 < low < 1, "a number in (0, 1)", eps_low)
        high = finite_number("eps_high", eps_high, "a finite number > 0")
        expect("eps_high", high > 0, "a finite number > 0", eps_high)
        return {"clip_low": -math.log1p(-low), "clip_high": math.log1p(high)}

    @classmethod
    def pmpo(cls, **options: Any) -> LossConfig:
        """PMPO (arXiv 2601.22521): p per trajectory from its clipped fraction, token clip 0.4 in log space."""
        return cls(**options)

    @classmethod
    def grpo(cls, **options: Any) -> LossConfig:
        """GRPO (arXiv 2402.03300, eq. 3): p = 1, token clip 1 +- 0.2."""
        return cls(**{"power": 1.0, **cls.ratio_clip(0.2, 0.2), **options})

    @classmethod
    def dr_grpo(cls, max_length: int, **options: Any) -> LossConfig:
        """Dr. GRPO (arXiv 2503.20783): GRPO's token sums divided by the constant `max_length` (tokens)."""
        return cls.grpo(**{"loss_agg_mode": "seq-mean-token-sum-norm", "max_length": max_length, **options})

    @classmethod
    def dapo(cls, **options: Any) -> LossConfig:
        """DAPO (arXiv 2503.14476, eq. 8): p = 1, clip higher 0.2 / 0.28, mean over all tokens."""
        return cls.grpo(**{**cls.ratio_clip(0.2, 0.28), "loss_agg_mode": "token-mean", **options})

    @classmethod
    def bnpo(cls, **options: Any) -> LossConfig:
        """TRL's loss_type "bnpo": GRPO with its clip of 1 +- 0.2, averaged over all tokens of the call.

        Those are the tokens of this rank and micro-batch, unless `denominator` is given."""
        return cls.grpo(**{"loss_agg_mode": "token-mean", **options})

    @classmethod
    def gmpo(cls, **options: Any) -> LossConfig:
        """GMPO (arXiv 2507.20673, eq. 4): geometric mean, p = 0, token clip 0.4 in log space."""
        return cls(**{"power": 0.0, **options})

    @classmethod
    def hmpo(cls, **options: Any) -> LossConfig:
        """HMPO (the GMPO authors' code): harmonic mean, p = -1, token clip 0.4 in log space."""
        return cls(**{"power": -1.0, **options})

    @classmethod
    def gspo(cls, **options: Any) -> LossConfig:
        """GSPO (arXiv 2507.18071, eq. 5-7): p = 0, the sequence ratio clipped to [1 - 3e-4, 1 + 4e-4]."""
        return cls(**{"power": 0.0, "clip": "sequence", **cls.ratio_clip(3e-4, 4e-4), **options})

    @classmethod
    def holder(cls, power: float, **options: Any) -> LossConfig:
        """HölderPO (arXiv 2605.12058): power mean of any real p, M_p clipped to 1 +- 0.2."""
        return cls(**{"power": power, "clip": "sequence", **cls.ratio_clip(0.2, 0.2), **options})

    @classmethod
    def holder_token(cls, power: float, **options: Any) -> LossConfig:
        """HölderPO (arXiv 2605.12058) with each token's ratio clipped one-sidedly to 1 +- 0.2 before the power mean."""
        return cls.holder(power, **{"clip": "token", **options})

    @classmethod
    def apmpo(cls, power: float, eps_high: float = 0.2, **options: Any) -> LossConfig:
        """APMPO (arXiv 2605.04066): power mean of token ratios clipped one-sidedly to [1 - 0.2, 1 + eps_high].

        Both numbers come from the step's rewards: `schedules.apmpo_power`, `schedules.apmpo_clip` (from 0.2 to 0.4)."""
        return cls.holder_token(power, **{**cls.ratio_clip(0.2, eps_high), **options})

    def trajectory_options(self, *, has_power: bool, has_target_ess: bool) -> TrajectoryOptions:
        """Return these options as the numbers that the stage `trajectory` reads.

        `has_power` and `has_target_ess` say that the call gives p or ESS* of each trajectory, which replaces the rule."""
        if has_power or self.power != "ess":
            rule = FIXED
        elif has_target_ess:
            rule = TARGET
        else:
            rule = RELATIVE if self.ess_rule == "relative" else ABSOLUTE
        none = (math.inf, math.inf, math.inf, math.inf)
        if self.clip_sides == "two":
            bounds = (self.clip_low, self.clip_high, self.clip_high, self.clip_low)
        else:
            dual = math.inf if self.dual_clip is None else math.log(self.dual_clip)
            bounds = (self.clip_low, self.clip_high, dual, math.inf)
        return TrajectoryOptions(
            rule,
            0.0 if self.power == "ess" else float(self.power),
            self.power_min,
            self.power_max,
            self.full_clip_fraction,
            self.ess_sharpness,
            self.ess_floor,
            *(bounds if self.clip == "token" else none),
            *(bounds if self.clip == "sequence" else none),
            float(self.loss_agg_mode != "seq-mean-token-mean"),
            float(self.max_length or 1),
            self.beta,
            float(self.kl_estimator[1]),
            2.0 if self.kl_straight_through else float(self.kl_estimator[1]),
            float(self.kl_bias_correction),
            self.entropy_coef,
        )

    def aggregate_options(self, limit: float = math.inf, entropy_factor: float = 1.0) -> AggregateOptions:
        """The options of the stage `aggregate`. `AggregateOptions` says what `limit` and `entropy_factor` mean."""
        by_tokens = float(self.loss_agg_mode == "token-mean")
        return AggregateOptions(by_tokens, self.beta, self.entropy_coef, limit, entropy_factor)
