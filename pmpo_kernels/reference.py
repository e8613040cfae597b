"""The specification: the stages in eager PyTorch, one function for each arrow of the flow, for any float dtype.

    logits --token_logp--> logp, row_max, row_sum, entropy
    logp   --trajectory--> stats (policy loss, p, ESS, ...), dlogp, dentropy
    stats  --aggregate---> loss, metrics
    logits --dlogits-----> gradient of the logits

Autograd can differentiate everything but `newton`, `solve_power` and the two gradients, dlogp and dlogits. This is how the
gradients written out here are tested. C++ and Triton do the same in the same order with the same names. Values are selected before
`exp`, never multiplied by a mask after it. The `trajectory` stage computes in float64, because it costs only O(tokens). Section
numbers are those of docs/mathematics.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pmpo_kernels.aggregate import aggregate as aggregate
from pmpo_kernels.batch import Batch
from pmpo_kernels.contract import (
    ABSOLUTE,
    ELSEWHERE,
    FIXED,
    MAX_NEWTON_ITERATIONS,
    NEWTON_TOLERANCE,
    STATS,
    TARGET,
    TrajectoryOptions,
)
from pmpo_kernels.contract import (
    compute_dtype as compute_dtype,
)

# --- stage 1: token_logp ---------------------------------------------------------------------------------------------


def token_logp(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp = z_y/T - logsumexp(z/T) and entropy H = -sum_j q_j log q_j of logits z at temperature T (sections 1 and 8).

    Returns logp, row_max, row_sum, entropy, (B, T) each. The logsumexp comes in two parts, `row_max` = max z and
    `row_sum` = sum exp((z - row_max)/T), because one float32 number would cost the gradient up to 1e-6 of relative accuracy. The
    maximum is subtracted before the division, so that what is rounded is small where q is large. Masked rows give 0 (row_sum 1);
    an id outside [0, V) gives NaN.

    Args: logits (B, S, V) with S = T or T + 1, token_ids (B, T), mask (B, T) bool or None.
    """
    T, V = token_ids.shape[1], logits.shape[2]
    keep = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask
    z = torch.where(keep[..., None], logits[:, :T], 0).to(compute_dtype(logits.dtype))
    row_max = z.detach().amax(-1)
    centred = (z - row_max[..., None]) / temperature
    e = centred.exp()
    row_sum = e.sum(-1)
    known = (token_ids >= 0) & (token_ids < V)
    target = centred.gather(-1, torch.where(known, token_ids, 0)[..., None].long())[..., 0]
    logp = torch.where(known, target - row_sum.log(), torch.nan)
    entropy = row_sum.log() - (e * torch.where(centred > -torch.inf, centred, 0)).sum(-1) / row_sum
    return (
        torch.where(keep, logp, 0),
        torch.where(keep, row_max, 0),
        torch.where(keep, row_sum, 1),
        torch.where(keep, entropy, 0),
    )


# --- stage 2: trajectory ---------------------------------------------------------------------------------------------


class Segments:
    """The trajectories of a flat (N,) tensor of tokens. `sum` and `max` reduce (N,) to one number a trajectory (B,). `spread` gives
    each token the number of its trajectory."""

    def __init__(self, cu_seqlens: Tensor, tokens: int) -> None:
        self.offsets = cu_seqlens.long().clamp(0, tokens)  # unchecked ones on a GPU read nothing out of bounds
        position = torch.arange(tokens, device=cu_seqlens.device)
        owner = torch.searchsorted(self.offsets[1:].contiguous(), position, right=True)
        self.owner = owner.clamp(max=max(len(cu_seqlens) - 2, 0))

    def sum(self, x: Tensor) -> Tensor:
        return torch.segment_reduce(x, "sum", offsets=self.offsets, unsafe=True)

    def max(self, x: Tensor) -> Tensor:
        return torch.segment_reduce(x, "max", offsets=self.offsets, initial=-torch.inf, unsafe=True)

    def spread(self, per_trajectory: Tensor) -> Tensor:
        return per_trajectory[self.owner]


class LogWeights(NamedTuple):
    """The log weights l = log a of the tokens, centred on each trajectory's mean. Weights of 0 are kept apart from the rest."""

    x: Tensor  # (N,) l - mean, 0 where not alive
    alive: Tensor  # (N,) bool: a token of the policy term with a_t > 0
    mean: Tensor  # (B,) mean of l over alive tokens
    x_min: Tensor  # (B,)
    x_max: Tensor  # (B,)
    tokens: Tensor  # (B,) tokens of the policy term, alive or not
    has_zero: Tensor  # (B,) bool: some a_t = 0
    seg: Segments


def clip_log_ratio(
    d: Tensor, advantage: Tensor, low: float, high: float, dual: float, under: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Clip tokens' d or trajectories' log M_p pessimistically (section 2); return them and whether each was below or above.

    For A > 0 the bounds are -under, infinite unless the clip is two-sided, and high. For A < 0 they are -low and dual, which is
    high in a two-sided clip. A = 0 clips nothing."""
    unbounded = torch.full_like(advantage, torch.inf)
    floor = torch.where(advantage < 0, -low, torch.where(advantage > 0, -under, -unbounded))
    ceiling = torch.where(advantage > 0, high, torch.where(advantage < 0, dual, unbounded))
    below, above = d < floor, d > ceiling
    return torch.where(above, ceiling, torch.where(below, floor, d)), below, above


def centre(log_weights: Tensor, valid: Tensor, seg: Segments) -> LogWeights:
    """Split log weights l (N,) into each trajectory's mean and the rest, with weights of 0 (l = -inf) set aside."""
    zero = valid & (log_weights == -torch.inf)
    alive = valid & ~zero
    count = seg.sum(alive.double())
    mean = seg.sum(torch.where(alive, log_weights, 0)) / count.clamp(min=1)
    x = torch.where(alive, log_weights - seg.spread(mean), 0)
    fixed = x.detach()
    return LogWeights(
        x,
        alive,
        mean,
        torch.where(count > 0, -seg.max(torch.where(alive, -fixed, -torch.inf)), 0),
        torch.where(count > 0, seg.max(torch.where(alive, fixed, -torch.inf)), 0),
        seg.sum(valid.double()),
        seg.sum(zero.double()) > 0,
        seg,
    )


class Moments(NamedTuple):
    """What the loss and the solver need of the weights a^p of each trajectory, at its p."""

    log_mean: Tensor  # (B,) log( (1/n) sum a^p ), of a centred on its mean
    deficit: Tensor  # (B,) log(n / ESS(p)) = log(1 + CV^2 of a^p)
    slope: Tensor  # (B,) d deficit / dp


def moments(l: LogWeights, p: Tensor) -> Moments:
    """`Moments` at p (B,): by expm1 where max |p x| < 1, so that a small p keeps its digits, elsewhere by exp, shifted."""
    n = l.tokens.clamp(min=1)
    top = torch.maximum(p * l.x_min, p * l.x_max)
    small = (torch.maximum(top, -torch.minimum(p * l.x_min, p * l.x_max)) < 1) & ~l.has_zero
    px, is_small, seg = l.seg.spread(p) * l.x, l.seg.spread(small), l.seg
    e = torch.where(is_small, torch.expm1(torch.where(is_small, px, 0)), 0)
    w = torch.where(is_small, 1 + e, torch.where(is_small, 0, px - seg.spread(top)).exp())
    e, w = torch.where(l.alive, e, 0), torch.where(l.alive, w, 0)

    mean_e, sum_w, sum_ww = seg.sum(e) / n, seg.sum(w), seg.sum(w * w)
    sum_w, sum_ww = torch.where(sum_w == 0, 1, sum_w), torch.where(sum_ww == 0, 1, sum_ww)
    cv2 = (seg.sum(e * e) / n - mean_e**2) / (1 + mean_e) ** 2
    return Moments(
        torch.where(small, torch.log1p(mean_e), top + torch.log(sum_w / n)),
        torch.where(small, torch.log1p(torch.where(small, cv2, 0)), torch.log(n * sum_ww) - 2 * torch.log(sum_w)),
        2 * (seg.sum(w * w * l.x) / sum_ww - seg.sum(w * l.x) / sum_w),
    )


def nothing_left(l: LogWeights, p: Tensor) -> Tensor:
    """Whether M_p is 0, (B,) bool: because p <= 0 meets a weight of 0, or all weights are 0."""
    return l.has_zero & ((p <= 0) | (l.seg.sum(l.alive.double()) == 0))


def log_power_mean(l: LogWeights, p: Tensor, log_mean: Tensor) -> Tensor:
    """log M_p (B,) for any real p (section 3). At p = 0 it is the mean of log a; it is -inf where M_p = 0."""
    at_zero = p == 0
    value = l.mean + torch.where(at_zero, 0, log_mean / torch.where(at_zero, 1, p))
    return torch.where(nothing_left(l, p), -torch.inf, value)


def target_deficit(l: LogWeights, clipped: Tensor, target_ess: Tensor | None, o: TrajectoryOptions) -> Tensor:
    """log(n / ESS*) (B,), the target that the rule makes of the number of clipped tokens (B,) or of target_ess (B,) (section 6)."""
    n = l.tokens.clamp(min=1)
    if o.rule == TARGET:
        assert target_ess is not None
        return torch.log(n) - torch.log(target_ess.double())
    severity = (clipped / n / o.full_clip_fraction).clamp(max=1) ** o.ess_sharpness
    if o.rule == ABSOLUTE:
        return -torch.log(o.ess_floor + (1 - o.ess_floor) * severity)
    lost = -torch.expm1(-moments(l, torch.full_like(n, o.power_max)).deficit)
    return -torch.log1p(-(1 - severity) * lost)


@torch.no_grad()
def newton(l: LogWeights, deficit: Tensor, power_min: float, power_max: float) -> tuple[Tensor, Tensor]:
    """Return p (B,) at which log(n / ESS(p)) = deficit, and the Newton iterations (B,) int64 (section 6).

    Newton runs in u = p^2 inside a bracket. From below the root a second step is tried, on log(deficit(power_max) - deficit(p)),
    which is nearly linear where the ESS saturates; the farther step inside the bracket wins. A deficit out of reach gives the
    nearest end of [power_min, power_max]; equal weights give power_max; NaN in the deficit or the weights gives NaN.
    """
    n = l.tokens.clamp(min=1)
    lo, hi = torch.full_like(n, power_min**2), torch.full_like(n, power_max**2)
    most = moments(l, hi.sqrt()).deficit
    tolerance = NEWTON_TOLERANCE * most.clamp(max=1)
    at_max = (most - deficit <= tolerance) | ((l.x_max <= l.x_min) & ~l.has_zero)
    at_min = ~at_max & (deficit - moments(l, lo.sqrt()).deficit <= tolerance)
    u = deficit / (l.seg.sum(l.x**2) / n)
    u = torch.where((u > lo) & (u < hi), u, (lo + hi) / 2)
    done, iterations = at_max | at_min, torch.zeros_like(n)
    for _ in range(MAX_NEWTON_ITERATIONS):
        if u.device.type == "cpu" and bool(done.all()):
            break
        p = u.sqrt()
        at = moments(l, p)
        g, slope = at.deficit - deficit, at.slope / (2 * p)
        iterations += ~done
        lo, hi = torch.where(g < 0, u, lo), torch.where(g > 0, u, hi)
        step, room = u - g / slope, most - at.deficit
        saturating = u + torch.log(room / (most - deficit)) * room / slope
        step = torch.where((g < 0) & (saturating > step) & (saturating < hi), saturating, step)
        step = torch.where((step > lo) & (step < hi), step, (lo + hi) / 2)
        done = done | (g.abs() <= tolerance)
        u = torch.where(done, u, step)
    p = torch.where(at_max, power_max, torch.where(at_min, power_min, u.sqrt()))
    return torch.where((deficit + most).isnan(), torch.nan, p), iterations.long()


def kl_penalty(r: Tensor, d: Tensor, o: TrajectoryOptions) -> tuple[Tensor, Tensor]:
    """Estimate of KL(policy, reference) for each token, k1, k2 or k3 at r = ref_logp - logp, and its derivative in logp.

    Where `kl_slope_order` names another estimator, the derivative is that one's, by autograd too. With `kl_weighted` the estimate
    is multiplied by exp(d), which depends on logp too."""
    values = (-r, r * r / 2, torch.expm1(r) - r)
    slopes = (torch.ones_like(r), -r, -torch.expm1(r))
    order, slope_order = int(o.kl_order) - 1, int(o.kl_slope_order) - 1
    value, slope = values[order], slopes[slope_order]
    if order != slope_order:
        value = values[slope_order] + (value - values[slope_order]).detach()
    return (d.exp() * value, d.exp() * (slope + value)) if o.kl_weighted else (value, slope)


def log_ratio(logp: Tensor, old_logp: Tensor | None, valid: Tensor) -> Tensor:
    """d = logp - old_logp (N,) in float64, 0 where masked. On-policy (old_logp None) it is 0 and still has a gradient."""
    logp = torch.where(valid, logp, 0).double()
    if old_logp is not None:
        return logp - torch.where(valid, old_logp, 0).double()
    return torch.where(logp == -torch.inf, 0, logp - logp.detach())


def choose_power(
    l: LogWeights, clipped: Tensor, power: Tensor | None, target_ess: Tensor | None, o: TrajectoryOptions
) -> tuple[Tensor, Tensor | None]:
    """Return p (B,) and the deficit log(n / ESS*) (B,) that it was solved for, None where p is given."""
    if o.rule == FIXED:
        return torch.full_like(l.mean, o.power).detach() if power is None else power.double(), None
    with torch.no_grad():
        deficit = target_deficit(l, clipped, target_ess, o)
    return newton(l, deficit, o.power_min, o.power_max)[0], deficit


def trajectory(
    logp: Tensor, entropy: Tensor | None, batch: Batch, options: TrajectoryOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, statistics and per-token gradient of every trajectory (sections 2 to 8), before the division by D.

    logp and entropy are flat (N,) like the tokens of the batch. Returns, all in float64, dlogp (N,), dentropy (N,) (empty
    without an entropy term) and stats (S, B), see `STATS`.

    Response tokens that `policy_mask` leaves out count in the averages with a term of 0. Where it keeps k of n tokens, the
    policy loss is -A (k/n) M_p, with M_p, W, ESS and p those of the k.
    """
    o, seg = options, Segments(batch.cu_seqlens, logp.numel())
    valid = torch.ones_like(logp, dtype=torch.bool) if batch.mask is None else batch.mask
    A, ref_logp = batch.advantages.double(), batch.ref_logp

    d = log_ratio(logp, batch.old_logp, valid)
    log_a, below, above = clip_log_ratio(d, seg.spread(A), o.token_low, o.token_high, o.token_dual, o.token_under)
    if batch.rollout_weights is not None:
        log_a = log_a + torch.where(valid, batch.rollout_weights, 1).double().log()
    counts = valid if batch.policy_mask is None else valid & batch.policy_mask
    l = centre(log_a, counts, seg)
    k, tokens = l.tokens.clamp(min=1), seg.sum(valid.double())
    n, some = tokens.clamp(min=1), tokens > 0
    clipped_low, clipped_high = seg.sum((counts & below).double()), seg.sum((counts & above).double())

    p, deficit = choose_power(l, clipped_low + clipped_high, batch.power, batch.target_ess, o)
    at = moments(l, p)
    log_m = log_power_mean(l, p, at.log_mean)
    sequence = (o.sequence_low, o.sequence_high, o.sequence_dual, o.sequence_under)
    clipped_m, m_below, m_above = clip_log_ratio(log_m, A, *sequence)
    acts = (l.tokens > 0) & (A != 0) & (log_m != -torch.inf)
    share = l.tokens / n
    policy_loss = torch.where(acts, -A * share * torch.where(acts, clipped_m, 0).exp(), 0)
    weight = torch.where(some, tokens**o.by_length / o.length_norm, 0)

    # -w A M_p W_t where nothing is clipped; M_p W_t in log space
    log_mw = seg.spread(log_m - at.log_mean - k.log()) + seg.spread(p) * l.x
    flows = l.alive & ~below & ~above & seg.spread(acts & ~m_below & ~m_above)
    dlogp = torch.where(flows, -seg.spread(weight * A * share) * torch.where(flows, log_mw, 0).exp(), 0)

    # KL and entropy: token means, weighted alike
    per_token = torch.where(valid, seg.spread(weight / n), 0)
    kl, entropy_sum, dentropy = torch.zeros_like(n), torch.zeros_like(n), n.new_empty(0)
    if ref_logp is not None:
        r = torch.where(valid, ref_logp, 0).double() - torch.where(valid, logp, 0).double()
        token_kl, dkl = kl_penalty(r, d, o)
        kl = seg.sum(token_kl)
        dlogp = dlogp + o.beta * per_token * dkl if o.beta else dlogp
    if entropy is not None:
        entropy_sum = seg.sum(torch.where(valid, entropy, 0).double())
        dentropy = -o.entropy_coef * per_token if o.entropy_coef else dentropy

    ess = torch.where((l.tokens > 0) & ~nothing_left(l, p), k * torch.exp(-at.deficit), 0)
    ratio = torch.where(valid, d.exp(), 0)
    rows = {
        "tokens": tokens,
        "weight": weight,
        "policy_loss": policy_loss,
        "kl": kl,
        "entropy": entropy_sum,
        "power": p,
        "ess": ess,
        "ess_target": ess if deficit is None else torch.where(l.tokens > 0, k * torch.exp(-deficit), 0),
        "clipped_low": torch.where(m_below, l.tokens, clipped_low),
        "clipped_high": torch.where(m_above, l.tokens, clipped_high),
        "ratio_sum": seg.sum(ratio),
        "ratio_max": seg.max(ratio).clamp(min=0),
        "approx_kl": seg.sum(torch.where(valid, torch.expm1(d) - d, 0)),
    }
    return dlogp, dentropy, torch.stack([rows[name] for name in STATS])


# --- p alone, for a given ESS ----------------------------------------------------------------------------------------


def solve_power(
    log_weights: Tensor, mask: Tensor | None, cu_seqlens: Tensor, target_ess: Tensor, power_max: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return p (B,) at which ESS(p) = target_ess (B,), the Newton iterations (B,), and the residual of log(n / ESS) (B,).
    log_weights l = log a and mask are flat (N,), and trajectory i owns tokens cu_seqlens[i] : cu_seqlens[i + 1]. p and the residual
    are float64."""
    valid = torch.ones_like(log_weights, dtype=torch.bool) if mask is None else mask
    seg = Segments(cu_seqlens, log_weights.numel())
    l = centre(torch.where(valid, log_weights, 0).double(), valid, seg)
    deficit = torch.log(l.tokens.clamp(min=1)) - torch.log(target_ess.double())
    p, iterations = newton(l, deficit, 0.0, power_max)
    return p, iterations, moments(l, p).deficit - deficit


# --- stage 4: dlogits; stage 3, aggregate, has a file of its own ------------------------------------------------------


def dlogits(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    entropy: Tensor,
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    temperature: float,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of the logits (section 9), with q = softmax(logits / temperature):

        dlogits_j = ( dlogp (1[j = y] - q_j) - dentropy q_j (log q_j + H) ) / temperature

    It is written to `out` if that is given, which may be the logits. Rows that are masked or beyond T, or whose dlogp and dentropy
    are both 0, are exactly 0 and do not depend on the logits. With the id `ELSEWHERE` no column is the target; other ids outside
    [0, V) give NaN.
    """
    T = token_ids.shape[1]
    g = torch.zeros_like(row_max) if dlogp is None else dlogp
    h = torch.zeros_like(row_max) if dentropy is None else dentropy
    row = (g != 0) | (h != 0)
    row = row if mask is None else row & mask
    known = (token_ids >= 0) & (token_ids < logits.shape[2])
    g = torch.where(known | (token_ids == ELSEWHERE), g, torch.nan)
    z = torch.where(row[..., None], logits[:, :T], 0).to(row_max.dtype)
    log_q = (z - row_max[..., None]) / temperature - row_sum.log()[..., None]
    q = log_q.exp()
    grad = -q * g[..., None] - torch.where(q > 0, q * (log_q + entropy[..., None]), q) * h[..., None]
    at_target = torch.where(token_ids == ELSEWHERE, 0, g)
    grad = grad.scatter_add(-1, torch.where(known, token_ids, 0)[..., None].long(), at_target[..., None])
    out = torch.empty_like(logits) if out is None else out
    out[:, T:] = 0
    out[:, :T] = torch.where(row[..., None], grad / temperature, 0)
    return out


# --- the fused head's backward pass ----------------------------------------------------------------------------------


SCALE_BLOCK = 2**22  # elements that are converted to the factor's dtype at a time


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply the gradient in place by factor (0-d), computed in the factor's dtype and rounded once."""
    if gradient.device.type == "cpu":
        if factor != 1:
            gradient.mul_(
                factor
            )  # on a CPU a factor () keeps its dtype; on a GPU it would be rounded to the gradient's
        return
    for block in gradient.view(-1).split(SCALE_BLOCK):
        block.copy_(block.to(factor.dtype) * factor)
