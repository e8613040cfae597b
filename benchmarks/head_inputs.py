"""A case from hidden states: its shape, hidden states and an LM head with signal in them, packed, and the leaves of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pmpo_kernels.benchmarking.cases import Case
from pmpo_kernels.benchmarking.inputs import MARGIN, chunks, flat_trajectory, log_ratios, trajectories
from pmpo_kernels.benchmarking.measure import Steps
from pmpo_kernels.contract import STATS

PEAKS = 4  # number of likely tokens in a row
SPREAD = 1.5  # standard deviation of the logits of all other tokens


@dataclass(frozen=True, kw_only=True)
class HeadCase(Case):
    """A `Case` of a loss from hidden states of width `hidden` and an LM head (V, H) of the same dtype.

    Raises:
        ValueError: as `Case`; a preset that clips whole trajectories, because its bounds are below the rounding of 16-bit logits.
    """

    hidden: int
    padded: float = 0.375

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config.clip != "token":
            raise ValueError(f"preset: expected one that clips tokens, got {self.preset.value}")

    @property
    def title(self) -> str:
        hidden = f"({self.batch}, {self.tokens}, {self.hidden})"
        head = f"({self.vocab}, {self.hidden})"
        return f"{self.preset.value}, hidden states {hidden}, head {head}, {self.dtype.value}, {self.device}"

    @property
    def name(self) -> str:
        return f"{super().name}-h{self.hidden}"

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of the response tokens' hidden states and of the head; lengths are rounded otherwise."""
        tokens = round(self.batch * self.tokens * (1 - self.padded))
        return (tokens + self.vocab) * self.hidden * (self.row_bytes // self.vocab)

    @property
    def needed_bytes(self) -> int:
        """Bytes needed, roughly. On a GPU they are those of what must fit: float64 copies of the head, its gradient and chunks. On
        a CPU the widest row, eager PyTorch, adds seven float32 tensors of the response tokens' logits."""
        exact = 4 * 8 * self.vocab * self.hidden + 8 * 2**28
        return exact + (
            0 if self.device != "cpu" else round(28 * (1 - self.padded) * self.batch * self.tokens * self.vocab)
        )


class HeadInputs(NamedTuple):
    """The N response tokens of B trajectories, one trajectory after the other.

    hidden (N, H) and weight (V, H) are contiguous. token_ids, old_logp and logp, exact in float64, are (N,); advantages are (B,).
    mask (B, T) tells where the tokens stand in a padded batch. power (B,) float64 is the solved p where it is adaptive, else
    None."""

    hidden: Tensor
    weight: Tensor
    token_ids: Tensor
    old_logp: Tensor
    advantages: Tensor
    mask: Tensor
    power: Tensor | None
    logp: Tensor

    def pad(self, x: Tensor) -> Tensor:
        """Put x (N, ...) into a padded batch (B, T, ...), 0 elsewhere. It is differentiable."""
        padded = x.new_zeros(*self.mask.shape, *x.shape[1:])
        return padded.masked_scatter(self.mask.view(*self.mask.shape, *[1] * (x.dim() - 1)), x)

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.nn.functional.pad(self.mask.sum(1).cumsum(0), (1, 0))


def exact_logits(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of rows and the float64 logits (rows, V) of these, a chunk at a time."""
    exact = weight.double().t()
    for rows in chunks(hidden.shape[0], weight.shape[0]):
        yield rows, hidden[rows].double() @ exact


def build_head_inputs(case: HeadCase) -> HeadInputs:
    """Make the inputs of a case as `build_inputs` does, with tokens sampled from the softmax of hidden @ weight.T in float64.

    No log-ratio is so near a clip bound that the rounding of the logits (`logp_error`) decides whether it is clipped.

    Raises:
        ValueError: the clip bounds leave no room beside the rounding of the logits.
    """
    V, H = case.vocab, case.hidden
    generator = torch.Generator(case.device).manual_seed(case.seed)
    random: dict[str, Any] = {"generator": generator, "device": case.device}
    mask, advantages = trajectories(case, random)
    N, dtype = int(mask.sum()), getattr(torch, case.dtype.value)
    weight = (torch.randn(V, H, **random) / math.sqrt(H)).to(dtype)
    hidden = language_hidden(N, weight, random)
    token_ids = torch.empty(N, dtype=torch.int64, device=case.device)
    logp = torch.empty(N, dtype=torch.float64, device=case.device)
    largest = 0.0
    for rows, z in exact_logits(hidden, weight):
        largest = max(largest, float(z.abs().max()))
        log_q = z.log_softmax(-1)
        token_ids[rows] = torch.multinomial(log_q.exp(), 1, generator=generator)[:, 0]
        logp[rows] = log_q.gather(-1, token_ids[rows, None])[:, 0]
    margin = MARGIN + logp_error(hidden, weight, largest)
    bound = min(case.config.clip_low, case.config.clip_high)
    if margin > 0.9 * bound:
        raise ValueError(f"dtype: expected logits rounded by less than the clip bound {bound:.2g}, got {margin:.2g}")
    d = log_ratios(case, mask, advantages, random, margin)[mask]
    old_logp = (logp - d).float()
    inputs = HeadInputs(hidden, weight, token_ids, old_logp, advantages, mask, None, logp)
    if case.config.power != "ess":
        return inputs
    padded = (inputs.pad(logp), inputs.pad(old_logp), advantages, mask, case.config)
    return inputs._replace(power=flat_trajectory(*padded)[2][STATS.index("power")])


def language_hidden(N: int, weight: Tensor, random: dict[str, Any]) -> Tensor:
    """Hidden states (N, H), in the dtype of weight, whose logits are spread like a language model's, as in `language_logits`.

    They are noise, which gives the logits their spread, and as much of 4 random rows of weight as raises the logits of these to
    compete with all others together (log V + spread^2 / 2 + 1 - 1.5 log k). Mostly one of the 4 is then sampled.
    """
    V, H = weight.shape
    rank = torch.arange(1, PEAKS + 1, device=weight.device)
    raised = math.log(V) + SPREAD**2 / 2 + 1 - 1.5 * rank.log()
    noise = math.sqrt(max(0.0, SPREAD**2 - float((raised**2).sum()) / H))
    hidden = torch.randn(N, H, **random) * noise
    peaks = torch.randint(0, V, (N, PEAKS), **random)
    for k in range(PEAKS):
        row = weight[peaks[:, k]].float()
        missing = raised[k] - (hidden * row).sum(1)
        hidden += (missing / row.square().sum(1))[:, None] * row
    return hidden.to(weight.dtype)


def accumulation(terms: int) -> float:
    """Bound on the error of a sum of `terms` products in float32, in any order, over the sum of their absolute values.

    It is terms u; or, for independent roundings, 8 sqrt(terms) u, except with a probability of 1e-13 terms (N. Higham, T. Mary, A
    new approach to probabilistic rounding error analysis, 2019, theorem 3.1 with lambda = 8)."""
    return min(terms, 8 * math.sqrt(terms)) * torch.finfo(torch.float32).eps / 2


def logp_error(hidden: Tensor, weight: Tensor, largest: float) -> float:
    """Bound on what the rounding of the product with the head changes in a log-probability.

    The target's logit and the logsumexp each change by at most as much as a single logit z does: by u |z| for its storage in the
    dtype, and by `accumulation` times the product of the norms."""
    u = torch.finfo(weight.dtype).eps / 2
    norms = [float(torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).max()) for x in (hidden, weight)]
    return 2 * (u * largest + accumulation(weight.shape[1]) * norms[0] * norms[1])


class HeadBench(Steps):
    """Runs with the leaves hidden and weight, which nothing writes over. hidden is packed (N, H) or, with `padded`, (B, T, H)."""

    def __init__(self, inputs: HeadInputs, padded: bool = False) -> None:
        self.inputs, self.cuda = inputs, inputs.hidden.is_cuda
        self.hidden = (inputs.pad(inputs.hidden) if padded else inputs.hidden).detach().requires_grad_()
        self.weight = inputs.weight.detach().requires_grad_()

    def restore(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight
