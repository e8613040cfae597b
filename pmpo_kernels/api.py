"""The public calls from logits and from log-probs: they check, and compose the two autograd Functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pmpo_kernels import checks
from pmpo_kernels.aggregate import default_denominator
from pmpo_kernels.autograd import Parts, TokenLogpFunction, TrajectoryFunction
from pmpo_kernels.batch import Batch, Call, as_bool, check_call, check_config
from pmpo_kernels.config import LossConfig
from pmpo_kernels.contract import METRICS, STATS, AggregateOptions, compute_dtype
from pmpo_kernels.impls import resolve_impl
from pmpo_kernels.scalars import expect, is_one_of
from pmpo_kernels.sharing import ALONE, Sharing, Split

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class TokenLogp(NamedTuple):
    """Per-token results, shaped like `token_ids`, float32 (float64 for float64 logits); 0 where masked."""

    logp: Tensor
    entropy: Tensor


class PMPOOutput(NamedTuple):
    """Result of a loss call. Only `loss` carries a gradient; everything else is detached.

    `logp` and `entropy` (None if not given to `pmpo_loss_from_logp`) are shaped like the tokens, 0 where masked.
    `power`, `ess` and `clip_fraction` are (B,) float64: p, effective sample size in tokens (0 where M_p = 0, and for a
    trajectory without tokens in the policy term) and clipped fraction of the response tokens of each trajectory.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logp: Tensor
    entropy: Tensor | None
    power: Tensor
    ess: Tensor
    clip_fraction: Tensor


def token_logp(
    logits: Tensor,
    token_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    inplace: bool = False,
    impl: str | None = None,
) -> TokenLogp:
    """Log-probability of each token and entropy of its distribution, in one read of the logits; differentiable in both.

    Args and errors as in `pmpo_loss`. Saves nothing of the logits' size but the logits themselves.
    """
    checks.check_logits(logits, token_ids, inplace)
    temperature = checks.check_factor("temperature", temperature)
    mask = checks.check_constant("mask", mask, dtypes=checks.MASKS, device=logits.device, shape=token_ids.shape)
    return _token_logp(logits, token_ids, as_bool(mask), temperature, inplace, resolve_impl(impl, logits.device), None)


def _token_logp(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    inplace: bool,
    impl: str,
    parts: Parts | None,
) -> TokenLogp:
    """`token_logp` of checked arguments; the mask is bool, of any shape."""
    shape = token_ids.shape
    if logits.dim() == 2:
        logits, token_ids = logits[None], token_ids[None]
    mask = None if mask is None else mask.view(token_ids.shape)
    logp, entropy = TokenLogpFunction.apply(logits, token_ids, mask, temperature, inplace, impl, parts)
    return TokenLogp(logp.view(shape), entropy.view(shape))


def pmpo_loss(
    logits: Tensor,
    token_ids: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logp: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    policy_mask: Tensor | None = None,
    power: Tensor | float | None = None,
    target_ess: Tensor | None = None,
    config: LossConfig | None = None,
    denominator: Tensor | float | None = None,
    inplace: bool = False,
    group: ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    sequence_split: Split = "contiguous",
    impl: str | None = None,
) -> PMPOOutput:
    """Power-mean policy loss of a batch of trajectories, from logits (PMPO, arXiv 2601.22521, and its whole family).

    Per trajectory with n tokens, log-ratios d_t = logp_t - old_logp_t clipped to d'_t, a_t = exp(d'_t) v_t::

        loss = - sum_i w_i A_i M_p(a),    M_p(a) = ( (1/n) sum_t a_t^p )^(1/p),
        dloss/dlogp_t = - w_i A_i M_p W_t on unclipped tokens,    W = softmax(p log a).

    Logits cost two reads and one write in all; rows without a gradient (masked, clipped, A = 0) are written, not read.

    Args:
        logits: (B, T, V), or (B, T + 1, V) as a model returns them (the last position is ignored and gets a zero
            gradient), or packed (N, V); float64, float32, bfloat16 or float16, any row strides. `logits[:, t]`
            predicts `token_ids[:, t]`: the caller shifts.
        token_ids: (B, T) or (N,), int64 or int32, in [0, V) where the mask is true.
        old_logp: log-probs of the policy that sampled, shaped like token_ids; None means on-policy (all ratios 1).
        advantages: (B,), one number a trajectory. Trajectories with advantage 0 have no policy loss or gradient.
        mask: bool or integer, shaped like token_ids; non-zero marks response tokens. Whatever stands in the other
            slots, NaN included, has no effect.
        cu_seqlens: (B + 1,) int32 or int64 offsets of the trajectories of a packed batch; None for a padded one.
        ref_logp: log-probs of the reference policy; required by config.beta != 0, otherwise only the metric ref_kl.
        rollout_weights: v_t >= 0, constant factors on the ratios (train/inference mismatch), shaped like token_ids, or (B,) for
            all tokens of a trajectory alike.
        policy_mask: bool or integer, shaped like token_ids or (B,); zero takes response tokens, such as those of low entropy, or
            trajectories that are too far off-policy, out of the policy term. They still count in the averages, with a term of
            0, and keep their KL and entropy terms: of k of n tokens the surrogate is A (k/n) M_p, with M_p, p and ESS of the k
            (ESS 0 for k = 0). Metrics of the ratios, and clipped fractions, stay those of all n.
        power: p of each trajectory, (B,) or one number, at most 1e30 in size; replaces config.power.
        target_ess: (B,) effective sample size in tokens to solve p for; needs config.power "ess". A target out of
            reach gives the nearest end of [power_min, power_max].
        config: `LossConfig`, default `LossConfig.pmpo()`.
        denominator: replaces D of the aggregation (0-d tensor or number > 0). Give the whole step's count to every
            micro-batch or rank and their summed gradients equal those of one big batch.
        inplace: the gradient is written over the logits (no second tensor of their size); a second backward raises.
        group: ranks among which the vocabulary of the logits is split, in their order, parts of any size; token_ids and all
            else is the same on all of them. Logits that are a DTensor sharded along V bring their own.
        mesh: `DeviceMesh` with dimensions among "tp" (as `group`), "cp" (each rank has a part of each trajectory's tokens, and
            the same number of trajectories), "dp" or several `"dp_..."` (other trajectories). The loss, p, ESS and metrics are
            those of the rank's trajectories, whole ones; the loss of the batch is their sum over "dp", its gradient the sum
            of those of "cp" and "dp". D is that of all trajectories of the mesh. docs/scaling.md.
        sequence_split: which part of a trajectory a rank of "cp" has: "contiguous", or "zigzag", two of twice as many pieces,
            one from either end.
        impl: "triton", "cpp", "reference", or None for the fastest that runs on this device.

    Returns:
        `PMPOOutput`; see there. `metrics`: policy_loss, clip_fraction, clip_fraction_low, clip_fraction_high,
        ratio_mean, ratio_max, approx_kl, power_mean, power_min, power_max, ess, ess_target, tokens, trajectories,
        entropy, and ref_kl where ref_logp is given: 0-d tensors on the same device.

    Raises:
        TypeError, ValueError: a wrong argument; names it, what was expected and what was got. The values of
            tensors are checked on the CPU always and on a GPU with PMPO_KERNELS_CHECK=1; unchecked ids give NaN.
        RuntimeError: the named `impl` cannot run here, with the reason; another rank's arguments are wrong, or it is gone.
    """
    sharing, (logits,) = find_sharing(group, mesh, sequence_split, logits=(logits, -1))
    # The loss's own arguments are checked before the first kernel starts.
    with sharing.agreement():
        config = check_config(config)
        checks.check_logits(logits, token_ids, inplace)
        # before the first autograd Function: torch.compile must see the temperature, which is in both, outside of them
        limit = _aggregate_options_of_logits(logits.dtype, config)
        call = check_call(
            "token_ids", token_ids, config, limit, advantages=advantages, cu_seqlens=cu_seqlens, old_logp=old_logp,
            mask=mask, ref_logp=ref_logp, rollout_weights=rollout_weights, policy_mask=policy_mask, power=power,
            target_ess=target_ess, denominator=denominator, impl=impl,
        )  # fmt: skip
        sharing.describe(logits.shape[-1], token_ids, call, (logits.dtype, config.temperature))
    mask, temperature = call.batch.mask, config.temperature
    sharing.check_token_ids(token_ids, mask)
    logp, entropy = _token_logp(logits, token_ids, mask, temperature, inplace, call.impl, sharing.parts)
    return _loss(logp, entropy, call, sharing)


def pmpo_loss_from_logp(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logp: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    policy_mask: Tensor | None = None,
    entropy: Tensor | None = None,
    power: Tensor | float | None = None,
    target_ess: Tensor | None = None,
    config: LossConfig | None = None,
    denominator: Tensor | float | None = None,
    mesh: DeviceMesh | None = None,
    sequence_split: Split = "contiguous",
    impl: str | None = None,
) -> PMPOOutput:
    """`pmpo_loss` for trainers that already have log-probs: `logp` (B, T) or (N,), differentiable.

    `entropy`, shaped like logp and differentiable, is required by config.entropy_coef != 0, otherwise only a metric.
    config.temperature belongs to the logits and must be 1 here. All else as in `pmpo_loss`.
    """
    sharing, _ = find_sharing(None, mesh, sequence_split)
    with sharing.agreement():
        config = check_config(config)
        if config.temperature != 1.0:
            raise ValueError(f"config.temperature: expected 1 for a loss from log-probs, got {config.temperature}")
        if checks.check_dense("logp", logp).dim() not in (1, 2):
            raise ValueError(f"logp: expected shape (B, T) or (N,), got {tuple(logp.shape)}")
        checks.check_tensor("logp", logp, dtypes=checks.FLOATS, device=logp.device, shape=logp.shape)
        if entropy is not None:
            checks.check_tensor("entropy", entropy, dtypes=checks.FLOATS, device=logp.device, shape=logp.shape)
        elif config.entropy_coef:
            raise ValueError(
                f"entropy: expected a tensor because config.entropy_coef is {config.entropy_coef}, got None"
            )
        limit = _aggregate_options_of_logp(logp, entropy, config)
        call = check_call(
            "logp", logp, config, limit, advantages=advantages, cu_seqlens=cu_seqlens, old_logp=old_logp, mask=mask,
            ref_logp=ref_logp, rollout_weights=rollout_weights, policy_mask=policy_mask, power=power,
            target_ess=target_ess, denominator=denominator, impl=impl,
        )  # fmt: skip
        sharing.describe(0, logp, call, (logp.dtype, entropy is not None))
    out = _loss(logp, entropy, call, sharing)
    if mask is None:
        return out
    keep = mask != 0
    return out._replace(
        logp=torch.where(keep, out.logp, 0), entropy=None if out.entropy is None else torch.where(keep, out.entropy, 0)
    )


def _aggregate_options_of_logits(dtype: torch.dtype, config: LossConfig) -> AggregateOptions:
    """Options with a limit within which the gradient is finite in the dtype of the logits, and on the way there.

    A row of the gradient is 1 / temperature of its token's coefficients; `dlogits` has factors some hundred times the row.
    Entropy: |q (log q + H)| <= H <= log V < 22; a number, because torch.compile would compile anew for each V.
    """
    arithmetic = torch.finfo(compute_dtype(dtype)).max
    largest = min(torch.finfo(dtype).max, arithmetic / 1024) * config.temperature
    return config.aggregate_options(min(arithmetic, largest), 22.0)


def _aggregate_options_of_logp(logp: Tensor, entropy: Tensor | None, config: LossConfig) -> AggregateOptions:
    """Options with a limit within which each gradient is finite in the dtype of its own tensor and in that of the arithmetic."""
    largest = torch.finfo(logp.dtype).max
    if entropy is None:
        return config.aggregate_options(largest)
    arithmetic = torch.finfo(compute_dtype(logp.dtype)).max
    return config.aggregate_options(largest, largest / min(arithmetic, torch.finfo(entropy.dtype).max))


def _loss(logp: Tensor, entropy: Tensor | None, call: Call, sharing: Sharing) -> PMPOOutput:
    """The loss from log-probs and entropies, which have the tokens' shape."""
    dtype = compute_dtype(logp.dtype)
    flat_entropy = None if entropy is None else entropy.reshape(-1).to(dtype)
    whole = sharing.gather(logp.reshape(-1).to(dtype), flat_entropy, call.batch)
    if sharing is not ALONE:
        call = call._replace(batch=whole.batch)
        if call.denominator is None and sharing.sums_over_data:
            tokens = whole.batch.count_tokens()
            D = default_denominator(tokens, call.aggregate_options, sharing.sum_over_data)
            call = call._replace(denominator=D)
    results = TrajectoryFunction.apply(whole.logp, whole.entropy, call)
    return as_output(results, logp.detach(), None if entropy is None else entropy.detach(), call.batch)


def as_output(results: Sequence[Tensor], logp: Tensor, entropy: Tensor | None, batch: Batch) -> PMPOOutput:
    """What a call returns, from the loss (), stats (S, B), metrics (M,) and clip fractions (B,) of its stages."""
    loss, stats, metrics, clip_fraction = results
    absent = {"ref_kl": batch.ref_logp is None, "entropy": entropy is None}
    found = {name: x for name, x in zip(METRICS, metrics.unbind(), strict=True) if not absent.get(name)}
    row = dict(zip(STATS, stats.unbind(), strict=True))
    return PMPOOutput(loss, found, logp, entropy, row["power"], row["ess"], clip_fraction)


def find_sharing(group: Any, mesh: Any, sequence_split: Any, **tensors: tuple[Any, int]) -> tuple[Sharing, list[Any]]:
    """The devices that share a call, from its arguments, and this rank's part of `tensors`.

    Each tensor comes with its dimension of the vocabulary, along which a DTensor may be sharded.
    """
    logits, _ = tensors.get("logits", (None, 0))
    sharded = hasattr(logits, "device_mesh")  # a weight may be FSDP's: it needs a group
    if group is None and mesh is None and not sharded:
        alone = is_one_of(sequence_split, ("contiguous",))
        expect("sequence_split", alone, "'contiguous' without a mesh", sequence_split)
        return ALONE, [x for x, _ in tensors.values()]
    from pmpo_kernels.distributed.shared import Shared  # torch.distributed is not part of every PyTorch

    return Shared.find(group, mesh, sequence_split, tensors)
