"""The promises, each implementation: masks, packing, determinism, memory, strides, backward."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import pytest
import torch
from conftest import CONFIGURATIONS, device_of
from helpers import FEW, run, same_bits, small_case
from torch import Tensor

from pmpo_kernels import LossConfig, pmpo_loss, pmpo_loss_from_logp, token_logp
from pmpo_kernels.batch import Batch
from pmpo_kernels.verification import Case, oracle, three_part_error, tolerance


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["pmpo, all terms", "sequence clip, dual, k2"])
def test_masked_slots_change_no_bit(name: str, impl: str, device: str, poison: float) -> None:
    config = CONFIGURATIONS[name]
    case = small_case(device)
    policy = case.ref_logp < case.old_logp
    out, grad = run(case, config, impl, policy_mask=policy)
    hidden = ~case.mask

    def fill(x: Tensor) -> Tensor:
        return torch.where(hidden if x.dim() == 2 else hidden[..., None], poison, x)

    bad = Case(
        fill(case.logits), torch.where(hidden, -100, case.token_ids), fill(case.old_logp), case.advantages, case.mask,
        fill(case.ref_logp), fill(case.rollout_weights),
    )  # fmt: skip
    out_bad, grad_bad = run(bad, config, impl, policy_mask=torch.where(hidden, ~policy, policy))
    same_bits(out, out_bad)
    assert torch.equal(grad, grad_bad)
    assert torch.equal(out.logp, out_bad.logp)
    assert grad[hidden].abs().max() == 0


@pytest.mark.parametrize("name", FEW)
def test_packed_equals_padded_bit_for_bit(name: str, impl: str, device: str) -> None:
    config = CONFIGURATIONS[name]
    case = small_case(device)
    policy = case.ref_logp < case.old_logp
    out, grad = run(case, config, impl, policy_mask=policy)
    keep, lengths = case.mask, case.mask.sum(1)
    packed = Case(*(t[keep] if t.dim() > 1 else t for t in case))
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
    out_packed, grad_packed = run(packed, config, impl, mask=None, cu_seqlens=cu_seqlens, policy_mask=policy[keep])
    same_bits(out, out_packed)
    assert torch.equal(grad[keep], grad_packed)
    assert torch.equal(out.logp[keep], out_packed.logp)


@pytest.mark.parametrize("name", FEW)
def test_micro_batches_equal_one_batch(name: str, impl: str, device: str) -> None:
    """With the whole step's denominator, the gradients of any split are the same bits; their losses sum up."""
    config = CONFIGURATIONS[name]
    case = small_case(device)
    lengths = case.mask.sum()
    D = lengths if config.loss_agg_mode == "token-mean" else (case.mask.sum(1) > 0).sum()
    out, grad = run(case, config, impl)
    for split in (1, 4):
        parts = [run(Case(*(t[i : i + split] for t in case)), config, impl, denominator=D) for i in range(0, 6, split)]
        assert torch.equal(torch.cat([g for _, g in parts]), grad)
        assert torch.equal(torch.cat([o.power for o, _ in parts]), out.power)
        total = sum(o.loss.detach().double() for o, _ in parts)
        magnitude = sum(abs(float(o.loss.detach())) for o, _ in parts)
        assert float(total) == pytest.approx(float(out.loss), abs=8 * torch.finfo(torch.float32).eps * magnitude)


def test_same_input_same_bits(impl: str, device: str) -> None:
    case = small_case(device, torch.bfloat16)
    config = CONFIGURATIONS["pmpo, all terms"]
    (a, grad_a), (b, grad_b) = run(case, config, impl), run(case, config, impl)
    same_bits(a, b)
    assert torch.equal(grad_a, grad_b)


def test_one_more_position_is_ignored(impl: str, device: str) -> None:
    """(B, T + 1, V) logits, as a model returns them: the last position has a zero gradient and no effect, even NaN."""
    case = small_case(device)
    out, grad = run(case, LossConfig.pmpo(), impl)
    extra = torch.cat([case.logits, torch.full_like(case.logits[:, :1], math.nan)], 1)
    out_extra, grad_extra = run(case._replace(logits=extra), LossConfig.pmpo(), impl)
    same_bits(out, out_extra)
    assert torch.equal(grad_extra[:, :-1], grad)
    assert (grad_extra[:, -1] == 0).all()


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "time first": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "padded vocabulary": lambda z: torch.cat([z, torch.full_like(z[..., :7], math.nan)], -1)[..., : z.shape[-1]],
    "every other position": lambda z: z.repeat_interleave(2, 1)[:, ::2],
    "offset storage": lambda z: torch.cat([z.new_zeros(3), z.flatten()])[3:].view(z.shape),
    "aligned rows in a wider tensor": lambda z: torch.cat([z, z], -1)[..., : z.shape[-1]],
}


def test_overlapping_rows(impl: str, device: str) -> None:
    """Rows that share memory (out of place): the gradient has rows of its own, whose sum flows to the shared elements."""
    x = torch.randn(13, dtype=torch.float64, device=device, requires_grad=True)
    ids = torch.tensor([[0, 3, 9, 1]], device=device)
    shared = x.unfold(0, 10, 1)[None]
    assert shared.stride() == (4, 1, 1)
    results = []
    for z in (shared, shared.contiguous()):
        logp = token_logp(z, ids, impl=impl).logp
        results.append((logp, torch.autograd.grad(logp.sum(), x, retain_graph=True)[0]))
    (a, grad_a), (b, grad_b) = results
    # ten terms, added in another order: rows that overlap are not aligned, which for Triton means other lanes
    assert torch.allclose(a, b, rtol=1e-14, atol=1e-15)
    assert torch.allclose(grad_a, grad_b, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("layout", list(STRIDED))
@pytest.mark.parametrize("inplace", [False, True])
def test_strided_logits(impl: str, device: str, layout: str, inplace: bool) -> None:
    case = small_case(device)
    out, grad = run(case, LossConfig.pmpo(), impl)
    leaf = case.logits.clone().requires_grad_()
    strided = STRIDED[layout](leaf)
    assert torch.equal(strided, leaf)
    small = [t.t().contiguous().t() for t in (case.token_ids, case.old_logp, case.mask)]
    got = pmpo_loss(
        strided, small[0], small[1], case.advantages.repeat_interleave(2)[::2], mask=small[2],
        rollout_weights=case.rollout_weights, ref_logp=case.ref_logp, inplace=inplace, impl=impl,
    )  # fmt: skip
    got.loss.backward()
    # Rows that are not aligned take narrower accesses, whose lanes add in another order; the rest is the same bits.
    if "padded" in layout or "offset" in layout:
        want, bound = oracle(case, LossConfig.pmpo(), out.power), tolerance(case, LossConfig.pmpo())
        assert max(three_part_error(leaf.grad, want, case.token_ids)) <= bound
        assert float(got.loss) == pytest.approx(float(want.loss), abs=bound * want.loss_scale)
    else:
        same_bits(out, got)
        assert torch.equal(grad, leaf.grad)


def test_backward_scales_and_can_be_repeated(impl: str, device: str) -> None:
    """grad_output 4 gives four times the gradient, twice the same; nothing saved, given or incoming is written to."""
    case = small_case(device, torch.float64)
    _, grad = run(case, LossConfig.pmpo(entropy_coef=0.1), impl)
    z = case.logits.clone().requires_grad_()
    before = [t.clone() for t in case]
    out = pmpo_loss(
        z, case.token_ids, case.old_logp, case.advantages, mask=case.mask, ref_logp=case.ref_logp,
        rollout_weights=case.rollout_weights, config=LossConfig.pmpo(entropy_coef=0.1), impl=impl,
    )  # fmt: skip
    four = torch.tensor(4.0, dtype=torch.float64, device=device)
    first, second = (torch.autograd.grad(out.loss, z, four, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, 4 * grad)
    assert four.item() == 4.0
    assert all(torch.equal(a, b) for a, b in zip(before, case, strict=True))
    assert torch.equal(z.detach(), case.logits)


def test_inplace_writes_over_the_logits_once(impl: str, device: str) -> None:
    case = small_case(device, torch.bfloat16)
    _, grad = run(case, LossConfig.pmpo(), impl)
    z = case.logits.clone().requires_grad_()
    logits = z * 1.0
    out = pmpo_loss(
        logits, case.token_ids, case.old_logp, case.advantages, mask=case.mask, rollout_weights=case.rollout_weights,
        inplace=True, impl=impl,
    )  # fmt: skip
    (got,) = torch.autograd.grad(out.loss, logits, retain_graph=True)
    assert got.data_ptr() == logits.data_ptr()
    assert torch.equal(got, grad)
    with pytest.raises(RuntimeError, match="inplace=True the first backward writes the gradient over them"):
        out.loss.backward()


def test_no_double_backward(impl: str, device: str) -> None:
    case = small_case(device, torch.float64)
    z = case.logits.clone().requires_grad_()
    loss = pmpo_loss(z, case.token_ids, case.old_logp, case.advantages, impl=impl).loss
    with pytest.raises(RuntimeError, match="expected a first-order backward, got create_graph=True"):
        torch.autograd.grad(loss, z, create_graph=True)


def test_rows_without_gradient_are_not_read(impl: str, device: str) -> None:
    """A clipped token's row and those of A = 0 are written as zeros even if the logits turn NaN after the forward pass."""
    z = torch.zeros(2, 3, 8, device=device, requires_grad=True)
    logits = z * 1.0
    ids = torch.zeros(2, 3, dtype=torch.long, device=device)
    old = torch.full((2, 3), math.log(1 / 8), device=device)
    old[0, 1] -= 1.0  # ratio e, clipped for A > 0
    out = pmpo_loss(logits, ids, old, torch.tensor([1.0, 0.0], device=device), config=LossConfig.grpo(), impl=impl)
    logits.data[0, 1] = math.nan
    logits.data[1] = math.nan
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert (grad[0, 1] == 0).all()
    assert (grad[1] == 0).all()
    assert (grad[0, [0, 2]].abs().sum(-1) > 0).all()


def test_empty_and_single_token_trajectories(impl: str, device: str) -> None:
    case = small_case(device, torch.float64)
    out, grad = run(case, LossConfig.pmpo(), impl)
    assert case.mask.sum(1)[1:3].tolist() == [0, 1]
    assert out.ess[1:3].tolist() == [0.0, 1.0]
    assert out.power[2] == 1.0
    assert out.metrics["trajectories"] == 5
    assert (grad[1] == 0).all()
    nothing = case._replace(mask=torch.zeros_like(case.mask))
    out, grad = run(nothing, LossConfig.pmpo(beta=0.1, entropy_coef=0.1), impl)
    assert out.loss == 0
    assert (grad == 0).all()
    assert all(bool(value.isfinite()) for value in out.metrics.values())
    none = Case(*(t[:0] for t in case))
    out, grad = run(none, LossConfig.pmpo(), impl)
    assert out.loss == 0
    assert grad.shape == none.logits.shape


@pytest.mark.parametrize("impl", ["reference", "triton"])  # C++ always checks
def test_unchecked_ids_give_nan(impl: str, device: str) -> None:
    """What a GPU does with an id out of range: NaN for that token, nothing read out of bounds."""
    module = importlib.import_module(f"pmpo_kernels.{impl}")  # below the operator's check, which the CPU always makes
    function = module.token_logp
    logits = torch.randn(1, 3, 8, device=device)
    logp = function(logits, torch.tensor([[3, 8, -1]], device=device), None, 1.0)[0]
    assert logp.isnan().tolist() == [[False, True, True]]


def test_masked_slots_of_given_logp_are_zero_in_the_output(impl: str, device: str) -> None:
    logp = torch.tensor([[-1.0, math.nan]], device=device)
    mask = torch.tensor([[True, False]], device=device)
    A = torch.ones(1, device=device)
    out = pmpo_loss_from_logp(logp, None, A, mask=mask, entropy=logp, impl=impl)
    assert out.logp.tolist() == out.entropy.tolist() == [[-1.0, 0.0]]


def test_overlapping_rows_are_refused_in_place() -> None:
    rows = torch.zeros(20).as_strided((1, 3, 7), (0, 4, 1))
    with pytest.raises(ValueError, match="logits: expected rows that do not overlap with inplace=True"):
        token_logp(rows, torch.zeros(1, 3, dtype=torch.long), inplace=True)


def test_triton_gives_tokens_of_no_trajectory_zero_gradient() -> None:
    """What a GPU does with offsets that it does not check."""
    device, function = device_of("triton"), importlib.import_module("pmpo_kernels.triton").trajectory
    logp = torch.tensor([-1.0, -2.0, -3.0], device=device)
    offsets, A = torch.tensor([0, 2], device=device), torch.ones(1, device=device)
    options = LossConfig.grpo().trajectory_options(has_power=False, has_target_ess=False)
    dlogp = function(logp, None, Batch(A, offsets, old_logp=logp - 0.1), options)[0]
    assert (dlogp != 0).tolist() == [True, True, False]
