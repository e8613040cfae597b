"""The loss from hidden states: logits exist for one chunk of tokens at a time.

    hidden --projection--> logits of a chunk --token_logp, trajectory, dlogits--> their gradient --> dhidden, dweight, dbias

A trajectory's coefficients depend on that trajectory alone. A chunk is made of whole trajectories, so its gradients are
finished before its logits are dropped: one product forward, two backward. Only a trajectory longer than a chunk is
projected twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pmpo_kernels.aggregate import default_denominator, total_loss
from pmpo_kernels.autograd import TrajectoryInputs, first_order
from pmpo_kernels.checks import check_cu_seqlens, check_token_ids
from pmpo_kernels.config import LossConfig, TrajectoryOptions
from pmpo_kernels.memory import available_memory
from pmpo_kernels.ops import LIBRARY, stage
from pmpo_kernels.projection import Head, Projection, row_bytes, sums
from pmpo_kernels.reference import STATS, compute_dtype

ENOUGH_TOKENS = {"cpu": 1024}
"""Tokens a chunk with which the products run at full speed: 1,024 on a CPU (97 % of the rate at 2,048, 2 cores, float32 and
bfloat16), elsewhere 4,096."""
FEWEST_TOKENS = 128
MEMORY_SHARE = 4  # the logits of a chunk take at most this part of the free memory


class Work(NamedTuple):
    """The tokens that enter a product: response tokens of the trajectories that are not left out."""

    rows: Tensor  # (K,) their positions, rising
    trajectories: list[int]  # indices of those not left out, empty ones among them
    lengths: list[int]  # response tokens of each of these
    tokens: Tensor  # (B,) response tokens of every trajectory
    skipped: Tensor  # (B,) bool: left out


def count_tokens(inputs: TrajectoryInputs) -> Tensor:
    """Response tokens of each trajectory (B,) int64."""
    offsets = inputs.cu_seqlens.long()
    if inputs.mask is None:
        return offsets.diff()
    before = torch.nn.functional.pad(inputs.mask.cumsum(0), (1, 0))
    return before[offsets.clamp(0, inputs.mask.numel())].diff()


def find_work(token_ids: Tensor, inputs: TrajectoryInputs, skip_zero_advantage: bool) -> Work:
    """Of token_ids (N,). Waits for a GPU: the sizes of the products depend on the data."""
    offsets, N = inputs.cu_seqlens.long(), token_ids.numel()
    tokens = count_tokens(inputs)
    skipped = (inputs.advantages == 0) & skip_zero_advantage
    values = torch.cat([offsets, tokens, skipped.long()]).cpu()
    check_cu_seqlens(values[: len(offsets)], N)
    counts, left_out = values[len(offsets) :].view(2, -1).tolist()
    valid = torch.ones_like(token_ids, dtype=torch.bool) if inputs.mask is None else inputs.mask
    if any(left_out):
        valid = valid & ~skipped.repeat_interleave(offsets.diff(), output_size=N)
    trajectories = [i for i, out in enumerate(left_out) if not out]
    return Work(valid.nonzero()[:, 0], trajectories, [counts[i] for i in trajectories], tokens, skipped)


def pack(lengths: list[int], max_tokens: int) -> Iterator[slice]:
    """Slices of trajectories, in order, each as long as it fits into `max_tokens`; one that alone does not has its own."""
    start = total = 0
    for i, n in enumerate(lengths):
        if n and total and total + n > max_tokens:
            yield slice(start, i)
            start, total = i, 0
        total += n
    if lengths:
        yield slice(start, len(lengths))


def default_chunk_tokens(longest: int, bytes_a_token: int, device: torch.device) -> int:
    """Enough tokens for full speed, or the longest trajectory, which then is projected once; but not more than a quarter of
    the free memory holds, rounded down to a power of two so that it rarely differs from run to run."""
    wanted = max(longest, ENOUGH_TOKENS.get(device.type, 4096))
    free = available_memory(device)
    if free is None:
        return wanted
    room = max(free // MEMORY_SHARE // bytes_a_token, FEWEST_TOKENS)
    return min(wanted, 1 << (room.bit_length() - 1))


class LinearLoss:
    """One pass over the chunks. `projection` holds the logits of one and sums up the gradients."""

    def __init__(
        self, projection: Projection, token_ids: Tensor, inputs: TrajectoryInputs, work: Work, denominator: Tensor
    ) -> None:
        self.projection, self.token_ids, self.inputs, self.work = projection, token_ids, inputs, work
        self.impl = inputs.impl
        self.dtype = compute_dtype(projection.head.dtype)
        N, B = token_ids.numel(), work.tokens.numel()
        self.logp = token_ids.new_zeros(N, dtype=self.dtype)
        self.entropy = torch.zeros_like(self.logp)
        self.stats = token_ids.new_zeros(len(STATS), B, dtype=torch.float64)
        self.stats[STATS.index("tokens")] = work.tokens.double()
        self.largest = self.stats.new_zeros(())
        self.denominator = denominator

    def run(self, limit: int) -> None:
        """Chunk after chunk of at most `limit` tokens. What is not known of skipped trajectories is NaN."""
        end = 0
        for chunk in pack(self.work.lengths, limit):
            lengths = self.work.lengths[chunk]
            begin, end = end, end + sum(lengths)
            self.add(self.work.rows[begin:end], self.work.trajectories[chunk], lengths, limit)
        left_out = self.work.skipped.repeat_interleave(self.inputs.cu_seqlens.diff(), output_size=len(self.logp))
        if self.inputs.mask is not None:
            left_out = left_out & self.inputs.mask
        for per_token in (self.logp, self.entropy):
            per_token.masked_fill_(left_out, torch.nan)

    def add(self, rows: Tensor, trajectories: list[int], lengths: list[int], limit: int) -> None:
        """One chunk; or one trajectory longer than that, whose pieces are projected again for their gradient."""
        whole = len(rows) <= limit
        pieces = rows.split(limit) if len(rows) else ()
        for piece in pieces:
            h, ids, (logp, *sums) = self.token_logp(piece)
            self.logp[piece], self.entropy[piece] = logp, sums[-1]
        dlogp, dentropy = self.trajectory(rows, trajectories, lengths)
        if not any(self.projection.head.gradients):
            return
        keep = ((dlogp != 0) | (dentropy != 0)).cpu()  # waits for a GPU
        if not bool(keep.any()):
            return
        if whole:
            self.gradient(rows, h, [ids, *sums], dlogp, dentropy, keep)
            return
        for piece in keep.nonzero()[:, 0].to(rows.device).split(limit):
            h, ids, (_, *sums) = self.token_logp(rows[piece])
            self.gradient(rows[piece], h, [ids, *sums], dlogp[piece], dentropy[piece], None)

    def token_logp(self, rows: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Hidden states (M, H) and ids of tokens, and the results of the stage (M,); the logits stay in the projection."""
        h, z = self.projection.project(rows)
        ids = self.token_ids[rows]
        found = stage("token_logp", self.impl)(z[None], ids[None], None, self.projection.temperature)
        return h, ids, [x[0] for x in found]

    def trajectory(self, rows: Tensor, trajectories: list[int], lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Coefficients of the tokens' logp and entropy (M,) over D, of whole trajectories."""
        i, who = self.inputs, torch.tensor(trajectories, device=rows.device)
        offsets = torch.tensor([0, *lengths], device=rows.device).cumsum(0)

        def take(index: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
            return [None if x is None else x[index] for x in tensors]

        old_logp, ref_logp, rollout_weights = take(rows, i.old_logp, i.ref_logp, i.rollout_weights)
        A, power, target_ess = take(who, i.advantages, i.power, i.target_ess)
        dlogp, dentropy, self.stats[:, who] = stage("trajectory", self.impl)(
            self.logp[rows], old_logp, A, None, offsets, ref_logp, rollout_weights, self.entropy[rows], power,
            target_ess, list(i.options),
        )  # fmt: skip
        if len(rows):
            self.largest = torch.maximum(self.largest, torch.linalg.vector_norm(dlogp, torch.inf))
        scale = 1 / self.denominator
        dlogp, dentropy = (dlogp * scale).to(self.dtype), (dentropy * scale).to(self.dtype)
        return dlogp, dentropy if dentropy.numel() else torch.zeros_like(dlogp)

    def gradient(
        self, rows: Tensor, h: Tensor, sums: list[Tensor], dlogp: Tensor, dentropy: Tensor, keep: Tensor | None
    ) -> None:
        """The two products of the chunk in the projection's buffer; rows not in `keep` (M,) are left out of them."""
        if keep is not None and not bool(keep.all()):
            order = self.move_to_front(keep).to(rows.device)
            rows, h, dlogp, dentropy = rows[order], h[order], dlogp[order], dentropy[order]
            sums = [x[order] for x in sums]
        scale = None
        if self.projection.head.dtype == torch.float16:
            largest = torch.maximum(dlogp.abs(), dentropy.abs()).amax()
            scale = torch.exp2(-largest.log2().ceil().clamp(-100, 100))  # a power of two: exact
            dlogp, dentropy = dlogp * scale, dentropy * scale
        z, (ids, *saved) = self.projection.z[: len(rows)], [x[None] for x in sums]
        h_rows = dentropy[None] if self.inputs.options.entropy_coef else None
        stage("dlogits_", self.impl)(z[None], ids, None, *saved, dlogp[None], h_rows, self.projection.temperature)
        self.projection.back(rows, h, scale)

    def move_to_front(self, keep: Tensor) -> Tensor:
        """Move as few rows of the buffer as possible so that those in `keep` (M,) come first; where these were."""
        kept = keep.nonzero()[:, 0]
        order = torch.arange(len(kept))
        holes, beyond = (~keep[: len(kept)]).nonzero()[:, 0], kept[kept >= len(kept)]
        order[holes] = beyond
        device = self.token_ids.device
        self.projection.move(holes.to(device), beyond.to(device))
        return order


SCHEMA = (
    "linear_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? old_logp, Tensor advantages,"
    " Tensor? mask, Tensor cu_seqlens, Tensor? ref_logp, Tensor? rollout_weights, Tensor? power, Tensor? target_ess,"
    " float[] options, str impl, Tensor denominator, float logit_scale, float? logit_softcap, float temperature,"
    " ScalarType dtype, bool[] gradients, int? max_chunk_tokens, bool skip_zero_advantage)"
    " -> (Tensor dhidden, Tensor dweight, Tensor dbias, Tensor largest, Tensor logp, Tensor entropy, Tensor stats)"
)
"""The whole loss as one operator, because torch.compile cannot look into it: the sizes of the products depend on the data. Its
arguments are hidden, weight, bias, token_ids, those of `TrajectoryInputs`, the denominator, those of `Head`."""
SIZES = (len(TrajectoryInputs._fields), len(Head._fields))


def linear_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """The operator: gradients of the loss (float32 at least for weight and bias, empty where not wanted), the largest
    |coefficient of a token| times the denominator, logp and entropy (N,), and stats (S, B)."""
    (*constants, options, impl), denominator, head = rest[: SIZES[0]], rest[SIZES[0]], Head(*rest[-SIZES[1] :])
    inputs = TrajectoryInputs._make([*constants, TrajectoryOptions(*options), impl])
    ids, V = token_ids.reshape(-1), weight.shape[0]
    check_token_ids(token_ids, None if inputs.mask is None else inputs.mask.view(token_ids.shape), V)
    with torch.autocast(hidden.device.type, enabled=False):  # its casts are those to `head.dtype`
        work = find_work(ids, inputs, head.skip_zero_advantage)
        limit = head.max_chunk_tokens
        if limit is None:
            limit = default_chunk_tokens(max(work.lengths, default=0), row_bytes(V, head), hidden.device)
        size = max((min(sum(work.lengths[chunk]), limit) for chunk in pack(work.lengths, limit)), default=0)
        projection = Projection(hidden, weight, bias, head, token_ids.shape[-1], size)
        loss = LinearLoss(projection, ids, inputs, work, denominator)
        loss.run(limit)
    return *projection.gradients, loss.largest, loss.logp, loss.entropy, loss.stats


def fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """What `linear_loss` returns, without values."""
    advantages, head = rest[1], Head(*rest[-SIZES[1] :])
    dtype, N = compute_dtype(head.dtype), token_ids.numel()
    stats = token_ids.new_empty(len(STATS), advantages.numel(), dtype=torch.float64)
    tokens = [token_ids.new_empty(N, dtype=dtype) for _ in range(2)]
    return *sums(hidden, weight, bias, head), stats.new_empty(()), *tokens, stats


LIBRARY.define(SCHEMA)
LIBRARY.impl("linear_loss", linear_loss, "CompositeExplicitAutograd")
torch.library.register_fake("pmpo_kernels::linear_loss", fake, lib=LIBRARY)


def scales_nothing(grad_loss: Tensor) -> bool:
    """Whether the saved gradients can be given away: the factor is 1, and nobody can ask for them again because the graph is
    freed. Not asked on a GPU, which it would wait for."""
    if torch.compiler.is_compiling() or grad_loss.device.type != "cpu":
        return False
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return not kept() and float(grad_loss) == 1


class LinearLossFunction(torch.autograd.Function):
    """(hidden, weight, bias, token_ids, inputs, denominator, config, head) -> (loss, stats, denominator, logp, entropy); the
    loss is differentiable in the first three, whose gradients the forward pass computes and the backward pass scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        inputs: TrajectoryInputs,
        denominator: Tensor | None,
        config: LossConfig,
        head: Head,
    ) -> tuple[Tensor, ...]:
        if denominator is None:
            denominator = default_denominator(count_tokens(inputs).double(), config)
        *constants, options, impl = inputs
        arguments = (*constants, list(options), impl, denominator, *head)
        *gradients, largest, logp, entropy, stats = torch.ops.pmpo_kernels.linear_loss(
            hidden, weight, bias, token_ids, *arguments
        )
        ctx.dtypes = [
            x.dtype if x is not None and wanted else None
            for x, wanted in zip((hidden, weight, bias), head.gradients, strict=True)
        ]
        # those of float16 are scaled in float32, lest they underflow here
        gradients = [
            g if dtype in (None, torch.float16) else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(stats, denominator, logp, entropy)
        ctx.set_materialize_grads(False)
        loss = total_loss(stats, config, denominator).to(logp.dtype)
        # a finite loss is only given with finite gradients
        norms = [torch.linalg.vector_norm(g, torch.inf).to(logp.dtype) for g in gradients if g.numel()]
        finite = torch.stack([(largest / denominator).to(logp.dtype), *norms]).amax() < torch.inf
        return torch.where(finite, loss, loss + torch.inf), stats, denominator, logp, entropy

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 8
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        if scales_nothing(grad_loss):
            return *(None if dtype is None else g.to(dtype) for g, dtype in saved), *(None,) * 5
        return *(None if dtype is None else (g * grad_loss).to(dtype) for g, dtype in saved), *(None,) * 5
