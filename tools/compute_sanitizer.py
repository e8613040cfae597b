"""Small forward and backward passes of the Triton kernels, for `compute-sanitizer python tools/compute_sanitizer.py`.

Lengths and vocabularies are no multiples of a block, rows begin anywhere and are shared by several programs or not, so that every
tail, edge and mask is exercised. Then come every optional input and further way into the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor

from pmpo_kernels import LossConfig, linear_pmpo_loss, pmpo_loss, pmpo_loss_from_logp, token_logp
from pmpo_kernels import triton as stages
from pmpo_kernels.batch import Batch
from pmpo_kernels.impls import interpreted

CONFIGS = {"pmpo": LossConfig.pmpo(entropy_coef=0.01, beta=0.1), "gspo": LossConfig.gspo()}
TERMS = LossConfig.pmpo(entropy_coef=0.01, beta=0.1, temperature=0.7, dual_clip=2.0)


class Case(NamedTuple):
    """Four trajectories of up to T tokens."""

    logits: Tensor
    token_ids: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    advantages: Tensor
    mask: Tensor


def make_batch(V: int, T: int, dtype: torch.dtype, device: str) -> Case:
    B = 4
    generator = torch.Generator(device).manual_seed(0)
    logits = (2 * torch.randn(B, T, V, generator=generator, device=device)).to(dtype)
    token_ids = torch.randint(0, V, (B, T), generator=generator, device=device)
    logp = logits.float().log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]
    old_logp, ref_logp = (logp + 0.3 * torch.randn(B, T, generator=generator, device=device) for _ in range(2))
    advantages = torch.tensor([1.0, -1.0, 0.5, 0.0], device=device)
    mask = torch.rand(B, T, generator=generator, device=device) > 0.2
    return Case(logits, token_ids, old_logp, ref_logp, advantages, mask)


def finite(loss: Tensor, *leaves: Tensor) -> None:
    gradients = torch.autograd.grad(loss, leaves)
    assert all(bool(x.isfinite().all()) for x in (loss, *gradients))


def run(V: int, T: int, dtype: torch.dtype, packed: bool, inplace: bool, config: LossConfig, device: str) -> None:
    """Compute one loss and its gradient."""
    logits, token_ids, old_logp, ref_logp, advantages, mask = make_batch(V, T, dtype, device)
    cu_seqlens = None
    if packed:
        logits, token_ids, old_logp, ref_logp, mask = (
            x.flatten(0, 1) for x in (logits, token_ids, old_logp, ref_logp, mask)
        )
        cu_seqlens = torch.tensor([0, 5, 5, 90, len(token_ids)], device=device).clamp(max=len(token_ids))
    logits.requires_grad_()
    out = pmpo_loss(
        logits,
        token_ids,
        old_logp,
        advantages,
        mask=mask,
        cu_seqlens=cu_seqlens,
        ref_logp=ref_logp,
        config=config,
        inplace=inplace,
        impl="triton",
    )
    finite(out.loss, logits)


def loss(batch: Case, config: LossConfig | None = None, **options: object) -> None:
    logits = batch.logits.requires_grad_()
    out = pmpo_loss(
        logits,
        batch.token_ids,
        batch.old_logp,
        batch.advantages,
        mask=batch.mask,
        config=config,
        impl="triton",
        **options,
    )
    finite(out.loss, logits)


def without_options(batch: Case) -> None:
    logits = batch.logits.requires_grad_()
    out = pmpo_loss(logits, batch.token_ids, None, batch.advantages, config=LossConfig.grpo(), impl="triton")
    finite(out.loss, logits)


def more_positions(batch: Case) -> None:
    """Run on logits of T + 1 positions, whose rows are wider and begin where no row of the batch does."""
    B, T, V = batch.logits.shape
    wide = batch.logits.new_zeros(B, T + 1, V + 8)
    wide[:, :T, 1 : V + 1] = batch.logits
    loss(batch._replace(logits=wide[..., 1 : V + 1].detach()), TERMS, ref_logp=batch.ref_logp)


def long_trajectories(batch: Case) -> None:
    """Run from log-probs on trajectories one token longer than some blocks, and a step, of the trajectory kernels, between two
    short ones."""
    N = 1025 + 4
    logp, old_logp, ref_logp, entropy = torch.linspace(-1, 1, 4 * N, device=batch.logits.device).view(4, N)
    leaves = [x.clone().requires_grad_() for x in (logp, entropy)]
    out = pmpo_loss_from_logp(
        leaves[0], old_logp, batch.advantages[:3], entropy=leaves[1], ref_logp=ref_logp, config=CONFIGS["pmpo"],
        cu_seqlens=torch.tensor([0, 3, N - 1, N], device=logp.device), impl="triton",
    )  # fmt: skip
    finite(out.loss, *leaves)


def log_probs_alone(batch: Case) -> None:
    logits = batch.logits.requires_grad_()
    out = token_logp(logits, batch.token_ids, mask=batch.mask, temperature=0.7, impl="triton")
    finite(out.logp.sum() + out.entropy.sum(), logits)


def linear(batch: Case) -> None:
    """Run through the LM head. The rows of its buffer are wider than the vocabulary, and chunks are smaller than a trajectory."""
    B, T, V = batch.logits.shape
    hidden, weight = (torch.ones(*size, 16, device=batch.logits.device, requires_grad=True) for size in ((B, T), (V,)))
    out = linear_pmpo_loss(
        hidden, weight, batch.token_ids, batch.old_logp, batch.advantages, mask=batch.mask, ref_logp=batch.ref_logp,
        config=TERMS, max_chunk_tokens=T - 1, impl="triton",
    )  # fmt: skip
    finite(0.3 * out.loss, hidden, weight)  # scaled in place


def values_that_nobody_checks(batch: Case) -> None:
    """Run on a GPU with ids outside of the vocabulary and offsets outside of the tokens. Nothing is read or written there."""
    ids = batch.token_ids.clone()
    ids[:, ::2] = 2**40
    logp, *saved = stages.token_logp(batch.logits, ids, batch.mask, 1.0)
    stages.dlogits(batch.logits, ids, batch.mask, *saved, torch.ones_like(logp), None, 1.0)
    offsets = torch.tensor([-5, 3, 2**40, 7, 2], device=ids.device)
    options = CONFIGS["gspo"].trajectory_options(has_power=False, has_target_ess=False)
    stages.trajectory(logp.flatten(), None, Batch(batch.advantages, offsets), options)


FURTHER: dict[str, Callable[[Case], None]] = {
    "every optional input": lambda b: loss(
        b, TERMS, ref_logp=b.ref_logp, rollout_weights=(0.1 * b.ref_logp).exp(), policy_mask=b.ref_logp < b.old_logp
    ),
    "no optional input": without_options,
    "power": lambda b: loss(b, LossConfig.pmpo(), power=b.advantages + 1),
    "target_ess": lambda b: loss(b, LossConfig.pmpo(), target_ess=b.advantages + 3),
    "absolute rule": lambda b: loss(b, LossConfig.pmpo(ess_rule="absolute", ess_floor=0.98)),
    "T + 1 positions, strided rows": more_positions,
    "long trajectories": long_trajectories,
    "log-probs alone": log_probs_alone,
    "LM head": linear,
    "values that nobody checks": values_that_nobody_checks,
}


def main(
    tiny: Annotated[bool, typer.Option("--tiny", help="A rehearsal: few rows, a small vocabulary.")] = False,
) -> None:
    """Run every combination. On CPU tensors this needs Triton's interpreter."""
    device = "cpu" if interpreted() else "cuda"
    few = (40, 3) if tiny else (1000, 37)
    for V, T in (few,) if tiny else (few, (17_003, 37), (17_003, 80)):  # 320 rows are enough for a program each
        for dtype in (torch.bfloat16,) if tiny else (torch.bfloat16, torch.float32):
            for packed in (False, True):
                for inplace, config in product((False, True), CONFIGS.values()):
                    run(V, T, dtype, packed, inplace, config, device)
                print(f"ran V={V} T={T} {dtype} {'packed' if packed else 'padded'} on {device}", flush=True)
    for dtype in (torch.float16, torch.float64):
        run(*few, dtype, False, False, CONFIGS["pmpo"], device)
    for name, call in FURTHER.items():
        call(make_batch(*few, torch.bfloat16, device))
        print(f"ran {name} on {device}", flush=True)


if __name__ == "__main__":
    typer.run(main)
