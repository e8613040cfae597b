"""Extreme values, each implementation: overflow, zeros, infinities, NaN, certain tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import CONFIGURATIONS
from helpers import run, small_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pmpo_kernels import LossConfig, pmpo_loss, pmpo_loss_from_logp, token_logp
from pmpo_kernels.batch import Batch
from pmpo_kernels.contract import STATS
from pmpo_kernels.ops import stage
from pmpo_kernels.verification import Case, make_case, oracle, row_sum_tolerance, three_part_error, tolerance


def test_zero_advantage_is_exactly_zero(impl: str, device: str) -> None:
    """Whatever the ratios are: overflowing, zero, or NaN."""
    T, V = 4, 8
    z = torch.randn(3, T, V, device=device, requires_grad=True)
    old = torch.tensor([[-900.0] * T, [900.0] * T, [math.nan] * T], device=device)
    for name, config in CONFIGURATIONS.items():
        if config.beta or config.entropy_coef:
            continue
        out = pmpo_loss(
            z,
            torch.zeros(3, T, dtype=torch.long, device=device),
            old,
            torch.zeros(3, device=device),
            config=config,
            impl=impl,
        )
        (grad,) = torch.autograd.grad(out.loss, z)
        assert out.loss == 0, name
        assert (grad == 0).all(), name


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    d=st.lists(st.sampled_from([0.0, 0.3, -0.3, 5.0, -5.0, 89.0, -89.0, 400.0, -400.0, 2000.0, -2000.0]), min_size=1, max_size=6),
    advantage=st.sampled_from([1.0, -1.0, 1e-30, -1e30]),
    name=st.sampled_from(list(CONFIGURATIONS)),
)  # fmt: skip
def test_a_finite_loss_has_a_finite_gradient(
    impl: str, device: str, d: list[float], advantage: float, name: str
) -> None:
    """|d| > 88 overflows float32's exp: peers give a finite loss with a NaN gradient there."""
    logp = (torch.tensor([d], device=device) - 1).requires_grad_()
    old = torch.full_like(logp, -1.0).detach()
    config = replace(CONFIGURATIONS[name], temperature=1.0, entropy_coef=0.0)
    out = pmpo_loss_from_logp(
        logp, old, torch.tensor([advantage], device=device), ref_logp=old, config=config, impl=impl
    )
    (grad,) = torch.autograd.grad(out.loss, logp)
    if bool(out.loss.isfinite()):
        assert bool(grad.isfinite().all()), (out.loss, grad)


def test_an_entropy_of_fewer_bits_does_not_limit_the_loss(impl: str, device: str) -> None:
    """Without entropy_coef it is there for the metrics; with it, its own gradient is what its dtype must hold."""
    logp = torch.tensor([[13.0, 0.0]], device=device, requires_grad=True)  # d = 14 on one token: a gradient of 6e5
    entropy = torch.ones(1, 2, dtype=torch.float16, device=device, requires_grad=True)
    given = (torch.full((1, 2), -1.0, device=device), torch.ones(1, device=device))
    losses = {}
    for coefficient in (0.0, 1e4, 1e6):
        config = LossConfig(power=1.0, clip="none", entropy_coef=coefficient)
        losses[coefficient] = pmpo_loss_from_logp(logp, *given, entropy=entropy, config=config, impl=impl).loss
    alone = pmpo_loss_from_logp(logp, *given, config=LossConfig(power=1.0, clip="none"), impl=impl).loss
    assert losses[0.0] == alone
    assert alone.isfinite()
    assert alone < -1e5
    (gradient,) = torch.autograd.grad(losses[1e4], entropy)
    assert gradient.tolist() == [[-5000.0, -5000.0]]
    assert not losses[1e6].isfinite()  # -5e5 is beyond float16


def test_large_powers_in_fewer_bits(impl: str, device: str) -> None:
    """1e30 as float32 and bfloat16 round it: the maximum of the ratios."""
    logp = torch.tensor([[0.25, 0.0]], device=device).double()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        power = torch.full((1,), 1e30, dtype=dtype, device=device)
        out = pmpo_loss_from_logp(
            logp,
            0 * logp,
            torch.ones(1, device=device),
            power=power,
            config=LossConfig(power=1.0, clip="none"),
            impl=impl,
        )
        assert out.loss.item() == pytest.approx(-math.exp(0.25), rel=1e-14)


def test_large_log_ratio_is_clipped_before_exp(impl: str, device: str) -> None:
    """d = 400 with A > 0: bounded by the clip, zero gradient on that token, right gradient on the others."""
    logp = torch.tensor([[400.0, 0.0]], device=device, requires_grad=True)
    out = pmpo_loss_from_logp(
        logp, torch.zeros(1, 2, device=device), torch.ones(1, device=device), config=LossConfig.grpo(), impl=impl
    )
    out.loss.backward()
    eps = torch.finfo(torch.float32).eps
    assert out.loss.item() == pytest.approx(-(1.2 + 1) / 2, rel=2 * eps)
    assert logp.grad[0].tolist() == [0.0, pytest.approx(-0.5, rel=2 * eps)]


def test_zero_weights(impl: str, device: str) -> None:
    """a_t = 0 from a rollout weight or a -inf target: counted for p > 0; for p <= 0 the trajectory is exactly zero."""
    logp = torch.tensor([[-1.0, -1.0], [-1.0, -math.inf]], device=device).double()
    v = torch.tensor([[1.0, 0.0], [1.0, 1.0]], device=device).double()
    for p, mean in ((1.0, 0.5), (2.0, math.sqrt(0.5)), (0.0, 0.0), (-1.0, 0.0)):
        z = logp.clone().requires_grad_()
        out = pmpo_loss_from_logp(
            z, torch.full_like(logp, -1.0), torch.ones(2, device=device).double(), rollout_weights=v,
            config=LossConfig(power=p), impl=impl,
        )  # fmt: skip
        out.loss.backward()
        assert out.loss.item() == pytest.approx(-mean, rel=1e-15)
        # W = (1, 0): d loss / d logp = -(1/2) M on the token with weight, 0 on the other
        assert z.grad.flatten().tolist() == [pytest.approx(-mean / 2, rel=1e-15), 0.0] * 2


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.1, 1e-2])
@pytest.mark.parametrize("spread", [30.0, 1e4])
def test_peaked_rows(impl: str, device: str, temperature: float, spread: float) -> None:
    """Certain tokens at any temperature: logp <= 0, entropy >= 0, and rows of the gradient that sum to 0, all to a few
    roundings of 1 and not of the logits."""
    random = torch.Generator().manual_seed(0)
    z = (spread * torch.randn(1, 12, 70, generator=random)).to(device).requires_grad_()
    logp, entropy = token_logp(z, z.argmax(-1), temperature=temperature, impl=impl)
    (grad,) = torch.autograd.grad(logp.sum(), z)
    bound = row_sum_tolerance(Case(z, *[z] * 6))
    assert float(logp.max()) <= bound
    assert float(entropy.min()) >= -bound
    assert float(temperature * grad.double().sum(-1).abs().max()) <= bound  # relative to |dlogp| = 1 / temperature
    one = token_logp(z[..., :1], torch.zeros_like(z[..., 0], dtype=torch.long), temperature=temperature, impl=impl)
    assert (one.logp == 0).all()
    assert (one.entropy == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [0.7, 1.1, 1.2])
def test_banned_blocks_at_a_temperature(impl: str, device: str, dtype: torch.dtype, temperature: float) -> None:
    """The first and the last of several blocks are banned with finfo.min or -inf: as if they were not there."""
    case = make_case(dtype, B=2, T=2, V=40, device=device)
    banned = torch.full((2, 2, 4200), torch.finfo(dtype).min, dtype=dtype, device=device)
    want = token_logp(case.logits, case.token_ids, temperature=temperature, impl=impl)
    for fill in (banned, torch.full_like(banned, -math.inf)):
        z = torch.cat([fill, case.logits, fill], -1).requires_grad_()
        logp, entropy = token_logp(z, case.token_ids + 4200, temperature=temperature, impl=impl)
        (logp.sum() + entropy.sum()).backward()
        bound = tolerance(case, LossConfig.grpo(temperature=temperature))
        assert torch.allclose(logp, want.logp, rtol=0, atol=bound)
        assert torch.allclose(entropy, want.entropy, rtol=0, atol=bound)
        assert bool(z.grad.isfinite().all())
        assert (z.grad[..., :4200] == 0).all()
        assert (z.grad[..., 4240:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_smallest_finite_logits(impl: str, device: str, dtype: torch.dtype) -> None:
    """Banned vocabulary is often filled with finfo.min: probability 0, nothing overflows on the way."""
    case = small_case(device, dtype)
    banned = torch.full_like(case.logits, torch.finfo(dtype).min)
    wide = case._replace(logits=torch.cat([case.logits, banned, banned], -1))
    config = LossConfig.pmpo(entropy_coef=0.1)
    want, bound = oracle(case, config, run(case, config, impl)[0].power), tolerance(case, config)
    out, grad = run(wide, config, impl)
    assert bool(out.metrics["entropy"].isfinite())
    assert (grad[..., 40:] == 0).all()
    assert max(three_part_error(grad[..., :40], want, case.token_ids)) <= bound


def test_overflow_is_never_hidden_in_a_finite_loss(impl: str, device: str) -> None:
    """exp(92) is beyond float32: divided by a large D it is not, and terms that cancel in float64 are not finite."""
    old = torch.full((2, 1), -92.0, device=device)
    logp = torch.zeros(2, 1, device=device, requires_grad=True)
    config = LossConfig(power=1.0, clip="none")
    A = torch.tensor([-1.0, -1.0], device=device)
    out = pmpo_loss_from_logp(logp, old, A, config=config, denominator=1e4, impl=impl)
    (grad,) = torch.autograd.grad(out.loss, logp)
    assert grad.flatten().tolist() == [pytest.approx(math.exp(92) / 1e4, rel=1e-6)] * 2
    assert out.loss.item() == pytest.approx(2 * math.exp(92) / 1e4, rel=1e-6)
    out = pmpo_loss_from_logp(logp, old, A * torch.tensor([1.0, -1.0], device=device), config=config, impl=impl)
    assert not bool(out.loss.isfinite())


def test_infinite_logits(impl: str, device: str) -> None:
    """-inf logits (a constrained vocabulary) are probability 0: finite entropy, zero gradient, as if they were absent."""
    case = small_case(device, torch.float64)
    config = LossConfig.pmpo(entropy_coef=0.1)
    out, grad = run(case, config, impl)
    wide = torch.cat([case.logits, torch.full_like(case.logits, -math.inf)], -1)
    out_wide, grad_wide = run(case._replace(logits=wide), config, impl)
    assert torch.allclose(out.loss, out_wide.loss, rtol=1e-13)
    assert torch.allclose(grad, grad_wide[..., :40], rtol=1e-11, atol=1e-14)
    assert (grad_wide[..., 40:] == 0).all()


def test_a_nan_target_is_not_hidden(impl: str, device: str) -> None:
    """Unchecked (a GPU does not read it back), a NaN target_ess gives a NaN p, not one out of the blue."""
    function = stage("trajectory", impl)
    logp = torch.tensor([-1.0, -2.0, -3.0], device=device)
    old = torch.tensor([-1.1, -2.2, -2.9], device=device)
    offsets, target = torch.tensor([0, 3], device=device), torch.tensor([math.nan], device=device)
    options = LossConfig.pmpo().trajectory_options(has_power=False, has_target_ess=True)
    A = torch.ones(1, device=device)
    stats = function(logp, None, *Batch(A, offsets, old_logp=old, target_ess=target), list(options))[2]
    assert stats[STATS.index("power")].isnan().all()
    assert stats[STATS.index("policy_loss")].isnan().all()


@pytest.mark.parametrize("rule", ["relative", "absolute", "target", "power 1", "power -1"])
def test_nan_is_not_hidden_in_the_statistics(impl: str, device: str, rule: str) -> None:
    """A NaN log-prob, or a ratio that is infinite, gives NaN for p and ESS where they follow from the ratios, and no finite loss."""
    logp = torch.tensor([[-1.0, math.nan, -2.0], [-1.0, -1.0, -2.0]], device=device).double()
    old = torch.tensor([[-1.1, -1.0, -2.1], [-1.2, -math.inf, -2.1]], device=device).double()
    power = float(rule.split()[1]) if rule.startswith("power") else "ess"
    config = LossConfig(power=power, ess_rule="absolute" if rule == "absolute" else "relative")
    target = torch.tensor([2.5, 2.5], device=device) if rule == "target" else None
    A = torch.tensor([-1.0, -1.0], device=device).double()
    out = pmpo_loss_from_logp(logp, old, A, target_ess=target, config=config, impl=impl)
    assert not bool(out.loss.isfinite())
    assert out.ess.isnan().all()
    assert out.metrics["ratio_max"].isnan()
    assert out.power.isnan().all() if power == "ess" else (out.power == power).all()


@pytest.mark.parametrize("lowest", [-math.inf, -3e38])
@pytest.mark.parametrize(
    ("temperature", "entropy_coef", "scale"), [(1e-3, 1e6, 1.0), (1.0, 6e8, 1.0), (1.0, 0.01, 2.0**36)]
)
def test_banned_tokens_under_a_large_entropy_gradient(
    impl: str, device: str, lowest: float, temperature: float, entropy_coef: float, scale: float
) -> None:
    """A token of probability 0 has gradient 0, however large the factor of q log q is."""
    z = torch.tensor([[[9.0, -20.0, lowest, -30.0]]], device=device, requires_grad=True)
    config = LossConfig.grpo(temperature=temperature, entropy_coef=entropy_coef)
    out = pmpo_loss(
        z,
        torch.zeros(1, 1, dtype=torch.int64, device=device),
        None,
        torch.ones(1, device=device),
        config=config,
        impl=impl,
    )
    (out.loss * scale).backward()
    assert out.loss.isfinite()
    assert z.grad.isfinite().all()
    assert z.grad[0, 0, 2] == 0


def test_metrics_of_nothing_are_positive_zeros(impl: str, device: str) -> None:
    none = torch.zeros(2, 3, device=device)
    out = pmpo_loss_from_logp(none, none, torch.ones(2, device=device), mask=none.bool(), impl=impl)
    assert all(value == 0 and not value.signbit() for value in out.metrics.values())


def test_one_token_with_any_stride(impl: str, device: str) -> None:
    """Of a tensor with one element PyTorch takes every stride for contiguous."""

    def one(x: float) -> torch.Tensor:
        return torch.tensor([x, 7.0], device=device)[::2].view(1, 1)

    ids, z = one(3).long(), torch.arange(5.0, device=device).view(1, 1, 5)
    ids = torch.stack([ids, ids], -1)[..., 0]
    assert ids.stride() == (2, 2)
    assert ids.is_contiguous()
    out = pmpo_loss(z, ids, one(-1.5), one(1.0)[0], impl=impl)
    same = pmpo_loss(
        z,
        torch.tensor([[3]], device=device),
        torch.tensor([[-1.5]], device=device),
        torch.ones(1, device=device),
        impl=impl,
    )
    assert torch.equal(out.loss, same.loss)
    packed = torch.tensor([0, 9, 1, 9], device=device)[::2]
    from_packed = pmpo_loss(z[0], ids[0], one(-1.5)[0], one(1.0)[0], cu_seqlens=packed, impl=impl)
    assert torch.equal(from_packed.loss, same.loss)


def test_the_widest_sequence_clip_clips_nothing(impl: str, device: str) -> None:
    """Bounds are finite, however large; the loss is then that of clip="none", also where only A < 0 has no upper bound."""
    old = torch.tensor([[-1.0, -300.0, -2.0], [-1.0, -4.0, -2.0]], device=device).double()
    A = torch.tensor([-0.5, 2.0], device=device)
    for power in (-1.0, 0.0, 1.0):
        found = []
        for options in ({"clip": "none"}, {"clip": "sequence", "clip_low": 1e308, "clip_high": 1e308}):
            logp = torch.tensor([[-1.1, -1.0, -2.2], [-3.0, -1.0, -2.0]], device=device).double().requires_grad_()
            out = pmpo_loss_from_logp(logp, old, A, config=LossConfig(power=power, **options), impl=impl)
            out.loss.backward()
            assert bool(out.loss.isfinite())
            assert bool(logp.grad.isfinite().all())
            found.append((out, logp.grad))
        assert torch.equal(found[0][0].loss, found[1][0].loss)
        assert torch.equal(found[0][1], found[1][1])
        assert found[1][0].metrics["clip_fraction"] == 0


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"entropy_coef": -1e300}, torch.float32),  # the loss is 0 times that: one token has no entropy
        ({"entropy_coef": 1e30, "temperature": 1e-30}, torch.float32),
        ({"beta": 1e300, "kl_estimator": "k1", "temperature": 1e-30}, torch.float64),
    ],
)
def test_a_gradient_that_overflows_is_not_hidden(
    impl: str, device: str, options: dict[str, float], dtype: torch.dtype
) -> None:
    """It comes with no finite loss: neither that of the entropy term, nor that of logits divided by a small temperature."""
    temperature = options.get("temperature", 0.0)
    row = [0.0, temperature] if temperature else [0.0]  # 1 apart at that temperature
    z = torch.tensor([[row]], dtype=dtype, device=device, requires_grad=True)
    none = torch.zeros(1, 1, device=device)
    out = pmpo_loss(z, none.long(), none, none[0] + 1, ref_logp=none, config=LossConfig.grpo(**options), impl=impl)
    (grad,) = torch.autograd.grad(out.loss, z)
    assert not bool(grad.isfinite().all())
    assert not bool(out.loss.isfinite())
