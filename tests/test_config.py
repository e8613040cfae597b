"""`LossConfig`: presets, numbers. Ranges and combinations: bad_calls_config.py."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import get_args

import pytest

from pmpo_kernels import LossConfig
from pmpo_kernels.config import Preset
from pmpo_kernels.verification import configurations


def test_ratio_clip() -> None:
    bounds = LossConfig.ratio_clip(0.2, 0.28)
    assert math.exp(-bounds["clip_low"]) == pytest.approx(0.8, rel=1e-15)
    assert math.exp(bounds["clip_high"]) == pytest.approx(1.28, rel=1e-15)


def test_presets() -> None:
    assert LossConfig() == LossConfig.pmpo()
    made = {name: configurations()[name] for name in get_args(Preset)}
    assert {name: config.power for name, config in made.items()} == {
        "pmpo": "ess", "grpo": 1.0, "dr_grpo": 1.0, "dapo": 1.0, "bnpo": 1.0, "gmpo": 0.0, "hmpo": -1.0, "gspo": 0.0,
        "holder": 2.0, "holder_token": -2.0, "apmpo": 0.5,
    }  # fmt: skip
    assert len(set(made.values())) == len(made)  # frozen, hashable, all different
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


def test_numbers_become_floats() -> None:
    """Integers beyond 64 bits are numbers too, but not of an operator's."""
    config = LossConfig(power=10**30, temperature=10**30, clip_high=10**300, beta=-(10**20), dual_clip=3)
    floats = (config.power, config.temperature, config.clip_high, config.beta, config.dual_clip)
    assert floats == (1e30, 1e30, 1e300, -1e20, 3.0)
    assert all(type(x) is float for x in floats)
    assert LossConfig(power=1) == LossConfig(power=1.0)
    assert hash(LossConfig(power=1)) == hash(LossConfig(power=1.0))
