"""Each stage alone, each implementation and dtype, against the same stage of the reference in float64."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CONFIGURATIONS
from torch import Tensor

from pmpo_kernels import reference
from pmpo_kernels.batch import Batch
from pmpo_kernels.contract import METRICS, NEWTON_TOLERANCE, STATS, AggregateOptions, compute_dtype
from pmpo_kernels.ops import stage
from pmpo_kernels.verification import Case, make_case

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(compute_dtype(dtype)).eps / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [67, 4100])
def test_token_logp(impl: str, device: str, dtype: torch.dtype, V: int) -> None:
    case = make_case(dtype, B=3, T=4, V=V, device=device)
    got = stage("token_logp", impl)(case.logits, case.token_ids, case.mask, 0.7)
    want = reference.token_logp(case.logits.double(), case.token_ids, case.mask, 0.7)
    x = float((case.logits.double() / 0.7).abs().max())
    # x and x - max carry u |x| each; the sum of V terms u (64 + log2 V) (see `tolerance`); a few more for exp and log
    bound = unit_roundoff(dtype) * (6 * x + 64 + 2 * torch.tensor(V).log2().item() + 16)
    names = ("logp", "row_max", "row_sum", "entropy")
    for name, a, b in zip(names, got, want, strict=True):
        assert a.dtype == compute_dtype(dtype), name
        # entropy is a mean of x - max, up to twice as large as x
        scale = b.abs() if name == "row_sum" else torch.full_like(b, 2 * x if name == "entropy" else 1.0)
        assert ((a.double() - b).abs() <= bound * scale).all(), name


def flat(case: Case) -> tuple[Tensor, ...]:
    logp, _, _, entropy = reference.token_logp(case.logits.double(), case.token_ids, case.mask, 1.0)
    small = compute_dtype(case.logits.dtype)
    tensors = (logp, case.old_logp, case.ref_logp, case.rollout_weights, entropy)
    return (*(t.flatten().to(small) for t in tensors), case.mask.flatten())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", list(CONFIGURATIONS))
@pytest.mark.parametrize("optional", [True, False])
def test_trajectory(impl: str, device: str, dtype: torch.dtype, name: str, optional: bool) -> None:
    """Same inputs, float64 inside: equal to a few roundings of float64 whatever the inputs' dtype."""
    config = CONFIGURATIONS[name]
    if not optional:  # the KL and entropy terms need their inputs
        config = replace(config, beta=0.0, entropy_coef=0.0)
    case = make_case(dtype, B=6, T=10, V=16, device=device)
    logp, old, ref, weights, entropy, mask = flat(case)
    offsets = torch.arange(7, device=device) * 10
    policy = torch.rand(60, generator=torch.Generator().manual_seed(0)).to(device) < 0.7
    options = config.trajectory_options(has_power=False, has_target_ess=False)
    if not optional:
        ref = weights = entropy = mask = policy = None
    args = (logp, entropy, *Batch(case.advantages, offsets, old, mask, ref, weights, policy))
    dlogp, dentropy, stats = stage("trajectory", impl)(*args, list(options))
    logp, entropy, *doubles = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in args]
    row = dict(zip(STATS, stats, strict=True))
    # p is right to 1e-10 in log ESS: compare the rest at that p
    power = row["power"] if config.power == "ess" else None
    fixed = config.trajectory_options(has_power=power is not None, has_target_ess=False)
    batch = Batch(*doubles)._replace(power=power)
    want_dlogp, want_dentropy, want = reference.trajectory(logp, entropy, batch, fixed)
    u64 = torch.finfo(torch.float64).eps / 2
    for key, a, b in zip(STATS, stats, want, strict=True):
        if key == "ess_target" and power is not None:
            solved = (row["power"] > config.power_min) & (row["power"] < config.power_max) & (row["tokens"] > 0)
            b = row["ess"]
            assert torch.allclose(a[solved], b[solved], rtol=2 * NEWTON_TOLERANCE, atol=0)
            continue
        # sums of 10 terms and quantities of order 1 from them, with cancellation to at worst 1 %
        assert torch.allclose(a, b, rtol=100 * 64 * u64, atol=64 * u64), key
    assert torch.allclose(dlogp, want_dlogp, rtol=100 * 64 * u64, atol=64 * u64)
    assert torch.allclose(dentropy, want_dentropy, rtol=4 * u64, atol=0)


def random_stats(B: int, device: str) -> Tensor:
    """Statistics of B trajectories, every third one empty, some p below 0."""
    random = torch.Generator().manual_seed(B)
    stats = torch.rand(len(STATS), B, generator=random, dtype=torch.float64)
    row = dict(zip(STATS, stats, strict=True))
    row["tokens"].copy_(torch.randint(1, 50, (B,), generator=random))
    row["power"].sub_(0.5)
    stats[:, 2::3] = 0
    return stats.to(device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("B", [0, 1, 3, 1100])
@pytest.mark.parametrize("options", [(0.0, 0.0, 0.0), (1.0, 0.1, 0.2)])
@pytest.mark.parametrize("optional", [True, False])
def test_aggregate(
    impl: str, device: str, dtype: torch.dtype, B: int, options: tuple[float, ...], optional: bool
) -> None:
    """Sums of B positive float64 numbers in another order, then one rounding to `dtype`."""
    stats = random_stats(B, device)
    given = (stats.new_tensor(3.5), stats.new_tensor(2.0), torch.arange(B, device=device) % 2 == 0)
    args = (stats, *(given if optional else (None,) * 3), [*options, 0.8, 0.5], dtype)
    got, want = (
        stage("aggregate", impl)(*args),
        reference.aggregate(*args[:-2], AggregateOptions(*options, 0.8, 0.5), dtype),
    )
    rtol = (B + 8) * torch.finfo(torch.float64).eps + torch.finfo(dtype).eps
    for a, b in zip(got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        # policy_loss and the loss are differences of positive sums, at worst a tenth of them
        assert torch.allclose(a, b, rtol=10 * rtol, atol=0)


def test_aggregate_by_hand(impl: str, device: str) -> None:
    """Three trajectories, one empty, one skipped."""
    columns = {
        "tokens": (4, 0, 2), "weight": (1, 0, 1), "policy_loss": (-3, 0, 1), "kl": (2, 0, 4), "entropy": (8, 0, 6),
        "power": (-0.5, 0.25, 0.75), "ess": (3, 0, 2), "ess_target": (2, 0, 1), "clipped_low": (1, 0, 0),
        "clipped_high": (1, 0, 1), "ratio_sum": (5, 0, 3), "ratio_max": (2, 0, 1.75), "approx_kl": (1, 0, 0.5),
    }  # fmt: skip
    stats = torch.tensor([columns[name] for name in STATS], dtype=torch.float64, device=device)
    loss, D, metrics, clip_fraction = stage("aggregate", impl)(
        stats, None, stats.new_tensor(4.0), None, [0.0, 0.5, 0.1, 2.0, 0.0], torch.float64
    )
    assert float(D) == 2
    # (-3 + 1) + 0.5 (2/4 + 4/2) - 0.1 (8/4 + 6/2), over D = 2
    assert float(loss) == pytest.approx((-2 + 0.5 * 2.5 - 0.1 * 5) / 2, rel=1e-15)
    assert clip_fraction.tolist() == [0.5, 0, 0.5]
    want = {
        "clip_fraction_low": 1 / 6, "clip_fraction_high": 2 / 6, "ratio_mean": 8 / 6, "approx_kl": 1.5 / 6, "ref_kl": 1.0,
        "entropy": 14 / 6, "power_mean": 0.125, "ess": 2.5, "ess_target": 1.5, "policy_loss": -1.0, "tokens": 6.0,
        "trajectories": 2.0, "ratio_max": 2.0, "power_max": 0.75, "power_min": -0.5, "clip_fraction": 0.5,
    }  # fmt: skip
    assert dict(zip(METRICS, metrics.tolist(), strict=True)) == pytest.approx(want, rel=1e-15)
    skipped = torch.tensor([False, False, True], device=device)
    by_tokens = list(AggregateOptions(1.0, 0.0, 0.0))
    loss, D, metrics, _ = stage("aggregate", impl)(stats, None, None, skipped, by_tokens, torch.float64)
    assert (float(D), float(loss)) == (6, pytest.approx(-2 / 6, rel=1e-15))
    found = dict(zip(METRICS, metrics.tolist(), strict=True))
    assert (found["tokens"], found["trajectories"], found["clip_fraction"]) == (6, 2, pytest.approx(0.5))
    assert (found["power_mean"], found["power_max"], found["power_min"]) == (-0.5, -0.5, -0.5)
    assert (found["ratio_mean"], found["ratio_max"], found["ess"]) == (8 / 4, 2, 5)


def test_aggregate_keeps_nan_and_the_limit(impl: str, device: str) -> None:
    stats = random_stats(5, device)
    row = dict(zip(STATS, stats, strict=True))
    run = stage("aggregate", impl)
    no_terms = list(AggregateOptions(0.0, 0.0, 0.0))
    for largest, limit, finite in ((8.0, 2.0, True), (8.1, 2.0, False), (math.nan, 2.0, False), (math.inf, 2.0, False)):
        loss, *_ = run(
            stats,
            stats.new_tensor(4.0),
            stats.new_tensor(largest),
            None,
            [*no_terms[:3], limit, 0.0],
            torch.float32,
        )
        assert bool(loss.isfinite()) == finite, largest
    # the entropy's coefficient, of 2 (largest) + 22 (factor) x 0.1 (its weight) x weight / tokens
    with_entropy = [0.0, 0.0, -0.1]
    most = float(2 + 22 * 0.1 * (row["weight"] / row["tokens"].clamp(min=1)).max()) / 4
    for limit, finite in ((1.001 * most, True), (0.999 * most, False)):
        loss, *_ = run(
            stats,
            stats.new_tensor(4.0),
            stats.new_tensor(2.0),
            None,
            [*with_entropy, limit, 22.0],
            torch.float32,
        )
        assert bool(loss.isfinite()) == finite, limit
    # terms that are not asked for may be anything
    row["kl"].fill_(math.nan)
    row["entropy"][0] = math.inf
    assert bool(run(stats, None, None, None, no_terms, torch.float32)[0].isfinite())
    for name in ("ratio_sum", "ratio_max", "power", "policy_loss"):
        row[name][1] = math.nan
    loss, _, metrics, _ = run(stats, None, None, None, no_terms, torch.float32)
    found = dict(zip(METRICS, metrics.tolist(), strict=True))
    assert bool(loss.isnan())
    for name in ("ratio_mean", "ratio_max", "power_mean", "power_max", "power_min", "policy_loss", "ref_kl"):
        assert math.isnan(found[name]), name
    assert found["entropy"] == math.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [67, 4100])
@pytest.mark.parametrize("given", ["dlogp", "dentropy", "both"])
def test_dlogits(impl: str, device: str, dtype: torch.dtype, V: int, given: str) -> None:
    case = make_case(dtype, B=3, T=3, V=V, device=device)
    z, small = case.logits.double().clone().requires_grad_(), compute_dtype(dtype)
    logp, row_max, row_sum, entropy = reference.token_logp(z, case.token_ids, case.mask, 0.7)
    g, h = torch.randn(2, 3, 3, dtype=torch.float64, device=device).to(small)
    g[0, 0], h[0, 0] = 0.0, 0.0
    g, h = (None if given == "dentropy" else g), (None if given == "dlogp" else h)
    total = sum((a * b.double()).sum() for a, b in ((logp, g), (entropy, h)) if b is not None)
    (want,) = torch.autograd.grad(total, z)
    saved = [t.detach().to(small) for t in (row_max, row_sum, entropy)]
    got = stage("dlogits", impl)(case.logits, case.token_ids, case.mask, *saved, g, h, 0.7)
    assert got.dtype == dtype
    assert (got[0, 0] == 0).all()
    x = float((case.logits.double() / 0.7).abs().max())
    # log q carries u (6 |x| + log V), the entropy factor (log q + H) the same once more; then products and the store,
    # which for float16 has a smallest step of 2^-24
    delta = unit_roundoff(dtype) * (12 * x + 4 * torch.tensor(V).log().item() + 32)
    stored = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    step = 2.0**-24 if dtype == torch.float16 else 0.0
    # relative to what each entry is made of: q (|g| + |h| (|log q| + H)), plus |g| in the target column
    q = torch.softmax(case.logits.double() / 0.7, -1)
    one_hot = torch.zeros_like(q).scatter_(-1, case.token_ids[..., None], 1.0)
    size = torch.zeros_like(q)
    if g is not None:
        size = size + (q + one_hot) * g.double().abs()[..., None]
    if h is not None:
        size = size + q * (q.log().abs() + entropy.detach()[..., None]) * h.double().abs()[..., None]
    size = torch.where(case.mask[..., None], size / 0.7, 0)
    assert ((got.double() - want).abs() <= (delta + stored) * size + step).all()


def test_stages_have_the_same_names_everywhere() -> None:
    for name in ("token_logp", "trajectory", "dlogits"):
        assert callable(getattr(reference, name))
        assert callable(getattr(importlib.import_module("pmpo_kernels.triton"), name))
        assert (Path(__file__).parent.parent / "csrc" / f"{name}.cpp").exists()
