"""The loss from hidden states: logits exist for one chunk of tokens at a time.

    hidden --projection--> logits of a chunk --token_logp, trajectory, dlogits--> their gradient --> dhidden, dweight, dbias

A trajectory's coefficients depend on that trajectory alone. A chunk is made of whole trajectories, so its gradients are
finished before its logits are dropped: one product forward, two backward. Only a trajectory longer than a chunk is
projected twice.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pmpo_kernels.aggregate import Aggregation, default_denominator
from pmpo_kernels.autograd import TrajectoryInputs, first_order
from pmpo_kernels.checks import check_token_ids
from pmpo_kernels.chunks import Work, count_tokens, default_chunk_tokens, even, find_work, first, pack
from pmpo_kernels.config import STATS, TrajectoryOptions
from pmpo_kernels.ops import LIBRARY, stage
from pmpo_kernels.projection import HeadOptions, Projection, empty_gradients, gradient_dtypes, row_bytes
from pmpo_kernels.reference import compute_dtype
from pmpo_kernels.sharing import ALONE, Sharing


class LinearLoss:
    """One pass over the chunks. `projection` holds the logits of one and sums up the gradients."""

    def __init__(
        self,
        projection: Projection,
        token_ids: Tensor,
        inputs: TrajectoryInputs,
        work: Work,
        denominator: Tensor,
        sharing: Sharing,
    ) -> None:
        self.projection, self.token_ids, self.inputs, self.work = projection, token_ids, inputs, work
        self.sharing = sharing
        self.denominator, self.impl = denominator, inputs.impl
        self.dtype = compute_dtype(projection.head.dtype)
        N, B = token_ids.numel(), work.tokens.numel()
        self.logp = token_ids.new_zeros(N, dtype=self.dtype)
        self.entropy = torch.zeros_like(self.logp)
        self.stats = token_ids.new_zeros(len(STATS), B, dtype=torch.float64)
        self.stats[STATS.index("tokens")] = sharing.whole_lengths(work.tokens).double()
        self.largest = self.stats.new_zeros(())

    def run(self, chunks: list[slice], limit: int) -> None:
        """Chunk after chunk of at most `limit` tokens. What is not known of skipped trajectories is NaN."""
        end = 0
        for chunk in chunks:
            begin, end = end, end + sum(self.work.lengths[chunk])
            self.add(self.work.rows[begin:end], chunk, begin, limit)
        left_out = self.work.skipped.repeat_interleave(self.inputs.cu_seqlens.diff(), output_size=len(self.logp))
        if self.inputs.mask is not None:
            left_out = left_out & self.inputs.mask
        for per_token in (self.logp, self.entropy):
            per_token.masked_fill_(left_out, torch.nan)

    def add(self, rows: Tensor, chunk: slice, begin: int, limit: int) -> None:
        """One chunk; or one trajectory longer than that, whose pieces are projected again for their gradient."""
        for piece in rows.split(even(len(rows), limit)) if len(rows) else ():
            h, ids, (logp, *saved) = self.token_logp(piece)
            self.logp[piece], self.entropy[piece] = logp, saved[-1]
        dlogp, dentropy = self.trajectory(rows, chunk, begin)
        if not any(self.projection.head.gradients) or not len(rows):
            return
        keep = (dlogp != 0) | (dentropy != 0)
        before = keep.cumsum(0)
        in_front = before.gather(0, (before[-1:] - 1).clamp(min=0))
        count, in_place = torch.cat([before[-1:], in_front]).tolist()  # waits for a GPU
        if len(rows) <= limit and count:
            order = self.to_the_front(keep, count, count - in_place)
            per_token = (rows, h, dlogp, dentropy, ids, *saved)
            self.gradient(*(per_token if order is None else (x[order] for x in per_token)))
            return
        for piece in first(keep, count).split(even(count, limit)) if count else ():
            h, ids, (_, *saved) = self.token_logp(rows[piece])
            self.gradient(rows[piece], h, dlogp[piece], dentropy[piece], ids, *saved)

    def token_logp(self, rows: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Hidden states (M, H) and ids of tokens, and the results of the stage (M,); the logits stay in the projection."""
        h, z = self.projection.project(rows)
        ids, parts, temperature = self.token_ids[rows][None], self.sharing.parts, self.projection.temperature
        any_ids, targets = (ids, ids) if parts is None else parts.local_ids(ids)
        found = stage("token_logp", self.impl)(z[None], any_ids, None, temperature)
        found = found if parts is None else parts.combine(ids, None, temperature, found)
        return h, targets[0], [x[0] for x in found]

    def trajectory(self, rows: Tensor, chunk: slice, begin: int) -> tuple[Tensor, Tensor]:
        """Coefficients of the tokens' logp and entropy (M,) over D, of whole trajectories."""
        if self.sharing.splits_trajectories:
            return self.over_denominator(*self.shared_trajectories(rows))
        i, who = self.inputs, self.work.trajectories[chunk]
        offsets = self.work.ends[chunk.start : chunk.stop + 1] - begin

        def take(index: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
            return [None if x is None else x[index] for x in tensors]

        old_logp, ref_logp, rollout_weights, policy_mask = take(
            rows, i.old_logp, i.ref_logp, i.rollout_weights, i.policy_mask
        )
        A, power, target_ess = take(who, i.advantages, i.power, i.target_ess)
        dlogp, dentropy, self.stats[:, who] = stage("trajectory", self.impl)(
            self.logp[rows], old_logp, A, None, offsets, ref_logp, rollout_weights, self.entropy[rows], power,
            target_ess, policy_mask, list(i.options),
        )  # fmt: skip
        return self.over_denominator(dlogp, dentropy)

    def shared_trajectories(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The same where other ranks have the rest of each trajectory's tokens."""
        valid = torch.zeros_like(self.token_ids, dtype=torch.bool)
        valid[rows] = True
        whole = self.sharing.gather(self.logp, self.entropy, self.inputs._replace(mask=valid))
        i, tokens = whole.inputs, self.stats[STATS.index("tokens")].clone()
        dlogp, dentropy, stats = stage("trajectory", self.impl)(
            whole.logp, i.old_logp, i.advantages, i.mask, i.cu_seqlens, i.ref_logp, i.rollout_weights, whole.entropy,
            i.power, i.target_ess, i.policy_mask, list(i.options),
        )  # fmt: skip
        self.stats = torch.where(self.work.skipped, 0, stats)
        self.stats[STATS.index("tokens")] = tokens
        own = rows if whole.own is None else whole.own[rows]
        return dlogp[own], dentropy[own] if dentropy.numel() else dentropy

    def over_denominator(self, dlogp: Tensor, dentropy: Tensor) -> tuple[Tensor, Tensor]:
        """What the trajectory stage gave, float64, over D and in the gradient's dtype."""
        if len(dlogp):
            self.largest = torch.maximum(self.largest, torch.linalg.vector_norm(dlogp, torch.inf))
        scale = 1 / self.denominator
        dlogp, dentropy = (dlogp * scale).to(self.dtype), (dentropy * scale).to(self.dtype)
        return dlogp, dentropy if dentropy.numel() else torch.zeros_like(dlogp)

    def to_the_front(self, keep: Tensor, count: int, moved: int) -> Tensor | None:
        """Move `moved` rows of the buffer, so that the `count` rows in `keep` (M,) come first; where these were, None for where
        they are."""
        if count == len(keep):
            return None
        order = torch.arange(count, device=keep.device)
        if moved:
            gaps, beyond = first(~keep[:count], moved), count + first(keep[count:], moved)
            order[gaps] = beyond
            self.projection.move(gaps, beyond)
        return order

    def gradient(
        self,
        rows: Tensor,
        h: Tensor,
        dlogp: Tensor,
        dentropy: Tensor,
        ids: Tensor,
        row_max: Tensor,
        row_sum: Tensor,
        entropy: Tensor,
    ) -> None:
        """The two products with the gradient of the logits in the projection's first rows, of tokens at `rows`; all (M,)."""
        scale = None
        if self.projection.head.dtype == torch.float16:
            V = self.sharing.whole_vocabulary(self.projection.weight.shape[0])
            size = dlogp.abs() + dentropy.abs() * math.log(V)
            scale = self.projection.float16_scale(size, h).to(self.dtype)
            dlogp, dentropy = dlogp * scale, dentropy * scale
        z = self.projection.z[: len(rows)]
        entropy_rows = dentropy[None] if self.inputs.options.entropy_coef else None
        saved = (row_max[None], row_sum[None], entropy[None], dlogp[None], entropy_rows)
        stage("dlogits_", self.impl)(z[None], ids[None], None, *saved, self.projection.temperature)
        self.projection.back(rows, h, scale)


SCHEMA = (
    "linear_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? old_logp, Tensor advantages,"
    " Tensor? mask, Tensor cu_seqlens, Tensor? ref_logp, Tensor? rollout_weights, Tensor? power, Tensor? target_ess,"
    " Tensor? policy_mask, float[] options, str impl, Tensor denominator, float logit_scale, float? logit_softcap,"
    " float temperature, ScalarType dtype, bool[] gradients, int? max_chunk_tokens, bool skip_zero_advantage)"
    " -> (Tensor dhidden, Tensor dweight, Tensor dbias, Tensor largest, Tensor logp, Tensor entropy, Tensor stats)"
)
"""The whole loss as one operator, because torch.compile cannot look into it: the sizes of the products depend on the data. Its
arguments are hidden, weight, bias, token_ids, and `pack_arguments`."""


def pack_arguments(inputs: TrajectoryInputs, denominator: Tensor, head: HeadOptions) -> tuple[Any, ...]:
    """The fields of `TrajectoryInputs`, the denominator, the fields of `HeadOptions`."""
    *constants, options, impl = inputs
    return *constants, list(options), impl, denominator, *head


def unpack_arguments(arguments: tuple[Any, ...]) -> tuple[TrajectoryInputs, Tensor, HeadOptions]:
    """The inverse."""
    n = len(TrajectoryInputs._fields)
    *constants, options, impl = arguments[:n]
    inputs = TrajectoryInputs._make([*constants, TrajectoryOptions(*options), impl])
    return inputs, arguments[n], HeadOptions(*arguments[n + 1 :])


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    *arguments: Any,
    sharing: Sharing = ALONE,
) -> tuple[Tensor, ...]:
    """The operator, on one device: gradients of the loss in `gradient_dtypes`, empty where not wanted, the largest |coefficient of
    a token| times the denominator, logp and entropy (N,), and stats (S, B)."""
    inputs, denominator, head = unpack_arguments(arguments)
    ids, V = token_ids.reshape(-1), weight.shape[0]
    if sharing.parts is None:
        check_token_ids(token_ids, None if inputs.mask is None else inputs.mask.view(token_ids.shape), V)
    with torch.autocast(hidden.device.type, enabled=False):  # its casts are those to `head.dtype`
        work = find_work(ids, inputs, head.skip_zero_advantage)
        limit = head.max_chunk_tokens
        if limit is None:
            longest = sum(work.lengths) if sharing.splits_trajectories else max(work.lengths, default=0)
            limit = default_chunk_tokens(longest, row_bytes(V, head), hidden.device)
        limit = sharing.smallest(limit)
        chunks = pack(work.lengths, limit)
        if sharing.splits_trajectories:  # the loss of none is known before all log-probs are
            chunks = [slice(0, len(work.lengths))]
        size = max((min(sum(work.lengths[chunk]), limit) for chunk in chunks), default=0)
        once = len(work.rows) <= limit
        projection = Projection(hidden, weight, bias, head, token_ids.shape[-1], size, once)
        loss = LinearLoss(projection, ids, inputs, work, denominator, sharing)
        loss.run(chunks, limit)
        gradients = projection.finish()
        sharing.sum_over_vocabulary(gradients[0])
    return *gradients, loss.largest, loss.logp, loss.entropy, loss.stats


def fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """What `linear_loss` returns, without values."""
    inputs, denominator, head = unpack_arguments(arguments)
    dtype, N = compute_dtype(head.dtype), token_ids.numel()
    stats = token_ids.new_empty(len(STATS), inputs.advantages.numel(), dtype=torch.float64)
    tokens = [token_ids.new_empty(N, dtype=dtype) for _ in range(2)]
    gradients = empty_gradients(hidden, weight, bias, head, gradient_dtypes(hidden, weight, bias))
    return *gradients, torch.empty_like(denominator), *tokens, stats


LIBRARY.define(SCHEMA)
LIBRARY.impl("linear_loss", linear_loss, "CompositeExplicitAutograd")
torch.library.register_fake("pmpo_kernels::linear_loss", fake, lib=LIBRARY)


def frees_graph() -> bool:
    """Whether the backward pass under way frees what is saved, so that nobody can ask for it again."""
    return not getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()


def scaled(gradient: Tensor, dtype: torch.dtype, factor: Tensor, impl: str) -> Tensor:
    """gradient x factor (), computed in the factor's dtype and rounded once to `dtype`: in place where the graph is freed."""
    if torch.compiler.is_compiling():
        return (gradient.to(factor.dtype) * factor).to(dtype)
    if not frees_graph() or not gradient.is_contiguous():
        gradient = gradient.clone(memory_format=torch.contiguous_format)
    torch.autograd.graph.increment_version(gradient)  # a second backward raises, even if this one is interrupted
    stage("scale_", "reference" if impl == "cpp" else impl)(gradient, factor)
    return gradient.to(dtype)


class LinearLossFunction(torch.autograd.Function):
    """(hidden, weight, bias, token_ids, inputs, denominator, aggregation, head, sharing) -> (loss, stats, metrics, clip fractions,
    logp, entropy); the loss is differentiable in the first three, whose gradients the forward pass computes and the backward pass
    scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        inputs: TrajectoryInputs,
        denominator: Tensor | None,
        aggregation: Aggregation,
        head: HeadOptions,
        sharing: Sharing,
    ) -> tuple[Tensor, ...]:
        denominator = sharing.denominator(denominator, lambda: sharing.whole_lengths(count_tokens(inputs)), aggregation)
        if denominator is None:
            denominator = default_denominator(sharing.whole_lengths(count_tokens(inputs)), aggregation)
        denominator = denominator.clone()
        arguments = (hidden, weight, bias, token_ids, *pack_arguments(inputs, denominator, head))
        if sharing is ALONE:
            *gradients, largest, logp, entropy, stats = torch.ops.pmpo_kernels.linear_loss(*arguments)
        else:
            *gradients, largest, logp, entropy, stats = linear_loss(*arguments, sharing=sharing)
        ctx.dtypes = [
            x.dtype if x is not None and wanted else None
            for x, wanted in zip((hidden, weight, bias), head.gradients, strict=True)
        ]
        ctx.impl = inputs.impl
        ctx.save_for_backward(*gradients)
        skipped = inputs.advantages == 0 if head.skip_zero_advantage else None
        loss, _, metrics, clip_fraction = stage("aggregate", inputs.impl)(
            stats, denominator, None, skipped, list(aggregation), logp.dtype
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
            return (None,) * 9
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        found = (None if dtype is None else scaled(g, dtype, grad_loss, ctx.impl) for g, dtype in saved)
        return *found, *(None,) * 6
