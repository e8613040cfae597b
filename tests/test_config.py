"""`LossConfig`: ranges, combinations, presets."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest

from pmpo_kernels import LossConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": math.nan}, 'power: expected a finite number or "ess", got nan'),
        ({"power": "geometric"}, "power: expected a finite number or \"ess\", got 'geometric'"),
        ({"power": True}, "power: expected"),
        ({"clip": "both"}, r"clip: expected one of \['token', 'sequence', 'none'\], got 'both'"),
        ({"ess_rule": "x"}, "ess_rule: expected one of"),
        ({"kl_estimator": "k4"}, "kl_estimator: expected one of"),
        ({"loss_agg_mode": "mean"}, "loss_agg_mode: expected one of"),
        ({"clip_low": 0.0}, "clip_low: expected a finite number > 0, got 0.0"),
        ({"clip_high": math.inf}, "clip_high: expected a finite number > 0, got inf"),
        ({"temperature": -1.0}, "temperature: expected a finite number > 0, got -1.0"),
        ({"temperature": 1e39}, "temperature: expected a number from 1e-30 to 1e30, got 1e\\+39"),
        ({"ess_sharpness": 0.0}, "ess_sharpness: expected a finite number > 0"),
        ({"full_clip_fraction": 1.5}, r"full_clip_fraction: expected a number in \(0, 1\], got 1.5"),
        ({"ess_floor": 0.0}, r"ess_floor: expected a number in \(0, 1\], got 0.0"),
        ({"power_min": -0.1}, "power_min: expected 0 <= power_min <= power_max, got -0.1"),
        ({"power_min": 2.0}, "power_min: expected 0 <= power_min <= power_max, got 2.0"),
        ({"beta": math.inf}, "beta: expected a finite number, got inf"),
        ({"entropy_coef": "0.1"}, "entropy_coef: expected a finite number, got '0.1'"),
        ({"dual_clip": 1.0}, "dual_clip: expected a ratio > 1, got 1.0"),
        ({"dual_clip": 3.0, "clip": "none"}, 'dual_clip: expected None when clip="none", got 3.0'),
        (
            {"dual_clip": 3.0, "clip_sides": "two"},
            'dual_clip: expected None with clip_sides="two", which bounds the ratio, got 3.0',
        ),
        ({"clip_sides": "both"}, "clip_sides: expected one of .*'one', 'two'.*, got 'both'"),
        ({"clip_sides": "two", "clip": "none"}, 'clip_sides: expected "one" when clip="none", got \'two\''),
        ({"kl_straight_through": 1}, "kl_straight_through: expected a bool, got 1"),
        (
            {"kl_straight_through": True, "kl_estimator": "k2"},
            'kl_straight_through: expected False with kl_estimator="k2"',
        ),
        (
            {"kl_straight_through": True, "kl_bias_correction": True},
            "kl_bias_correction: expected False with kl_straight_through",
        ),
        ({"loss_agg_mode": "seq-mean-token-sum-norm"}, "max_length: expected an int > 0"),
        ({"max_length": 5}, 'max_length: expected None with loss_agg_mode="seq-mean-token-mean", got 5'),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**options)  # type: ignore[arg-type]


def test_ratio_clip() -> None:
    bounds = LossConfig.ratio_clip(0.2, 0.28)
    assert math.exp(-bounds["clip_low"]) == pytest.approx(0.8, rel=1e-15)
    assert math.exp(bounds["clip_high"]) == pytest.approx(1.28, rel=1e-15)
    for low, high, name in ((1.0, 0.2, "eps_low"), (0.0, 0.2, "eps_low"), (0.2, 0.0, "eps_high")):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            LossConfig.ratio_clip(low, high)


def test_presets() -> None:
    assert LossConfig() == LossConfig.pmpo()
    powers = {
        LossConfig.grpo(): 1.0, LossConfig.dr_grpo(8): 1.0, LossConfig.dapo(): 1.0, LossConfig.gmpo(): 0.0,
        LossConfig.hmpo(): -1.0, LossConfig.gspo(): 0.0, LossConfig.holder(-2.0): -2.0,
        LossConfig.holder_token(2.0): 2.0, LossConfig.pmpo(): "ess",
        LossConfig.bnpo(): 1.0, LossConfig.apmpo(0.5, 0.3): 0.5,
    }  # fmt: skip
    assert all(config.power == power for config, power in powers.items())
    assert len(powers) == 11  # frozen, hashable, all different
    assert {c.clip for c in (LossConfig.gspo(), LossConfig.holder(1.0))} == {"sequence"}
    assert LossConfig.holder_token(1.0).clip == "token"
    assert LossConfig.dr_grpo(8).max_length == 8
    assert LossConfig.dapo().loss_agg_mode == "token-mean"
    assert LossConfig.bnpo() == LossConfig.dapo(**LossConfig.ratio_clip(0.2, 0.2))
    assert LossConfig.apmpo(0.5) == LossConfig.holder_token(0.5)
    assert LossConfig.apmpo(0.5, 0.3) == LossConfig.holder_token(0.5, **LossConfig.ratio_clip(0.2, 0.3))
    assert LossConfig.apmpo(0.5, eps_high=0.3, beta=0.1).beta == 0.1
    assert LossConfig.gmpo(beta=0.1).beta == 0.1
    with pytest.raises(FrozenInstanceError):
        LossConfig().power = 1.0  # type: ignore[misc]
