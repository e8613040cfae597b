"""Replaces the LM head of a causal language model by the loss while the model's own forward pass runs.

Everything before the head stays the model's: adapters, experts, images, sharded weights that hooks gather. Of what it does to the
logits after the head, a scale and a softcap can be fused. A check finds out whether there is more to it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from pmpo_kernels.api import PMPOOutput, token_logp
from pmpo_kernels.config import LossConfig
from pmpo_kernels.linear import linear_pmpo_loss

PROBE = (-30.0, -4.0, -0.5, 0.0, 0.25, 1.0, 8.0, 60.0)
"""What the replaced head returns for logits. What the model makes of these numbers shows its scale and softcap."""


class Scoring:
    """What a call of the model computes for its last `length` tokens (T): log-probs, or with `loss` their loss too.

    `loss` is `linear_pmpo_loss` without the model's arguments: `hidden`, `weight`, `bias` and the scale of the logits. The call
    sets `out`. Its caller sets `value`, the loss as it comes out of the wrapped model. (FSDP would copy a dataclass.)
    """

    def __init__(self, length: int, loss: Callable[..., PMPOOutput] | None = None) -> None:
        self.length, self.loss = length, loss
        self.out: PMPOOutput | None = None
        self.value: Tensor | None = None


def logit_options(config: Any) -> dict[str, Any]:
    """Return a model's `logit_scale` and `logit_softcap`, found by the names that they have in transformers' configurations."""
    text = config.get_text_config()
    named = (getattr(text, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"))
    scale = next((float(value) for value in named if value is not None), None)
    scaling = getattr(text, "logits_scaling", None)
    if scale is None and scaling is not None:
        scale = float(scaling) if text.model_type == "hyperclovax" else 1 / float(scaling)
    return {
        "logit_scale": 1.0 if scale is None else scale,
        "logit_softcap": getattr(text, "final_logit_softcapping", None),
    }


def add_loss_head(model: nn.Module, *, temperature: float, fused: bool, float32_head: bool, impl: str | None) -> None:
    """Give a model that TRL's `add_fused_lm_head` patched the argument `scoring` beside TRL's `fused_lm_head`.

    Args:
        model: a causal language model of transformers, changed in place: its `forward`, not its modules.
        temperature: the logits are divided by it.
        fused: project chunks of hidden states, so that a batch's logits never exist; else compute differentiable log-probs from
            the logits.
        float32_head: compute the head's product in float32, outside autocast.
        impl: implementation of the kernels, as in `pmpo_loss`.

    Raises:
        ValueError: `fused` with a head that is not a plain `torch.nn.Linear`.
    """
    inner, options = model.forward, logit_options(model.config)
    takes_length = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    checked = not fused
    if fused:
        check_head(model)

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(
        self: nn.Module, *args: Any, fused_lm_head: bool = False, scoring: Scoring | None = None, **kwargs: Any
    ) -> Any:
        nonlocal checked
        if not fused_lm_head:
            return inner(*args, **kwargs)
        if scoring is None or (fused and scoring.loss is None and torch.is_grad_enabled()):
            return inner(*args, fused_lm_head=True, **kwargs)
        if self is not model:
            raise RuntimeError(
                "model: expected the one that the trainer was given, got a copy of it; save and load it instead"
            )
        labels, T = kwargs.pop("labels"), scoring.length
        if takes_length:
            kwargs["logits_to_keep"] = T + 1  # as `pmpo_loss` takes them, which ignores the last position
        call = functools.partial(inner, *args, use_cache=False, **kwargs)
        ids, mask = labels[:, -T:].clamp(min=0), labels[:, -T:] != -100
        if not fused:
            with in_float32(self) if float32_head else contextlib.nullcontext():
                outputs = call()
            logp, entropy = token_logp(
                outputs.logits[:, -(T + 1) :], ids, mask=mask, temperature=temperature, impl=impl
            )
            return scored(None, logp, entropy, outputs)
        loss = scoring.loss or functools.partial(
            linear_pmpo_loss,
            token_ids=ids,
            old_logp=None,
            advantages=ids.new_ones(len(ids), dtype=torch.float32),  # log-probs alone are wanted
            mask=mask,
            config=LossConfig.grpo(temperature=temperature),
            impl=impl,
        )
        with replaced_head(self, loss, options, scoring, float32_head):
            outputs = call()
        if scoring.out is None:
            raise RuntimeError(
                f"fused_head: expected a model whose forward calls its LM head, got {type(self).__name__}"
            )
        if not checked:
            check_probe(outputs.logits, type(self).__name__, **options)
            checked = True
        return scored(scoring.out.loss, scoring.out.logp, scoring.out.entropy, outputs)

    model.forward = types.MethodType(forward, model)


def scored(loss: Tensor | None, logp: Tensor, entropy: Tensor | None, outputs: Any) -> FusedCausalLMOutput:
    """Return what TRL expects of a model with a fused head."""
    aux_loss = getattr(outputs, "aux_loss", None)
    return FusedCausalLMOutput(loss=loss, log_probs=logp, entropy=entropy, aux_loss=aux_loss)


@contextlib.contextmanager
def head_forward(
    model: nn.Module, make: Callable[[Any, Callable[..., Tensor]], Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Within the block replace the head's forward pass by `make(head, its forward pass)`."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    own = head.__dict__.get("forward")
    head.forward = make(head, head.forward)
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


def without_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def in_float32(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Run the head outside autocast, which would round the products of TRL's float32 head again."""

    def make(head: Any, own: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(hidden: Tensor) -> Tensor:
            with without_autocast(hidden):
                return own(hidden)

        return forward

    return head_forward(model, make)


def replaced_head(
    model: nn.Module,
    loss: Callable[..., PMPOOutput],
    options: dict[str, Any],
    scoring: Scoring,
    float32: bool,
) -> contextlib.AbstractContextManager[None]:
    """Let the head compute the loss of its input and return the probe. In its forward pass even a sharded weight is whole."""

    def make(head: Any, own: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(hidden: Tensor) -> Tensor:
            hidden = hidden[:, -(scoring.length + 1) :]
            with without_autocast(hidden) if float32 else contextlib.nullcontext():
                scoring.out = loss(hidden.float() if float32 else hidden, head.weight, bias=head.bias, **options)
            return torch.tensor(PROBE, device=hidden.device).view(1, 1, -1)

        return forward

    return head_forward(model, make)


def check_head(model: nn.Module) -> None:
    """Raise ValueError unless the head is a plain linear layer on one device: weight and bias are then all there is to it."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise ValueError(
            f"fused_head: expected False for {type(model).__name__}, because its LM head is not a torch.nn.Linear of floating-"
            f"point numbers, got True and {type(head).__name__}"
        )
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        raise ValueError(
            f"fused_head: expected False for a model spread over devices, because the LM head's hooks would not run, got True and "
            f"{sorted(map(str, devices))}"
        )


def check_probe(got: Tensor, name: str, *, logit_scale: float, logit_softcap: float | None) -> None:
    """Raise RuntimeError unless `got`, what the model made of the probe, is what the fused loss would make of it."""
    expected = torch.tensor(PROBE) * logit_scale
    if logit_softcap is not None:
        expected = logit_softcap * torch.tanh(expected / logit_softcap)
    got = got.detach().float().flatten().cpu()
    # one rounding of the model's own to bfloat16, 2^-9 relative, would be no difference of formula
    if got.shape != expected.shape or not torch.allclose(got, expected, rtol=2**-7, atol=0):
        raise RuntimeError(
            f"fused_head: expected False for {name}, whose logits are not scale and softcap of its LM head's output: of "
            f"{list(PROBE)} it makes {got.tolist()}, expected {expected.tolist()}"
        )
