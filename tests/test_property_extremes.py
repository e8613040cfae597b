"""Properties at the ends of the numbers: overflow, probability 0, huge and tiny ratios, one token and many."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from agreement import assert_agrees, bounds, call_and_want, wanted, well_posed
from definition import Trajectory, define, log_deficit
from generated import for_every
from hypothesis import assume
from hypothesis import strategies as st
from strategies import DTYPES, PACKED, Batch, Sizes, batches, call, configs, layouts, plain
from torch import Tensor

from pmpo_kernels import linear_pmpo_loss, pmpo_loss_from_logp, solve_power

U64 = torch.finfo(torch.float64).eps / 2
TINY_TO_HUGE = st.sampled_from([1e-30, 1e-10, 1e-5, 1e-3, 0.1, 1.0, 1e4, 1e30])
ADVANTAGES = st.sampled_from([1.0, -1.0, 1e-30, -1e30, 6e4, -1e5, 1e10, 3e38])


def is_finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())


@for_every(2.0)
def test_a_finite_loss_has_finite_gradients(data: st.DataObject, impl: str, device: str, sizes: Sizes) -> None:
    """Of the logits, in their dtype: a coefficient, or its quotient by the temperature, that overflows shows in the loss."""
    config = data.draw(configs(), "config")
    config = replace(config, temperature=data.draw(TINY_TO_HUGE, "temperature"))
    if config.entropy_coef:
        config = replace(
            config, entropy_coef=data.draw(st.sampled_from([0.01, 1e5, 1e30, -1e38, 1e300]), "entropy_coef")
        )
    batch = data.draw(batches(config, data.draw(st.sampled_from(DTYPES), "dtype"), sizes), "batch")
    size = data.draw(ADVANTAGES, "advantage")
    batch = batch._replace(advantages=(batch.advantages.double() * size).clamp(-3e38, 3e38).to(batch.advantages.dtype))
    got = call(batch, data.draw(layouts(), "layout"), config, impl, device)
    assert not is_finite(got.out.loss) or is_finite(got.grad), (got.out.loss, got.grad)


@for_every()
def test_a_finite_loss_has_finite_gradients_of_log_probs(
    data: st.DataObject, impl: str, device: str, sizes: Sizes
) -> None:
    """The same for log-probs and entropies of any dtype, with log-ratios of up to 300."""
    config = replace(data.draw(configs(), "config"), temperature=1.0)
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    B, T = data.draw(st.integers(1, 3), "B"), data.draw(st.integers(1, 4), "T")
    ratios = st.lists(
        st.sampled_from([0.0, 0.3, -0.3, 10.0, -10.0, 89.0, -89.0, 300.0, -300.0]), min_size=B * T, max_size=B * T
    )
    old = torch.full((B, T), -1.0, device=device)
    logp = (torch.tensor(data.draw(ratios, "d"), device=device).view(B, T) - 1).to(dtype).requires_grad_()
    entropy = torch.full((B, T), 0.5, device=device, dtype=dtype, requires_grad=True)
    A = torch.tensor(data.draw(st.lists(ADVANTAGES, min_size=B, max_size=B), "advantages"), device=device)
    target = torch.full((B,), 0.7 * T, device=device) if config.power == "ess" else None
    if config.entropy_coef:
        config = replace(config, entropy_coef=data.draw(st.sampled_from([0.01, 1e5, 1e30, 1e300]), "entropy_coef"))
    out = pmpo_loss_from_logp(logp, old, A, entropy=entropy, ref_logp=old, target_ess=target, config=config, impl=impl)
    grads = torch.autograd.grad(out.loss, [logp, entropy], allow_unused=True)
    assert not is_finite(out.loss) or all(g is None or is_finite(g) for g in grads), (out.loss, grads)


@for_every()
def test_large_and_infinite_logits(data: st.DataObject, impl: str, device: str, sizes: Sizes) -> None:
    """Logits of up to 1e4 and a vocabulary that is masked with -inf, down to two tokens of which one is banned."""
    config = data.draw(configs(), "config")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    sizes = sizes._replace(vocabulary=data.draw(st.sampled_from([2, 3, sizes.vocabulary]), "V"))
    batch = data.draw(batches(config, dtype, sizes), "batch")
    size = data.draw(st.sampled_from([1.0, 100.0, 1e4]), "size")
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    z = batch.logits.double()
    z = z / z.abs().amax().clamp(min=1e-9) * size if z.numel() else z
    banned = torch.rand(z.shape, generator=random) < data.draw(st.sampled_from([0.0, 0.5, 1.0]), "banned")
    banned.scatter_(1, batch.token_ids[:, None], False)
    batch = batch._replace(logits=torch.where(banned, -math.inf, z).to(dtype))
    logp = torch.log_softmax(batch.logits.double() / config.temperature, -1).gather(1, batch.token_ids[:, None])[:, 0]
    if batch.old_logp is not None:
        d = 0.5 * torch.randn(len(logp), generator=random).double()
        batch = batch._replace(old_logp=(logp - d).to(batch.old_logp.dtype))
    if batch.ref_logp is not None:
        batch = batch._replace(ref_logp=(logp + 0.1).to(batch.ref_logp.dtype))
    got, want, scale = call_and_want(batch, data.draw(layouts(), "layout"), config, impl, device)
    assert is_finite(got.out.loss)
    assert is_finite(got.grad)
    assert bool((got.grad[banned] == 0).all())
    assume(well_posed(batch, config, want))
    assert_agrees(batch, config, got, want, scale)


@for_every()
def test_a_banned_target(data: st.DataObject, impl: str, device: str, sizes: Sizes) -> None:
    """Tokens whose own logit is -inf have weight 0: counted for p > 0, the end of the trajectory for p <= 0; ESS likewise."""
    config = plain(data.draw(configs(), "config"))
    batch = data.draw(batches(config, data.draw(st.sampled_from(DTYPES), "dtype"), sizes), "batch")
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    share = data.draw(st.sampled_from([0.3, 1.0]), "share")
    banned = torch.rand(len(batch.token_ids), generator=random) < share
    z = batch.logits.clone()
    z[banned] = z[banned].scatter(1, batch.token_ids[banned][:, None], -math.inf)
    old = batch.logits.new_zeros(len(banned)).double() if batch.old_logp is None else batch.old_logp
    batch = batch._replace(logits=z, old_logp=old.to(batch.advantages.dtype))
    got, want, scale = call_and_want(batch, PACKED, config, impl, device)
    assume(well_posed(batch, config, want))
    assert_agrees(batch, config, got, want, scale)
    for i, x in enumerate(want.trajectories):
        if x is not None and not bool((x.log_a > -math.inf).any()):
            assert float(got.out.ess[i]) == 0


@for_every()
def test_ratios_of_any_size(data: st.DataObject, impl: str, device: str, sizes: Sizes) -> None:
    """Log-ratios of +-300, in float64: loss and gradient are those of the definition, relative to their own size."""
    config = plain(data.draw(configs(), "config"), temperature=1.0)
    T = data.draw(st.integers(1, 6), "T")
    values = st.sampled_from([0.0, 1.0, -1.0, 30.0, -30.0, 300.0, -300.0])
    d = torch.tensor(data.draw(st.lists(values, min_size=T, max_size=T), "d"), dtype=torch.float64)
    A = data.draw(st.sampled_from([1.0, -1.0, 0.25]), "A")
    target = data.draw(st.floats(1, T), "target") if config.power == "ess" else None
    logp, old = torch.full((T,), -1.0, dtype=torch.float64) + d, torch.full((T,), -1.0, dtype=torch.float64)
    x = logp.to(device).requires_grad_()
    out = pmpo_loss_from_logp(
        x, old.to(device), torch.tensor([A], device=device), cu_seqlens=torch.tensor([0, T], device=device), config=config,
        target_ess=None if target is None else torch.tensor([target], device=device).double(), impl=impl,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out.loss, x)
    p = float(out.power)
    y = logp.clone().requires_grad_()
    want = define(Trajectory(y, torch.zeros(T, dtype=torch.long), old, A, None, None, None, target), config, p, logp=y)
    (expected,) = torch.autograd.grad(want.weight * want.surrogate + 0 * y.sum(), y)
    expected = expected / (T if config.loss_agg_mode == "token-mean" else 1)
    loss = want.weight * float(want.surrogate.detach()) / (T if config.loss_agg_mode == "token-mean" else 1)
    assume(want.margin > 1e-6)
    # p |l| is rounded in float64 and so is (l - mean), a few times; the definition divides log n + |p| l by p
    l = 300.0
    bound = 4 * (T + 16) * (1 + l) * (1 + 2 * abs(p)) * U64 + (
        4 * (2 + math.log(T) + abs(p) * l) / abs(p) * U64 if p else 0
    )
    bound += 16 * U64
    assert abs(float(out.loss.detach()) - loss) <= bound * abs(loss)
    # the definition's W is lost below the smallest normal number, before it is multiplied by M_p
    lost = torch.finfo(torch.float64).tiny * (1 + float(expected.abs().sum()))
    assert bool(((grad.cpu() - expected).abs() <= bound * expected.abs() + lost).all()), (grad, expected)


@for_every(0.1)
def test_one_and_many_tokens(data: st.DataObject, impl: str, device: str, sizes: Sizes) -> None:
    """Trajectories of one token beside one of up to 100,000; the sums have one order, and p does not depend on company."""
    config = plain(data.draw(configs(), "config"), temperature=1.0)
    n = data.draw(st.sampled_from([1, 1023, 1025, 100_000]), "n")
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    lengths = [1, n, 1]
    d = data.draw(st.sampled_from([1e-3, 0.2, 1.0]), "sd") * torch.randn(n + 2, generator=random, dtype=torch.float64)
    A = torch.tensor([1.0, data.draw(st.sampled_from([1.0, -1.0]), "A"), -1.0], dtype=torch.float64)
    old = torch.full((n + 2,), -2.0, dtype=torch.float64)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    target = torch.tensor([1.0, max(1.0, 0.97 * n), 1.0], dtype=torch.float64) if config.power == "ess" else None
    x = (old + d).to(device).requires_grad_()
    out = pmpo_loss_from_logp(
        x, old.to(device), A.to(device), cu_seqlens=offsets.to(device), config=config, impl=impl, denominator=3.0,
        target_ess=None if target is None else target.to(device),
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out.loss, x)
    loss, expected, terms = 0.0, [], 0.0
    for i, y in enumerate((old + d).split(lengths)):
        y = y.clone().requires_grad_()
        one = Trajectory(y, torch.zeros(len(y), dtype=torch.long), old[: len(y)], float(A[i]), None, None, None, None)
        found = define(one, config, float(out.power[i]), logp=y)
        assume(found.margin > 1e-9)
        value = found.weight * found.surrogate / 3
        loss, terms = loss + float(value.detach()), terms + abs(float(value.detach()))
        expected.append(torch.autograd.grad(value + 0 * y.sum(), y)[0])
        assert float(out.ess[i]) == pytest.approx(
            len(y) * math.exp(-log_deficit(found.log_a.detach(), found.power)), rel=8 * (len(y) + 64) * U64
        )
    p = float(out.power.abs().max())
    small = min([abs(float(p)) for p in out.power if p], default=1.0)
    bound = 4 * (n + 16) * 6 * (1 + 2 * p) * U64 + 4 * (2 + math.log(n + 1) + 6 * p) / small * U64
    assert abs(float(out.loss.detach()) - loss) <= bound * terms
    want = torch.cat(expected)
    assert bool(((grad.cpu() - want).abs() <= bound * want.abs()).all())


@for_every(2.0, ["reference", "cpp"])
def test_the_solver_meets_its_residual(data: st.DataObject, impl: str, device: str, sizes: Sizes) -> None:
    """ESS(p) = ESS* to 1e-9 in its logarithm where it can be reached, else the nearer end; never more than 20 iterations."""
    n = data.draw(st.integers(1, 60), "n")
    sd = data.draw(st.sampled_from([1e-4, 0.1, 1.0, 30.0, 300.0]), "sd")
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    l = sd * torch.randn(n, generator=random, dtype=torch.float64)
    l[torch.rand(n, generator=random) < data.draw(st.sampled_from([0.0, 0.3, 1.0]), "zeros")] = -math.inf
    power_max = data.draw(st.sampled_from([0.3, 1.0, 5.0]), "power_max")
    target = data.draw(st.floats(0.5, n + 1), "target")
    p, info = solve_power(
        l[None], torch.tensor([target], dtype=torch.float64), power_max=power_max, impl=impl, full_output=True
    )
    p, residual = float(p), float(info.residual)
    assert 0 <= p <= power_max
    assert int(info.iterations) <= 20
    if not bool((l > -math.inf).any()):
        assert math.isfinite(residual)
        return
    goal, noise = math.log(n) - math.log(target), 1e-9 + 4 * (n + 16) * (1 + power_max * 6 * min(sd, 1)) * U64
    noise += 8 * power_max * sd * U64
    assert abs(log_deficit(l, p) - goal - residual) <= noise
    most, least = log_deficit(l, power_max), log_deficit(l, 0.0)
    if most - least <= noise:
        return  # equal weights have any p
    if goal >= most:
        assert log_deficit(l, p) >= most - noise
    elif goal <= least:
        assert log_deficit(l, p) <= least + noise
    else:
        assert abs(residual) <= noise


@for_every(0.5)
def test_the_fused_head(data: st.DataObject, impl: str, device: str, sizes: Sizes) -> None:
    """Hidden states and weight in float64, chunks of any size: loss and both gradients from the definition's."""
    config = data.draw(configs(), "config")
    batch = data.draw(batches(config, torch.float64, sizes), "batch")
    N, V = batch.logits.shape
    H = data.draw(st.integers(1, 8), "H")
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    hidden = torch.randn(N, H, generator=random, dtype=torch.float64)
    weight = torch.randn(V, H, generator=random, dtype=torch.float64)
    bias = torch.randn(V, generator=random, dtype=torch.float64)
    logits = hidden @ weight.T + bias
    logp = torch.log_softmax(batch.logits / config.temperature, -1).gather(1, batch.token_ids[:, None])[:, 0]
    moved = torch.log_softmax(logits / config.temperature, -1).gather(1, batch.token_ids[:, None])[:, 0] - logp
    batch = Batch(
        logits, batch.token_ids, batch.lengths, None if batch.old_logp is None else batch.old_logp + moved,
        batch.advantages, None if batch.ref_logp is None else batch.ref_logp + moved, *batch[6:],
    )  # fmt: skip
    h, w, b = (x.to(device).clone().requires_grad_() for x in (hidden, weight, bias))

    def there(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device)

    out = linear_pmpo_loss(
        h, w, there(batch.token_ids), there(batch.old_logp), there(batch.advantages), bias=b, config=config, impl=impl,
        max_chunk_tokens=data.draw(st.none() | st.integers(1, 9), "chunk"), skip_zero_advantage=False,
        cu_seqlens=torch.tensor([0, *torch.tensor(batch.lengths).cumsum(0)], device=device),
        ref_logp=there(batch.ref_logp), rollout_weights=there(batch.rollout_weights), policy_mask=there(batch.policy_mask),
        power=there(batch.power), target_ess=there(batch.target_ess),
    )  # fmt: skip
    grads = [g.cpu() for g in torch.autograd.grad(out.loss, [h, w, b])]
    want = wanted(batch, config, out.power.cpu())
    assume(well_posed(batch, config, want))
    # a product of H terms moves a logit by H u sum |h w|, all of them by at most `moves`: then as in `bounds`
    moves = (H + 2) * U64 * float((hidden.abs() @ weight.abs().T + bias.abs()).max() if N else 0.0) / config.temperature
    p = max([abs(float(p)) for p in out.power], default=0.0)
    rows = bounds(batch, config, want).rows + 4 * (2 + 5 * p) * moves
    assert abs(float(out.loss.detach()) - want.loss) <= rows * want.loss_terms
    q, c, e = want.log_q.detach().exp(), want.row[:, None], want.entropy_weight[:, None]
    size = q * (c + e * (want.log_q.detach().abs() + 2 * want.entropy[:, None] + 2)) / config.temperature
    size = size.scatter_add(1, batch.token_ids[:, None], c / config.temperature)
    # the two products add N or V terms, each of at most this size
    terms = rows + (N + V + 4) * U64
    for got, exact, allowed in zip(
        grads,
        (want.grad @ weight, want.grad.T @ hidden, want.grad.sum(0)),
        (size @ weight.abs(), size.T @ hidden.abs(), size.sum(0)),
        strict=True,
    ):
        assert bool(((got - exact).abs() <= terms * allowed + 1e-300).all())
