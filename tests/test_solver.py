"""The Newton solver for p against bisection, on the distributions that break solvers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pmpo_kernels

Solver = Callable[..., Any]


@pytest.fixture(params=["reference", "cpp"])
def solve_power(request: pytest.FixtureRequest) -> Solver:
    """The solver of each implementation that has one on the host."""
    return functools.partial(pmpo_kernels.solve_power, impl=request.param)


def log_deficit(l: Tensor, p: float) -> float:
    """log(n / ESS(p)) straight from the definition, in float64."""
    w = torch.softmax(p * l, 0)
    return math.log(l.numel()) + math.log(float((w * w).sum()))


def bisect(l: Tensor, target: float, power_max: float) -> float:
    want, lo, hi = math.log(l.numel()) - math.log(target), 0.0, power_max
    for _ in range(200):
        mid = (lo + hi) / 2
        lo, hi = (mid, hi) if log_deficit(l, mid) < want else (lo, mid)
    return (lo + hi) / 2


def draw(kind: str, sd: float, n: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    uniform = torch.rand(n, dtype=torch.float64, generator=random)
    if kind == "normal":
        return sd * torch.randn(n, dtype=torch.float64, generator=random)
    if kind == "exponential tail":
        return -sd * torch.log1p(-uniform)
    if kind == "cauchy":
        return sd * torch.tan(math.pi * (uniform - 0.5))
    if kind == "one outlier":
        return torch.cat([torch.full((1,), 10 * sd, dtype=torch.float64), 1e-3 * sd * uniform[1:]])
    return torch.where(uniform < 0.3, sd, 0.0).double()


KINDS = ["normal", "exponential tail", "cauchy", "one outlier", "two-valued"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sd", [1e-4, 0.05, 0.2, 2.0, 20.0])
@pytest.mark.parametrize("power_max", [1.0, 4.0])
def test_agrees_with_bisection(kind: str, sd: float, power_max: float, solve_power: Solver) -> None:
    n, fractions = 300, [0.001, 0.1, 0.5, 0.9, 0.999]
    rows = torch.stack([draw(kind, sd, n, seed) for seed in range(len(fractions))])
    least = [n * math.exp(-log_deficit(l, power_max)) for l in rows]
    target = torch.tensor([e + f * (n - e) for e, f in zip(least, fractions, strict=True)], dtype=torch.float64)
    power, info = solve_power(rows, target, power_max=power_max, full_output=True)
    assert int(info.iterations.max()) <= 20
    for l, p, goal, residual in zip(rows, power.tolist(), target.tolist(), info.residual.tolist(), strict=True):
        want = bisect(l, goal, power_max)
        # The definition's own rounding: two sums of n terms near 1, in logs; bisection sees no less.
        noise = n * torch.finfo(torch.float64).eps
        assert abs(residual) <= 1e-9
        assert abs(log_deficit(l, p) - (math.log(n) - math.log(goal))) <= 1e-9 + noise
        assert abs(log_deficit(l, p) - log_deficit(l, want)) <= 1e-9 + 2 * noise


@settings(max_examples=200, deadline=None)
@given(
    impl=st.sampled_from(["reference", "cpp"]),
    kind=st.sampled_from(KINDS),
    sd=st.floats(1e-5, 1e3),
    n=st.integers(2, 2000),
    fraction=st.floats(0.0, 1.0),
    power_max=st.floats(0.1, 10.0),
    seed=st.integers(0, 2**31),
)
def test_never_more_than_20_iterations(
    impl: str, kind: str, sd: float, n: int, fraction: float, power_max: float, seed: int
) -> None:
    l = draw(kind, sd, n, seed)
    least = n * math.exp(-log_deficit(l, power_max))
    target = least + fraction * (n - least)
    power, info = pmpo_kernels.solve_power(
        l[None], torch.tensor([target], dtype=torch.float64), power_max=power_max, impl=impl, full_output=True
    )
    assert 0.0 <= float(power) <= power_max
    assert int(info.iterations) <= 20
    if float(l.max()) > float(l.min()):
        # Ends of the bracket are chosen to the definition's rounding.
        assert abs(float(info.residual)) <= 1e-9 + n * torch.finfo(torch.float64).eps


def test_relative_precision_for_tiny_spread(solve_power: Solver) -> None:
    """log(n / ESS) ~ p^2 Var: at sd 1e-4 it is 1e-8, and p still has its digits."""
    l = draw("normal", 1e-4, 1000, 0)
    variance = float(l.var(correction=0))
    target = torch.tensor([1000 * math.exp(-0.25 * variance)], dtype=torch.float64)
    # log(target) itself is rounded: u log(n) / deficit in the deficit, half of that in p.
    bound = 2 * torch.finfo(torch.float64).eps * math.log(1000) / (0.25 * variance) + 10 * 1e-4
    assert float(solve_power(l[None], target)) == pytest.approx(0.5, rel=bound)


def test_constant_and_single_token_give_power_max(solve_power: Solver) -> None:
    assert solve_power(torch.full((2, 5), 0.7), torch.tensor([5.0, 2.0]), power_max=1.5).tolist() == [1.5, 1.5]
    assert solve_power(torch.tensor([[0.3]]), torch.tensor([1.0])).tolist() == [1.0]


def test_targets_out_of_reach_give_the_nearest_end(solve_power: Solver) -> None:
    l = draw("normal", 0.3, 50, 1).expand(3, 50)
    power, info = solve_power(l, torch.tensor([50.0, 60.0, 1.0]), full_output=True)
    assert power.tolist() == [0.0, 0.0, 1.0]
    assert info.iterations.tolist() == [0, 0, 0]


def test_zero_weights_count_as_tokens_without_weight(solve_power: Solver) -> None:
    """l = 0, log 3, -inf: at p, ESS = (1 + 3^p)^2 / (1 + 9^p), 1.6 at p = 1; it can never exceed 2 of the 3 tokens."""
    l = torch.tensor([[0.0, math.log(3.0), -math.inf]], dtype=torch.float64)
    assert float(solve_power(l, torch.tensor([1.6], dtype=torch.float64), power_max=2.0)) == pytest.approx(
        1.0, rel=1e-8
    )
    assert float(solve_power(l, torch.tensor([2.5], dtype=torch.float64))) == 0.0


def test_mask_and_packing_change_no_bit(solve_power: Solver) -> None:
    rows = [draw("normal", 0.3, n, n) for n in (5, 9, 2)]
    target = torch.tensor([4.95, 8.9, 1.99], dtype=torch.float64)
    packed = solve_power(torch.cat(rows), target, cu_seqlens=torch.tensor([0, 5, 14, 16]))
    padded, mask = torch.full((3, 9), torch.nan, dtype=torch.float64), torch.zeros(3, 9, dtype=torch.bool)
    for i, l in enumerate(rows):
        padded[i, : l.numel()], mask[i, : l.numel()] = l, True
    assert torch.equal(packed, solve_power(padded, target, mask=mask))


def test_default() -> None:
    """None takes C++ where it is built."""
    rows, target = torch.stack([draw("normal", 0.3, 50, 1)]), torch.tensor([49.0], dtype=torch.float64)
    default, fast, twin = (pmpo_kernels.solve_power(rows, target, impl=impl) for impl in (None, "cpp", "reference"))
    assert torch.equal(default, fast)
    assert torch.allclose(fast, twin, rtol=1e-6)  # p^2 Var carries the solver's 1e-10
