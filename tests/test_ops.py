"""The operators as PyTorch sees them: schema, fake, functionalisation, `torch.compile`."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from head_cases import head_case

from pmpo_kernels import LossConfig, linear_pmpo_loss, pmpo_loss, reference
from pmpo_kernels.batch import Batch
from pmpo_kernels.contract import STATS, compute_dtype
from pmpo_kernels.linear.projection import HeadOptions
from pmpo_kernels.ops import IMPLEMENTATIONS, SCHEMAS, stage
from pmpo_kernels.verification import make_case


def arguments(name: str, device: str, dtype: torch.dtype) -> tuple[object, ...]:
    case = make_case(dtype, B=4, T=4, V=16, device=device)
    logp, row_max, row_sum, entropy = reference.token_logp(case.logits, case.token_ids, case.mask, 0.9)
    if name == "token_logp":
        return case.logits, case.token_ids, case.mask, 0.9
    if name == "trajectory":
        options = LossConfig.pmpo(entropy_coef=0.1).trajectory_options(has_power=False, has_target_ess=False)
        offsets = torch.arange(5, device=device) * 4
        flat = [t.flatten() for t in (case.old_logp, case.mask, case.ref_logp, case.rollout_weights, case.mask)]
        return logp.flatten(), entropy.flatten(), *Batch(case.advantages, offsets, *flat), list(options)
    if name == "aggregate":
        stats = torch.rand(len(STATS), 4, dtype=torch.float64, device=device)
        D, largest = stats.new_tensor(3.0), stats.new_tensor(0.5)
        return stats, D, largest, case.advantages == 0, [1.0, 0.1, 0.01, 1.0, 22.0], compute_dtype(dtype)
    if name == "solve_power":
        l = (logp - case.old_logp).double().flatten()
        return l, case.mask.flatten(), torch.arange(5, device=device) * 4, torch.full((4,), 3.9).double(), 1.0
    if name == "scale_":
        return case.logits, logp[0, 0]
    g = torch.randn_like(logp)
    return case.logits, case.token_ids, case.mask, row_max, row_sum, entropy, g, None, 0.9


@pytest.mark.parametrize(
    ("impl", "name"), [(i, name) for i in IMPLEMENTATIONS for name in IMPLEMENTATIONS[i].operators]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(name: str, impl: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(stage(name, impl), arguments(name, device_of(impl), dtype))


@pytest.mark.parametrize("max_chunk_tokens", [None, 2])
@pytest.mark.parametrize("trained", [(True, True, True), (False, True, False)])
def test_opcheck_linear_loss(trained: tuple[bool, ...], max_chunk_tokens: int | None) -> None:
    head = head_case(torch.bfloat16)
    c, tokens = head.case, head.case.mask.numel()
    flat = [t.flatten() for t in (c.old_logp, c.mask, c.ref_logp, c.rollout_weights, c.mask)]
    options = LossConfig.pmpo(entropy_coef=0.1, beta=0.1).trajectory_options(has_power=False, has_target_ess=False)
    offsets = torch.arange(0, tokens + 1, tokens // len(c.advantages))
    batch = Batch(c.advantages, offsets, *flat)
    arguments = (*head[:3], c.token_ids, *batch, list(options), torch.tensor(6.0).double(), "cpp")
    settings = HeadOptions(0.9, 3.0, 0.8, torch.bfloat16, list(trained), max_chunk_tokens, False)
    torch.library.opcheck(torch.ops.pmpo_kernels.linear_loss.default, (*arguments, *settings))


def test_compile_fullgraph_from_hidden() -> None:
    """One graph although the sizes of the products depend on the data, and no recompilation for a new length."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def step(h: torch.Tensor, w: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        ids, old_logp, advantages, mask = args
        return linear_pmpo_loss(torch.tanh(h), w, ids, old_logp, advantages, mask=mask, max_chunk_tokens=8).loss

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for T in (5, 6, 9):
        case = make_case(torch.float32, B=4, T=T, V=16)
        results = []
        for function in (step, compiled):
            random = torch.Generator().manual_seed(T)
            leaves = [torch.randn(s, generator=random).requires_grad_() for s in ((4, T, 3), (16, 3))]
            function(*leaves, case.token_ids, case.old_logp, case.advantages, case.mask).backward()
            results.append([x.grad for x in leaves])
        # the same operator; tanh and its gradient are compiled: a few roundings
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*results, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_every_operator_has_an_implementation() -> None:
    assert {name for i in IMPLEMENTATIONS.values() for name in i.operators} == set(SCHEMAS)
    for name in IMPLEMENTATIONS["cpp"].operators:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pmpo_kernels::{name}.cpp", "CPU"), name


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(impl: str, device: str, backend: str, inplace: bool) -> None:
    """The public call in one graph, dynamic shapes, same bits as eager, and no recompilation for a new length."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = LossConfig.pmpo(entropy_coef=0.01)

    def step(logits: torch.Tensor, *args: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        ids, old_logp, advantages, mask = args
        further = {"policy_mask": mask & (ids > 1), "rollout_weights": advantages.abs() + 0.5}
        out = pmpo_loss(
            logits * 1.0, ids, old_logp, advantages, mask=mask, config=config, inplace=inplace, impl=impl, **further
        )
        return out.loss, out.metrics

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for T in (5, 6, 9):  # not 4, the batch size, which the compiler would take for the same symbol
        case = make_case(torch.float32, B=4, T=T, V=16, device=device)
        args = (case.token_ids, case.old_logp, case.advantages, case.mask)
        results = []
        for function in (step, compiled):
            z = case.logits.clone().requires_grad_()
            loss, metrics = function(z, *args)
            loss.backward()
            results.append((loss.detach(), z.grad, metrics))
        # The small reductions around the operators are re-ordered by the compiler: a few roundings of B terms.
        eps = torch.finfo(torch.float32).eps
        (a, grad_a, metrics_a), (b, grad_b, metrics_b) = results
        assert torch.allclose(a, b, rtol=8 * eps, atol=8 * eps)
        assert torch.allclose(grad_a, grad_b, rtol=8 * eps, atol=0)
        assert all(torch.allclose(metrics_a[k], metrics_b[k], rtol=8 * eps) for k in metrics_a)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_token_ids_are_checked_inside_a_compiled_graph() -> None:
    case = make_case(torch.float32, B=4, T=4, V=16)
    compiled = torch.compile(lambda z, ids: pmpo_loss(z, ids, case.old_logp, case.advantages).loss, fullgraph=True)
    # what a compiled graph's operator raises is a RuntimeError from PyTorch 2.15 on
    with pytest.raises((ValueError, RuntimeError), match=r"token_ids: expected ids in \[0, 16\)"):
        compiled(case.logits, case.token_ids + 16)


def test_values_on_a_gpu_are_checked_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from pmpo_kernels.checks import checks_values

    meta = torch.empty(0, device="meta")  # any device that is not the CPU
    assert not checks_values(meta)
    monkeypatch.setenv("PMPO_KERNELS_CHECK", "1")
    assert checks_values(meta)
