"""The fused LM head: which products it makes, what it keeps in memory, its backward pass, its promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import CONFIGURATIONS
from head_cases import HeadCase, head_case, loss_scale, materialised, product_error, run_head
from helpers import same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile

import pmpo_kernels.linear
from pmpo_kernels import LossConfig, linear_pmpo_loss, pmpo_loss
from pmpo_kernels.demo.cost import peak_memory
from pmpo_kernels.linear import FEWEST_TOKENS, default_chunk_tokens, pack
from pmpo_kernels.projection import Head, row_bytes

CLIPPING = LossConfig.grpo()


def call(head: HeadCase, leaves: list[Tensor], config: LossConfig = CLIPPING, **kwargs: object) -> Tensor:
    c = head.case
    given = (c.token_ids, c.old_logp, c.advantages)
    return linear_pmpo_loss(*leaves, *given, **{"bias": head.bias, "mask": c.mask, "config": config} | kwargs).loss


def leaves_of(head: HeadCase, *trained: bool) -> list[Tensor]:
    return [x.clone().requires_grad_(t) for x, t in zip((head.hidden, head.weight), trained, strict=True)]


# --- work ------------------------------------------------------------------------------------------------------------


def products_of(run: Callable[[], object]) -> list[tuple[int, int, int]]:
    """(rows, inner, columns) of every matrix product in a call."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        run()
    found = []
    for event in trace.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = event.input_shapes[0 if event.name == "aten::mm" else 1 :][:2]
            found.append((a[0], a[1], b[1]))
    return found


@pytest.mark.parametrize(("chunk", "passes"), [(None, 1), (3, 2)])
def test_rows_without_work_enter_no_product(chunk: int | None, passes: int) -> None:
    """Forward: response tokens of trajectories with A != 0, twice where they are longer than a chunk and have a gradient.
    Backward: of these, tokens with a gradient."""
    head = head_case(torch.float32)
    V, H = head.weight.shape
    want = materialised(
        head._replace(case=head.case._replace(rollout_weights=torch.ones_like(head.case.old_logp))), CLIPPING, None
    )
    entering = head.case.mask & (head.case.advantages != 0)[:, None]
    has_gradient = want.terms[0].amax(-1) > 0
    assert 0 < has_gradient.sum() < entering.sum() < head.case.mask.sum() < head.case.mask.numel()
    leaves = leaves_of(head, True, True)
    found = products_of(lambda: call(head, leaves, max_chunk_tokens=chunk).backward())
    long = entering.sum(1) > (chunk or 99)
    again = int((has_gradient & long[:, None]).sum())
    assert (again > 0) == (passes == 2)
    assert sum(m for m, k, n in found if (k, n) == (H, V)) == entering.sum() + again
    assert sum(m for m, k, n in found if (k, n) == (V, H)) == has_gradient.sum()
    assert sum(k for m, k, n in found if (m, n) == (V, H)) == has_gradient.sum()


@pytest.mark.parametrize("trained", [(True, False), (False, True), (False, False)])
def test_what_is_frozen_costs_nothing(trained: tuple[bool, bool]) -> None:
    head = head_case(torch.float32)
    V, H = head.weight.shape
    leaves = leaves_of(head, *trained)
    both = leaves_of(head, True, True)
    call(head, both).backward()
    found = products_of(lambda: call(head, leaves).backward() if any(trained) else call(head, leaves))
    assert any((k, n) == (V, H) for m, k, n in found) == trained[0]
    assert any((m, n) == (V, H) for m, k, n in found) == trained[1]
    for x, y in zip(leaves, both, strict=True):
        assert x.grad is None or torch.equal(x.grad, y.grad)
    with torch.no_grad():
        found = products_of(lambda: call(head, both))
    assert all((k, n) == (H, V) for m, k, n in found)
    assert found


def test_kl_and_entropy_terms_keep_zero_advantages() -> None:
    """Trajectories with A = 0 have a gradient then; without these terms, only on request are they looked at."""
    head = head_case(torch.float64)
    zero = head.case.advantages == 0
    seen = head.case.mask & zero[:, None]
    for config in (replace(CLIPPING, beta=0.1), replace(CLIPPING, entropy_coef=0.1)):
        out, _ = run_head(head, config, None)
        assert out.power.isfinite().all()
        assert (out.logp[seen] < 0).all()
    full, _ = run_head(head, CLIPPING, None, skip_zero_advantage=False)
    out, _ = run_head(head, CLIPPING, None)
    assert out.power.isnan().tolist() == out.ess.isnan().tolist() == zero.tolist()
    assert torch.equal(out.logp.isnan(), seen)
    assert torch.equal(out.entropy.isnan(), seen)
    assert torch.equal(out.logp[~seen], full.logp[~seen])
    assert torch.equal(out.clip_fraction, full.clip_fraction)
    same = {"policy_loss", "tokens", "trajectories", "clip_fraction", "clip_fraction_low", "clip_fraction_high"}
    for name in same:
        assert torch.equal(out.metrics[name], full.metrics[name]), name
    others = head._replace(case=head.case._replace(mask=head.case.mask & ~zero[:, None]))
    rest, _ = run_head(others, CLIPPING, None)
    for name in rest.metrics.keys() - same:
        assert torch.equal(out.metrics[name], rest.metrics[name]), name


def test_one_chunk_of_logits_at_a_time() -> None:
    """Peak memory is one chunk's logits and the gradients, and what is of the size of a chunk's hidden states, ids and logp."""
    N, V, H, chunk = 256, 8192, 16, 32
    hidden, weight = torch.randn(N, H).requires_grad_(), torch.randn(V, H).requires_grad_()
    ids, offsets = torch.randint(V, (N,)), torch.arange(0, N + 1, 16)
    rest = (None, torch.ones(N // 16))
    linear_pmpo_loss(hidden, weight, ids, *rest, cu_seqlens=offsets)  # what is made once

    def peak(tokens: int) -> int:
        def run() -> None:
            linear_pmpo_loss(hidden, weight, ids, *rest, cu_seqlens=offsets, max_chunk_tokens=tokens).loss.backward()

        hidden.grad = weight.grad = None
        return peak_memory(run, torch.device("cpu"))

    gradients = 4 * (N + V) * H  # given away by the backward pass, since there is nothing to scale
    small = 64 * 8 * N + 4 * 4 * chunk * H
    assert peak(chunk) <= 4 * chunk * V + gradients + small
    assert peak(N) > 4 * N * V  # the measurement sees logits


# --- chunks ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40)), st.integers(1, 60))
def test_pack(lengths: list[int], max_tokens: int) -> None:
    """Every trajectory once, in order; no chunk too long unless one trajectory is; none that the next one fits into."""
    chunks = list(pack(lengths, max_tokens))
    assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(len(lengths)))
    for chunk in chunks:
        assert sum(lengths[chunk]) <= max_tokens or sum(n > 0 for n in lengths[chunk]) == 1
    for a, b in pairwise(chunks):
        assert sum(lengths[a]) + lengths[b.start] > max_tokens


def test_default_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest trajectory or 1,024 tokens on a CPU, but at most a quarter of the free memory; a power of two then."""
    cpu, free = torch.device("cpu"), 8 << 30
    monkeypatch.setattr(pmpo_kernels.linear, "available_memory", lambda device: free)
    assert default_chunk_tokens(100, 1000, cpu) == 1024
    assert default_chunk_tokens(5000, 1000, cpu) == 5000
    assert default_chunk_tokens(5000, 1 << 20, cpu) == 2048
    assert default_chunk_tokens(5000, 3 << 19, cpu) == 1024
    assert default_chunk_tokens(5000, 1 << 40, cpu) == FEWEST_TOKENS
    monkeypatch.setattr(pmpo_kernels.linear, "available_memory", lambda device: None)
    assert default_chunk_tokens(5000, 1 << 40, cpu) == 5000
    head = Head(1.0, None, 1.0, torch.bfloat16, [True, True, True], None, True)
    assert row_bytes(50_257, head) == 2 * 50_304
    assert row_bytes(50_257, head._replace(logit_softcap=30.0)) == 4 * 50_304


# --- backward --------------------------------------------------------------------------------------------------------


def test_backward_scales_and_can_be_repeated() -> None:
    head = head_case(torch.float32)
    leaves = leaves_of(head, True, True)
    loss = call(head, leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for factor in (1.0, -3.0, 0.37):
        again = torch.autograd.grad(loss, leaves, torch.tensor(factor), retain_graph=True)
        assert all(torch.equal(factor * x, y) for x, y in zip(first, again, strict=True))
    last = torch.autograd.grad(call(head, leaves), leaves)
    assert all(torch.equal(x, y) for x, y in zip(first, last, strict=True))
    for x in first:
        x.zero_()  # what was given away is the caller's
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(x, y) for x, y in zip(last, again, strict=True))
    first = last
    half = torch.autograd.grad(0.5 * call(head, leaves) + 0.25 * call(head, leaves), leaves)
    assert all(torch.equal(0.75 * x, y) for x, y in zip(first, half, strict=True))
    with pytest.raises(RuntimeError, match="expected a first-order backward, got create_graph=True"):
        torch.autograd.grad(loss, leaves, create_graph=True)


def test_float16_gradients_are_scaled_before_they_are_rounded() -> None:
    """A loss of 1e-6 times its size has gradients below float16's smallest number, until the loss is scaled up again."""
    head = head_case(torch.float16)
    found = []
    for factor in (1.0, 2.0**-20):
        leaves = leaves_of(head, True, True)
        (call(head, leaves, denominator=1 / factor) * (loss_scale(torch.float16) / factor)).backward()
        found.append([x.grad for x in leaves])
    assert all(x.abs().max() > 0 for x in found[0])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("impl", [None, "reference"])
def test_tied_weight(impl: str | None) -> None:
    """One weight as embedding and as head: both gradients arrive."""
    head = head_case(torch.float64)
    c = head.case
    results = []
    for fused in (True, False):
        w = head.weight.clone().requires_grad_()
        h = torch.tanh(torch.nn.functional.embedding(c.token_ids.roll(1, 1), w))
        rest = (c.token_ids, c.old_logp, c.advantages)
        options = {"mask": c.mask, "config": CLIPPING, "impl": impl}
        out = linear_pmpo_loss(h, w, *rest, **options) if fused else pmpo_loss(linear(h, w), *rest, **options)
        out.loss.backward()
        results.append(w.grad)
    assert torch.allclose(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_autocast(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The products are in autocast's dtype, as those of `linear`; gradients have the dtype of their tensors."""
    head = head_case(torch.bfloat16)
    head = head._replace(case=head.case._replace(rollout_weights=torch.ones_like(head.case.rollout_weights)))
    leaves = [x.clone().to(d).requires_grad_() for x, d in zip(head[:3], (*dtypes, dtypes[1]), strict=True)]
    given = (head.case.token_ids, head.case.old_logp, head.case.advantages)
    options = {"mask": head.case.mask, "config": CLIPPING}
    with torch.autocast("cpu", torch.bfloat16):
        logits = linear(*leaves)
        assert logits.dtype == torch.bfloat16
        want = pmpo_loss(logits, *given, **options)
        out = linear_pmpo_loss(*leaves[:2], *given, bias=leaves[2], **options)
    assert torch.equal(out.loss, want.loss)
    out.loss.backward()
    assert [x.grad.dtype for x in leaves] == [x.dtype for x in leaves]
    assert product_error([x.grad for x in leaves], materialised(head, CLIPPING, None), torch.bfloat16) <= 1


# --- promises --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 3])
def test_what_does_not_enter_changes_no_bit(impl: str, chunk: int | None) -> None:
    """NaN in masked slots; and in whole trajectories with A = 0."""
    head, config = head_case(torch.float32), CONFIGURATIONS["pmpo, severity in between"]
    out, gradients = run_head(head, config, impl, max_chunk_tokens=chunk)
    left_out = ~head.case.mask | (head.case.advantages == 0)[:, None]

    def poison(x: Tensor) -> Tensor:
        return torch.where(left_out if x.dim() == 2 else left_out[..., None], torch.nan, x)

    case = head.case._replace(
        old_logp=poison(head.case.old_logp),
        ref_logp=poison(head.case.ref_logp),
        rollout_weights=torch.where(head.case.mask, head.case.rollout_weights, torch.nan),
        token_ids=torch.where(head.case.mask, head.case.token_ids, -100),
    )
    bad, bad_gradients = run_head(
        head._replace(hidden=poison(head.hidden), case=case), config, impl, max_chunk_tokens=chunk
    )
    assert torch.equal(out.loss, bad.loss)
    assert all(torch.equal(out.metrics[name], bad.metrics[name]) for name in out.metrics)
    assert torch.equal(out.logp.nan_to_num(9), bad.logp.nan_to_num(9))
    assert all(torch.equal(x, y) for x, y in zip(gradients, bad_gradients, strict=True))
    assert (gradients[0][left_out] == 0).all()


def test_layouts_agree_bit_for_bit(impl: str) -> None:
    """Padded, with one position more, packed, strided: the same products."""
    head, config = head_case(torch.float32), CONFIGURATIONS["pmpo, all terms"]
    out, (dh, dw, db) = run_head(head, config, impl)
    keep, lengths = head.case.mask, head.case.mask.sum(1)
    one_more = torch.cat([head.hidden, torch.full_like(head.hidden[:, :1], torch.nan)], 1)
    got, (dh1, dw1, db1) = run_head(head._replace(hidden=one_more), config, impl)
    same_bits(out, got)
    assert torch.equal(dh1[:, :-1], dh)
    assert (dh1[:, -1] == 0).all()
    packed = head._replace(
        hidden=head.hidden[keep], case=type(head.case)(*(t[keep] if t.dim() > 1 else t for t in head.case))
    )
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    got, (dh2, dw2, db2) = run_head(packed, config, impl, mask=None, cu_seqlens=cu_seqlens)
    same_bits(out, got)
    assert torch.equal(dh2, dh[keep])
    wide = head.weight.repeat(1, 2)[:, : head.weight.shape[1]]
    strided = head._replace(hidden=head.hidden.transpose(0, 1).contiguous().transpose(0, 1), weight=wide)
    got, (dh3, dw3, db3) = run_head(strided, config, impl)
    same_bits(out, got)
    assert torch.equal(dh3, dh)
    assert all(torch.equal(dw, x) for x in (dw1, dw2, dw3))
    assert all(torch.equal(db, x) for x in (db1, db2, db3))


def test_micro_batches_add_up() -> None:
    """With the whole step's denominator, whatever the split; to the rounding of the products."""
    head, config = head_case(torch.float32), LossConfig.dapo()
    D = head.case.mask.sum()
    want = materialised(head, config, None)
    total: list[Tensor] = [torch.zeros(()) for _ in range(3)]
    for i in range(0, 6, 2):
        part = head._replace(hidden=head.hidden[i : i + 2], case=type(head.case)(*(t[i : i + 2] for t in head.case)))
        _, gradients = run_head(part, config, None, denominator=D)
        total[0] = torch.cat([total[0], gradients[0]]) if i else gradients[0]
        total[1:] = [x + y for x, y in zip(total[1:], gradients[1:], strict=True)]
    assert product_error(total, want, torch.float32) <= 1


@pytest.mark.parametrize("kind", ["all masked", "no advantage", "no trajectory", "packed, empty"])
def test_nothing_to_do(impl: str, kind: str) -> None:
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    ids, A, options = torch.zeros(2, 3, dtype=torch.long), torch.ones(2), {}
    if kind == "all masked":
        options = {"mask": torch.zeros(2, 3, dtype=torch.bool)}
    elif kind == "no advantage":
        A = torch.zeros(2)
    elif kind == "no trajectory":
        hidden, ids, A = torch.randn(0, 3, 4, requires_grad=True), ids[:0], A[:0]
    else:
        hidden, ids = torch.randn(0, 4, requires_grad=True), ids.flatten()[:0]
        options = {"cu_seqlens": torch.zeros(3, dtype=torch.long)}
    out = linear_pmpo_loss(hidden, weight, ids, None, A, impl=impl, **options)
    out.loss.backward()
    assert out.loss == 0
    assert not any(value.isnan() for value in out.metrics.values())
    assert all((x.grad == 0).all() and x.grad.shape == x.shape for x in (hidden, weight))


def test_a_finite_loss_has_finite_gradients() -> None:
    """Also where only a product overflows, or only the gradient of the weight."""
    ids, A = torch.tensor([[1]]), torch.tensor([1.0])
    big = torch.finfo(torch.float32).max / 4
    for h, w in (
        (torch.tensor([[[0.0, big]]]), [[1.0, 0.0], [2.0, 0.0]]),
        (torch.tensor([[[1e-38]]]), [[-big], [big]]),
    ):
        hidden, weight = h.requires_grad_(), torch.tensor(w, requires_grad=True)
        out = linear_pmpo_loss(hidden, weight, ids, None, 100 * A, config=LossConfig.grpo())
        out.loss.backward()
        finite = bool(hidden.grad.isfinite().all() and weight.grad.isfinite().all())
        assert not finite
        assert not out.loss.isfinite()


def test_banned_tokens() -> None:
    """A bias of -inf: no probability, no gradient, under every term."""
    head = head_case(torch.float32)
    head.bias[3] = -math.inf
    head.case.token_ids[head.case.token_ids == 3] = 4
    _, gradients = run_head(head, CONFIGURATIONS["pmpo, all terms"], None)
    assert all(x.isfinite().all() for x in gradients)
    assert (gradients[1][3] == 0).all()
    assert gradients[2][3] == 0
