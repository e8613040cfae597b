"""Loss and gradient of a variant against float64, in chunks of rows. A variant with a wrong result is not timed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pmpo_kernels import reference
from pmpo_kernels.aggregate import default_denominator, total_loss
from pmpo_kernels.benchmarking.inputs import Inputs, chunks, flat_trajectory
from pmpo_kernels.config import LossConfig
from pmpo_kernels.contract import STATS
from pmpo_kernels.verification import Oracle, ThreePartError, error_bound, three_part_error


class Exact(NamedTuple):
    """The right results in float64, without the gradient itself, which is made from them a chunk at a time.

    row_max, row_sum, entropy and dlogp are (B T,), and dlogp is divided by D. loss_scale is sum_i |w_i A_i M_p| / D. largest, the
    largest |logit / temperature|, and power, the largest |p|, are what the bounds depend on."""

    row_max: Tensor
    row_sum: Tensor
    entropy: Tensor
    dlogp: Tensor
    loss: float
    loss_scale: float
    largest: float
    power: float

    @property
    def gradient_rows(self) -> int:
        """Number of rows whose gradient is not 0: neither padded nor clipped nor of a trajectory with advantage 0."""
        return int((self.dlogp != 0).sum())


class Errors(NamedTuple):
    """Relative errors against float64: those of the gradient in three parts, and that of the loss over `Exact.loss_scale`."""

    gradient: ThreePartError
    loss: float


@torch.no_grad()
def exact(inputs: Inputs, config: LossConfig) -> Exact:
    """Run the reference's stages in float64, `token_logp` a chunk of rows at a time. An adaptive p is solved here. KL and entropy
    terms are not supported, because the presets have neither."""
    assert config.beta == 0
    assert config.entropy_coef == 0
    V = inputs.logits.shape[-1]
    rows_of_logits, token_ids, mask = inputs.logits.flatten(0, 1), inputs.token_ids.flatten(), inputs.mask.flatten()
    parts, largest = [], 0.0
    for rows in chunks(mask.numel(), V):
        z = rows_of_logits[rows].double()
        largest = max(largest, float(torch.where(mask[rows, None], z, 0).abs().max()))
        found = reference.token_logp(z[None], token_ids[None, rows], mask[None, rows], config.temperature)
        parts.append([part[0] for part in found])
    logp, row_max, row_sum, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    dlogp, _, stats = flat_trajectory(
        logp.view(inputs.mask.shape), inputs.old_logp, inputs.advantages, inputs.mask, config
    )
    terms = config.aggregate_options()
    denominator = default_denominator(stats[STATS.index("tokens")], terms)
    row = dict(zip(STATS, stats, strict=True))
    return Exact(
        row_max,
        row_sum,
        entropy,
        dlogp / denominator,
        float(total_loss(stats, terms, denominator)),
        float((row["weight"] * row["policy_loss"]).abs().sum() / denominator),
        largest / config.temperature,
        float(row["power"].abs().max()),
    )


@torch.no_grad()
def errors(loss: Tensor, gradient: Tensor, inputs: Inputs, want: Exact, config: LossConfig) -> Errors:
    """Compare every row of the gradient (B, T, V), whose float64 counterpart is made a chunk of rows at a time."""
    _, T, V = inputs.logits.shape
    logits = inputs.logits.flatten(0, 1)
    token_ids, mask = inputs.token_ids.flatten(), inputs.mask.flatten()
    worst = ThreePartError(0.0, 0.0, 0.0)
    for rows in chunks(mask.numel(), V):
        ids, g = token_ids[None, rows], want.dlogp[None, rows]
        saved = (want.row_max[None, rows], want.row_sum[None, rows], want.entropy[None, rows])
        grad = reference.dlogits(
            logits[None, rows].double(), ids, mask[None, rows], *saved, g, None, config.temperature
        )
        scale = g.abs() / config.temperature
        oracle = Oracle(loss, grad, scale, torch.ones_like(scale), scale, want.loss_scale)
        position = torch.arange(rows.start, rows.stop, device=ids.device)
        found = gradient[position // T, position % T]  # without a copy of the whole where its rows are not in one piece
        part = three_part_error(found[None], oracle, ids)
        worst = ThreePartError(*(_largest(a, b) for a, b in zip(worst, part, strict=True)))
    return Errors(worst, _largest(0.0, abs(float(loss) - want.loss) / (want.loss_scale or 1.0)))


def _largest(a: float, b: float) -> float:
    """The larger of the two, infinity if b is NaN."""
    return math.inf if math.isnan(b) else max(a, b)


def bounds(dtype: torch.dtype, vocab: int, want: Exact, config: LossConfig, *, fused: bool) -> tuple[float, float]:
    """Return the bound on the gradient's parts, for the dtype of the logits, and that on the loss, which is always float32. What is
    not `fused` may add up a row in 8 lanes, one element after the other, as PyTorch does on a CPU."""
    partial_sum = 64 if fused else max(64, vocab / 8)
    gradient, loss = (
        error_bound(d, vocab, want.largest, want.power, solved=config.power == "ess", partial_sum=partial_sum)
        for d in (dtype, torch.float32)
    )
    return gradient, loss
