"""The loss from the model's hidden states: the fused LM head beside all logits at once, against float64."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rollouts import Policy, Rollouts
from time_and_memory import peak_memory, timed
from torch import Tensor
from torch.nn.functional import linear

from pmpo_kernels.api import pmpo_loss
from pmpo_kernels.config import LossConfig
from pmpo_kernels.linear import linear_pmpo_loss
from pmpo_kernels.verification import error_bound
from pmpo_kernels.verification.baseline import eager_pmpo_loss

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from head_accuracy import HeadExact, bounds, errors, exact
from head_inputs import HeadInputs, exact_logits

REPEATS = 3
CHUNK_TOKENS = 128
CONFIG = LossConfig.pmpo()
Run = Callable[[Tensor, Tensor, Rollouts], Tensor]
"""(hidden (B, T, H), weight (V, H), rollouts) -> loss ()."""


@dataclass(frozen=True)
class HeadRow:
    """One way from hidden states to the gradients of hidden states and weight. Errors are relative to what the bounds are relative
    to (`benchmarks/head_accuracy.py`); times are seconds."""

    name: str
    loss: float
    loss_error: float
    loss_bound: float
    hidden_error: float
    weight_error: float
    bound: float
    seconds: float
    peak_bytes: int

    @property
    def error(self) -> float:
        """The larger error of the two gradients."""
        return max(self.hidden_error, self.weight_error)

    @property
    def ok(self) -> bool:
        """Whether every error is within its bound; NaN is not."""
        return self.loss_error <= self.loss_bound and self.error <= self.bound


def eager(hidden: Tensor, weight: Tensor, r: Rollouts) -> Tensor:
    """Compute the loss as trainers write it: all logits, then plain PyTorch."""
    return eager_pmpo_loss(linear(hidden, weight), r.token_ids, r.old_logp, r.advantages, r.mask, CONFIG)


def materialised(hidden: Tensor, weight: Tensor, r: Rollouts) -> Tensor:
    """Compute the loss by `pmpo_loss` on all logits, whose gradient is written over them."""
    z = linear(hidden, weight)
    return pmpo_loss(z, r.token_ids, r.old_logp, r.advantages, mask=r.mask, inplace=True).loss


def fused(max_chunk_tokens: int | None) -> Run:
    """Make a function that runs `linear_pmpo_loss` with chunks of at most so many tokens."""

    def run(hidden: Tensor, weight: Tensor, r: Rollouts) -> Tensor:
        return linear_pmpo_loss(
            hidden, weight, r.token_ids, r.old_logp, r.advantages, mask=r.mask, max_chunk_tokens=max_chunk_tokens
        ).loss

    return run


RUNS = {
    "eager PyTorch": eager,
    "lm_head, pmpo_loss": materialised,
    "linear_pmpo_loss": fused(None),
    f"linear_pmpo_loss, {CHUNK_TOKENS} tokens a chunk": fused(CHUNK_TOKENS),
}


def compare_heads(policy: Policy, rollouts: Rollouts, advance: Callable[[str], None]) -> list[HeadRow]:
    """Make a row for each of `RUNS`, on the hidden states of the policy in float32. `advance(what)` is called before each.

    The bound of eager PyTorch is what the rounding of the product with the head can do at worst, which is far from what it does.
    The bound of the others is eager's own error, of the same product, and what may come after it (`verification.error_bound`).
    """
    with torch.no_grad():
        hidden = policy.hidden_states(rollouts)[:, :-1].float()
    weight = policy.model.lm_head.weight.detach().float()
    keep = rollouts.mask
    inputs = HeadInputs(
        hidden[keep], weight, rollouts.token_ids[keep], rollouts.old_logp[keep], rollouts.advantages, keep, None,
        torch.empty(0),
    )  # fmt: skip
    logp = [z.log_softmax(-1).gather(-1, inputs.token_ids[rows, None])[:, 0] for rows, z in exact_logits(*inputs[:2])]
    inputs = inputs._replace(logp=torch.cat(logp))
    want = exact(inputs, CONFIG)
    rows: list[HeadRow] = []
    bound, loss_bound = bounds(inputs, want, CONFIG)
    for name, run in RUNS.items():
        advance(f"comparing {name} with float64")
        rows.append(measure(name, run, hidden, rollouts, inputs, want, bound, loss_bound))
        if len(rows) == 1:
            fused_only = error_bound(torch.float32, weight.shape[0], want.largest, want.power, solved=True)
            bound, loss_bound = rows[0].error + fused_only, rows[0].loss_error + fused_only
    return rows


def measure(
    name: str,
    run: Run,
    hidden: Tensor,
    r: Rollouts,
    inputs: HeadInputs,
    want: HeadExact,
    bound: float,
    loss_bound: float,
) -> HeadRow:
    """Measure errors, median time of `REPEATS` runs and peak memory of one way."""
    leaves = [x.detach().requires_grad_() for x in (hidden, inputs.weight)]

    def once() -> tuple[Tensor, ...]:
        loss = run(leaves[0], leaves[1], r)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    loss, dhidden, dweight = once()
    parts, loss_error = errors(loss, dhidden, dweight, inputs, want)
    del dhidden, dweight
    seconds = statistics.median(timed(once, hidden.device)[0] for _ in range(REPEATS))
    return HeadRow(
        name,
        float(loss),
        loss_error,
        loss_bound,
        parts.hidden,
        max(parts.weight_target, parts.weight_other),
        bound,
        seconds,
        peak_memory(once, hidden.device),
    )


def head_table(rows: list[HeadRow], memory_method: str) -> Table:
    """Make the table of errors, memory and time."""
    caption = (
        "From the model's hidden states in float32 to the gradients of hidden states and head. Errors: largest of a row, "
        f"relative to the norms of its terms. ms: forward + backward, median of {REPEATS}. MiB: {memory_method}."
    )
    table = Table(
        title="Hidden states in, loss out: the fused LM head against float64",
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for name in ("loss", "d hidden", "d weight", "ms", "MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name if row.ok else f"[red]{row.name}: FAILED[/red]",
            f"{row.loss:+.5f}",
            f"{row.hidden_error:.1e}",
            f"{row.weight_error:.1e}",
            f"{1e3 * row.seconds:.0f}",
            f"{row.peak_bytes / 2**20:.0f}",
        )
    return table
