"""The specification itself: cases computed by hand, its limits in p, and its written-out gradients against autograd."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import CONFIGURATIONS
from torch import Tensor

from pmpo_kernels import LossConfig, pmpo_loss_from_logp, reference
from pmpo_kernels.aggregate import default_denominator, total_loss
from pmpo_kernels.batch import Batch
from pmpo_kernels.contract import STATS

EPS = torch.finfo(torch.float64).eps


def loss_of(ratios: list[float], advantage: float, config: LossConfig, **kwargs: Tensor) -> tuple[float, list[float]]:
    """Loss and d loss / d logp of one trajectory with these importance ratios."""
    logp = torch.tensor([ratios], dtype=torch.float64).log().requires_grad_()
    old_logp = torch.zeros(1, len(ratios), dtype=torch.float64)
    out = pmpo_loss_from_logp(
        logp, old_logp, torch.tensor([advantage], dtype=torch.float64), config=config, impl="reference", **kwargs
    )
    out.loss.backward()
    return out.loss.item(), logp.grad[0].tolist()


# By hand: ratios 2, 1/2, 1. Sums of r^p: p = 1: 3.5, p = 2: 5.25, p = -1: 3.5, p = 0: three equal weights.
@pytest.mark.parametrize(
    ("power", "mean", "weights"),
    [
        (1.0, 3.5 / 3, [2 / 3.5, 0.5 / 3.5, 1 / 3.5]),
        (2.0, math.sqrt(5.25 / 3), [4 / 5.25, 0.25 / 5.25, 1 / 5.25]),
        (-1.0, 3 / 3.5, [0.5 / 3.5, 2 / 3.5, 1 / 3.5]),
        (0.0, 1.0, [1 / 3, 1 / 3, 1 / 3]),
    ],
)
@pytest.mark.parametrize("advantage", [1.5, -0.5])
def test_power_mean_by_hand(power: float, mean: float, weights: list[float], advantage: float) -> None:
    loss, grad = loss_of([2.0, 0.5, 1.0], advantage, LossConfig(power=power, clip="none"))
    assert loss == pytest.approx(-advantage * mean, rel=8 * EPS)
    assert grad == pytest.approx([-advantage * mean * w for w in weights], rel=16 * EPS)


def test_token_clip_by_hand() -> None:
    bounds = LossConfig.ratio_clip(0.2, 0.2)
    loss, grad = loss_of([2.0, 0.5, 1.0], 1.0, LossConfig(power=1.0, **bounds))
    assert loss == pytest.approx(-(1.2 + 0.5 + 1.0) / 3, rel=8 * EPS)
    assert grad == pytest.approx([0.0, -0.5 / 3, -1 / 3], rel=8 * EPS)
    loss, grad = loss_of([2.0, 0.5, 1.0], -1.0, LossConfig(power=1.0, **bounds))
    assert loss == pytest.approx((2.0 + 0.8 + 1.0) / 3, rel=8 * EPS)
    assert grad == pytest.approx([2 / 3, 0.0, 1 / 3], rel=8 * EPS)
    loss, grad = loss_of([2.0, 0.5, 1.0], -1.0, LossConfig(power=1.0, dual_clip=1.5, **bounds))
    assert loss == pytest.approx((1.5 + 0.8 + 1.0) / 3, rel=8 * EPS)
    assert grad == pytest.approx([0.0, 0.0, 1 / 3], rel=8 * EPS)


def test_sequence_clip_by_hand() -> None:
    config = LossConfig(power=1.0, clip="sequence", **LossConfig.ratio_clip(0.1, 0.1))
    assert loss_of([2.0, 0.5, 1.0], 2.0, config) == (pytest.approx(-2.2, rel=8 * EPS), [0.0, 0.0, 0.0])
    loss, grad = loss_of([2.0, 0.5, 1.0], -2.0, config)
    assert loss == pytest.approx(2 * 3.5 / 3, rel=8 * EPS)
    assert grad == pytest.approx([2 * 2 / 3, 2 * 0.5 / 3, 2 / 3], rel=8 * EPS)


def test_kl_and_entropy_by_hand() -> None:
    ref_logp = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    entropy = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    r, ratio = [0.3, -0.2], [1.0, 1.0]
    for name, k, dk in (
        ("k1", lambda r: -r, lambda r: 1.0),
        ("k2", lambda r: r * r / 2, lambda r: -r),
        ("k3", lambda r: math.exp(r) - r - 1, lambda r: 1 - math.exp(r)),
    ):
        config = LossConfig.grpo(beta=0.5, kl_estimator=name, entropy_coef=0.1)
        loss, grad = loss_of(ratio, 0.0, config, ref_logp=ref_logp, entropy=entropy)
        assert loss == pytest.approx(0.5 * (k(r[0]) + k(r[1])) / 2 - 0.1 * 1.5, rel=64 * EPS)
        assert grad == pytest.approx([0.5 * dk(r[0]) / 2, 0.5 * dk(r[1]) / 2], rel=64 * EPS)


def test_kl_gradients_by_hand() -> None:
    """Straight-through: the value of one estimator with the gradient of k2. Corrected: times the ratio, gradient included."""
    ratio, r = [1.2, 0.7], [0.3, -0.4]
    ref_logp = torch.tensor([[math.log(a) + x for a, x in zip(ratio, r, strict=True)]], dtype=torch.float64)
    for name, k in (("k1", lambda r: -r), ("k3", lambda r: math.exp(r) - r - 1)):
        config = LossConfig.grpo(beta=0.5, kl_estimator=name, kl_straight_through=True)
        loss, grad = loss_of(ratio, 0.0, config, ref_logp=ref_logp)
        assert loss == pytest.approx(0.5 * (k(r[0]) + k(r[1])) / 2, rel=64 * EPS)
        assert grad == pytest.approx([-0.5 * x / 2 for x in r], rel=64 * EPS)
    for name, k, dk in (
        ("k1", lambda r: -r, lambda r: 1.0),
        ("k2", lambda r: r * r / 2, lambda r: -r),
        ("k3", lambda r: math.exp(r) - r - 1, lambda r: 1 - math.exp(r)),
    ):
        config = LossConfig.grpo(beta=0.5, kl_estimator=name, kl_bias_correction=True)
        loss, grad = loss_of(ratio, 0.0, config, ref_logp=ref_logp)
        terms = list(zip(ratio, r, strict=True))
        assert loss == pytest.approx(0.5 * sum(a * k(x) for a, x in terms) / 2, rel=64 * EPS)
        assert grad == pytest.approx([0.5 * a * (dk(x) + k(x)) / 2 for a, x in terms], rel=64 * EPS)


def test_two_sided_clip_by_hand() -> None:
    """Both bounds for both signs of A, on tokens (p = 1) and on the trajectory's mean (p = 1, sequence)."""
    bounds = {"clip_sides": "two", **LossConfig.ratio_clip(0.2, 0.3)}
    for A in (1.0, -1.0):
        loss, grad = loss_of([1.5, 0.5, 1.1], A, LossConfig.grpo(**bounds))
        assert loss == pytest.approx(-A * (1.3 + 0.8 + 1.1) / 3, rel=64 * EPS)
        assert grad == pytest.approx([0.0, 0.0, -A * 1.1 / 3], rel=64 * EPS)
        for ratio, clipped in (([1.5, 1.3], 1.3), ([0.5, 0.7], 0.8)):
            loss, grad = loss_of(ratio, A, LossConfig.holder(1.0, **bounds))
            assert loss == pytest.approx(-A * clipped, rel=64 * EPS)
            assert grad == [0.0, 0.0]
    assert loss_of([1.5, 0.5], 0.0, LossConfig.grpo(**bounds)) == (0.0, [0.0, 0.0])


@pytest.mark.parametrize("p", [1.0, 0.5, 0.0, -1.0])
def test_policy_mask_by_hand(p: float) -> None:
    """Of k of n tokens: -A (k / n) M_p of the k; the others have no policy gradient, and keep their KL term and their weight in D."""
    ratio, keep = [1.1, 3.0, 0.9, 1.05], [True, False, True, True]
    chosen = [a for a, used in zip(ratio, keep, strict=True) if used]
    config = LossConfig(power=p, clip="none", loss_agg_mode="token-mean")
    mean = math.exp(sum(map(math.log, chosen)) / 3) if p == 0 else (sum(a**p for a in chosen) / 3) ** (1 / p)
    logp = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    mask, A = torch.tensor([keep]), torch.tensor([2.0], dtype=torch.float64)
    out = pmpo_loss_from_logp(logp, torch.zeros_like(logp), A, policy_mask=mask, config=config)
    out.loss.backward()
    weights = [a**p / sum(c**p for c in chosen) if used else 0.0 for a, used in zip(ratio, keep, strict=True)]
    assert out.loss.item() == pytest.approx(-2.0 * 3 / 4 * mean, rel=64 * EPS)
    assert logp.grad[0].tolist() == pytest.approx([-2.0 * 3 / 4 * mean * w for w in weights], rel=64 * EPS)
    assert out.ess.item() == pytest.approx(1 / sum(w * w for w in weights), rel=64 * EPS)
    assert out.metrics["tokens"] == 4
    nothing = pmpo_loss_from_logp(
        logp, torch.zeros_like(logp), A, policy_mask=torch.tensor([False]), ref_logp=torch.zeros_like(logp),
        config=replace(config, beta=0.5),
    )  # fmt: skip
    kl = [math.exp(-x) + x - 1 for x in map(math.log, ratio)]
    assert nothing.loss.item() == pytest.approx(0.5 * sum(kl) / 4, rel=64 * EPS)


def test_aggregations_by_hand() -> None:
    """Trajectories of 1 and 3 tokens, all ratios 1, and an empty one that does not count."""
    logp = torch.zeros(3, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]])
    A = torch.tensor([1.0, 5.0, 7.0], dtype=torch.float64)
    for config, want in (
        (LossConfig.grpo(), -(1 + 5) / 2),
        (LossConfig.dapo(), -(1 * 1 + 3 * 5) / 4),
        (LossConfig.dr_grpo(max_length=10), -(1 * 1 + 3 * 5) / (10 * 2)),
    ):
        loss = pmpo_loss_from_logp(logp, logp, A, mask=mask, config=config).loss
        assert loss.item() == pytest.approx(want, rel=8 * EPS)
    assert pmpo_loss_from_logp(
        logp, logp, A, mask=mask, config=LossConfig.grpo(), denominator=10
    ).loss.item() == pytest.approx(-0.6, rel=8 * EPS)


def test_ess_by_hand() -> None:
    """Weights 9, 1 at p = 1: ESS 100 / 82; at p = 1/2 weights 3, 1: ESS 16 / 10, which is then solved for."""
    logp = torch.tensor([[math.log(9.0), 0.0]], dtype=torch.float64)
    A, old = torch.ones(1, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    config = LossConfig.pmpo(clip="none", power=1.0)
    assert pmpo_loss_from_logp(logp, old, A, config=config).ess.item() == pytest.approx(100 / 82, rel=8 * EPS)
    out = pmpo_loss_from_logp(
        logp, old, A, config=LossConfig.pmpo(clip="none"), target_ess=torch.tensor([1.6], dtype=torch.float64)
    )
    assert out.power.item() == pytest.approx(0.5, rel=1e-9)  # p is solved to 1e-10 in log ESS, whose slope here is 0.5
    assert out.ess.item() == pytest.approx(1.6, rel=1e-9)


def test_clipping_sets_p() -> None:
    """No clipped token: p = power_max; full_clip_fraction of them: p = 0; in between, in between."""
    d = torch.tensor([[0.1, -0.2, 0.3, 0.0], [0.1, -0.2, 0.5, 0.0], [0.1, -0.2, 0.5, 0.6]], dtype=torch.float64)
    out = pmpo_loss_from_logp(
        d, torch.zeros_like(d), torch.ones(3).double(), config=LossConfig.pmpo(full_clip_fraction=0.5)
    )
    assert out.clip_fraction.tolist() == [0.0, 0.25, 0.5]
    assert out.power[0] == 1.0
    assert 0.0 < out.power[1] < 1.0
    assert out.power[2] == 0.0


@pytest.mark.parametrize("p", [1e-12, 1e-8, 1e-4, -1e-8])
def test_small_p_keeps_its_digits(p: float) -> None:
    """log M_p = mean + p Var / 2 + O(p^2): the textbook (logsumexp - log n)/p loses 37 % of it at p = 1e-6 in float32."""
    l = torch.tensor([0.3, -0.2, 0.7, -1.0, 0.05], dtype=torch.float64)
    loss, _ = loss_of(l.exp().tolist(), -1.0, LossConfig(power=p, clip="none"))
    mean, var = l.mean().item(), l.var(correction=0).item()
    third = ((l - mean) ** 3).mean().item()
    assert math.log(loss) == pytest.approx(mean + p * var / 2 + p * p * third / 6, abs=8 * EPS + abs(p) ** 3)


def test_extreme_p_is_max_and_min() -> None:
    """M_p is within a factor n^(1/|p|) of the largest (smallest) ratio, and nothing overflows."""
    for p, want in ((400.0, 2.0), (-400.0, 0.5)):
        loss, grad = loss_of([2.0, 0.5, 1.0], -1.0, LossConfig(power=p, clip="none"))
        assert want * 3 ** (-1 / p) == pytest.approx(loss, rel=64 * EPS)
        assert all(math.isfinite(g) for g in grad)


@pytest.mark.parametrize("name", list(CONFIGURATIONS))
@pytest.mark.parametrize("features", ["plain", "weights", "packed", "policy mask"])
def test_gradcheck(name: str, features: str) -> None:
    """Finite differences of the reference's loss against autograd through it, and autograd against the written gradients."""
    config = CONFIGURATIONS[name]
    torch.manual_seed(3)
    B, T, V = 4, 5, 6
    logits = torch.randn(B, T, V, dtype=torch.float64, requires_grad=True)
    token_ids = torch.randint(V, (B, T))
    mask = torch.arange(T) < torch.tensor([5, 3, 1, 0])[:, None]
    offsets = torch.arange(B + 1) * T
    if features == "packed":
        offsets, mask = torch.tensor([0, 7, 7, 8, 20]), torch.ones_like(mask)
    A = torch.tensor([1.0, -0.7, 0.4, -2.0], dtype=torch.float64)

    def random(scale: float) -> Tensor:
        return scale * torch.randn(B * T, dtype=torch.float64)

    old = torch.log_softmax(logits.detach(), -1).gather(-1, token_ids[..., None]).flatten() + random(0.4)
    ref, weights = old + random(0.2), random(0.2).exp() if features == "weights" else None

    policy = torch.rand(B * T) < 0.6 if features == "policy mask" else None

    def run(z: Tensor, power: Tensor | None) -> tuple[Tensor, ...]:
        logp, row_max, row_sum, entropy = reference.token_logp(z, token_ids, mask, config.temperature)
        options = config.trajectory_options(has_power=power is not None, has_target_ess=False)
        batch = Batch(A, offsets, old, mask.flatten(), ref, weights, policy, power)
        dlogp, dentropy, stats = reference.trajectory(logp.flatten(), entropy.flatten(), batch, options)
        terms = config.aggregate_options()
        denominator = default_denominator(stats.detach()[STATS.index("tokens")], terms)
        return (
            total_loss(stats, terms, denominator),
            dlogp / denominator,
            dentropy / denominator,
            stats,
            row_max,
            row_sum,
            entropy,
        )

    power = run(logits, None)[3][STATS.index("power")].detach()
    if not config.kl_straight_through:  # whose gradient is another's, on purpose
        assert torch.autograd.gradcheck(lambda z: run(z, power)[0], logits, eps=1e-6, atol=1e-8, rtol=1e-6)
    loss, dlogp, dentropy, _, row_max, row_sum, entropy = run(logits, power)
    (want,) = torch.autograd.grad(loss, logits)
    with torch.no_grad():
        h = dentropy.view(B, T) if dentropy.numel() else None
        got = reference.dlogits(
            logits, token_ids, mask, row_max, row_sum, entropy, dlogp.view(B, T), h, config.temperature
        )
    # Each entry is a product of about 10 rounded factors and sums of at most max(V, T) terms.
    assert torch.allclose(got, want, rtol=0, atol=(10 + max(V, T)) * 4 * EPS * float(want.abs().max()))


def test_token_logp_gradcheck() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.randint(5, (2, 3))
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]]).bool()
    assert torch.autograd.gradcheck(lambda z: reference.token_logp(z, ids, mask, 0.8)[::3], logits)
