"""Loss steps for `soak.py`. Step `index` of a seed is always the same batch, and no two are alike."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pmpo_kernels import (
    LossConfig,
    PMPOOutput,
    linear_pmpo_loss,
    pmpo_loss,
    pmpo_loss_from_logp,
    solve_power,
    token_logp,
)
from pmpo_kernels.verification import Case, configurations, make_case

DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
VOCABULARIES = (33, 64, 257, 1000, 2048)  # V is a constant of a Triton kernel: a few, each of which comes early
MOST_B, MOST_T, HIDDEN = 8, 32, 24
COMPILED_V = 40  # one graph: only B and T change
CONFIGURATIONS = tuple(configurations().values())


class Step:
    """One batch and what is done with it, all drawn from (seed, index)."""

    def __init__(self, seed: int, index: int, impl: str | None, device: str) -> None:
        self.draw = random.Random(f"{seed} {index}")
        self.impl, self.device = impl, device
        kinds = list(KINDS)
        first = index < len(kinds) * len(DTYPES)  # at first the largest batch of each kind and dtype
        self.kind = kinds[index % len(kinds)] if first else self.draw.choices(kinds, KINDS.values())[0]
        self.dtype = DTYPES[index // len(kinds)] if first else self.draw.choice(DTYPES)
        self.B = MOST_B if first else self.draw.randint(1, MOST_B)
        self.T = MOST_T if first else self.draw.randint(1, MOST_T)
        self.V = max(VOCABULARIES) if first else self.draw.choice(VOCABULARIES)
        self.config = self.draw.choice(CONFIGURATIONS)
        self.number = index

    def some(self, *choices: Any) -> Any:
        return self.draw.choice(choices)

    def case(self) -> Case:
        return make_case(self.dtype, B=self.B, T=self.T, V=self.V, device=self.device, seed=self.number)

    def loss_scale(self) -> float:
        return 4096.0 if self.dtype == torch.float16 else 1.0

    def options(self, case: Case) -> dict[str, Any]:
        """Draw the optional arguments, each of which is there or not."""
        one_a_trajectory = case.advantages.abs() + 0.5
        found = {
            "mask": self.some(None, case.mask, case.mask.int()),
            "ref_logp": case.ref_logp if self.config.beta else self.some(None, case.ref_logp),
            "rollout_weights": self.some(None, case.rollout_weights, one_a_trajectory),
            "policy_mask": self.some(None, case.token_ids > 1, case.advantages != 0),
            "denominator": self.some(None, 3.5, case.mask.any(1).sum()),
            "power": self.some(None, None, 0.3, case.advantages.tanh()),
            "config": self.config,
            "impl": self.impl,
        }
        if self.config.power == "ess" and found["power"] is None:
            found["target_ess"] = self.some(None, 1 + case.advantages.abs())
        return found

    def packed(self, case: Case, options: dict[str, Any], *tokens: Tensor) -> tuple[Case, list[Tensor]]:
        """Return the case and its tensors without padding, (N, ...): every trajectory is as long as its mask."""
        keep = case.mask
        for name, x in options.items():
            if isinstance(x, Tensor) and x.shape == keep.shape:
                options[name] = x[keep]
        offsets = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0))
        options.update(mask=None, cu_seqlens=offsets.to(self.some(torch.int32, torch.int64)))
        flat = Case(*(x if x.dim() == 1 else x[keep] for x in case))
        return flat, [x[keep] for x in tokens]


def from_logits(s: Step) -> list[Tensor]:
    case = s.case()
    options = s.options(case)
    layout = s.some("padded", "one position more", "packed")
    if layout == "one position more":
        case = case._replace(logits=torch.cat([case.logits, case.logits[:, :1]], 1))
    elif layout == "packed":
        case, _ = s.packed(case, options)
    z, old_logp = case.logits.requires_grad_(), s.some(None, case.old_logp)
    out = pmpo_loss(z, case.token_ids, old_logp, case.advantages, inplace=s.some(True, False), **options)
    (s.loss_scale() * out.loss).backward()
    return [*results(out), z.grad]


def from_logp(s: Step) -> list[Tensor]:
    s.config = replace(s.config, temperature=1.0)
    case = s.case()
    options = s.options(case)
    z = case.logits.requires_grad_()
    logp, entropy = token_logp(z, case.token_ids, mask=options["mask"], temperature=s.some(1.0, 0.7), impl=s.impl)
    out = pmpo_loss_from_logp(logp, case.old_logp, case.advantages, entropy=entropy, **options)
    (s.loss_scale() * out.loss).backward()
    return [*results(out), z.grad]


def from_hidden(s: Step) -> list[Tensor]:
    """Run a step of the fused head, with chunks, bias, softcap, autocast and frozen parameters as they are drawn."""
    case = s.case()
    generator = torch.Generator().manual_seed(s.number)
    shapes = ((s.B, s.T, HIDDEN), (s.V, HIDDEN), (s.V,))
    hidden, weight, bias = (torch.randn(shape, generator=generator).to(s.device, s.dtype) / 4 for shape in shapes)
    options = s.options(case)
    if s.some(True, False):
        case, (hidden,) = s.packed(case, options, hidden)
    logits = torch.nn.functional.linear(hidden.double(), weight.double()).log_softmax(-1)
    old_logp = (logits.gather(-1, case.token_ids[..., None])[..., 0] + 0.1).to(case.old_logp.dtype)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(s.some(True, False))]
    bias = s.some(None, bias.requires_grad_())
    if bias is not None:
        leaves.append(bias)
    options |= {
        "bias": bias,
        "logit_scale": s.some(1.0, 0.5),
        "logit_softcap": s.some(None, 5.0),
        "max_chunk_tokens": s.some(4, 16, 256),  # a default depends on the free memory
        "skip_zero_advantage": s.some(True, False),
    }
    lower = s.dtype == torch.float32 and s.some(True, False)
    with torch.autocast(s.device, torch.bfloat16) if lower else contextlib.nullcontext():
        out = linear_pmpo_loss(hidden, weight, case.token_ids, old_logp, case.advantages, **options)
    (s.loss_scale() * out.loss).backward()
    return [*results(out), *(x.grad for x in leaves if x.grad is not None)]


def solver(s: Step) -> list[Tensor]:
    case = s.case()
    impl = None if s.impl == "triton" else s.impl
    l, target = case.rollout_weights.log(), 1 + case.advantages.abs()
    power, found = solve_power(l, target, mask=s.some(None, case.mask), impl=impl, full_output=True)
    return [power, *found]


@cache
def compiled_loss() -> Callable[..., Tensor]:
    """Compile the loss into one graph for all batches, as docs/pytorch.md promises, without a code generator, which would only cost
    time."""

    def loss(z: Tensor, case: Case, power: float, impl: str | None) -> Tensor:
        given = (case.token_ids, case.old_logp, case.advantages)
        return pmpo_loss(z, *given, mask=case.mask, power=power, config=LossConfig.holder_token(0.0), impl=impl).loss

    found: Callable[..., Tensor] = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    return found


def compiled(s: Step) -> list[Tensor]:
    """Run a step under torch.compile. B and T differ and are more than 1, because PyTorch compiles once more for 1, and where sizes
    that were equal part."""
    s.dtype, s.V, s.B = torch.float32, COMPILED_V, max(s.B, 2)
    s.T = max(s.T, 9)
    case = s.case()
    z = case.logits.requires_grad_()
    loss = compiled_loss()(z, case, s.draw.uniform(-1, 1), s.impl)
    loss.backward()
    return [loss.detach(), z.grad]


KINDS: dict[Callable[[Step], list[Tensor]], float] = {  # and how often each is drawn
    from_hidden: 10,
    from_logits: 10,
    from_logp: 5,
    solver: 3,
    compiled: 1,
}
FIRST = len(KINDS) * len(DTYPES)
"""Steps at the start that have the largest batches; repeated at the end they must have the same bits."""


def results(out: PMPOOutput) -> list[Tensor]:
    rest = [x for x in (out.logp, out.entropy, out.power, out.ess, out.clip_fraction) if x is not None]
    return [out.loss.detach(), *out.metrics.values(), *rest]


def run_step(seed: int, index: int, impl: str | None, device: str) -> list[Tensor]:
    """Run forward and backward of one step, and return all its results and gradients."""
    step = Step(seed, index, impl, device)
    return step.kind(step)


def bits(tensors: list[Tensor]) -> str:
    """SHA-256 of the tensors' bytes."""
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(x.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
