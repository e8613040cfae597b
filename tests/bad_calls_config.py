"""Bad options of `LossConfig`, its presets and `ratio_clip`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args

from bad_calls import NOT_FLAGS, Call, Row, choice_rows, count_rows, number_rows, positive_rows

from pmpo_kernels import LossConfig
from pmpo_kernels.config import ClipMode, ClipSides, EssRule, KLEstimator, LossAggMode, Preset
from pmpo_kernels.verification.oracle import NUMBERS

PRESETS: tuple[str, ...] = get_args(Preset)
CALLS = {
    "LossConfig": Call(LossConfig, {}),
    "LossConfig, Dr. GRPO": Call(LossConfig, {"loss_agg_mode": "seq-mean-token-sum-norm", "max_length": 8}),
    "ratio_clip": Call(LossConfig.ratio_clip, {"eps_low": 0.2, "eps_high": 0.2}),
    **{name: Call(getattr(LossConfig, name), NUMBERS.get(name, {})) for name in PRESETS},
}

LENGTH = 'an int > 0 and below 2^63 with loss_agg_mode="seq-mean-token-sum-norm"'
POWER = 'a finite number or "ess"'
PAIRS: list[tuple[dict[str, Any], str]] = [
    ({"power": "geometric"}, f"power: expected {POWER}, got 'geometric'"),
    ({"power": -1e31}, "power: expected a number from -1e30 to 1e30, got -1e+31"),
    ({"power": 10**31}, f"power: expected a number from -1e30 to 1e30, got {1e31}"),
    ({"power_max": 1e31}, "power_max: expected a number in (0, 1e30], got 1e+31"),
    ({"power_max": 1.7e308}, "power_max: expected a number in (0, 1e30], got 1.7e+308"),
    ({"power_min": 1e200, "power_max": 1e201}, "power_max: expected a number in (0, 1e30], got 1e+201"),
    ({"power_min": -0.1}, "power_min: expected 0 <= power_min <= power_max, got -0.1"),
    ({"power_min": 2.0}, "power_min: expected 0 <= power_min <= power_max, got 2.0"),
    ({"temperature": 1e39}, "temperature: expected a number from 1e-30 to 1e30, got 1e+39"),
    ({"temperature": 1e-31}, "temperature: expected a number from 1e-30 to 1e30, got 1e-31"),
    ({"temperature": 5e-324}, "temperature: expected a number from 1e-30 to 1e30, got 5e-324"),
    ({"temperature": 10**31}, f"temperature: expected a number from 1e-30 to 1e30, got {1e31}"),
    ({"dual_clip": 3.0, "clip": "none"}, 'dual_clip: expected None when clip="none", got 3.0'),
    ({"dual_clip": 3.0, "clip_sides": "two"}, 'dual_clip: expected None with clip_sides="two", which bounds the ratio, got 3.0'),
    ({"clip_sides": "two", "clip": "none"}, "clip_sides: expected \"one\" when clip=\"none\", got 'two'"),
    ({"kl_straight_through": True, "kl_estimator": "k2"}, 'kl_straight_through: expected False with kl_estimator="k2", which it is, got True'),
    ({"kl_straight_through": True, "kl_bias_correction": True}, "kl_bias_correction: expected False with kl_straight_through, got True"),
    ({"loss_agg_mode": "seq-mean-token-sum-norm"}, f"max_length: expected {LENGTH}, got None"),
    *(({"max_length": value}, f'max_length: expected None with loss_agg_mode="seq-mean-token-mean", got {value}') for value in (5, False, 0)),
    *(({"max_length": 5, "loss_agg_mode": "token-mean"}, 'max_length: expected None with loss_agg_mode="token-mean", got 5'),),
]  # fmt: skip


def config_rows() -> Iterator[Row]:
    call = "LossConfig"
    yield from number_rows(call, "power", POWER)
    for name in ("clip_low", "clip_high", "temperature", "ess_sharpness", "power_max"):
        yield from finite_rows(name, "a finite number > 0", (0.0, -1.0, -5e-324))
    for name in ("full_clip_fraction", "ess_floor"):
        yield from finite_rows(name, "a number in (0, 1]", (0.0, -0.1, 1.0000000000000002))
    for name in ("power_min", "beta", "entropy_coef"):
        yield from finite_rows(name, "a finite number", ())
    yield from finite_rows("dual_clip", "a ratio > 1", (1.0, 0.5, -3.0), optional=True)
    for name, choices in (
        ("ess_rule", EssRule), ("clip", ClipMode), ("clip_sides", ClipSides), ("kl_estimator", KLEstimator),
        ("loss_agg_mode", LossAggMode),
    ):  # fmt: skip
        yield from choice_rows(call, name, get_args(choices))
    for name in ("kl_straight_through", "kl_bias_correction"):
        for value, got in NOT_FLAGS:
            yield Row(call, {name: value}, ValueError, f"{name}: expected a bool, got {got}")
    yield from count_rows("LossConfig, Dr. GRPO", "max_length", LENGTH)
    yield from (Row(call, change, ValueError, message) for change, message in PAIRS)
    unexpected = "LossConfig.__init__() got an unexpected keyword argument 'p'"
    yield Row(call, {"p": 1.0}, TypeError, unexpected)


def finite_rows(name: str, expected: str, bad: tuple[float, ...], *, optional: bool = False) -> Iterator[Row]:
    yield from number_rows("LossConfig", name, expected, bad, optional=optional)


def preset_rows() -> Iterator[Row]:
    yield from number_rows("ratio_clip", "eps_low", "a number in (0, 1)", (0.0, 1.0, -0.1, 2.0))
    yield from positive_rows("ratio_clip", "eps_high")
    yield from positive_rows("apmpo", "eps_high")
    yield from count_rows("dr_grpo", "max_length", LENGTH)
    for call in (name for name, numbers in NUMBERS.items() if "power" in numbers):
        for value in (math.nan, math.inf, None, True, "p", 10**400):
            message = f"power: expected {POWER}, got …"
            yield Row(call, {"power": value}, ValueError, message)
        yield Row(call, {"power": 1e31}, ValueError, "power: expected a number from -1e30 to 1e30, got 1e+31")
    for call in PRESETS:
        yield Row(call, {"clip_low": math.inf}, ValueError, "clip_low: expected a finite number > 0, got inf")
        unexpected = "LossConfig.__init__() got an unexpected keyword argument 'p'"
        yield Row(call, {"p": 1.0}, TypeError, unexpected)


ROWS = [*config_rows(), *preset_rows()]
