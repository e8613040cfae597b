"""The fused LM head: its backward pass, 16-bit gradients, and the promises of `pmpo_loss`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import CONFIGURATIONS, device_of
from head_cases import CLIPPING, call, head_case, leaves_of, loss_scale, materialised, product_error, run_head
from helpers import same_bits
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

import pmpo_kernels.linear.chunks
import pmpo_kernels.linear.loss
import pmpo_kernels.linear.projection
from pmpo_kernels import LossConfig, linear_pmpo_loss, pmpo_loss
from pmpo_kernels.contract import compute_dtype
from pmpo_kernels.impls import interpreted
from pmpo_kernels.ops import stage

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_that_were_given_stay(dtype: torch.dtype, impl: str, device: str) -> None:
    """Scaled in place when the graph is freed, in new memory before; a factor of 1 changes no bit."""
    head = head_case(dtype, device)
    leaves, size = leaves_of(head, True, True), loss_scale(dtype)
    loss = call(head, leaves, impl=impl)
    factors = [size * x for x in (1.0, 0.37, 1.0, -2.0, 0.37)]
    given = [
        torch.autograd.grad(loss, leaves, torch.tensor(x, device=device), retain_graph=i < 4)
        for i, x in enumerate(factors)
    ]
    fresh = [
        torch.autograd.grad(call(head, leaves, impl=impl), leaves, torch.tensor(x, device=device)) for x in factors
    ]
    for a, b in zip(given, fresh, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    pointers = [x.untyped_storage().data_ptr() for gradients in given for x in gradients]
    assert len(set(pointers)) == len(pointers)


class Operators(TorchDispatchMode):
    """Names of the operators that run, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("retain_graph", "names"), [(False, ["scale_"] * 2), (True, ["clone", "scale_"] * 2)])
def test_the_backward_pass_is_an_operator_for_each_gradient(
    retain_graph: bool, names: list[str], impl: str, device: str
) -> None:
    head = head_case(torch.bfloat16, device)
    leaves = leaves_of(head, True, True)
    loss = call(head, leaves, impl=impl, max_chunk_tokens=12)
    factor = torch.tensor(0.3, device=device)
    with Operators() as found:
        torch.autograd.grad(loss, leaves, factor, retain_graph=retain_graph)
    assert found.names == names


@pytest.mark.parametrize("retain_graph", [False, True])
def test_an_interrupted_backward_pass_scales_nothing_twice(
    retain_graph: bool, impl: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was scaled in place is not handed out by another backward pass: that raises. With retain_graph=True it repeats."""
    head = head_case(torch.float32, device)
    leaves, three = leaves_of(head, True, True), torch.tensor(3.0, device=device)
    want = torch.autograd.grad(call(head, leaves, impl=impl), leaves, three)
    loss = call(head, leaves, impl=impl)

    def interrupted(name: str, chosen: str) -> Callable[[Tensor, Tensor], None]:
        def run(gradient: Tensor, factor: Tensor) -> None:
            stage(name, chosen)(gradient, factor)
            raise KeyboardInterrupt

        return run

    with monkeypatch.context() as patch:
        patch.setattr(pmpo_kernels.linear.loss, "stage", interrupted)
        with pytest.raises(KeyboardInterrupt):
            torch.autograd.grad(loss, leaves, three, retain_graph=retain_graph)
    if retain_graph:
        again = torch.autograd.grad(loss, leaves, three)
        assert all(torch.equal(x, y) for x, y in zip(again, want, strict=True))
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, leaves, three)


@pytest.mark.parametrize("chosen", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 3 * 4096 + 5])
def test_scale_rounds_once(size: int, dtype: torch.dtype, chosen: str) -> None:
    device, arithmetic = device_of(chosen), compute_dtype(dtype)
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(device, dtype)
    for factor in (1.0, 1.0019, -0.3, 1e-30, torch.inf, torch.nan):
        found, by = gradient.clone(), torch.tensor(factor, dtype=arithmetic, device=device)
        stage("scale_", chosen)(found, by)
        want = gradient.to(arithmetic) * by
        if (
            chosen == "triton" and interpreted() and dtype == torch.bfloat16
        ):  # the interpreter cuts off instead of rounding
            want = (want.view(torch.int32) & -(2**16)).view(torch.float32)
        want = want.to(dtype)
        assert torch.equal(found.nan_to_num(7), want.nan_to_num(7))
        assert torch.equal(found.isnan(), want.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_factor_is_not_rounded_to_16_bits(dtype: torch.dtype) -> None:
    """Gradients are rounded once, each its own way: no factor that all have in common, but for 1 / sqrt(n) of a rounding."""
    head = head_case(dtype)
    leaves = leaves_of(head, True, True)
    loss = call(head, leaves)
    size = loss_scale(dtype)
    first = torch.autograd.grad(loss, leaves, torch.tensor(size), retain_graph=True)
    for factor in (1.0019, 0.9981, 1 / 3):
        again = torch.autograd.grad(loss, leaves, torch.tensor(size * factor), retain_graph=True)
        for x, y in zip(first, again, strict=True):
            a, b = x.double().flatten(), y.double().flatten()
            error = float((a @ b) / (a @ a)) / factor - 1
            # independent roundings of the terms of a sum, each within u: 8 standard deviations
            assert abs(error) <= 8 * torch.finfo(dtype).eps / 2 * float((a**4).sum().sqrt() / (a @ a))


def test_float16_products_do_not_overflow() -> None:
    """Many tokens with one target, a large scale, a small one: as finite as with all logits at once, whatever the chunks."""
    B, T, H, V = 8, 512, 4, 8
    rest = (torch.zeros(B, T, dtype=torch.long), None, torch.ones(B))
    for size, scale in ((100.0, 1.0), (1.0, 1e4), (1.0, 1e-4)):
        hidden = torch.full((B, T, H), size).half().requires_grad_()
        weight = (torch.arange(V * H).view(V, H) % 3 * 1e-3 / scale).half().requires_grad_()
        given = {"config": CLIPPING}
        z = (scale * linear(hidden.double(), weight.double())).float()
        want = pmpo_loss(z, *rest, **given)
        exact = torch.autograd.grad(want.loss, (hidden, weight))
        for chunk in (None, 512, 4096):
            out = linear_pmpo_loss(hidden, weight, *rest, logit_scale=scale, max_chunk_tokens=chunk, **given)
            found = torch.autograd.grad(out.loss, (hidden, weight))
            # float16 rounds a logit below 1 by 2^-11, or by half of its smallest step, 2^-25, times the scale: at most 5e-4 in z,
            # which two logits of logp carry into (1 + 2 p) of a coefficient; then four roundings to float16
            bound = 3 * 2 * 5e-4 + 4 * 2.0**-11
            assert out.loss.item() == pytest.approx(want.loss.item(), rel=bound)
            for a, b in zip(found, exact, strict=True):
                assert torch.allclose(a.double(), b.double(), rtol=0, atol=bound * float(b.abs().max()) + 2.0**-24)


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


def test_sums_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a product of 16-bit factors can add to a float32 sum, nothing is rounded to 16 bits before the end."""

    def add(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
        total.copy_(a.float() @ b.float() + (0 if first else total))

    head, config = head_case(torch.bfloat16), LossConfig.grpo(clip="none")
    monkeypatch.setattr(pmpo_kernels.linear.projection, "add_product", add)
    monkeypatch.setattr(pmpo_kernels.linear.projection, "adds_to_float32", lambda device, dtype: True)
    want = materialised(head, config, None)
    for chunk in (None, 7):
        _, (_, dweight, _) = run_head(head, config, None, max_chunk_tokens=chunk)
        n, u, stored = head.case.mask.numel(), 2.0**-24, 2.0**-8
        bound = want.terms[1] * (n + 2) * u + want.gradients[1].abs() * stored * (1 + stored)
        assert ((dweight.double() - want.gradients[1]).abs() <= bound).all()


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


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk", [None, 12, 3])
@pytest.mark.parametrize("product", [True, False])
def test_the_first_chunk_is_written(
    product: bool, chunk: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stood in the memory of the sums."""

    def add(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
        total.copy_(a.float() @ b.float() + (0 if first else total))

    if product:  # what only a GPU has
        monkeypatch.setattr(pmpo_kernels.linear.projection, "add_product", add)
        monkeypatch.setattr(pmpo_kernels.linear.projection, "adds_to_float32", lambda device, dtype: True)
    head, config = head_case(dtype), CONFIGURATIONS["pmpo, all terms"]
    _, want = run_head(head, config, None, max_chunk_tokens=chunk)
    with poisoned():
        _, found = run_head(head, config, None, max_chunk_tokens=chunk)
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


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


def test_same_bits() -> None:
    """Again, with another number of threads, in several threads, in inference mode, and with the bias alone in training."""
    head, config = head_case(torch.float32), CONFIGURATIONS["pmpo, all terms"]
    out, gradients = run_head(head, config, None, max_chunk_tokens=12)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = run_head(head, config, None, max_chunk_tokens=12)
    finally:
        torch.set_num_threads(threads)
    with ThreadPoolExecutor(4) as pool:
        several = list(pool.map(lambda _: run_head(head, config, None, max_chunk_tokens=12), range(8)))
    for again, found in (single, *several):
        same_bits(out, again)
        assert all(torch.equal(x, y) for x, y in zip(gradients, found, strict=True))
    bias = head.bias.clone().requires_grad_()
    rest = {"rollout_weights": head.case.rollout_weights, "ref_logp": head.case.ref_logp, "max_chunk_tokens": 12}
    call(head, leaves_of(head, False, False), config, bias=bias, **rest).backward()
    assert torch.equal(bias.grad, gradients[2])
    with torch.inference_mode():
        assert torch.equal(call(head, leaves_of(head, True, True), config, **rest), out.loss)


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
    with poisoned():
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
        (torch.tensor([[[0.0, big]]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]])),
        (torch.tensor([[[1e-38]]]), torch.tensor([[-big], [big]])),
        (torch.full((1, 1, 4), 2000.0).half(), torch.zeros(2, 4).half()),
    ):
        hidden, weight = h.requires_grad_(), w.requires_grad_()
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
