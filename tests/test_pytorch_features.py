"""With what PyTorch offers around a loss: checkpointing, offloaded tensors, autocast, torch.func."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_model import CONFIG, Model, batch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from pmpo_kernels import linear_pmpo_loss, pmpo_loss
from pmpo_kernels.verification import Case


def loss(logits: Tensor, case: Case) -> Tensor:
    given = (case.token_ids, case.old_logp, case.advantages)
    options = {"mask": case.mask, "ref_logp": case.ref_logp, "config": CONFIG}
    return pmpo_loss(logits, *given, **options).loss


def fused(model: Model, case: Case, hidden: Tensor) -> Tensor:
    given = (case.token_ids, case.old_logp, case.advantages)
    options = {"mask": case.mask, "ref_logp": case.ref_logp, "config": CONFIG, "max_chunk_tokens": 8}
    return linear_pmpo_loss(hidden, model.head.weight, *given, **options).loss


def gradients(run: Callable[[Model, Case], Tensor]) -> list[Tensor]:
    model = Model()
    run(model, batch()).backward()
    return [p.grad for p in model.parameters()]


def plain(model: Model, case: Case) -> Tensor:
    return loss(model(case.token_ids.roll(1, 1)), case)


def plain_fused(model: Model, case: Case) -> Tensor:
    return fused(model, case, model.hidden(case.token_ids.roll(1, 1)))


def test_gradient_checkpointing() -> None:
    """The model's forward pass again in the backward pass: the same bits."""

    def logits(model: Model, case: Case) -> Tensor:
        return loss(checkpoint(model, case.token_ids.roll(1, 1), use_reentrant=False), case)

    def hidden(model: Model, case: Case) -> Tensor:
        return fused(model, case, checkpoint(model.hidden, case.token_ids.roll(1, 1), use_reentrant=False))

    for run, want in ((logits, plain), (hidden, plain_fused)):
        assert all(torch.equal(a, b) for a, b in zip(gradients(run), gradients(want), strict=True))


@pytest.mark.parametrize("run", [plain, plain_fused])
def test_saved_tensors_may_go_elsewhere(run: Callable[[Model, Case], Tensor]) -> None:
    """save_on_cpu, and hooks that keep a copy: the same bits."""
    want = gradients(run)
    for context in (save_on_cpu(), saved_tensors_hooks(lambda x: x.clone(), lambda x: x)):

        def hooked(model: Model, case: Case, context: object = context) -> Tensor:
            with context:
                return run(model, case)

        assert all(torch.equal(a, b) for a, b in zip(gradients(hooked), want, strict=True))


def test_autocast() -> None:
    """Logits in bfloat16 from a float32 model: gradients in float32, near those without autocast."""

    def cast(model: Model, case: Case) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(model, case)

    for a, b in zip(gradients(cast), gradients(plain), strict=True):
        assert a.dtype == torch.float32
        # hidden states, logits (below 1, three times in a coefficient) and their gradients, and those of the layer's output and
        # input are rounded to bfloat16: eight roundings of u
        assert (a - b).norm() <= 8 * torch.finfo(torch.bfloat16).eps / 2 * b.norm()


@pytest.mark.parametrize("function", ["grad", "vmap"])
def test_functional_transforms_raise(function: str) -> None:
    """torch.func cannot go through an operator with a gradient of its own: an error of PyTorch that says so, not a number."""
    case = batch()
    z = case.logits.float()
    transform = {
        "grad": lambda: torch.func.grad(lambda x: loss(x, case))(z),
        "vmap": lambda: torch.func.vmap(lambda x: loss(x, case))(z[None]),
    }
    with pytest.raises(RuntimeError, match="setup_context"):
        transform[function]()
