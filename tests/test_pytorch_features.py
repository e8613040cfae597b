"""With what PyTorch offers around a loss: checkpointing, offloaded tensors, autocast, derivatives of other kinds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_model import CONFIG, Model, batch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from pmpo_kernels import linear_pmpo_loss, pmpo_loss, pmpo_loss_from_logp, token_logp
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


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_around_the_loss(use_reentrant: bool) -> None:
    """Layers and loss again in the backward pass, both kinds of checkpointing: the same bits."""

    def layers(model: Model, case: Case) -> Tensor:
        """The reentrant kind sees gradients through its inputs only, hence the embedding outside."""
        x = model.embedding(case.token_ids.roll(1, 1))
        return checkpoint(lambda x: torch.tanh(model.layer(x)), x, use_reentrant=use_reentrant)

    def logits(model: Model, case: Case) -> Tensor:
        return checkpoint(lambda h: loss(model.head(h), case), layers(model, case), use_reentrant=use_reentrant)

    def hidden(model: Model, case: Case) -> Tensor:
        return checkpoint(lambda h: fused(model, case, h), layers(model, case), use_reentrant=use_reentrant)

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


@pytest.mark.parametrize("run", [plain, plain_fused])
def test_autocast(run: Callable[[Model, Case], Tensor]) -> None:
    """Logits in bfloat16 from a float32 model: gradients in float32, near those without autocast. The head's weight stays float32
    in `linear_pmpo_loss`, its products are in bfloat16."""

    def cast(model: Model, case: Case) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run(model, case)

    for a, b in zip(gradients(cast), gradients(run), strict=True):
        assert a.dtype == torch.float32
        assert not torch.equal(a, b)
        # hidden states, logits (below 1, three times in a coefficient) and their gradients, and those of the layer's output and
        # input are rounded to bfloat16: eight roundings of u
        assert (a - b).norm() <= 8 * torch.finfo(torch.bfloat16).eps / 2 * b.norm()


CASE, MODEL = batch(), Model()
HIDDEN = MODEL.hidden(CASE.token_ids).detach()
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "pmpo_loss": (lambda z: loss(z, CASE), CASE.logits.float()),
    "pmpo_loss in place": (lambda z: pmpo_loss(z * 1, CASE.token_ids, None, CASE.advantages, inplace=True).loss, CASE.logits.float()),
    "pmpo_loss_from_logp": (lambda x: pmpo_loss_from_logp(x, CASE.old_logp, CASE.advantages).loss, CASE.ref_logp),
    "token_logp": (lambda z: token_logp(z, CASE.token_ids).logp.sum(), CASE.logits.float()),
    "token_logp's entropy": (lambda z: token_logp(z, CASE.token_ids).entropy.sum(), CASE.logits.float()),
    "linear_pmpo_loss": (lambda h: fused(MODEL, CASE, h), HIDDEN),
    "linear_pmpo_loss's weight": (
        lambda w: linear_pmpo_loss(HIDDEN, w, CASE.token_ids, CASE.old_logp, CASE.advantages).loss,
        MODEL.head.weight.detach(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_second_derivative_raises(name: str) -> None:
    """Where the graph of the first is asked for, and through hvp; the first derivative is there without it."""
    function, x = FUNCTIONS[name]
    leaf = x.clone().requires_grad_()
    assert torch.autograd.grad(function(leaf), leaf)[0].abs().sum() > 0
    with pytest.raises(RuntimeError, match="first-order backward, got create_graph=True"):
        torch.autograd.grad(function(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="first-order backward, got create_graph=True"):
        function(leaf).backward(create_graph=True)
    with pytest.raises(RuntimeError, match="first-order backward, got create_graph=True"):
        torch.autograd.functional.hvp(function, x, torch.ones_like(x))


@pytest.mark.parametrize("name", ["pmpo_loss_from_logp", "linear_pmpo_loss"])
def test_a_second_derivative_of_a_compiled_call_raises(name: str) -> None:
    """There it is PyTorch that refuses, when the second derivative is taken."""
    function, x = FUNCTIONS[name]
    leaf = x.clone().requires_grad_()
    torch._dynamo.reset()
    value = torch.compile(function, fullgraph=True, backend="aot_eager")(leaf)
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    assert gradient.requires_grad
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        (value + gradient.square().sum()).backward()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functional_transforms_raise(name: str) -> None:
    """torch.func cannot go through an operator with a gradient of its own: an error of PyTorch that says so, not a number."""
    function, x = FUNCTIONS[name]
    transforms: list[Callable[[], object]] = [
        lambda: torch.func.grad(function)(x),
        lambda: torch.func.vmap(function)(x[None]),
        lambda: torch.func.vjp(function, x),
        lambda: torch.func.jvp(function, (x,), (torch.ones_like(x),)),
        lambda: torch.func.jacrev(function)(x),
        lambda: torch.func.hessian(function)(x),
    ]
    for transform in transforms:
        with pytest.raises(RuntimeError, match="setup_context"):
            transform()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("enabled", [True, False])
def test_forward_mode_raises(name: str, enabled: bool) -> None:
    """With and without grad mode: a tangent that is silently lost would read as a zero derivative."""
    function, x = FUNCTIONS[name]
    with forward_ad.dual_level(), torch.set_grad_enabled(enabled):
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="jvp function for custom"):
            function(dual)


def test_functional_call() -> None:
    """Other parameters in the model's place: the same bits by ordinary autograd, an error by torch.func."""
    given = {name: p.detach().clone().requires_grad_() for name, p in MODEL.named_parameters()}

    def value(parameters: dict[str, Tensor]) -> Tensor:
        return loss(torch.func.functional_call(MODEL, parameters, (CASE.token_ids.roll(1, 1),)), CASE)

    found = torch.autograd.grad(value(given), list(given.values()))
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(plain), strict=True))
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(value)(given)


def test_batched_gradients() -> None:
    """is_grads_batched: the kernels run once for each; `linear_pmpo_loss`, which only scales, refuses."""
    function, x = FUNCTIONS["pmpo_loss"]
    leaf, factors = x.clone().requires_grad_(), torch.tensor([1.0, -2.0, 0.5])
    value = function(leaf)
    (batched,) = torch.autograd.grad(value, leaf, factors, is_grads_batched=True, retain_graph=True)
    for found, factor in zip(batched, factors, strict=True):
        assert torch.equal(found, torch.autograd.grad(value, leaf, factor, retain_graph=True)[0])
    function, x = FUNCTIONS["linear_pmpo_loss"]
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.autograd.grad(function(leaf), leaf, factors, is_grads_batched=True)
