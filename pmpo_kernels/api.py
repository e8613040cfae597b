"""The public calls: check, bring padded and packed inputs to one form, compose the two autograd Functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pmpo_kernels import checks
from pmpo_kernels.aggregate import METRICS, Aggregation
from pmpo_kernels.arguments import as_bool, check_config, trajectory_inputs
from pmpo_kernels.autograd import Parts, TokenLogpFunction, TrajectoryFunction, TrajectoryInputs
from pmpo_kernels.chunks import count_tokens
from pmpo_kernels.config import STATS, LossConfig
from pmpo_kernels.impls import resolve_impl
from pmpo_kernels.linear import LinearLossFunction
from pmpo_kernels.projection import HeadOptions
from pmpo_kernels.reference import compute_dtype
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
    checks.check_logits(logits, token_ids)
    temperature = checks.check_factor("temperature", temperature)
    checks.check_inplace(logits, inplace)
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
    """Of checked arguments; the mask bool, of any shape."""
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
    sharing, (logits,) = _find_sharing(group, mesh, sequence_split, logits=(logits, -1))
    # The loss's own arguments are checked before the first kernel starts.
    with sharing.agreement():
        config = check_config(config)
        checks.check_logits(logits, token_ids)
        inputs, D = trajectory_inputs(
            "token_ids",
            token_ids,
            old_logp=old_logp,
            advantages=advantages,
            mask=mask,
            cu_seqlens=cu_seqlens,
            ref_logp=ref_logp,
            rollout_weights=rollout_weights,
            policy_mask=policy_mask,
            power=power,
            target_ess=target_ess,
            config=config,
            denominator=denominator,
            impl=impl,
        )
        checks.check_inplace(logits, inplace)
        sharing.describe(logits.shape[-1], token_ids, inputs, D, (logits.dtype, config.temperature))
    sharing.check_token_ids(token_ids, inputs.mask)
    # before the first autograd Function: torch.compile must see the temperature, which is in both, outside of them
    terms = _aggregation_of_logits(logits.dtype, config)
    logp, entropy = _token_logp(logits, token_ids, inputs.mask, config.temperature, inplace, inputs.impl, sharing.parts)
    return _loss(logp, entropy, inputs, D, sharing, terms)


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
    sharing, _ = _find_sharing(None, mesh, sequence_split)
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
        inputs, D = trajectory_inputs(
            "logp",
            logp,
            old_logp=old_logp,
            advantages=advantages,
            mask=mask,
            cu_seqlens=cu_seqlens,
            ref_logp=ref_logp,
            rollout_weights=rollout_weights,
            policy_mask=policy_mask,
            power=power,
            target_ess=target_ess,
            config=config,
            denominator=denominator,
            impl=impl,
        )
        sharing.describe(0, logp, inputs, D, (logp.dtype, entropy is not None))
    out = _loss(logp, entropy, inputs, D, sharing, _aggregation_of_logp(logp, entropy, config))
    if mask is None:
        return out
    keep = mask != 0
    return out._replace(
        logp=torch.where(keep, out.logp, 0), entropy=None if out.entropy is None else torch.where(keep, out.entropy, 0)
    )


def linear_pmpo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    max_chunk_tokens: int | None = None,
    skip_zero_advantage: bool = True,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logp: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    policy_mask: Tensor | None = None,
    power: Tensor | float | None = None,
    target_ess: Tensor | None = None,
    config: LossConfig | None = None,
    denominator: Tensor | float | None = None,
    group: ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    sequence_split: Split = "contiguous",
    impl: str | None = None,
) -> PMPOOutput:
    """`pmpo_loss` from the hidden states before the LM head: the logits of a whole batch never exist.

    With scale s and softcap c, both as in the model's configuration, the logits are::

        z = c tanh(s (W h + b) / c),  or  s (W h + b) without a softcap.

    Chunks of whole trajectories are projected one after the other, and a chunk's loss and gradients are finished before
    the next one: one product forward, two backward, all in the forward pass; the backward pass scales them. A trajectory
    longer than a chunk is projected twice. Masked tokens enter no product, clipped ones not the two backward products.
    The sizes of the products depend on the data, so unlike `pmpo_loss` the call waits for the GPU, twice and once a chunk.

    Args:
        hidden: (B, T, H), or (B, T + 1, H) with the last position ignored, or packed (N, H); float64, float32, bfloat16
            or float16. `hidden[:, t]` predicts `token_ids[:, t]`: the caller shifts.
        weight: (V, H) as in `torch.nn.Linear`, in the dtype of `hidden`; under autocast the products are in its dtype,
            as those of `torch.nn.functional.linear`. It may be tied to the embedding. If it, `hidden` or `bias` needs no
            gradient, that gradient costs nothing.
        bias: (V,), in the dtype of `weight`.
        logit_scale: s > 0 (Cohere's logit_scale, 1 / logits_scaling of Granite). Without a softcap it costs nothing.
        logit_softcap: c > 0 (final_logit_softcapping of Gemma). A chunk's logits then take twice the memory.
        max_chunk_tokens: most tokens whose logits exist at a time; the chunks are as few and then as even as possible. None: 16,384
            (1,024 on a CPU), as far as their logits take no more than an eighth of the free memory, or the longest trajectory if
            that is more and they take no more than a quarter, both rounded down to a power of two where memory limits them; where
            "cp" splits trajectories, all of the rank's tokens instead of the longest. Other chunks give other bits, because
            products add in another order.
        skip_zero_advantage: leave trajectories with advantage 0 out of every product where they have no gradient, that is
            without a KL or entropy term. Then their logp, entropy, power and ess are NaN, and of the metrics ratio_mean,
            ratio_max, approx_kl, ref_kl, entropy, ess, ess_target and those of p are of the other trajectories. False:
            they cost one product, and everything is known of all tokens.

    All other arguments, the result, the metrics and the errors are those of `pmpo_loss`.
    """
    sharing, (weight, bias) = _find_sharing(group, mesh, sequence_split, weight=(weight, 0), bias=(bias, 0))
    with sharing.agreement():
        config = check_config(config)
        dtype = checks.check_head(hidden, weight, bias, token_ids)
        checks.check_flag("skip_zero_advantage", skip_zero_advantage)
        if max_chunk_tokens is not None:
            checks.check_count("max_chunk_tokens", max_chunk_tokens)
        if logit_softcap is not None:
            logit_softcap = checks.check_factor("logit_softcap", logit_softcap)
        logit_scale = checks.check_factor("logit_scale", logit_scale)
        if logit_softcap is None:
            checks.check_factor("config.temperature / logit_scale", config.temperature / logit_scale)
        else:
            checks.check_factor("logit_scale / logit_softcap", logit_scale / logit_softcap)
        inputs, D = trajectory_inputs(
            "token_ids",
            token_ids,
            old_logp=old_logp,
            advantages=advantages,
            mask=mask,
            cu_seqlens=cu_seqlens,
            ref_logp=ref_logp,
            rollout_weights=rollout_weights,
            policy_mask=policy_mask,
            power=power,
            target_ess=target_ess,
            config=config,
            denominator=denominator,
            impl=impl,
        )
        wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
        skips = skip_zero_advantage and not config.beta and not config.entropy_coef
        head = HeadOptions(logit_scale, logit_softcap, config.temperature, dtype, wanted, max_chunk_tokens, skips)
        sharing.describe(weight.shape[0], token_ids, inputs, D, (*head[:4], skips), tuple(wanted))
    sharing.check_token_ids(token_ids, inputs.mask)
    loss, stats, found, clip_fraction, logp, entropy = LinearLossFunction.apply(
        hidden, weight, bias, token_ids, inputs, D, Aggregation.of(config), head, sharing
    )
    logp, entropy = logp.view(token_ids.shape), entropy.view(token_ids.shape)
    out = _output(loss, stats, found, clip_fraction, logp, entropy, inputs)
    if not skips:
        return out
    skipped = inputs.advantages == 0
    return out._replace(power=torch.where(skipped, torch.nan, out.power), ess=torch.where(skipped, torch.nan, out.ess))


def _aggregation_of_logits(dtype: torch.dtype, config: LossConfig) -> Aggregation:
    """With the limit of a token's coefficients, whose row of the gradient is a temperature-th of them: finite in the logits' dtype,
    and on the way there, where `dlogits` has factors some hundred times the row. Entropy: |q (log q + H)| <= H <= log V < 22; a
    number, because torch.compile would compile anew for each V."""
    arithmetic = torch.finfo(compute_dtype(dtype)).max
    largest = min(torch.finfo(dtype).max, arithmetic / 1024) * config.temperature
    return Aggregation.of(config, min(arithmetic, largest), 22.0)


def _aggregation_of_logp(logp: Tensor, entropy: Tensor | None, config: LossConfig) -> Aggregation:
    """With a limit within which each gradient is finite in the dtype of its own tensor, and in that of the arithmetic."""
    largest = torch.finfo(logp.dtype).max
    if entropy is None:
        return Aggregation.of(config, largest)
    arithmetic = torch.finfo(compute_dtype(logp.dtype)).max
    return Aggregation.of(config, largest, largest / min(arithmetic, torch.finfo(entropy.dtype).max))


def _loss(
    logp: Tensor,
    entropy: Tensor | None,
    inputs: TrajectoryInputs,
    denominator: Tensor | None,
    sharing: Sharing,
    terms: Aggregation,
) -> PMPOOutput:
    dtype = compute_dtype(logp.dtype)
    flat_entropy = None if entropy is None else entropy.reshape(-1).to(dtype)
    whole = sharing.gather(logp.reshape(-1).to(dtype), flat_entropy, inputs)
    denominator = sharing.denominator(denominator, lambda: count_tokens(whole.inputs), terms)
    loss, stats, found, clip_fraction = TrajectoryFunction.apply(
        whole.logp, whole.entropy, whole.inputs, denominator, terms
    )
    entropy = None if entropy is None else entropy.detach()
    return _output(loss, stats, found, clip_fraction, logp.detach(), entropy, inputs)


def _output(
    loss: Tensor,
    stats: Tensor,
    metrics: Tensor,
    clip_fraction: Tensor,
    logp: Tensor,
    entropy: Tensor | None,
    inputs: TrajectoryInputs,
) -> PMPOOutput:
    absent = {"ref_kl": inputs.ref_logp is None, "entropy": entropy is None}
    found = {name: x for name, x in zip(METRICS, metrics.unbind(), strict=True) if not absent.get(name)}
    row = dict(zip(STATS, stats.unbind(), strict=True))
    return PMPOOutput(loss, found, logp, entropy, row["power"], row["ess"], clip_fraction)


def _find_sharing(group: Any, mesh: Any, sequence_split: Any, **tensors: tuple[Any, int]) -> tuple[Sharing, list[Any]]:
    """Who shares a call, from its arguments, and this rank's part of `tensors`: each with its dimension of the vocabulary, along
    which a DTensor may be sharded."""
    logits, _ = tensors.get("logits", (None, 0))
    sharded = hasattr(logits, "device_mesh")  # a weight may be FSDP's: it needs a group
    if group is None and mesh is None and not sharded:
        alone = is_one_of(sequence_split, ("contiguous",))
        expect("sequence_split", alone, "'contiguous' without a mesh", sequence_split)
        return ALONE, [x for x, _ in tensors.values()]
    from pmpo_kernels.distributed.shared import Shared  # torch.distributed is not part of every PyTorch

    return Shared.find(group, mesh, sequence_split, tensors)
