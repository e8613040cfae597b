"""Loss and gradients of the fused head's comparisons against float64: dhidden and dweight, row by row."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from head_inputs import HeadInputs, accumulation, exact_logits, logp_error
from torch import Tensor

from pmpo_kernels.aggregate import default_denominator, total_loss
from pmpo_kernels.benchmarking.inputs import chunks, flat_trajectory
from pmpo_kernels.config import LossConfig
from pmpo_kernels.contract import STATS


class HeadExact(NamedTuple):
    """The right results in float64: the gradients hidden (N, H) and weight (V, H), the sizes that errors are measured by, and what
    the bounds depend on. is_target (V,) tells which rows of weight are the target of a token with a gradient.

    With G the gradient of the logits, dhidden_t = sum_j G_tj W_j and dweight_j = sum_t G_tj h_t. The scale of a row, hidden_scale
    (N,) and weight_scale (V,), is the sum of the norms of its terms. The target's term counts with |dlogp| instead of |G|, because
    the rounding of 1 - q leaves an absolute error of q, not a relative one.
    """

    hidden: Tensor
    weight: Tensor
    hidden_scale: Tensor
    weight_scale: Tensor
    is_target: Tensor
    loss: float
    loss_scale: float
    largest: float
    power: float
    gradient_rows: int


class HeadErrors(NamedTuple):
    """The largest error over the rows, relative to the row's scale: of dhidden, of the rows of dweight that are the target of a
    token with a gradient, and of its other rows, which the softmax alone makes. Infinite where a row that must be 0 is not, or
    where anything is not finite."""

    hidden: float
    weight_target: float
    weight_other: float


@torch.no_grad()
def exact(inputs: HeadInputs, config: LossConfig) -> HeadExact:
    """Compute the right results in float64, in chunks of the rows that have a gradient. An adaptive p is solved here."""
    assert config.beta == 0
    assert config.entropy_coef == 0
    assert config.temperature == 1
    i = inputs
    dlogp, _, stats = flat_trajectory(i.pad(i.logp), i.pad(i.old_logp.double()), i.advantages, i.mask, config)
    row = dict(zip(STATS, stats, strict=True))
    terms = config.aggregate_options()
    denominator = default_denominator(row["tokens"], terms)
    g = dlogp.view(i.mask.shape)[i.mask] / denominator
    acting = g.nonzero()[:, 0]
    h, ids, g = i.hidden[acting], i.token_ids[acting], g[acting]
    V, head = i.weight.shape[0], i.weight.double()
    row_norm, token_norm = head.norm(dim=1), h.double().norm(dim=1)
    hidden, hidden_scale = torch.zeros_like(i.hidden, dtype=torch.float64), head.new_zeros(len(i.hidden))
    weight, weight_scale = torch.zeros_like(head), head.new_zeros(V)
    largest = 0.0
    for rows, z in exact_logits(h, i.weight):
        largest = max(largest, float(z.abs().max()))
        target, coefficient = ids[rows, None], g[rows, None]
        grad = z.softmax(-1).mul_(-coefficient).scatter_add_(1, target, coefficient)
        hidden[acting[rows]] = grad @ head
        weight.addmm_(grad.t(), h[rows].double())
        size = grad.abs_().scatter_(1, target, coefficient.abs())
        hidden_scale[acting[rows]] = size @ row_norm
        weight_scale += size.t() @ token_norm[rows]
    return HeadExact(
        hidden,
        weight,
        hidden_scale,
        weight_scale,
        torch.zeros(V, dtype=torch.bool, device=head.device).index_fill_(0, ids, True),
        float(total_loss(stats, terms, denominator)),
        float((row["weight"] * row["policy_loss"]).abs().sum() / denominator),
        largest,
        float(row["power"].abs().max()),
        len(acting),
    )


@torch.no_grad()
def errors(
    loss: Tensor, dhidden: Tensor, dweight: Tensor, inputs: HeadInputs, want: HeadExact
) -> tuple[HeadErrors, float]:
    """Return the errors of dhidden, (N, H) or padded (B, T, H), and dweight (V, H); and the loss's error over its scale."""
    padding = 0.0
    if dhidden.dim() == 3:
        padding = math.inf if bool((dhidden[~inputs.mask] != 0).any()) else 0.0
        dhidden = dhidden[inputs.mask]
    hidden = relative_errors(dhidden, want.hidden, want.hidden_scale)
    weight = relative_errors(dweight, want.weight, want.weight_scale)
    parts = HeadErrors(
        max(_largest(hidden), padding), _largest(weight[want.is_target]), _largest(weight[~want.is_target])
    )
    off = abs(float(loss) - want.loss) / (want.loss_scale or 1.0)
    return parts, math.inf if math.isnan(off) else off


def relative_errors(found: Tensor, want: Tensor, scale: Tensor) -> Tensor:
    """Norm of each row's error over the row's scale, computed in chunks. With scale 0 it is 0 or infinite."""
    out = torch.empty_like(scale)
    for rows in chunks(*want.shape):
        error = (found[rows].double() - want[rows]).norm(dim=1)
        out[rows] = torch.where(error == 0, 0, error / scale[rows])
    return out


def _largest(errors: Tensor) -> float:
    """The largest of the errors: 0 if there are none, infinity for NaN."""
    value = float(errors.max()) if errors.numel() else 0.0
    return math.inf if math.isnan(value) else value


def bounds(inputs: HeadInputs, want: HeadExact, config: LossConfig) -> tuple[float, float]:
    """Return the bound on the gradients' parts and that on the loss, for any order of the sums and up to one chunk a trajectory.

    With u the unit roundoff of float32 and delta the error of a log-probability, log q_j of any column j among them:
    - delta: `logp_error` of the product with the head; on float32 logits z - max, exp and log at most u (6 |z| + log V), and the
      sum of V positive terms, in at least 8 lanes, `accumulation` of V / 8;
    - a token's coefficient is A M_p W / D, M_p W of the form M_p^(1 - p) a^p / n with |dlog M_p| <= delta, |dlog a| <= delta:
      (|1 - p| + |p|) delta, which for 0 <= p <= 1 is delta; a p solved from the same logp adds 4 delta (see
      `verification.error_bound`); q_j then adds its own delta: (1 + |1 - p| + |p| + 4 solved) delta in all;
    - both products: `accumulation` of V and of N terms;
    - exp, the products by the coefficients and the stores: 16 u;
    - in 16 bits the gradient of the logits is rounded once, dhidden and dweight once at the end, and dweight where
      it is summed up in 16 bits once more a chunk: (B + 3) u16.
    """
    V, p = inputs.weight.shape[0], want.power
    dtype, u = inputs.weight.dtype, torch.finfo(torch.float32).eps / 2
    delta = logp_error(inputs.hidden, inputs.weight, want.largest)
    delta += u * (6 * want.largest + math.log(V)) + accumulation(max(64, V // 8))
    loss = (1 + abs(1 - p) + abs(p) + 4 * (config.power == "ess")) * delta + 16 * u
    stored = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0
    products = accumulation(V) + accumulation(len(inputs.hidden))
    return loss + products + (len(inputs.advantages) + 3) * stored, loss
