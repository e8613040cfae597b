"""Properties of the loss over generated cases: what every implementation promises for any batch, layout and options."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from agreement import assert_agrees, assert_power, bounds, call_and_want, wanted, well_posed
from definition import denominator
from generated import for_every
from hypothesis import assume
from hypothesis import strategies as st
from strategies import (
    DTYPES,
    PACKED,
    PADDED,
    Batch,
    Call,
    Sizes,
    batches,
    call,
    configs,
    layouts,
    plain,
)
from torch import Tensor

from pmpo_kernels import LossConfig, pmpo_loss_from_logp, token_logp


def drawn(data: st.DataObject, sizes: Sizes, dtype: torch.dtype | None = None) -> tuple[LossConfig, Batch]:
    config = data.draw(configs(), "config")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype") if dtype is None else dtype
    return config, data.draw(batches(config, dtype, sizes), "batch")


def same(a: Call, b: Call, *, loss: bool = True) -> None:
    """The same bits."""
    assert torch.equal(a.grad, b.grad)
    assert torch.equal(a.logp, b.logp)
    for x, y in zip(a.out[4:], b.out[4:], strict=True):
        assert torch.equal(x, y)
    assert not loss or torch.equal(a.out.loss, b.out.loss)


@for_every(2.0)
def test_agrees_with_the_definition(data: st.DataObject, impl: str, device: str, sizes: Sizes) -> None:
    """Loss, gradient, p, ESS and clipped fractions of any batch in any layout, dtype and configuration."""
    config, batch = drawn(data, sizes)
    layout, inplace = data.draw(layouts(), "layout"), data.draw(st.booleans(), "inplace")
    D = data.draw(st.none() | st.floats(0.5, 50), "denominator")
    got, want, scale = call_and_want(batch, layout, config, impl, device, denominator=D)
    if inplace:
        same(got, call(batch, layout, config, impl, device, scale, denominator=D, inplace=True))
    assume(well_posed(batch, config, want))
    assert_agrees(batch, config, got, want, scale)
    assert_power(batch, config, got, want)


@for_every()
def test_layout_changes_no_bit(data: st.DataObject, impl: str, device: str, sizes: Sizes) -> None:
    """Packed or padded by any amount, with anything in the masked slots: the same bits."""
    config, batch = drawn(data, sizes)
    layout = data.draw(layouts(), "layout")
    # Triton: other lanes for masked slots inside the response and for rows of another alignment
    layout = layout._replace(holes=layout.holes and impl != "triton", strides="contiguous")
    base = PADDED if layout.packed else PACKED
    V = batch.logits.shape[1] * batch.logits.element_size() % 16
    assume(impl != "triton" or V == 0 or not layout.extra)
    same(call(batch, base, config, impl, device), call(batch, layout, config, impl, device))


@for_every()
def test_order_and_company_change_no_bit(data: st.DataObject, impl: str, device: str, sizes: Sizes) -> None:
    """Trajectories permuted, or split into micro-batches with one denominator: same p and gradient; losses add up."""
    config, batch = drawn(data, sizes)
    B = len(batch.lengths)
    layout = data.draw(st.sampled_from([PACKED, PADDED]), "layout")
    order = data.draw(st.permutations(range(B)), "order")
    cuts = sorted(data.draw(st.sets(st.integers(1, B)), "cuts") | {0, B})
    D = denominator(batch.trajectories(), config)
    whole = call(batch, layout, config, impl, device, denominator=D)
    parts = [call(batch.select(order[a:b]), layout, config, impl, device, denominator=D) for a, b in pairwise(cuts)]
    rows = torch.cat([p.grad for p in parts])
    expected = batch._replace(logits=whole.grad).select(list(order)).logits
    assert torch.equal(rows, expected)
    assert torch.equal(torch.cat([p.out.power for p in parts]), whole.out.power[list(order)])
    assert torch.equal(torch.cat([p.out.ess for p in parts]), whole.out.ess[list(order)])
    want = wanted(batch, config, whole.out.power.cpu(), D)
    losses = sum(float(p.out.loss.detach()) for p in parts)
    # each is rounded once, and so is the sum
    u = torch.finfo(whole.out.loss.dtype).eps
    magnitude = sum(abs(float(p.out.loss.detach())) for p in parts) + abs(float(whole.out.loss.detach()))
    noise = 4 * (B + 4) * torch.finfo(torch.float64).eps * want.loss_terms
    assert (
        abs(losses - float(whole.out.loss.detach())) <= u * magnitude + noise + torch.finfo(whole.out.loss.dtype).tiny
    )


@for_every()
def test_a_constant_on_a_row_changes_nothing(data: st.DataObject, impl: str, device: str, sizes: Sizes) -> None:
    """Logits of each row shifted by a constant: the definition's loss and gradient do not change, so neither may these."""
    config, batch = drawn(data, sizes, data.draw(st.sampled_from([torch.float32, torch.float64]), "dtype"))
    size = data.draw(st.sampled_from([1.0, 30.0, 1000.0]), "size")
    shift = torch.linspace(-size, size, len(batch.token_ids), dtype=torch.float64)[:, None]
    moved = batch._replace(logits=(batch.logits.double() + shift).to(batch.logits.dtype))
    # the addition is rounded too: at most u x, which the bound has six times; the sum of both is within twice the bound
    got = call(moved, PACKED, config, impl, device)
    before = wanted(batch, config, got.out.power.cpu())
    assume(well_posed(moved, config, before))
    assert_agrees(moved, config, got, before._replace(loss=wanted(moved, config, got.out.power.cpu()).loss))
    after = float(got.out.loss.detach())
    assert (
        abs(after - before.loss)
        <= 2 * bounds(moved, config, before).loss * before.loss_terms + torch.finfo(got.out.loss.dtype).tiny
    )


@for_every()
def test_scaled_ratios_scale_the_loss(data: st.DataObject, impl: str, device: str, sizes: Sizes) -> None:
    """M_p(s a) = s M_p(a), ESS(s a) = ESS(a): rollout weights times s scale loss and gradient by s, and leave p."""
    config, batch = drawn(data, sizes, data.draw(st.sampled_from([torch.float32, torch.float64]), "dtype"))
    config = (
        plain(config) if config.clip != "sequence" else plain(config, clip="none", clip_sides="one", dual_clip=None)
    )
    assume(config.clip == "token" or config.power != "ess" or batch.target_ess is not None)
    s = 2.0 ** data.draw(st.integers(-20, 20), "exponent")
    N = len(batch.token_ids)
    weights = torch.ones(N, dtype=torch.float64) if batch.rollout_weights is None else batch.rollout_weights
    a = call(batch._replace(rollout_weights=weights), PACKED, config, impl, device)
    # the same p: a solved one is only right to Newton's tolerance
    batch, config = batch._replace(power=a.out.power.cpu(), target_ess=None), replace(config, power=1.0)
    a = call(batch._replace(rollout_weights=weights), PACKED, config, impl, device)
    b = call(batch._replace(rollout_weights=weights * s), PACKED, config, impl, device)
    want = wanted(batch, config, a.out.power.cpu())
    assume(well_posed(batch, config, want))
    bound = bounds(
        batch._replace(rollout_weights=weights * s),
        config,
        wanted(batch._replace(rollout_weights=weights * s), config, a.out.power.cpu()),
    )
    lost = 2 * torch.finfo(a.grad.dtype).tiny * max(s, 1)  # below the smallest normal number
    assert abs(float(b.out.loss.detach()) - s * float(a.out.loss.detach())) <= s * bound.loss * want.loss_terms + lost
    # the same rounding of q on both sides; coefficients differ by float64 noise and one rounding
    allowed = (bound.rows * s * a.grad.double().abs()) + lost
    peak = s * bound.rows * want.row[:, None] / config.temperature * want.log_q.detach().exp() if N else allowed
    assert bool(((b.grad.double() - s * a.grad.double()).abs() <= allowed + peak).all())
    some = a.out.ess > 0
    assert torch.allclose(b.out.ess[some].log(), a.out.ess[some].log(), rtol=0, atol=bound.deficit)


@for_every(0.25)
def test_ess_falls_as_p_grows(data: st.DataObject, impl: str, device: str, sizes: Sizes) -> None:
    """On either side of p = 0, where it is n without weights of 0."""
    config, batch = drawn(data, sizes, torch.float64)
    config = replace(plain(config), power=1.0, temperature=1.0)
    grid = [-3.0, -1.0, -0.1, 0.0, 1e-4, 0.1, 0.5, 1.0, 2.0, 4.0]
    B = len(batch.lengths)
    batch = batch._replace(target_ess=None)
    found = []
    for p in grid:
        x = batch._replace(power=torch.full((B,), p, dtype=torch.float64))
        found.append(call(x, PACKED, config, impl, device).out.ess.cpu())
    want = wanted(batch._replace(power=torch.ones(B)), config, torch.full((B,), 4.0))
    for i, x in enumerate(want.trajectories):
        values = [float(e[i]) for e in found]
        if x is None or not len(x.log_a) or not bool((x.log_a > -torch.inf).any()):
            assert values == [0.0] * len(grid)
            continue
        noise = (
            64
            * (len(x.log_a) + 16)
            * torch.finfo(torch.float64).eps
            * (1 + 4 * float(x.log_a.detach()[x.log_a > -torch.inf].abs().max()))
        )
        at_zero = grid.index(0.0)
        for a, b in pairwise(values[at_zero + 1 :]):
            assert b <= a * (1 + noise)
        if bool((x.log_a == -torch.inf).any()):
            assert values[: at_zero + 1] == [0.0] * (at_zero + 1)
            continue
        assert abs(values[at_zero] - len(x.log_a)) <= noise * len(x.log_a)
        for a, b in pairwise(values[: at_zero + 1]):
            assert a <= b * (1 + noise)


@for_every(0.5)
def test_log_probs_give_the_same_loss(data: st.DataObject, impl: str, device: str, sizes: Sizes) -> None:
    """token_logp, then pmpo_loss_from_logp: the bits of pmpo_loss, and a gradient through both."""
    config, batch = drawn(data, sizes)
    got = call(batch, PACKED, config, impl, device)
    z = batch.logits.to(device).clone().requires_grad_()
    one = token_logp(z, batch.token_ids.to(device), temperature=config.temperature, impl=impl)

    def there(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device)

    out = pmpo_loss_from_logp(
        one.logp, there(batch.old_logp), batch.advantages.to(device), entropy=one.entropy,
        cu_seqlens=torch.tensor([0, *torch.tensor(batch.lengths).cumsum(0)], device=device),
        ref_logp=there(batch.ref_logp), rollout_weights=there(batch.rollout_weights), policy_mask=there(batch.policy_mask),
        power=there(batch.power), target_ess=there(batch.target_ess), config=replace(config, temperature=1.0), impl=impl,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out.loss, z)
    assert torch.equal(out.loss, got.out.loss)
    assert torch.equal(grad.cpu(), got.grad)
    assert torch.equal(out.ess, got.out.ess)
