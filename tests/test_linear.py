"""The fused LM head: equal to `pmpo_loss` on materialised logits, whatever the chunks, the dtype and the implementation."""

from __future__ import annotations

import pytest
import torch
from conftest import CONFIGURATIONS, device_of
from head_cases import HeadCase, head_case, materialised, product_error, products, run_head
from helpers import same_bits
from torch import Tensor
from torch.nn.functional import linear

from pmpo_kernels import LossConfig, PMPOOutput, linear_pmpo_loss, pmpo_loss
from pmpo_kernels.verification import error_bound, make_case, oracle

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CHUNKS = [
    None,
    1,
    5,
    12,
]  # trajectories have 7 tokens and fewer: all at once, all in pieces, longer ones in pieces, whole
ALL = {"skip_zero_advantage": False}


def check(head: HeadCase, config: LossConfig, impl: str | None, **kwargs: object) -> PMPOOutput:
    """The loss, everything beside it and the gradients are those of `pmpo_loss`."""
    want = materialised(head, config, impl)
    out, found = run_head(head, config, impl, **kwargs)
    assert product_error(found, want, head.hidden.dtype) <= 1
    if kwargs.get("skip_zero_advantage", True) and not config.beta and not config.entropy_coef:
        assert torch.equal(out.loss, want.out.loss)
    else:
        same_bits(out, want.out)
        assert torch.equal(out.logp, want.out.logp)
        assert torch.equal(out.entropy, want.out.entropy)
    return out


# --- equal to pmpo_loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("chosen", "chunk"), [*(("cpp", chunk) for chunk in CHUNKS), ("reference", 5)])
def test_equals_pmpo_loss(config: LossConfig, chosen: str, chunk: int | None, dtype: torch.dtype) -> None:
    head = head_case(dtype)
    check(head, config, chosen, max_chunk_tokens=chunk, **ALL)
    check(head, config, chosen, max_chunk_tokens=chunk)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "chunk"), [("pmpo, severity in between", 12), ("pmpo, all terms", 5)])
def test_triton_equals_pmpo_loss(name: str, chunk: int, dtype: torch.dtype) -> None:
    check(head_case(dtype, device_of("triton")), CONFIGURATIONS[name], "triton", max_chunk_tokens=chunk, **ALL)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_what_is_given_for_each_trajectory(chunk: int | None, impl: str, device: str) -> None:
    """target_ess and power reach their own trajectories, whatever chunk they are in; ids and mask of other dtypes."""
    head = head_case(torch.float64, device)
    c, B = head.case, len(head.case.advantages)
    ess = c.mask.sum(1) * torch.linspace(0.9, 1, B, device=device).double()
    for config, options in (
        (
            LossConfig.pmpo(beta=0.1),
            {"target_ess": ess, "ref_logp": c.ref_logp, "policy_mask": c.ref_logp < c.old_logp},
        ),
        (LossConfig.holder_token(0.0), {"power": torch.linspace(-2, 2, B, device=device).double()}),
    ):
        want = materialised(head, config, impl, **options)
        integers = {"mask": 3 * c.mask.int(), **options}
        small = head._replace(case=c._replace(token_ids=c.token_ids.int()))
        out, found = run_head(small, config, impl, max_chunk_tokens=chunk, **ALL, **integers)
        assert product_error(found, want, torch.float64) <= 1
        same_bits(out, want.out)


def test_rejects_wrong_gradients() -> None:
    """The bound of the tests above is narrow enough to see what a fused head can get wrong."""
    head, config = head_case(torch.bfloat16), LossConfig.pmpo(full_clip_fraction=0.5)
    want = materialised(head, config, None)
    _, found = run_head(head, config, None)
    assert product_error(found, want, torch.bfloat16) <= 1
    z = head.case.logits.double()
    ids = head.case.token_ids[..., None]
    g = oracle(head.case, config, want.out.power).grad

    def wrong(g: Tensor) -> list[Tensor | None]:
        return [x.to(torch.bfloat16) for x in products(g, head.hidden, head.weight)]

    assert product_error(wrong(g), want, torch.bfloat16) <= 2  # its own rounding of the gradient is not in the bound
    softmax = 1.05 * g
    no_trajectory = torch.where(torch.arange(len(z))[:, None, None] == 0, 0, g)
    for bad in (softmax.scatter(-1, ids, g.gather(-1, ids)), no_trajectory, g.roll(1, 1), g.roll(1, 2), 0 * g):
        assert product_error(wrong(bad), want, torch.bfloat16) > 2
    twice = [2 * x for x in found]
    assert product_error(twice, want, torch.bfloat16) > 2


@pytest.mark.parametrize("chosen", [None, "reference"])
@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (None, 0.6), (2.0, 1.3)])
@pytest.mark.parametrize("name", ["pmpo, all terms", "gmpo", "sequence clip, dual, k2"])
def test_gradcheck(name: str, softcap: float | None, scale: float, chunk: int | None, chosen: str | None) -> None:
    """Against finite differences of the formula in the docstring, in float64; p is a constant."""
    config, case = CONFIGURATIONS[name], make_case(torch.float64, B=4, T=2, V=3)
    random = torch.Generator().manual_seed(1)
    leaves = [torch.randn(s, dtype=torch.float64, generator=random).requires_grad_() for s in ((4, 2, 2), (3, 2), (3,))]
    rest = {"mask": case.mask, "ref_logp": case.ref_logp, "rollout_weights": case.rollout_weights, "config": config}
    given_ = (case.token_ids, case.old_logp, case.advantages)

    def fused(h: Tensor, w: Tensor, b: Tensor, power: Tensor | None) -> PMPOOutput:
        return linear_pmpo_loss(
            h, w, *given_, bias=b, logit_scale=scale, logit_softcap=softcap, max_chunk_tokens=chunk, power=power,
            impl=chosen, **rest,
        )  # fmt: skip

    out = fused(*leaves, None)
    power = out.power.nan_to_num(0.5)
    assert torch.autograd.gradcheck(lambda *x: fused(*x, power).loss, leaves)
    z = scale * linear(*leaves)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    assert fused(*leaves, power).loss.item() == pytest.approx(pmpo_loss(z, *given_, power=power, **rest).loss.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("softcap", "scale"), [(None, 0.6), (5.0, 1.3)])
def test_scale_and_softcap(softcap: float | None, scale: float, dtype: torch.dtype, impl: str, device: str) -> None:
    """Against autograd in float64 from the logits as they are rounded: c tanh once, the slope not at all."""
    head, config = head_case(dtype, device), LossConfig.grpo(clip="none")
    leaves = [x.double().requires_grad_() for x in head[:3]]
    z = scale * linear(*leaves)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
        z = z + (z.to(dtype).double() - z).detach()
    given_ = (head.case.token_ids, head.case.old_logp.double(), head.case.advantages.double())
    want = pmpo_loss(z, *given_, mask=head.case.mask, config=config)
    exact = torch.autograd.grad(want.loss, leaves)
    out, found = run_head(
        head, config, impl, logit_scale=scale, logit_softcap=softcap, ref_logp=None, rollout_weights=None
    )
    # float32 products and tanh add four roundings of a logit, which two logits of logp carry into (1 + 2 p) of a coefficient;
    # the gradient of the product is rounded to 16 bits once more than that of the logits, and so is what it becomes
    x, u = float(z.detach().abs().max()), torch.finfo(torch.float32).eps / 2
    stored = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0
    bound = error_bound(dtype, z.shape[-1], x, 1.0) + 3 * 2 * 4 * u * x + 2 * stored
    g = torch.autograd.grad(
        pmpo_loss(y := z.detach().requires_grad_(), *given_, mask=head.case.mask, config=config).loss, y
    )
    for a, b, terms in zip(found, exact, products(g[0].abs(), head.hidden.abs(), head.weight.abs()), strict=True):
        assert ((a.double() - b).abs() <= bound * scale * terms + 1e-30).all()
    assert out.loss.item() == pytest.approx(want.loss.item(), rel=bound)
