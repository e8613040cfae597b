"""A training step under torch.compile: one graph for all lengths, batch sizes and numbers, the results of eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from small_model import CONFIG, Model, batch
from torch import Tensor

from pmpo_kernels import LossConfig, PMPOOutput, linear_pmpo_loss, pmpo_loss, pmpo_loss_from_logp, token_logp
from pmpo_kernels.verification import Case

# sizes that differ from one another at first, for PyTorch takes equal ones for the same symbol, and afterwards any
SHAPES = [(4, 7), (5, 9), (3, 17), (12, 5), (2, 33), (8, 8)]
PRESET = LossConfig.holder_token(0.0)


def ids(case: Case) -> Tensor:
    return case.token_ids.roll(1, 1)


def given(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    return case.token_ids, case.old_logp, case.advantages


def every_argument(model: Model, case: Case, number: float, config: LossConfig) -> PMPOOutput:
    D = case.mask.any(1).sum()
    options = {"ref_logp": case.ref_logp, "rollout_weights": case.rollout_weights, "policy_mask": case.token_ids > 1}
    return pmpo_loss(model(ids(case)), *given(case), mask=case.mask, config=config, denominator=D, **options)


def numbers(model: Model, case: Case, number: float, config: LossConfig) -> PMPOOutput:
    """p and denominator as numbers that change from step to step."""
    return pmpo_loss(model(ids(case)), *given(case), power=number, denominator=2 + number, config=PRESET)


def one_position_more(model: Model, case: Case, number: float, config: LossConfig) -> PMPOOutput:
    shifted = torch.cat([case.token_ids[:, :1], case.token_ids], 1)
    return pmpo_loss(model(shifted), *given(case), mask=case.mask, inplace=True)


def from_logp(model: Model, case: Case, number: float, config: LossConfig) -> PMPOOutput:
    logp, entropy = token_logp(model(ids(case)), case.token_ids, mask=case.mask)
    options = {"mask": case.mask, "ref_logp": case.ref_logp, "config": config, "entropy": entropy}
    return pmpo_loss_from_logp(logp, *given(case)[1:], **options)


def fused(model: Model, case: Case, number: float, config: LossConfig) -> PMPOOutput:
    options = {"mask": case.mask, "ref_logp": case.ref_logp, "config": config, "denominator": 2 + number}
    return linear_pmpo_loss(model.hidden(ids(case)), model.head.weight, *given(case), max_chunk_tokens=8, **options)


def packed(case: Case) -> tuple[Case, dict[str, Tensor]]:
    B, T = case.mask.shape
    flat = Case(*(t if t.dim() == 1 else t.flatten(0, 1) for t in case))
    return flat, {"mask": flat.mask, "cu_seqlens": torch.arange(B + 1) * T}


def from_packed(model: Model, case: Case, number: float, config: LossConfig) -> PMPOOutput:
    flat, options = packed(case)
    weights = case.advantages.abs() + 0.5  # one a trajectory
    return pmpo_loss(model(ids(case)).flatten(0, 1), *given(flat), rollout_weights=weights, **options)


def fused_packed(model: Model, case: Case, number: float, config: LossConfig) -> PMPOOutput:
    flat, options = packed(case)
    return linear_pmpo_loss(model.hidden(ids(case)).flatten(0, 1), model.head.weight, *given(flat), **options)


Forward = Callable[[Model, Case, float, LossConfig], PMPOOutput]
FORWARDS = [every_argument, numbers, one_position_more, from_logp, fused, from_packed, fused_packed]


def step(forward: Forward) -> Callable[..., tuple[Tensor, Tensor]]:
    def loss(model: Model, case: Case, number: float, config: LossConfig) -> tuple[Tensor, Tensor]:
        """The loss of a step, and what a trainer logs, computed from the metrics inside the graph."""
        out = forward(model, case, number, config)
        return out.loss, out.metrics["clip_fraction"] + out.metrics["power_mean"] + out.power.nansum()

    return loss


def double(B: int, T: int) -> Case:
    case = batch(B, T)
    return Case(*(t.double() if t.is_floating_point() else t for t in case))


def run(function: Callable[..., tuple[Tensor, Tensor]], case: Case, number: float, config: LossConfig) -> list[Tensor]:
    model = Model().double()
    loss, logged = function(model, case, number, config)
    loss.backward()
    return [loss.detach(), logged, *(p.grad for p in model.parameters())]


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.set_stance("default")


def agree(found: list[Tensor], want: list[Tensor]) -> None:
    """float64: sums of at most 96 tokens and V = 24 entries, in another order, of terms that are at most some ten times the
    result's largest entry: 10 x 120 roundings of it, below 3e-13."""
    for a, b in zip(found, want, strict=True):
        assert (a - b).abs().max() <= 3e-13 * b.abs().max().clamp(min=1e-2)


@pytest.mark.usefixtures("fresh")
def test_other_vocabularies_are_not_compiled_again() -> None:
    def loss(logits: Tensor, case: Case) -> Tensor:
        return pmpo_loss(logits, case.token_ids % logits.shape[-1], *given(case)[1:]).loss

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    case = double(4, 7)
    for V in (11, 24, 37, 50, 64):
        logits = torch.linspace(-1, 1, 4 * 7 * V).double().view(4, 7, V).requires_grad_()
        agree([compiled(logits, case)], [loss(logits, case)])
    assert graphs() == 1


# docs/pytorch.md says so: PyTorch 2.10 and 2.11 compile the fused head for each value of a denominator that is a number
once_a_number = pytest.mark.xfail(torch.__version__.startswith(("2.10.", "2.11.")), reason="compiled again")


@pytest.mark.parametrize(
    "forward",
    [pytest.param(f, marks=once_a_number) if f is fused else f for f in FORWARDS],
    ids=lambda f: f.__name__,
)
@pytest.mark.usefixtures("fresh")
def test_a_training_step_is_compiled_once(forward: Forward) -> None:
    """Other lengths, batch sizes, masks, advantages and numbers, and an equal configuration: nothing is compiled again."""
    function = step(forward)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, (B, T) in enumerate(SHAPES):
        case, number = double(B, T), 0.05 + 0.1 * i
        case.advantages[:1] = -case.advantages[:1] if i % 2 else 0
        agree(run(compiled, case, number, LossConfig(**vars(CONFIG))), run(function, case, number, CONFIG))
        torch.compiler.set_stance("fail_on_recompile")
    assert graphs() == 1


@pytest.mark.usefixtures("fresh")
def test_a_training_step_under_inductor() -> None:
    function = step(numbers)
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for i, (B, T) in enumerate(SHAPES[:3]):
        case, number = double(B, T), 0.05 + 0.1 * i
        agree(run(compiled, case, number, CONFIG), run(function, case, number, CONFIG))
    assert graphs() == 1


@pytest.mark.usefixtures("fresh")
def test_sizes_of_one_are_compiled_for_themselves() -> None:
    """PyTorch compiles for a size of 1 once more, whatever the model: one graph for B = 1, one for T = 1."""
    function = step(from_logp)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for count, shapes in enumerate([SHAPES[:2], [(1, 6), (1, 9)], [(6, 1), (9, 1)]], 1):
        for B, T in shapes:
            case = double(B, T)
            agree(run(compiled, case, 0.5, CONFIG), run(function, case, 0.5, CONFIG))
        assert graphs() == count


@pytest.mark.usefixtures("fresh")
def test_equal_sizes_at_first_are_compiled_once_more() -> None:
    """B = T in the first step is one symbol to PyTorch, until they differ."""
    compiled = torch.compile(step(numbers), fullgraph=True, dynamic=True, backend="aot_eager")
    for count, (B, T) in zip((1, 1, 2, 2, 2), ((4, 4), (6, 6), (4, 7), (5, 9), (3, 3)), strict=True):
        run(compiled, double(B, T), 0.5, CONFIG)
        assert graphs() == count
