"""The operator `linear_loss`: the loss's gradients from hidden states, with logits of one chunk of tokens at a time.

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

from pmpo_kernels.batch import Batch
from pmpo_kernels.checks import check_token_ids
from pmpo_kernels.contract import STATS, TrajectoryOptions, compute_dtype
from pmpo_kernels.linear.chunks import Work, default_chunk_tokens, even, find_work, first, pack
from pmpo_kernels.linear.projection import HeadOptions, Projection, empty_gradients, gradient_dtypes, row_bytes
from pmpo_kernels.ops import BATCH, LIBRARY, stage
from pmpo_kernels.sharing import ALONE, Sharing


class LinearLoss:
    """One pass over the chunks. `projection` holds the logits of one chunk and sums up the gradients."""

    def __init__(
        self,
        projection: Projection,
        token_ids: Tensor,
        batch: Batch,
        options: TrajectoryOptions,
        work: Work,
        denominator: Tensor,
        impl: str,
        sharing: Sharing,
    ) -> None:
        self.projection, self.token_ids, self.batch, self.work = projection, token_ids, batch, work
        self.options, self.sharing = options, sharing
        self.denominator, self.impl = denominator, impl
        self.dtype = compute_dtype(projection.head.dtype)
        N, B = token_ids.numel(), work.tokens.numel()
        self.logp = token_ids.new_zeros(N, dtype=self.dtype)
        self.entropy = torch.zeros_like(self.logp)
        self.stats = token_ids.new_zeros(len(STATS), B, dtype=torch.float64)
        self.stats[STATS.index("tokens")] = sharing.whole_lengths(work.tokens).double()
        self.largest = self.stats.new_zeros(())

    def run(self, chunks: list[slice], limit: int) -> None:
        """Do one chunk of at most `limit` tokens after the other. What is not known of skipped trajectories becomes NaN."""
        end = 0
        for chunk in chunks:
            begin, end = end, end + sum(self.work.lengths[chunk])
            self.add(self.work.rows[begin:end], chunk, begin, limit)
        left_out = self.work.skipped.repeat_interleave(self.batch.cu_seqlens.diff(), output_size=len(self.logp))
        if self.batch.mask is not None:
            left_out = left_out & self.batch.mask
        for per_token in (self.logp, self.entropy):
            per_token.masked_fill_(left_out, torch.nan)

    def add(self, rows: Tensor, chunk: slice, begin: int, limit: int) -> None:
        """Do one chunk, or one trajectory that is longer than a chunk: its pieces are projected again for their gradient."""
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
        """Hidden states (M, H) and ids (M,) of tokens, and the stage's results, (M,) each. The projection keeps their logits."""
        h, z = self.projection.project(rows)
        ids, parts, temperature = self.token_ids[rows][None], self.sharing.parts, self.projection.temperature
        any_ids, targets = (ids, ids) if parts is None else parts.local_ids(ids)
        found = stage("token_logp", self.impl)(z[None], any_ids, None, temperature)
        found = found if parts is None else parts.combine(ids, None, temperature, found)
        return h, targets[0], [x[0] for x in found]

    def trajectory(self, rows: Tensor, chunk: slice, begin: int) -> tuple[Tensor, Tensor]:
        """The coefficients (M,) of logp and entropy of the tokens at `rows`, which are whole trajectories, divided by D."""
        if self.sharing.splits_trajectories:
            return self.over_denominator(*self.shared_trajectories(rows))
        who = self.work.trajectories[chunk]
        batch = self.batch.take(rows, who, self.work.ends[chunk.start : chunk.stop + 1] - begin)
        dlogp, dentropy, self.stats[:, who] = stage("trajectory", self.impl)(
            self.logp[rows], self.entropy[rows], *batch, list(self.options)
        )
        return self.over_denominator(dlogp, dentropy)

    def shared_trajectories(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficients before they are divided by D, where other ranks have the rest of each trajectory's tokens."""
        valid = torch.zeros_like(self.token_ids, dtype=torch.bool)
        valid[rows] = True
        whole = self.sharing.gather(self.logp, self.entropy, self.batch._replace(mask=valid))
        tokens = self.stats[STATS.index("tokens")].clone()
        dlogp, dentropy, stats = stage("trajectory", self.impl)(
            whole.logp, whole.entropy, *whole.batch, list(self.options)
        )
        self.stats = torch.where(self.work.skipped, 0, stats)
        self.stats[STATS.index("tokens")] = tokens
        own = rows if whole.own is None else whole.own[rows]
        return dlogp[own], dentropy[own] if dentropy.numel() else dentropy

    def over_denominator(self, dlogp: Tensor, dentropy: Tensor) -> tuple[Tensor, Tensor]:
        """The results of the trajectory stage, float64, divided by D and in the gradient's dtype."""
        if len(dlogp):
            self.largest = torch.maximum(self.largest, torch.linalg.vector_norm(dlogp, torch.inf))
        scale = 1 / self.denominator
        dlogp, dentropy = (dlogp * scale).to(self.dtype), (dentropy * scale).to(self.dtype)
        return dlogp, dentropy if dentropy.numel() else torch.zeros_like(dlogp)

    def to_the_front(self, keep: Tensor, count: int, moved: int) -> Tensor | None:
        """Move `moved` rows of the buffer so that the `count` rows in `keep` (M,) come first.

        Returns where these rows were (count,); None if all of them stay.
        """
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
        """Write the gradient of the logits over the projection's first rows, and add its two products; all arguments (M, ...)."""
        scale = None
        if self.projection.head.dtype == torch.float16:
            V = self.sharing.whole_vocabulary(self.projection.weight.shape[0])
            size = dlogp.abs() + dentropy.abs() * math.log(V)
            scale = self.projection.float16_scale(size, h).to(self.dtype)
            dlogp, dentropy = dlogp * scale, dentropy * scale
        z = self.projection.z[: len(rows)]
        entropy_rows = dentropy[None] if self.options.entropy_coef else None
        saved = (row_max[None], row_sum[None], entropy[None], dlogp[None], entropy_rows)
        stage("dlogits_", self.impl)(z[None], ids[None], None, *saved, self.projection.temperature)
        self.projection.back(rows, h, scale)


SCHEMA = (
    f"linear_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, {BATCH}, float[] options,"
    " Tensor denominator, str impl, float logit_scale, float? logit_softcap, float temperature, ScalarType dtype,"
    " bool[] gradients, int? max_chunk_tokens, bool skip_zero_advantage)"
    " -> (Tensor dhidden, Tensor dweight, Tensor dbias, Tensor largest, Tensor logp, Tensor entropy, Tensor stats)"
)
"""One operator, because torch.compile cannot look into it: the sizes of the products depend on the data. After token_ids its
arguments are the fields of `Batch`, `TrajectoryOptions`, D, the implementation, and the fields of `HeadOptions`."""


def unpack(constants: tuple[Any, ...]) -> tuple[Batch, TrajectoryOptions, Tensor, str, HeadOptions]:
    """The operator's arguments after token_ids as objects."""
    n = len(Batch._fields)
    options, denominator, impl, *head = constants[n:]
    return Batch(*constants[:n]), TrajectoryOptions(*options), denominator, impl, HeadOptions(*head)


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    *constants: Any,
    sharing: Sharing = ALONE,
) -> tuple[Tensor, ...]:
    """The operator, and by `sharing` the same on several devices.

    Returns the gradients of the loss in `gradient_dtypes`, empty where not wanted; the largest size of a token's coefficient
    times D, (); logp and entropy (N,); and stats (S, B).
    """
    batch, options, denominator, impl, head = unpack(constants)
    ids, V = token_ids.reshape(-1), weight.shape[0]
    if sharing.parts is None:
        check_token_ids(token_ids, None if batch.mask is None else batch.mask.view(token_ids.shape), V)
    with torch.autocast(hidden.device.type, enabled=False):  # its casts are those to `head.dtype`
        work = find_work(ids, batch, head.skip_zero_advantage)
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
        loss = LinearLoss(projection, ids, batch, options, work, denominator, impl, sharing)
        loss.run(chunks, limit)
        gradients = projection.finish()
        sharing.sum_over_vocabulary(gradients[0])
    return *gradients, loss.largest, loss.logp, loss.entropy, loss.stats


def fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, *constants: Any) -> tuple[Tensor, ...]:
    """Tensors like those that `linear_loss` returns, without values."""
    batch, _, denominator, _, head = unpack(constants)
    dtype, N = compute_dtype(head.dtype), token_ids.numel()
    stats = token_ids.new_empty(len(STATS), batch.advantages.numel(), dtype=torch.float64)
    tokens = [token_ids.new_empty(N, dtype=dtype) for _ in range(2)]
    gradients = empty_gradients(hidden, weight, bias, head, gradient_dtypes(hidden, weight, bias))
    return *gradients, torch.empty_like(denominator), *tokens, stats


LIBRARY.define(SCHEMA)
LIBRARY.impl("linear_loss", linear_loss, "CompositeExplicitAutograd")
torch.library.register_fake("pmpo_kernels::linear_loss", fake, lib=LIBRARY)
