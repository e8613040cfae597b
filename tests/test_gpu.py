"""What only a GPU can show: no synchronisation, CUDA graphs, no further compiles, sizes beyond 32 bits."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from head_cases import call as call_head
from head_cases import head_case, leaves_of, run_head
from helpers import same_bits
from small_model import CONFIG, Model, batch

from pmpo_kernels import LossConfig, PMPOOutput, linear_pmpo_loss, pmpo_loss, token_logp
from pmpo_kernels.linear.chunks import pack
from pmpo_kernels.linear.projection import add_product, adds_to_float32
from pmpo_kernels.verification import Case, make_case

pytestmark = pytest.mark.gpu


def step(B: int, T: int, V: int = 1024, **options: object) -> torch.Tensor:
    case = make_case(torch.bfloat16, B=B, T=T, V=V, device="cuda")
    z = case.logits.requires_grad_()
    pmpo_loss(z, case.token_ids, case.old_logp, case.advantages, mask=case.mask, **options).loss.backward()
    return z.grad


CONFIGS = {
    "pmpo, all terms": LossConfig.pmpo(full_clip_fraction=0.5, beta=0.1, entropy_coef=0.01, temperature=0.7),
    "gspo": LossConfig.gspo(),
    "dapo": LossConfig.dapo(),
}


def call(case: Case, config: LossConfig, **options: object) -> tuple[PMPOOutput, torch.Tensor]:
    """Loss and gradient of one call with every optional input."""
    z = case.logits.detach().requires_grad_()
    out = pmpo_loss(
        z, case.token_ids, case.old_logp, case.advantages, mask=case.mask, ref_logp=case.ref_logp,
        rollout_weights=case.rollout_weights, config=config, **options,
    )  # fmt: skip
    return out, torch.autograd.grad(out.loss, z)[0]


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("rows", ["few", "many"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_no_synchronisation(name: str, rows: str, layout: str) -> None:
    case = make_case(torch.bfloat16, B=4, T=8 if rows == "few" else 128, V=20_000, device="cuda")
    options = {}
    if layout == "packed":
        offsets = torch.arange(5, device="cuda") * case.token_ids.shape[1]
        case = Case(*(t if t.dim() == 1 else t.flatten(0, 1) for t in case))
        options = {"cu_seqlens": offsets}
    call(case, CONFIGS[name], **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(case, CONFIGS[name], **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("T", [8, 128])
def test_cuda_graph_replays_the_same_bits(name: str, T: int) -> None:
    """Forward and backward captured once, replayed on other inputs: what a call on these gives."""
    case, other = (make_case(torch.bfloat16, B=4, T=T, V=20_000, device="cuda", seed=seed) for seed in (0, 1))
    static = Case(*(t.clone() for t in case))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call(static, CONFIGS[name])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, gradient = call(static, CONFIGS[name])
    for inputs in (other, case):
        for target, source in zip(static, inputs, strict=True):
            target.copy_(source)
        graph.replay()
        want, want_gradient = call(inputs, CONFIGS[name])
        same_bits(out, want)
        assert torch.equal(gradient, want_gradient)


def test_no_further_compiles_over_lengths() -> None:
    """As `test_triton.py::test_no_further_compiles_over_lengths`, counted in Triton's own caches."""
    from pmpo_kernels.triton.aggregate import _aggregate_fwd_kernel
    from pmpo_kernels.triton.dlogits import _dlogits_bwd_kernel
    from pmpo_kernels.triton.token_logp import _token_logp_fwd_kernel, _token_logp_merge_kernel
    from pmpo_kernels.triton.trajectory import (
        _trajectory_gradient_kernel,
        _trajectory_power_kernel,
        _trajectory_sums_kernel,
    )

    trajectory = (_trajectory_sums_kernel, _trajectory_power_kernel, _trajectory_gradient_kernel)
    kernels = (
        _token_logp_fwd_kernel, _token_logp_merge_kernel, *trajectory, _aggregate_fwd_kernel, _dlogits_bwd_kernel
    )  # fmt: skip

    def compiled() -> list[int]:
        return [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]

    V = 20_000
    step(4, 8, V)
    step(40, 32, V)
    before = compiled()
    for i in range(50):
        step(4 + i % 7, 5 + i, V)
    for config in (LossConfig.grpo(), LossConfig.gspo(), LossConfig.holder(-2.0), LossConfig.pmpo(temperature=0.7)):
        step(4, 8, V, config=config)
    assert compiled() == before


def test_more_than_65535_tokens_a_row() -> None:
    T, V = 70_000, 64
    z = torch.randn(1, T, V, device="cuda", requires_grad=True)
    ids = torch.randint(V, (1, T), device="cuda")
    logp = token_logp(z, ids).logp
    want = torch.log_softmax(z.detach().double(), -1).gather(-1, ids[..., None])[..., 0]
    assert (logp - want).abs().max() < 64 * torch.finfo(torch.float32).eps
    pmpo_loss(z, ids, want.float() + 0.1, torch.ones(1, device="cuda")).loss.backward()
    assert (z.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("V", [131_072, 131_075])
def test_more_than_2_31_elements(V: int) -> None:
    """In place and out of place; the last rows lie beyond 2^31 elements."""
    T = 16_400
    z = torch.zeros(1, T, V, device="cuda", dtype=torch.bfloat16)
    z[0, -1, 5] = 3.0
    ids = torch.full((1, T), 5, device="cuda")
    weight = torch.zeros(1, T, device="cuda")
    weight[0, -1] = 1.0
    z.requires_grad_()
    total = V - 1 + math.exp(3.0)
    for inplace in (False, True):
        logp = token_logp(z, ids, inplace=inplace).logp
        assert logp[0, -1].item() == pytest.approx(3.0 - math.log(total), rel=1e-5)
        (gradient,) = torch.autograd.grad((logp * weight).sum(), z)
        assert gradient[0, -1, 5].item() == pytest.approx(1.0, rel=1e-2)
        assert gradient[0, -1, -1].item() == pytest.approx(-1 / total, rel=1e-2)
        assert gradient[0, -1, 0].item() == pytest.approx(-1 / total, rel=1e-2)
        assert (gradient[0, -2] == 0).all()
        del gradient
        torch.cuda.empty_cache()


def test_the_head_waits_twice_and_once_a_chunk() -> None:
    """docs/fused_head.md counts them; every other transfer goes to the device."""
    head = head_case(torch.bfloat16, "cuda")
    run_head(head, LossConfig.pmpo(), None, max_chunk_tokens=12)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            out, _ = run_head(head, LossConfig.pmpo(), None, max_chunk_tokens=12)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lengths = [n for n, A in zip(head.case.mask.sum(1).tolist(), head.case.advantages.tolist(), strict=True) if A]
    assert len(found) <= 2 + len(list(pack(lengths, 12))), [str(w.message) for w in found]
    assert out.loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_backward_pass_of_the_head_waits_for_nothing(dtype: torch.dtype) -> None:
    """The factor stays on the GPU, 1 or not; the kernel has the reference's bits, rounded once."""
    head = head_case(dtype, "cuda")
    leaves = leaves_of(head, True, True)
    whole = [x.float() for x in torch.autograd.grad(call_head(head, leaves, config=LossConfig.pmpo()), leaves)]
    for factor in (1.0, 2.0**-3):  # exact
        loss, by = call_head(head, leaves, config=LossConfig.pmpo()), torch.tensor(factor, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = torch.autograd.grad(loss, leaves, by)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if dtype == torch.bfloat16:  # of float16 the smallest underflow
            assert all(torch.equal(x.float(), factor * y) for x, y in zip(found, whole, strict=True))


def test_the_head_holds_one_chunk_of_logits() -> None:
    """Peak memory: a chunk's logits, the float32 sum of the weight's gradient, and that in bfloat16 with the hidden states'."""
    N, V, H, chunk = 8192, 50_257, 512, 1024
    hidden = torch.randn(N, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids, offsets = torch.randint(V, (N,), device="cuda"), torch.arange(0, N + 1, 512, device="cuda")

    def run() -> None:
        hidden.grad = weight.grad = None
        options = {"cu_seqlens": offsets, "max_chunk_tokens": chunk, "config": LossConfig.grpo()}
        linear_pmpo_loss(hidden, weight, ids, None, torch.ones(N // 512, device="cuda"), **options).loss.backward()

    run()
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    sums = 4 * V * H if adds_to_float32(hidden.device, hidden.dtype) else 4 * V * H + 2**26
    logits, rows = 2 * chunk * (V + 64), 4 * 2 * chunk * H + 128 * N
    assert torch.cuda.max_memory_allocated() - before <= max(logits + sums, sums + 2 * V * H) + 2 * N * H + rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_add_to_float32(dtype: torch.dtype) -> None:
    """Where PyTorch offers it: no rounding to 16 bits in between."""
    device = torch.device("cuda")
    if not adds_to_float32(device, dtype):
        pytest.skip(f"PyTorch {torch.__version__} does not add 16-bit products to a float32 sum")
    a, b = (torch.randn(s, device=device).to(dtype) for s in ((1000, 300), (300, 96)))
    before = torch.randn(1000, 96, device=device)
    for first, total in ((True, torch.full_like(before, torch.nan)), (False, before.clone())):
        want, terms = (x @ y for x, y in ((a.double(), b.double()), (a.double().abs(), b.double().abs())))
        want, terms = (want, terms) if first else (want + before, terms + before.abs())
        add_product(total, a, b, first)
        assert ((total.double() - want).abs() <= 302 * torch.finfo(torch.float32).eps / 2 * terms).all()


def from_logits(model: Model, case: Case) -> torch.Tensor:
    given = (case.token_ids, case.old_logp, case.advantages)
    return pmpo_loss(
        model(case.token_ids.roll(1, 1)), *given, mask=case.mask, ref_logp=case.ref_logp, config=CONFIG
    ).loss


def from_hidden(model: Model, case: Case) -> torch.Tensor:
    given = (model.head.weight, case.token_ids, case.old_logp, case.advantages)
    h = model.hidden(case.token_ids.roll(1, 1))
    return linear_pmpo_loss(h, *given, mask=case.mask, ref_logp=case.ref_logp, config=CONFIG).loss


@pytest.mark.parametrize("loss", [from_logits, from_hidden])
def test_saved_tensors_in_pinned_memory(loss: Callable[[Model, Case], torch.Tensor]) -> None:
    """Offloaded to the CPU and back: the same bits."""
    case, results = Case(*(t.cuda() for t in batch())), []
    for context in (contextlib.nullcontext(), torch.autograd.graph.save_on_cpu(pin_memory=True)):
        model = Model().cuda()
        with context:
            value = loss(model, case)
        value.backward()
        results.append(
            [p.grad for p in model.parameters() if p is not model.embedding.weight]
        )  # that one adds atomically
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("loss", [from_logits, from_hidden])
def test_a_training_step_is_compiled_once(loss: Callable[[Model, Case], torch.Tensor]) -> None:
    """As in test_compile.py, with inductor's kernels around the loss."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for B, T in ((4, 7), (5, 9), (3, 17), (12, 5)):
        case, values = Case(*(t.cuda() for t in batch(B, T))), []
        for function in (loss, compiled):
            model = Model().cuda()
            value = function(model, case)
            value.backward()
            values.append((value.detach(), model.head.weight.grad))
        # products over H = 8 and sums over at most 60 tokens in another order: 100 roundings
        for a, b in zip(*values, strict=True):
            assert (a - b).norm() <= 100 * torch.finfo(torch.float32).eps * b.norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
