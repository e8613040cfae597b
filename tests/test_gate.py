"""The suite's own assertions must reject gradients that are known to be wrong, at every dtype's tolerance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pmpo_kernels import LossConfig
from pmpo_kernels.verification import Case, Oracle, make_case, oracle, three_part_error, tolerance

CONFIG = LossConfig.pmpo(full_clip_fraction=0.5, temperature=0.8, entropy_coef=0.01)


def softmax_part(case: Case, want: Oracle, factor: float) -> Tensor:
    scaled = factor * want.grad
    ids = case.token_ids[..., None]
    return scaled.scatter(-1, ids, want.grad.gather(-1, ids))


def target_part(case: Case, want: Oracle) -> Tensor:
    ids = case.token_ids[..., None]
    return want.grad.scatter(-1, ids, 1.05 * want.grad.gather(-1, ids))


def unmasked(case: Case, want: Oracle) -> Tensor:
    everything = oracle(case._replace(mask=torch.ones_like(case.mask)), CONFIG).grad
    return torch.where(case.mask[..., None], want.grad, everything)


def no_temperature(case: Case, want: Oracle) -> Tensor:
    return want.grad * CONFIG.temperature


def without_entropy(case: Case, want: Oracle) -> Tensor:
    return oracle(case, replace(CONFIG, entropy_coef=0.0)).grad


def unclipped(case: Case, want: Oracle) -> Tensor:
    power = want.stats[5]
    return oracle(case, replace(CONFIG, clip="none", power=1.0), power).grad


WRONG: dict[str, Callable[[Case, Oracle], Tensor]] = {
    "zero": lambda case, want: torch.zeros_like(want.grad),
    "target column only": lambda case, want: softmax_part(case, want, 0.0),
    "softmax part 5 % too large": lambda case, want: softmax_part(case, want, 1.05),
    "target column 5 % too large": target_part,
    "shifted by one token": lambda case, want: want.grad.roll(1, 1),
    "shifted by one column": lambda case, want: want.grad.roll(1, 2),
    "temperature forgotten": no_temperature,
    "padding unmasked": unmasked,
    "entropy forgotten": without_entropy,
    "clip forgotten": unclipped,
    "other sign": lambda case, want: -want.grad,
    "one NaN": lambda case, want: want.grad.clone().index_put_((torch.tensor(0), torch.tensor(0), torch.tensor(0)), torch.tensor(torch.nan).double()),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wrong", list(WRONG))
@pytest.mark.parametrize("V", [67, 5000])
def test_wrong_gradient_is_rejected(dtype: torch.dtype, wrong: str, V: int) -> None:
    case = make_case(dtype, V=V)
    want = oracle(case, CONFIG)
    bound = tolerance(case, CONFIG)
    right = want.grad if dtype.itemsize > 2 else want.grad.to(torch.bfloat16).double()
    assert max(three_part_error(right, want, case.token_ids)) <= tolerance(make_case(torch.bfloat16, V=V), CONFIG)
    error = three_part_error(WRONG[wrong](case, want), want, case.token_ids)
    assert max(error) > bound, (wrong, error, bound)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_right_gradient_is_accepted(dtype: torch.dtype) -> None:
    case = make_case(dtype)
    want = oracle(case, CONFIG)
    scaled = (4096 * want.grad).to(dtype).double() / 4096
    assert max(three_part_error(scaled, want, case.token_ids)) <= tolerance(case, CONFIG)


def test_an_absolute_tolerance_would_accept_a_missing_softmax_part() -> None:
    """Why the comparison has three parts: at V = 100,000 `allclose` at 1e-3 sees nothing of q."""
    torch.manual_seed(0)
    q = torch.softmax(torch.randn(1, 1, 100_000, dtype=torch.float64), -1)
    one_hot = torch.zeros_like(q).index_fill_(-1, torch.tensor(7), 1.0)
    want = Oracle(torch.tensor(0.0), one_hot - q, torch.ones(1, 1), torch.ones(1, 1), torch.empty(0), 1.0)
    assert torch.allclose(one_hot, want.grad, atol=1e-3)
    assert three_part_error(one_hot, want, torch.tensor([[7]])).off_target == 1.0
