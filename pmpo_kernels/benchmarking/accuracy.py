"""Loss and gradient of a variant against the eager formula in float64: no speed is printed for a wrong result."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pmpo_kernels.aggregate import default_denominator
from pmpo_kernels.baseline import eager_pmpo_loss
from pmpo_kernels.benchmarking.cases import Inputs
from pmpo_kernels.config import LossConfig
from pmpo_kernels.reference import STATS


class Errors(NamedTuple):
    """Largest relative errors against float64; `gradient` as in `row_error`, `loss` over sum_i |w_i A_i M_p| / D."""

    gradient: float
    loss: float


def row_error(gradient: Tensor, exact: Tensor, token_ids: Tensor) -> Tensor:
    """Per row (B, T), the larger of two: target column over the row's norm, other columns (2-norm) over their own norm.

    Apart, because the other V - 1 entries are so small that an error norm of the whole row would not see them missing.
    Rows whose exact gradient is 0 must be 0; they and NaN give infinity otherwise.
    """
    target = token_ids[..., None]
    difference = gradient.double() - exact
    at_target = difference.gather(-1, target)[..., 0].abs() / exact.norm(dim=-1)
    others = difference.scatter(-1, target, 0).norm(dim=-1) / exact.scatter(-1, target, 0).norm(dim=-1)
    error = torch.maximum(at_target, others).nan_to_num(nan=math.inf)
    is_zero = (exact == 0).all(-1)
    return torch.where(is_zero, torch.where((gradient == 0).all(-1), 0.0, math.inf), error)


def errors(loss: Tensor, gradient: Tensor, inputs: Inputs, config: LossConfig) -> Errors:
    """Compare the whole batch, one trajectory at a time: trajectories only share the denominator."""
    stats = torch.zeros(len(STATS), inputs.mask.shape[0], dtype=torch.float64, device=loss.device)
    stats[STATS.index("tokens")] = inputs.mask.sum(-1)
    total = default_denominator(stats, config)
    exact_loss, scale, worst = 0.0, 0.0, 0.0
    for b in range(inputs.mask.shape[0]):
        one = slice(b, b + 1)
        logits = inputs.logits[one].double().requires_grad_()
        power = None if inputs.power is None else inputs.power[one]
        rest = (inputs.token_ids[one], inputs.old_logp[one], inputs.advantages[one], inputs.mask[one])
        share = default_denominator(stats[:, one], config) / total
        part = share * eager_pmpo_loss(logits, *rest, config, power)
        (exact,) = torch.autograd.grad(part, logits)
        worst = max(worst, float(row_error(gradient[one], exact, inputs.token_ids[one]).max()))
        exact_loss, scale = exact_loss + part.item(), scale + abs(part.item())
    loss_error = abs(float(loss) - exact_loss) / (scale or 1.0)
    return Errors(worst, loss_error if math.isfinite(loss_error) else math.inf)


def float32_bound(vocab: int) -> float:
    """Bound of both relative errors for arithmetic in float32, C eps log2(V) with C = 12.

    logp: the tree or block sum over V adds log2(V) roundings of eps / 2, the final |logp| <~ log2(V) as many again:
    absolute error at most delta = eps log2(V). The gradient g (1[j = y] - q_j) sees it in q (2 delta: maximum and
    sum), in g = w A M_p W_t (delta from M_p, 2 |p| delta from W, |p| <= 1 in every preset; old_logp is the same number
    for all), and in a solved p, whose relative error delta / sd(l) moves p (l - mean) by 4 delta at 4 sd. The second
    backward product adds 3 eps. Together 2 + 1 + 2 + 4 + 3 = 12.
    """
    return 12 * torch.finfo(torch.float32).eps * math.log2(max(vocab, 2))


def gradient_bound(dtype: torch.dtype, vocab: int, eager_error: float | None) -> float:
    """float32: `float32_bound`. bfloat16: error of plain eager (None: this is eager) plus one rounding."""
    if dtype == torch.float32:
        return float32_bound(vocab)
    rounding = torch.finfo(dtype).eps / 2
    return rounding + (float32_bound(vocab) if eager_error is None else eager_error)
