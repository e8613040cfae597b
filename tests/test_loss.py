"""The public calls, each implementation: agreement with float64, options, metrics."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import CONFIGURATIONS, device_of
from helpers import FEW, run, same_bits, small_case

from pmpo_kernels import LossConfig, pmpo_loss, pmpo_loss_from_logp, token_logp
from pmpo_kernels.verification import Case, make_case, oracle, three_part_error, verify
from pmpo_kernels.verification.baseline import eager_pmpo_loss

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_float64(config: LossConfig, impl: str, device: str, dtype: torch.dtype) -> None:
    verdict = verify(make_case(dtype, T=6, V=67, device=device), config, impl)
    assert verdict.ok, verdict


@pytest.mark.parametrize(
    ("chosen", "name"),
    [(impl, name) for impl in (None, "reference", "cpp") for name in [*FEW, "gmpo", "holder_token"]]
    + [("triton", "pmpo, all terms")],  # 10 s under the interpreter
)
def test_gradcheck(chosen: str | None, name: str) -> None:
    """Autograd through the public function against finite differences, in float64; p is a constant."""
    device, config = device_of(chosen or "cpu"), CONFIGURATIONS[name]
    case = make_case(torch.float64, B=4, T=2, V=3, device=device)
    rest = {"mask": case.mask, "ref_logp": case.ref_logp, "rollout_weights": case.rollout_weights, "impl": chosen}
    given = (case.token_ids, case.old_logp, case.advantages)
    power = pmpo_loss(case.logits, *given, config=config, **rest).power

    def loss(z: torch.Tensor) -> torch.Tensor:
        return pmpo_loss(z, *given, config=config, power=power, **rest).loss

    assert torch.autograd.gradcheck(loss, case.logits.requires_grad_())


@pytest.mark.parametrize("V", [1, 2, 63, 64, 65, 4096, 9003])
def test_any_vocabulary(impl: str, device: str, V: int) -> None:
    """One block, several blocks, tails, aligned and not."""
    case = make_case(torch.float32, B=4, T=4, V=V, device=device)
    if V == 1:  # a distribution with one outcome has gradient 0, up to the rounding of exp(0) - 1
        assert run(case, LossConfig.pmpo(), impl)[1].abs().max() <= torch.finfo(torch.float32).eps
        return
    verdict = verify(case, LossConfig.pmpo(beta=0.1, entropy_coef=0.01), impl)
    assert verdict.ok, verdict


def test_bfloat16_is_no_worse_than_eager(impl: str, device: str) -> None:
    """Error <= error of the same formula on bfloat16 log-softmax + one rounding of the stored gradient."""
    case, config = make_case(torch.bfloat16, device=device), LossConfig.grpo()
    case = case._replace(rollout_weights=torch.ones_like(case.rollout_weights))
    want = oracle(case, config)
    z = case.logits.clone().requires_grad_()
    log_q = torch.log_softmax(z, -1)  # plain bfloat16
    logp = log_q.gather(-1, case.token_ids[..., None])[..., 0]
    pmpo_loss_from_logp(logp, case.old_logp, case.advantages, mask=case.mask, config=config).loss.backward()
    eager = three_part_error(torch.where(want.scale[..., None] == 0, 0, z.grad), want, case.token_ids)
    ours = three_part_error(run(case, config, impl)[1], want, case.token_ids)
    u = torch.finfo(torch.bfloat16).eps / 2
    assert all(a <= b + 2 * u for a, b in zip(ours, eager, strict=True)), (ours, eager)


def test_eager_baseline_is_the_same_loss(config: LossConfig) -> None:
    """Every configuration, without the terms that the baseline does not have."""
    case, config = make_case(torch.float64), replace(config, beta=0.0)
    ones = torch.ones_like(case.rollout_weights)
    z = case.logits.clone().requires_grad_()
    loss = eager_pmpo_loss(z, case.token_ids, case.old_logp, case.advantages, case.mask, config)
    loss.backward()
    out, grad = run(case._replace(rollout_weights=ones), config, "reference")
    assert torch.allclose(loss, out.loss, rtol=1e-13, atol=0)
    assert torch.allclose(grad, z.grad, rtol=0, atol=1e-14)


def test_token_logp_alone(impl: str, device: str) -> None:
    case = make_case(torch.float64, device=device)
    z = case.logits.clone().requires_grad_()
    logp, entropy = token_logp(z, case.token_ids, mask=case.mask, temperature=0.9, impl=impl)
    g, h = torch.randn_like(logp), torch.randn_like(entropy)
    (logp * g + entropy * h).sum().backward()
    y = case.logits.clone().requires_grad_()
    log_q = torch.log_softmax(y / 0.9, -1)
    want, H = log_q.gather(-1, case.token_ids[..., None])[..., 0], -(log_q.exp() * log_q).sum(-1)
    assert torch.allclose(logp, want * case.mask, atol=1e-13)
    assert torch.allclose(entropy, H * case.mask, atol=1e-13)
    ((want * g + H * h) * case.mask).sum().backward()
    assert torch.allclose(z.grad, y.grad, atol=1e-13)
    (only_logp,) = torch.autograd.grad(token_logp(z, case.token_ids, impl=impl).logp.sum(), z)
    assert torch.allclose(only_logp.sum(-1), torch.zeros_like(g), atol=1e-13)


@pytest.mark.parametrize("name", FEW)
def test_from_logp_equals_from_logits(name: str, impl: str, device: str) -> None:
    config = CONFIGURATIONS[name]
    case = make_case(torch.float64, device=device)
    out, grad = run(case, config, impl)
    z = case.logits.clone().requires_grad_()
    logp, entropy = token_logp(z, case.token_ids, mask=case.mask, temperature=config.temperature, impl=impl)
    again = pmpo_loss_from_logp(
        logp, case.old_logp, case.advantages, mask=case.mask, ref_logp=case.ref_logp, entropy=entropy,
        rollout_weights=case.rollout_weights, config=replace(config, temperature=1.0), impl=impl,
    )  # fmt: skip
    again.loss.backward()
    same_bits(out, again)
    assert torch.equal(grad, z.grad)


def test_long_trajectory_is_looped_over(impl: str, device: str) -> None:
    """More tokens than one block or step of the trajectory kernels, from log-probs; packed behind another trajectory."""
    torch.manual_seed(0)
    N, A = 2500, torch.tensor([0.5, -1.0], dtype=torch.float64, device=device)
    old = -torch.rand(N, dtype=torch.float64, device=device)
    logp = (old + 0.2 * torch.randn_like(old)).requires_grad_()
    offsets = torch.tensor([0, 37, N], device=device)
    config = LossConfig.pmpo(full_clip_fraction=0.5, beta=0.1)
    out = pmpo_loss_from_logp(logp, old, A, cu_seqlens=offsets, ref_logp=old, config=config, impl=impl)
    (grad,) = torch.autograd.grad(out.loss, logp)
    want = pmpo_loss_from_logp(
        logp.cpu(), old.cpu(), A.cpu(), cu_seqlens=offsets.cpu(), ref_logp=old.cpu(), power=out.power.cpu(),
        config=config, impl="reference",
    )  # fmt: skip
    (want_grad,) = torch.autograd.grad(want.loss, logp)
    assert (out.power > 0).all()
    assert (out.power < 1).all()
    eps = N * torch.finfo(torch.float64).eps  # sums of N terms
    assert out.loss.item() == pytest.approx(want.loss.item(), rel=eps)
    assert torch.allclose(grad, want_grad, rtol=4 * eps, atol=0)


def test_on_policy(impl: str, device: str) -> None:
    """old_logp None: ratios 1, p = power_max, and the gradient of REINFORCE with the mean over tokens."""
    case = small_case(device, torch.float64)
    case = case._replace(rollout_weights=torch.ones_like(case.rollout_weights), old_logp=None)
    out, grad = run(case, LossConfig.pmpo(), impl)
    assert (out.power == 1).all()
    assert out.metrics["ratio_max"] == 1
    z = case.logits.clone().requires_grad_()
    logp = token_logp(z, case.token_ids, mask=case.mask, impl=impl).logp
    n = case.mask.sum(1)
    want = -(case.advantages * logp.sum(1) / n.clamp(min=1)).sum() / (n > 0).sum()
    want.backward()
    assert torch.allclose(grad, z.grad, rtol=1e-13, atol=1e-16)


def test_given_power_and_target_ess(impl: str, device: str) -> None:
    case = small_case(device, torch.float64)
    out, grad = run(case, LossConfig.pmpo(full_clip_fraction=0.5), impl)
    assert ((out.power > 0) & (out.power < 1)).any()
    again, grad_again = run(case, LossConfig.grpo(clip_low=0.4, clip_high=0.4), impl, power=out.power)
    assert torch.equal(grad, grad_again)
    assert torch.equal(out.ess, again.ess)
    solved, _ = run(case, LossConfig.pmpo(), impl, target_ess=out.ess)
    some = (out.ess > 1) & (out.power > 0) & (out.power < 1)
    assert torch.allclose(solved.power[some], out.power[some], rtol=1e-5)  # p^2 Var carries the 1e-10 of the solver
    number, _ = run(case, LossConfig.grpo(), impl, power=0.3)
    assert (number.power == 0.3).all()
    sequence, _ = run(case, LossConfig.pmpo(clip="sequence"), impl, target_ess=out.ess)
    assert torch.isfinite(sequence.loss)


@pytest.mark.parametrize("packed", [False, True])
def test_one_value_a_trajectory(impl: str, device: str, packed: bool) -> None:
    """Weights and policy mask as (B,) are those of all tokens; a trajectory without policy term is one with A = 0."""
    case, config = small_case(device, torch.float64), LossConfig.pmpo(beta=0.1, full_clip_fraction=0.5)
    B, T = case.token_ids.shape
    weights, some = torch.linspace(0.5, 1.5, B, device=device).double(), torch.arange(B, device=device) % 2 == 0
    spread = {"rollout_weights": weights[:, None].expand(B, T), "policy_mask": some[:, None].expand(B, T)}
    options = {}
    if packed:
        options = {"cu_seqlens": torch.arange(B + 1, device=device) * T}
        case = Case(*(t if t.dim() == 1 else t.flatten(0, 1) for t in case))
        spread = {name: value.flatten() for name, value in spread.items()}
    out, grad = run(case, config, impl, **spread, **options)
    again, grad_again = run(case, config, impl, rollout_weights=weights, policy_mask=some.int(), **options)
    same_bits(out, again)
    assert torch.equal(grad, grad_again)
    zero, grad_zero = run(
        case._replace(advantages=torch.where(some, case.advantages, 0)),
        config,
        impl,
        rollout_weights=weights,
        **options,
    )
    assert torch.equal(out.loss, zero.loss)
    assert torch.equal(grad, grad_zero)


def test_what_has_the_tokens_shape_is_per_token(impl: str, device: str) -> None:
    """Packed, as many trajectories as tokens, one of them empty: a value each token. One trajectory: one for all of its tokens."""
    logp = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, device=device)
    A, v = torch.tensor([[1.0, -1.0, 2.0], [2.0, 3.0, 5.0]], dtype=torch.float64, device=device)
    options = {"config": LossConfig.grpo(clip="none"), "impl": impl}
    offsets = torch.tensor([0, 2, 2, 3], device=device)
    out = pmpo_loss_from_logp(logp, logp * 0, A, cu_seqlens=offsets, rollout_weights=v, **options)
    a = [w * math.exp(x) for w, x in zip(v.tolist(), logp.tolist(), strict=True)]
    assert out.loss.item() == pytest.approx(-((a[0] + a[1]) / 2 + 2 * a[2]) / 2, rel=1e-14)
    keep = torch.tensor([True, False, True], device=device)
    out = pmpo_loss_from_logp(logp, logp * 0, A, cu_seqlens=offsets, policy_mask=keep, **options)
    assert out.loss.item() == pytest.approx(-(math.exp(0.1) / 2 + 2 * math.exp(0.3)) / 2, rel=1e-14)
    one = {"cu_seqlens": torch.tensor([0, 3], device=device), **options}
    out = pmpo_loss_from_logp(logp, logp * 0, A[:1], rollout_weights=v[:1], policy_mask=keep[:1], **one)
    assert out.loss.item() == pytest.approx(-2 * sum(map(math.exp, logp.tolist())) / 3, rel=1e-14)


def test_metrics_by_hand(impl: str, device: str) -> None:
    logp = torch.tensor([[0.5, -0.5, 0.0], [0.1, 0.0, 9.0]], dtype=torch.float64, device=device)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]], device=device)
    A = torch.tensor([1.0, -1.0], device=device).double()
    out = pmpo_loss_from_logp(logp, torch.zeros_like(logp), A, mask=mask, config=LossConfig.gmpo(), impl=impl)
    d = [0.5, -0.5, 0.0, 0.1, 0.0]
    want = {
        "policy_loss": -(math.exp((0.4 - 0.5) / 3) - math.exp(0.05)) / 2,
        "clip_fraction": 1 / 5, "clip_fraction_low": 0.0, "clip_fraction_high": 1 / 5,
        "ratio_mean": sum(map(math.exp, d)) / 5, "ratio_max": math.exp(0.5),
        "approx_kl": sum(math.exp(x) - 1 - x for x in d) / 5,
        "power_mean": 0.0, "power_min": 0.0, "power_max": 0.0, "ess": 2.5, "ess_target": 2.5,
        "tokens": 5.0, "trajectories": 2.0,
    }  # fmt: skip
    assert {name: value.item() for name, value in out.metrics.items()} == {
        name: pytest.approx(value, rel=1e-14, abs=1e-15) for name, value in want.items()
    }
    assert out.clip_fraction.tolist() == [pytest.approx(1 / 3), 0.0]
    assert not any(value.requires_grad for value in out.metrics.values())
