"""What a step passes in: p and clip over training or from rewards, advantages of groups, weights of rollouts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pmpo_kernels import LossConfig, pmpo_loss_from_logp
from pmpo_kernels.schedules import apmpo_clip, apmpo_power, group_advantages, holder_power, rollout_weights

SHAPES = ["linear", "square", "cube", "sine"]
powers = st.floats(-20, 20)
rewards_01 = st.lists(st.floats(0, 1), min_size=1, max_size=12).map(lambda r: torch.tensor(r, dtype=torch.float64))


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("shape", "at_quarter", "at_half", "at_three_quarters"),
    [
        ("linear", 1.0, 0.0, -1.0),
        ("square", 2 - 4 / 16, 1.0, 2 - 4 * 9 / 16),
        ("cube", 2 - 2 * (1 - 1 / 8), 0.0, 2 - 2 * (1 + 1 / 8)),
        ("sine", math.sqrt(2), 0.0, -math.sqrt(2)),
    ],
)
def test_holder_power_by_hand(shape: Any, at_quarter: float, at_half: float, at_three_quarters: float) -> None:
    for x, want in ((0, 2), (0.25, at_quarter), (0.5, at_half), (0.75, at_three_quarters), (1, -2)):
        assert holder_power(x, shape=shape) == pytest.approx(want, abs=1e-15)
        assert holder_power(x, start=-2, end=2, shape=shape) == pytest.approx(-want, abs=1e-15)


@given(shape=st.sampled_from(SHAPES), start=powers, end=powers, a=st.floats(0, 1), b=st.floats(0, 1))
@settings(deadline=None)
def test_holder_power_goes_one_way(shape: Any, start: float, end: float, a: float, b: float) -> None:
    assert holder_power(0.0, start=start, end=end, shape=shape) == start
    assert holder_power(1.0, start=start, end=end, shape=shape) == end
    p, q = (holder_power(x, start=start, end=end, shape=shape) for x in (min(a, b), max(a, b)))
    assert min(start, end) <= p <= max(start, end)
    # sin and the sum round: a few eps of the range
    assert (q - p) * math.copysign(1, end - start) >= -8e-16 * (abs(start) + abs(end))


def test_apmpo_by_hand() -> None:
    rewards = double(1, 0, 1, 0)
    assert apmpo_power(rewards) == pytest.approx(math.exp(-0.4), rel=1e-15)
    assert apmpo_power(rewards.float(), gamma=2) == pytest.approx(math.exp(-1), rel=1e-15)
    assert apmpo_clip(rewards, delta=0.5) == pytest.approx(0.2 + 0.2 * math.tanh(0.5), rel=1e-15)
    assert apmpo_clip(rewards, eps_min=0.1, eps_max=0.5, delta=1) == pytest.approx(
        0.1 + 0.4 * math.tanh(1 / 3), rel=1e-15
    )
    assert (apmpo_power(double(0, 0)), apmpo_clip(double(0, 0))) == (1.0, 0.2)
    assert apmpo_clip(double(1)) == pytest.approx(0.4, rel=1e-15)
    config = LossConfig.apmpo(apmpo_power(rewards), apmpo_clip(rewards, delta=0.5))
    assert math.exp(config.clip_high) == pytest.approx(1.2 + 0.2 * math.tanh(0.5), rel=1e-15)
    assert math.exp(-config.clip_low) == pytest.approx(0.8, rel=1e-15)


@given(rewards=rewards_01, gamma=st.floats(0.01, 10))
@settings(deadline=None)
def test_apmpo_stays_in_range(rewards: Tensor, gamma: float) -> None:
    assert math.exp(-gamma) * (1 - 1e-14) <= apmpo_power(rewards, gamma=gamma) <= 1
    assert 0.2 <= apmpo_clip(rewards) <= 0.4 + 1e-15


def test_group_advantages_by_hand() -> None:
    rewards = double(1, 0, 0, 3, 1, 5, 2)
    groups = torch.tensor([4, -1, 4, -1, 4, 9, -1])  # {1, 0, 1}, {0, 3, 2}, {5}
    third = 1 / 3
    centred = double(third, -5 * third, -2 * third, 4 * third, third, 0, third)
    std = double(third, 7 * third, third, 7 * third, third, 1, 7 * third).sqrt()
    close = {"rtol": 1e-14, "atol": 1e-14}
    torch.testing.assert_close(group_advantages(rewards, groups, scale=None), centred, **close)
    torch.testing.assert_close(group_advantages(rewards, groups, delta=0.5), centred / (std + 0.5), **close)
    loo = group_advantages(rewards, groups, baseline="leave-one-out", scale=None)
    torch.testing.assert_close(loo, double(0.5, -2.5, -1, 2, 0.5, 0, 0.5), **close)
    both = group_advantages(rewards, groups, baseline="leave-one-out")
    torch.testing.assert_close(both, loo / (std + 1e-6), **close)


def test_a_size_is_consecutive_groups() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0, 0.0])
    by_id = group_advantages(rewards, torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.int32))
    assert torch.equal(group_advantages(rewards, 3), by_id)
    assert by_id.dtype == torch.float32
    assert group_advantages(rewards.bfloat16(), 3).dtype == torch.float32
    assert group_advantages(rewards.double(), 3).dtype == torch.float64
    assert group_advantages(torch.empty(0), 3).shape == (0,)
    assert group_advantages(torch.empty(0), torch.empty(0, dtype=torch.long)).shape == (0,)


@given(data=st.data(), baseline=st.sampled_from(["mean", "leave-one-out"]), scale=st.sampled_from(["std", None]))
@settings(deadline=None, max_examples=50)
def test_group_advantages_of_any_groups(data: st.DataObject, baseline: Any, scale: Any) -> None:
    rows = data.draw(st.lists(st.tuples(st.floats(-10, 10), st.integers(-3, 3)), min_size=1, max_size=12))
    rewards, groups = double(*(r for r, _ in rows)), torch.tensor([g for _, g in rows])
    found = group_advantages(rewards, groups, baseline=baseline, scale=scale)
    for g in groups.unique():
        own = groups == g
        # n roundings of the largest reward, over delta where the spread is that small; 2 for n / (n - 1)
        bound = 2 * 12 * 12 * 1.2e-16 * 10 / (1e-6 if scale else 1)
        assert abs(float(found[own].sum())) <= bound
        alone = group_advantages(rewards[own], int(own.sum()), baseline=baseline, scale=scale)
        assert torch.equal(alone, found[own])
    relabelled = group_advantages(rewards, 1000 - 7 * groups, baseline=baseline, scale=scale)
    assert torch.equal(relabelled, found)
    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    moved = group_advantages(rewards[order], groups[order], baseline=baseline, scale=scale)
    torch.testing.assert_close(moved, found[order], rtol=1e-9, atol=bound)


@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
@pytest.mark.parametrize("scale", ["std", None])
def test_equal_rewards_give_exactly_zero(baseline: Any, scale: Any) -> None:
    rewards = double(0.1, 0.1, 0.1, 0.7, 1e6 / 3, 1e6 / 3, 1e6 / 3)
    groups = torch.tensor([0, 0, 0, 1, 2, 2, 2])
    assert bool((group_advantages(rewards, groups, baseline=baseline, scale=scale) == 0).all())


LOGP = double(-1, -2, -3, -1, -1, -9).view(2, 3)
D = double(math.log(4), math.log(0.5), 0, math.log(3), math.log(0.1), 7).view(2, 3)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, [2, 0.5, 1, 2, 0.1, 0]),
        ({"low": 0.4, "high": 3.5}, [3.5, 0.5, 1, 3, 0.4, 0]),
        ({"mode": "mask"}, [0, 0.5, 1, 0, 0.1, 0]),
        ({"mode": "mask", "low": 0.4, "high": 3.5}, [0, 0.5, 1, 3, 0, 0]),
        ({"level": "sequence", "high": 3}, [2, 2, 2, 0.3, 0.3, 0]),
        ({"level": "sequence", "low": 0.5, "high": 1.5}, [1.5, 1.5, 1.5, 0.5, 0.5, 0]),
        ({"level": "sequence", "mode": "mask", "low": 0.5, "high": 3}, [2, 2, 2, 0, 0, 0]),
        ({"level": "geometric"}, [2 ** (1 / 3)] * 3 + [math.sqrt(0.3)] * 2 + [0]),
        ({"level": "geometric", "mode": "mask", "high": 1.1}, [0, 0, 0] + [math.sqrt(0.3)] * 2 + [0]),
    ],
)
def test_rollout_weights_by_hand(options: dict[str, Any], want: list[float]) -> None:
    found = rollout_weights(LOGP, LOGP - D, mask=MASK, **options)
    torch.testing.assert_close(found, double(*want).view(2, 3), rtol=1e-14, atol=0)


@given(
    d=st.lists(st.floats(-3000, 3000) | st.just(-math.inf), min_size=4, max_size=4),
    level=st.sampled_from(["token", "sequence", "geometric"]), mode=st.sampled_from(["truncate", "mask"]),
    low=st.none() | st.floats(1e-3, 0.9), high=st.floats(1, 1e6), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
@settings(deadline=None)
def test_rollout_weights_stay_in_bounds(
    d: list[float], level: Any, mode: Any, low: float | None, high: float, dtype: torch.dtype
) -> None:
    logp = torch.tensor(d, dtype=dtype).view(2, 2)
    found = rollout_weights(logp, torch.zeros_like(logp), level=level, mode=mode, low=low, high=high)
    eps = torch.finfo(dtype).eps
    inside = (found >= (low or 0) * (1 - eps)) & (found <= high * (1 + eps))
    assert bool((inside | (found == 0) if mode == "mask" else inside).all())
    assert found.dtype == dtype


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_masked_slots_change_no_weight(level: Any) -> None:
    clean = rollout_weights(LOGP, LOGP - D, mask=MASK, level=level)
    for bad in (math.nan, math.inf, -math.inf):
        logp, rollout_logp = LOGP.clone(), LOGP - D
        logp[1, 2] = rollout_logp[1, 2] = bad
        assert torch.equal(rollout_weights(logp, rollout_logp, mask=MASK, level=level), clean)
        assert torch.equal(rollout_weights(logp, LOGP - D, mask=MASK.bool(), level=level), clean)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_packed_weights_equal_padded(level: Any) -> None:
    keep = MASK.bool()
    padded = rollout_weights(LOGP, LOGP - D, mask=MASK, level=level)
    offsets = torch.tensor([0, 3, 3, 5])
    assert torch.equal(rollout_weights(LOGP[keep], (LOGP - D)[keep], cu_seqlens=offsets, level=level), padded[keep])


def test_no_gradient_flows_through_weights() -> None:
    logp = LOGP.float().requires_grad_()
    found = rollout_weights(logp, LOGP - D, mask=MASK)
    assert not found.requires_grad
    assert found.dtype == torch.float32
    assert rollout_weights(LOGP.bfloat16(), LOGP.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("power", [1.0, 0.0, -1.0])
def test_what_a_weight_does_to_the_loss(power: float) -> None:
    old_logp, A = LOGP - 0.1, double(1, 2)

    def loss(weights: Tensor, mask: Tensor = MASK) -> Tensor:
        config = LossConfig.gmpo(power=power)
        options = {"mask": mask, "rollout_weights": weights, "denominator": 1.0, "config": config}
        return pmpo_loss_from_logp(LOGP, old_logp, A, **options).loss

    ratio = math.exp(0.1)
    v = rollout_weights(old_logp, old_logp - D, mask=MASK, level="sequence", high=3)
    torch.testing.assert_close(loss(v), double(-ratio * (2 * 1 + 0.3 * 2))[0], rtol=1e-14, atol=0)
    v = rollout_weights(LOGP, LOGP - torch.where(D[0, 0] == D, D, 0), mask=MASK, mode="mask")
    assert v.tolist() == [[0, 1, 1], [1, 1, 0]]
    torch.testing.assert_close(loss(v), double(-ratio * ((2 / 3 if power > 0 else 0) + 2))[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(loss(v, MASK * (v > 0)), double(-ratio * 3)[0], rtol=1e-14, atol=0)


def test_reads_no_values_where_they_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pmpo_kernels.checks.checks_values", lambda tensor: False)
    with FakeTensorMode():  # reading a value of a fake tensor raises
        rewards, groups, logp = torch.zeros(6), torch.zeros(6, dtype=torch.long), torch.zeros(2, 3)
        for baseline, scale in (("mean", "std"), ("leave-one-out", None)):
            assert group_advantages(rewards, groups, baseline=baseline, scale=scale).shape == (6,)
        for level in ("token", "sequence", "geometric"):
            assert rollout_weights(logp, logp, mask=logp == 0, level=level, mode="mask").shape == (2, 3)
            packed = torch.zeros(3, dtype=torch.long)
            assert rollout_weights(rewards, rewards, cu_seqlens=packed, level=level).shape == (6,)


def test_group_advantages_of_large_and_infinite_rewards() -> None:
    """Squares of large rewards do not overflow; infinities (unchecked on a GPU) are not taken for equal rewards."""
    found = group_advantages(torch.tensor([1e200, 0.0], dtype=torch.float64), 2)
    assert found.tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)])


def test_apmpo_of_rewards_whose_mean_is_zero() -> None:
    """Whole numbers, whose sum has no rounding: p is 1 - tanh(0) everywhere, no mean below 0 is seen."""
    generator = torch.Generator().manual_seed(0)
    for n in range(2, 200):
        rewards = torch.randint(-9, 10, (n,), generator=generator).double()
        rewards[-1] -= rewards.sum()
        assert apmpo_power(rewards) == apmpo_power(torch.zeros(n))


def test_apmpo_of_large_rewards() -> None:
    """Neither their sum nor their squares overflow: mean 1.2e308, standard deviation 0.4e308."""
    rewards = torch.tensor([1.6e308, 0.8e308], dtype=torch.float64)
    assert apmpo_power(rewards, gamma=1e-308) == pytest.approx(math.exp(-1.2), rel=1e-14)
    assert apmpo_clip(rewards, eps_min=0.2, eps_max=0.4) == pytest.approx(0.2 + 0.2 * math.tanh(3), rel=1e-14)
