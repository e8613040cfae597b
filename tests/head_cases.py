"""What the tests of the fused LM head share: a batch whose logits are exact, so that only the products' sums are rounded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from helpers import run
from torch import Tensor

from pmpo_kernels import LossConfig, PMPOOutput, linear_pmpo_loss
from pmpo_kernels.contract import compute_dtype
from pmpo_kernels.verification import Case, make_case


class HeadCase(NamedTuple):
    """hidden (B, T, H), weight (V, H), bias (V,), and the batch that belongs to their logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    case: Case


def head_case(dtype: torch.dtype, device: str = "cpu", *, V: int = 72) -> HeadCase:
    """Make a case of small multiples of a power of two, so that the logits are exact in every dtype, in whatever order a product
    adds."""
    random = torch.Generator().manual_seed(0)
    B, T, H = 6, 7, 8

    def multiples(step: float, most: int, *shape: int) -> Tensor:
        return step * torch.randint(-most, most + 1, shape, generator=random).double()

    hidden, weight, bias = multiples(0.5, 2, B, T, H), multiples(0.5, 3, V, H), multiples(0.25, 4, V)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    assert torch.equal(logits, logits.bfloat16().double())
    log_q = torch.log_softmax(logits, -1)
    token_ids = torch.multinomial(log_q.exp().flatten(0, 1), 1, generator=random).view(B, T)
    logp = log_q.gather(-1, token_ids[..., None])[..., 0]
    old_logp, ref_logp = (logp + s * torch.randn(B, T, generator=random, dtype=torch.float64) for s in (0.25, 0.3))
    small = compute_dtype(dtype)
    case = make_case(dtype, B=B, T=T, V=V)._replace(
        logits=logits.to(dtype), token_ids=token_ids, old_logp=old_logp.to(small), ref_logp=ref_logp.to(small)
    )
    tensors = [x.to(dtype).to(device) for x in (hidden, weight, bias)]
    return HeadCase(*tensors, Case(*(x.to(device) for x in case)))


def loss_scale(dtype: torch.dtype) -> float:
    """Factor that float16 losses are multiplied by, as trainers do, lest gradients underflow."""
    return 4096.0 if dtype == torch.float16 else 1.0


def run_head(
    head: HeadCase, config: LossConfig, impl: str | None, **kwargs: object
) -> tuple[PMPOOutput, list[Tensor | None]]:
    """Return the output of `linear_pmpo_loss` with every optional argument in use, and the gradients of hidden, weight and bias at
    `loss_scale`."""
    hidden, weight, bias = (x.detach().clone().requires_grad_() for x in head[:3])
    c = head.case
    options = {"bias": bias, "mask": c.mask, "ref_logp": c.ref_logp, "rollout_weights": c.rollout_weights} | kwargs
    out = linear_pmpo_loss(hidden, weight, c.token_ids, c.old_logp, c.advantages, config=config, impl=impl, **options)
    (loss_scale(hidden.dtype) * out.loss).backward()
    return out, [hidden.grad, weight.grad, bias.grad]


class Materialised(NamedTuple):
    """The results of `pmpo_loss` on the logits of the whole batch, with the products of its gradient in float64: gradients of
    hidden, weight and bias, and the sum of the absolute values of the terms of each of their entries."""

    out: PMPOOutput
    gradients: list[Tensor]
    terms: list[Tensor]


def materialised(head: HeadCase, config: LossConfig, impl: str | None, **options: Tensor) -> Materialised:
    """Compute everything that `linear_pmpo_loss` must give, at `loss_scale`."""
    dtype = head.hidden.dtype
    out, dlogits = run(head.case, config, impl, scale=loss_scale(dtype), **options)
    g = dlogits.double()
    terms = products(g.abs(), head.hidden.abs(), head.weight.abs())
    if dtype == torch.float16:  # entries below its smallest number, 2^-24 of the largest coefficient
        below = torch.where(g.abs().amax(-1, keepdim=True) > 0, g.abs().max(), 0).expand_as(g)
        terms = [a + b / 4 for a, b in zip(terms, products(below, head.hidden.abs(), head.weight.abs()), strict=True)]
    return Materialised(out, products(g, head.hidden, head.weight), terms)


def products(g: Tensor, hidden: Tensor, weight: Tensor) -> list[Tensor]:
    """Gradients of hidden, weight and bias, in float64, of logits with gradient g (B, T, V)."""
    return [g @ weight.double(), g.flatten(0, 1).t() @ hidden.double().flatten(0, 1), g.sum((0, 1))]


def product_error(found: list[Tensor | None], want: Materialised, dtype: torch.dtype) -> float:
    """Largest |found - want| of an entry over its bound; at most 1 if the gradient of the logits had the same bits.

    The bound is the sum of the absolute values of the entry's terms times n u + 2 u16: a sum of n terms rounds n times in the
    dtype of the arithmetic, whatever its order; 16-bit results are rounded once, partial ones of a chunk once more.
    """
    u = torch.finfo(compute_dtype(dtype)).eps / 2
    stored = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0
    B, T, _ = want.terms[0].shape
    worst = 0.0
    for got, exact, terms, n in zip(found, want.gradients, want.terms, (len(want.terms[1]), B * T, B * T), strict=True):
        error, bound = (got.double() - exact).abs(), terms * ((n + 2) * u + 2 * stored)
        share = torch.where(error == 0, 0, error / bound)  # infinite where there is nothing to add up
        worst = max(worst, float(share.nan_to_num(torch.inf).max()))
    return worst


CLIPPING = LossConfig.grpo()


def call(head: HeadCase, leaves: list[Tensor], config: LossConfig = CLIPPING, **kwargs: object) -> Tensor:
    c = head.case
    given = (c.token_ids, c.old_logp, c.advantages)
    return linear_pmpo_loss(*leaves, *given, **{"bias": head.bias, "mask": c.mask, "config": config} | kwargs).loss


def leaves_of(head: HeadCase, *trained: bool) -> list[Tensor]:
    return [x.clone().requires_grad_(t) for x, t in zip((head.hidden, head.weight), trained, strict=True)]
