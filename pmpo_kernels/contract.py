"""What every implementation of the stages shares: names in their order, options, limits. `csrc/contract.h` is its twin."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

# `TrajectoryOptions.rule`: where a trajectory's p comes from.
RULES = ("FIXED", "RELATIVE", "ABSOLUTE", "TARGET")
FIXED, RELATIVE, ABSOLUTE, TARGET = range(len(RULES))


class TrajectoryOptions(NamedTuple):
    """The options of the `trajectory` stage, all as float64. A bound that does not apply is infinite."""

    rule: float
    power: float
    power_min: float
    power_max: float
    full_clip_fraction: float
    ess_sharpness: float
    ess_floor: float
    token_low: float
    token_high: float
    token_dual: float
    token_under: float
    sequence_low: float
    sequence_high: float
    sequence_dual: float
    sequence_under: float
    by_length: float
    length_norm: float
    beta: float
    kl_order: float
    kl_slope_order: float
    kl_weighted: float
    entropy_coef: float


class AggregateOptions(NamedTuple):
    """The options of the `aggregate` stage, all as float64.

    The loss is infinite where the largest |dlogp| plus entropy_factor times the largest |dentropy| of the tokens exceeds `limit`:
    beyond it the gradient of what logp and entropy come from could overflow.
    """

    by_tokens: float
    beta: float
    entropy_coef: float
    limit: float = math.inf
    entropy_factor: float = 1.0


STATS = (
    "tokens", "weight", "policy_loss", "kl", "entropy", "power", "ess", "ess_target", "clipped_low", "clipped_high",
    "ratio_sum", "ratio_max", "approx_kl",
)  # fmt: skip
"""Rows of the statistics (S, B) float64 that the `trajectory` stage returns. Those of tokens are sums over a trajectory."""

METRICS = (
    "clip_fraction_low", "clip_fraction_high", "ratio_mean", "approx_kl", "ref_kl", "entropy", "power_mean", "ess",
    "ess_target", "policy_loss", "tokens", "trajectories", "ratio_max", "power_max", "power_min", "clip_fraction",
)  # fmt: skip
"""Elements of the metrics (M,) that the `aggregate` stage returns."""

MAX_NEWTON_ITERATIONS = 20
NEWTON_TOLERANCE = 1e-10

ELSEWHERE = -(2**31)
"""The id that `dlogits` is given for a target in another rank's part of the vocabulary: no column of the row is the target."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic on logits of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
