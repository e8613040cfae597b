"""`linear_pmpo_loss`: the public call, and the autograd Function behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pmpo_kernels import checks
from pmpo_kernels.aggregate import default_denominator
from pmpo_kernels.api import PMPOOutput, as_output, find_sharing
from pmpo_kernels.autograd import first_order
from pmpo_kernels.batch import Call, check_call, check_config
from pmpo_kernels.config import LossConfig
from pmpo_kernels.linear.operator import linear_loss
from pmpo_kernels.linear.projection import HeadOptions
from pmpo_kernels.ops import stage
from pmpo_kernels.sharing import ALONE, Sharing, Split

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


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
    sharing, (weight, bias) = find_sharing(group, mesh, sequence_split, weight=(weight, 0), bias=(bias, 0))
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
        call = check_call(
            "token_ids", token_ids, config, config.aggregate_options(), advantages=advantages, cu_seqlens=cu_seqlens,
            old_logp=old_logp, mask=mask, ref_logp=ref_logp, rollout_weights=rollout_weights, policy_mask=policy_mask,
            power=power, target_ess=target_ess, denominator=denominator, impl=impl,
        )  # fmt: skip
        wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
        skips = skip_zero_advantage and not config.beta and not config.entropy_coef
        head = HeadOptions(logit_scale, logit_softcap, config.temperature, dtype, wanted, max_chunk_tokens, skips)
        sharing.describe(weight.shape[0], token_ids, call, (*head[:4], skips), tuple(wanted))
    sharing.check_token_ids(token_ids, call.batch.mask)
    *results, logp, entropy = LinearLossFunction.apply(hidden, weight, bias, token_ids, call, head, sharing)
    out = as_output(results, logp.view(token_ids.shape), entropy.view(token_ids.shape), call.batch)
    if not skips:
        return out
    skipped = call.batch.advantages == 0
    return out._replace(power=torch.where(skipped, torch.nan, out.power), ess=torch.where(skipped, torch.nan, out.ess))


def frees_graph() -> bool:
    """True if the backward pass under way frees what is saved, so that nobody can ask for it again."""
    return not getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()


def scaled(gradient: Tensor, dtype: torch.dtype, factor: Tensor, impl: str) -> Tensor:
    """gradient times factor (), computed in the factor's dtype and rounded once to `dtype`; in place where the graph is freed."""
    if torch.compiler.is_compiling():
        return (gradient.to(factor.dtype) * factor).to(dtype)
    if not frees_graph() or not gradient.is_contiguous():
        gradient = gradient.clone(memory_format=torch.contiguous_format)
    torch.autograd.graph.increment_version(gradient)  # a second backward raises, even if this one is interrupted
    stage("scale_", "reference" if impl == "cpp" else impl)(gradient, factor)
    return gradient.to(dtype)


class LinearLossFunction(torch.autograd.Function):
    """(hidden, weight, bias, token_ids, call, head, sharing) -> (loss, stats, metrics, clip fractions, logp, entropy).

    The loss is differentiable in the first three. The forward pass computes their gradients, the backward pass scales them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        call: Call,
        head: HeadOptions,
        sharing: Sharing,
    ) -> tuple[Tensor, ...]:
        batch, options, aggregate_options, denominator, impl = call
        if denominator is None:
            lengths = sharing.whole_lengths(batch.count_tokens())
            denominator = default_denominator(lengths, aggregate_options, sharing.sum_over_data)
        denominator = denominator.clone()
        arguments = (hidden, weight, bias, token_ids, *batch, list(options), denominator, impl, *head)
        if sharing is ALONE:
            *gradients, largest, logp, entropy, stats = torch.ops.pmpo_kernels.linear_loss(*arguments)
        else:
            *gradients, largest, logp, entropy, stats = linear_loss(*arguments, sharing=sharing)
        ctx.dtypes = [
            x.dtype if x is not None and wanted else None
            for x, wanted in zip((hidden, weight, bias), head.gradients, strict=True)
        ]
        ctx.impl = impl
        ctx.save_for_backward(*gradients)
        skipped = batch.advantages == 0 if head.skip_zero_advantage else None
        loss, _, metrics, clip_fraction = stage("aggregate", impl)(
            stats, denominator, None, skipped, list(aggregate_options), logp.dtype
        )
        ctx.mark_non_differentiable(stats, metrics, clip_fraction, logp, entropy)
        ctx.set_materialize_grads(False)
        # a finite loss is only given with finite gradients
        finite = [(largest / denominator).to(logp.dtype) < torch.inf]
        for g, dtype in zip(gradients, ctx.dtypes, strict=True):
            if dtype is not None and g.numel():
                low, high = torch.aminmax(g)  # NaN if there is one; on a CPU far faster than a norm
                finite += [low >= torch.finfo(dtype).min, high <= torch.finfo(dtype).max]
        loss = torch.where(sharing.everywhere(torch.stack(finite).all()), loss, loss + torch.inf)
        return loss, stats, metrics, clip_fraction, logp, entropy

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 7
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        found = (None if dtype is None else scaled(g, dtype, grad_loss, ctx.impl) for g, dtype in saved)
        return *found, *(None,) * 4
