"""Whether a loss and its gradient are right: the float64 oracle, a comparison in three parts, tolerances and their derivation.

A gradient of the logits has V entries a row of which V - 1 are tiny, so one absolute tolerance accepts gradients without
any softmax part. Each row is therefore compared in three parts: target column, off-target columns, row sum.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from pmpo_kernels import reference
from pmpo_kernels.aggregate import default_denominator, total_loss
from pmpo_kernels.api import pmpo_loss
from pmpo_kernels.batch import Batch
from pmpo_kernels.config import LossConfig, Preset
from pmpo_kernels.contract import NEWTON_TOLERANCE, STATS, compute_dtype


class Case(NamedTuple):
    """A padded batch: logits (B, T, V), advantages (B,), all else (B, T). Ratios are near 1 and some are clipped; there are
    padding, an empty trajectory, one of a single token, and an advantage of 0."""

    logits: Tensor
    token_ids: Tensor
    old_logp: Tensor
    advantages: Tensor
    mask: Tensor
    ref_logp: Tensor
    rollout_weights: Tensor


def make_case(dtype: torch.dtype, *, B: int = 6, T: int = 10, V: int = 201, device: str = "cpu", seed: int = 0) -> Case:
    """A random `Case` with logits of this dtype. Tokens are sampled from the logits' own distribution; old_logp differs from logp
    by noise of standard deviation 0.25."""
    random = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(B, T, V, dtype=torch.float64, generator=random)).to(dtype)
    log_q = torch.log_softmax(logits.double(), -1)
    token_ids = torch.multinomial(log_q.exp().flatten(0, 1), 1, generator=random).view(B, T)
    logp = log_q.gather(-1, token_ids[..., None])[..., 0]
    small = compute_dtype(dtype)
    lengths = torch.randint(T // 2, T + 1, (B,), generator=random)
    lengths[: min(B, 3)] = torch.tensor([T, 0, 1])[: min(B, 3)]
    advantages = torch.randn(B, dtype=torch.float64, generator=random)
    advantages[-1] = 0.0

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(B, T, dtype=torch.float64, generator=random)

    old_logp, ref_logp, weights = (logp + noise(0.25)).to(small), (logp + noise(0.3)).to(small), noise(0.1).exp()
    mask = torch.arange(T) < lengths[:, None]
    case = Case(logits, token_ids, old_logp, advantages.to(small), mask, ref_logp, weights.to(small))
    return Case(*(tensor.to(device) for tensor in case))


class Oracle(NamedTuple):
    """The right results in float64, and the sizes that errors are measured by.

    loss (0-d), its gradient grad (B, T, V) by autograd, and stats (S, B). scale (B, T) is the sum of the absolute values of a
    row's terms (policy, KL, entropy), 0 on rows that must be 0; condition (B, T) is how much larger that is than the row itself.
    loss_scale is the sum of the absolute values of the loss's terms."""

    loss: Tensor
    grad: Tensor
    scale: Tensor
    condition: Tensor
    stats: Tensor
    loss_scale: float


def oracle(case: Case, config: LossConfig, power: Tensor | None = None) -> Oracle:
    """Compute the `Oracle` of a case: the reference in float64, differentiated by autograd. `power` (B,) replaces the solved p, as
    a constant."""
    z = case.logits.double().clone().requires_grad_()
    logp, _, _, entropy = reference.token_logp(z, case.token_ids, case.mask, config.temperature)
    B, T = case.token_ids.shape
    batch = Batch(
        case.advantages,
        torch.arange(B + 1, device=z.device) * T,
        old_logp=case.old_logp.double().flatten(),
        mask=case.mask.flatten(),
        ref_logp=case.ref_logp.double().flatten(),
        rollout_weights=case.rollout_weights.double().flatten(),
        power=power,
    )
    options = config.trajectory_options(has_power=power is not None, has_target_ess=False)
    dlogp, dentropy, stats = reference.trajectory(logp.flatten(), entropy.flatten(), batch, options)
    terms = config.aggregate_options()
    denominator = default_denominator(stats.detach()[STATS.index("tokens")], terms)
    loss = total_loss(stats, terms, denominator)
    (grad,) = torch.autograd.grad(loss, z)
    row = dict(zip(STATS, stats.detach().abs(), strict=True))
    per_token = row["weight"] / row["tokens"].clamp(min=1)
    used = (dlogp != 0) if not dentropy.numel() else (dlogp != 0) | (dentropy != 0)
    scale = dlogp.detach().abs() + used * abs(config.beta) * per_token.repeat_interleave(T)
    if dentropy.numel():
        scale = scale + dentropy.detach().abs() * math.log(case.logits.shape[-1])
    condition = torch.where(used, scale / dlogp.detach().abs().clamp(min=1e-300), 1)
    terms = (
        row["weight"] * row["policy_loss"]
        + per_token * (abs(config.beta) * row["kl"] + abs(config.entropy_coef) * row["entropy"])
    ).sum()
    return Oracle(
        loss.detach(),
        grad,
        (scale / denominator / config.temperature).view(B, T),
        condition.view(B, T),
        stats.detach(),
        float(terms / denominator),
    )


class ThreePartError(NamedTuple):
    """The largest relative error over the rows, in each part of a row. Those of the target column and the row sum are relative to
    the row's scale, that of the off-target columns to their own norm times the row's condition. All are infinite where a row that
    must be 0 is not, or where anything is not finite."""

    target: float
    off_target: float
    row_sum: float


def three_part_error(grad: Tensor, want: Oracle, token_ids: Tensor) -> ThreePartError:
    """Compare a gradient of the logits (B, T, V), of any dtype, with the oracle's."""
    grad = grad.double()
    zero = want.scale == 0
    if not bool(grad.isfinite().all()) or bool((grad[zero] != 0).any()):
        return ThreePartError(math.inf, math.inf, math.inf)
    if bool(zero.all()):
        return ThreePartError(0.0, 0.0, 0.0)
    error, ids, unit = (grad - want.grad)[~zero], token_ids[~zero][:, None], want.scale[~zero]
    target = error.gather(1, ids)[:, 0].abs() / unit
    row_sum = grad[~zero].sum(1).abs() / unit
    want_off = want.grad[~zero].scatter(1, ids, 0).norm(dim=1) * want.condition[~zero]
    off = error.scatter(1, ids, 0).norm(dim=1) / want_off
    return ThreePartError(float(target.max()), float(off.max()), float(row_sum.max()))


def tolerance(case: Case, config: LossConfig, power: Tensor | None = None) -> float:
    """Bound on each part of the gradient's error and on the loss's error over its scale: `error_bound` for this case."""
    x = float((case.logits.detach()[case.mask].double() / config.temperature).abs().max())
    p = 1.0 if config.power == "ess" else abs(config.power)
    p = max(p, float(power.abs().max())) if power is not None else p
    return error_bound(case.logits.dtype, case.logits.shape[-1], x, p)


def error_bound(
    dtype: torch.dtype, V: int, x: float, p: float, *, solved: bool = False, partial_sum: float = 64
) -> float:
    """Bound on each part of the gradient's error, and on the loss's error over its scale, from the rounding of each step.

    With u the unit roundoff of the arithmetic (float32 for 16-bit logits) and x the largest |logits / temperature|:
    - z - max, its product with 1 / T (in base 2 with log2(e) / T, itself rounded) and log q: at most three roundings of
      |x| + max|x| and one of log V, u (6 x + log V), together delta;
    - row_sum adds V positive terms, at most `partial_sum` one after the other, then a tree: u (partial_sum + log2 V);
    - the coefficient depends on logp as exp((1 + 2|p|) d), so it multiplies delta by 1 + 2|p| (3 |p| for the weights);
    - a p `solved` from the same logp, where the exact gradient has its own, has a relative error of delta / sd(l), which
      moves p (l - mean) by 4 delta at 4 sd, |p| <= 1;
    - exp, the products and the stores add a few u (16 here, where a GPU's exp is good to 2 ulp);
    - 16-bit gradients are then rounded with u16 = 2^-8 (bfloat16) or 2^-11 (float16), counted twice because the
      absolute values of a row add up to twice its coefficient.
    """
    u = torch.finfo(compute_dtype(dtype)).eps / 2
    delta = u * (6 * x + math.log(V) + partial_sum + math.log2(V))
    stored = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0
    return 2 * stored + (2 + 5 * p + 4 * solved) * delta + 16 * u


def row_sum_tolerance(case: Case) -> float:
    """Bound on the error of the row sum alone, which does not grow with |x|.

    Whatever the rounding is, q sums to 1 if the sum, the target and the gradient are made of the same rounded (z - max) / T.

    - row_sum and sum q add V positive terms each, at most 64 to a partial sum, then a tree: 2 u (64 + log2 V);
    - log q = x - max - log(row_sum) and the entropy's factor carry u log V each, weighted by q; exp, products, stores: 16 u;
    - 16-bit gradients: as in `tolerance`.
    """
    dtype, V = case.logits.dtype, case.logits.shape[-1]
    u = torch.finfo(compute_dtype(dtype)).eps / 2
    stored = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0
    return 2 * stored + u * (2 * (64 + math.log2(V)) + 4 * math.log(V) + 16)


class Verdict(NamedTuple):
    """The errors of one implementation, dtype and configuration against float64. `tolerance` bounds all of them, and
    `row_sum_tolerance` bounds the row sum too."""

    loss: float
    grad: ThreePartError
    power_residual: float
    tolerance: float
    row_sum_tolerance: float

    @property
    def ok(self) -> bool:
        right = max(self.loss, *self.grad) <= self.tolerance and self.grad.row_sum <= self.row_sum_tolerance
        return right and self.power_residual <= self.tolerance + NEWTON_TOLERANCE


def verify(case: Case, config: LossConfig, impl: str, *, inplace: bool = False) -> Verdict:
    """Run `pmpo_loss` forward and backward and compare loss and gradient with float64. A solved p is compared by the residual of
    its equation. The gradient is then compared at that p, a constant of the loss."""
    z = case.logits.clone().requires_grad_()
    ref_logp = case.ref_logp if config.beta else None
    out = pmpo_loss(
        z, case.token_ids, case.old_logp, case.advantages, mask=case.mask, ref_logp=ref_logp,
        rollout_weights=case.rollout_weights, config=config, inplace=inplace, impl=impl,
    )  # fmt: skip
    # float16 entries would fall below its normal numbers: scale the loss, as trainers do.
    loss_scale = 4096.0 if z.dtype == torch.float16 else 1.0
    (grad,) = torch.autograd.grad(out.loss * loss_scale, z)
    power = out.power if config.power == "ess" else None
    want = oracle(case, config, power)
    residual = 0.0
    if power is not None:
        solved = dict(zip(STATS, oracle(case, config).stats, strict=True))
        at_power = dict(zip(STATS, want.stats, strict=True))
        some = (at_power["tokens"] > 0) & (power > config.power_min) & (power < config.power_max)
        ratio = torch.where(some, at_power["ess"] / solved["ess_target"].clamp(min=1e-300), 1)
        residual = float(ratio.log().abs().max())
    return Verdict(
        float((out.loss.detach().double() - want.loss).abs()) / (want.loss_scale or 1.0),
        three_part_error(grad.double() / loss_scale, want, case.token_ids),
        residual,
        tolerance(case, config, power),
        row_sum_tolerance(case),
    )


NUMBERS: dict[str, dict[str, Any]] = {
    "dr_grpo": {"max_length": 16},
    "holder": {"power": 2.0},
    "holder_token": {"power": -2.0},
    "apmpo": {"power": 0.5, "eps_high": 0.3},
}
"""Of the presets that take more than options: their arguments in `configurations`."""


def configurations() -> dict[str, LossConfig]:
    """The presets, and configurations that reach what no preset does: p between its ends by either ESS rule, every further term."""
    presets = {name: getattr(LossConfig, name)(**NUMBERS.get(name, {})) for name in get_args(Preset)}
    terms = {"beta": 0.1, "entropy_coef": 0.01, "temperature": 0.7, "dual_clip": 2.0}
    return {
        **presets,
        "pmpo, severity in between": LossConfig.pmpo(full_clip_fraction=0.5, ess_sharpness=0.7),
        "pmpo, absolute rule": LossConfig.pmpo(ess_rule="absolute", ess_floor=0.98),
        "pmpo, all terms": LossConfig.pmpo(**terms),
        "no clip, k1": LossConfig.grpo(clip="none", beta=0.1, kl_estimator="k1"),
        "two-sided clip, straight-through k3": LossConfig.gmpo(clip_sides="two", beta=0.1, kl_straight_through=True),
        "two-sided sequence clip, corrected k3": LossConfig.holder(
            1.0, clip_sides="two", beta=0.1, kl_bias_correction=True
        ),
        "sequence clip, dual, k2": LossConfig.holder(0.5, dual_clip=1.1, beta=0.1, kl_estimator="k2"),
    }
