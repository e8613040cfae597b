"""The calls that users write, as a program with types: mypy --strict checks it, here and against the installed wheel, and it runs.

Every `assert_type` is a promise: a result that becomes `Any` or another type fails the type checker.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import assert_type

import pmpo_kernels
from pmpo_kernels import (
    LossConfig,
    PMPOOutput,
    TokenLogp,
    available_impls,
    linear_pmpo_loss,
    pmpo_loss,
    pmpo_loss_from_logp,
    reference,
    schedules,
    solve_power,
    token_logp,
)
from pmpo_kernels.distributed import denominator
from pmpo_kernels.solver import PowerResults

B, T, V, H = 2, 4, 11, 8


def configurations() -> list[LossConfig]:
    presets = [LossConfig(), LossConfig.pmpo(full_clip_fraction=0.2), LossConfig.grpo(beta=0.0), LossConfig.dapo()]
    presets += [LossConfig.dr_grpo(T), LossConfig.bnpo(), LossConfig.gmpo(), LossConfig.hmpo(), LossConfig.gspo()]
    presets += [LossConfig.holder(2.0), LossConfig.holder_token(-1.0), LossConfig.apmpo(0.5, eps_high=0.3)]
    bounds = assert_type(LossConfig.ratio_clip(0.2, 0.28), dict[str, float])
    own = LossConfig(power="ess", clip="token", clip_low=bounds["clip_low"], dual_clip=3.0, loss_agg_mode="token-mean")
    assert_type(own.power, float | Literal["ess"])
    assert_type(own.dual_clip, float | None)
    return assert_type([*presets, own], list[LossConfig])


def padded(logits: Tensor, ids: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    for config in configurations():
        out = pmpo_loss(logits, ids, old_logp, advantages, mask=mask, config=config, impl=None)
        assert_type(out, PMPOOutput)
        assert_type(out.metrics, dict[str, Tensor])
        assert_type(out.entropy, Tensor | None)
    on_policy = pmpo_loss(logits, ids, None, advantages, power=torch.ones(B), denominator=8)
    return assert_type(on_policy.loss, Tensor) + out.loss


def packed(logits: Tensor, ids: Tensor, old_logp: Tensor, advantages: Tensor) -> Tensor:
    offsets = torch.tensor([0, 3, B * T])
    flat, tokens, old = logits[:, :T].reshape(-1, V), ids.flatten(), old_logp.flatten()
    out = pmpo_loss(flat, tokens, old, advantages, cu_seqlens=offsets, target_ess=torch.full((B,), 2.0))
    scored = assert_type(token_logp(flat, tokens, temperature=1.0), TokenLogp)
    again = pmpo_loss_from_logp(
        scored.logp, old, advantages, cu_seqlens=offsets, ref_logp=old, config=LossConfig.grpo(beta=0.1)
    )
    return out.loss + assert_type(again, PMPOOutput).loss


def from_hidden_states(ids: Tensor, old_logp: Tensor, advantages: Tensor) -> Tensor:
    head = torch.nn.Linear(H, V)
    hidden = torch.randn(B, T, H, requires_grad=True)
    out = linear_pmpo_loss(
        hidden, head.weight, ids, old_logp, advantages, bias=head.bias, logit_softcap=30.0, max_chunk_tokens=64
    )
    return assert_type(out, PMPOOutput).loss


def step(rewards: Tensor, logp: Tensor, rollout_logp: Tensor, mask: Tensor) -> Tensor:
    power = assert_type(schedules.holder_power(0.5, shape="cube"), float)
    power += assert_type(schedules.apmpo_power(rewards), float) + assert_type(schedules.apmpo_clip(rewards), float)
    weights = schedules.rollout_weights(logp, rollout_logp, mask=mask, level="sequence", mode="mask", low=0.5)
    D = assert_type(denominator(mask.sum(1), LossConfig.dapo()), Tensor)
    advantages = assert_type(schedules.group_advantages(rewards, 2, baseline="leave-one-out", scale=None), Tensor)
    return pmpo_loss_from_logp(
        logp, rollout_logp, advantages, mask=mask, rollout_weights=weights, power=power, denominator=D
    ).loss


def tools(log_weights: Tensor) -> None:
    target = torch.full((B,), 2.0)
    assert_type(solve_power(log_weights, target), Tensor)
    power, details = solve_power(log_weights, target, full_output=True)
    assert_type(details, PowerResults)
    assert_type(available_impls(), dict[str, str])
    assert_type(pmpo_kernels.__version__, str)
    assert_type(reference.compute_dtype(torch.bfloat16), torch.dtype)
    assert bool((power >= 0).all())


def main() -> None:
    torch.manual_seed(0)
    logits = torch.randn(B, T + 1, V, requires_grad=True)
    ids = torch.randint(V, (B, T))
    mask = torch.tensor([[True] * T, [True] * (T - 1) + [False]])
    old_logp = torch.log_softmax(logits.detach()[:, :T], -1).gather(-1, ids[..., None])[..., 0] + 0.3 * torch.randn(
        B, T
    )
    advantages = torch.tensor([1.0, -0.5])
    logp = old_logp.clone().requires_grad_()
    losses = [padded(logits, ids, old_logp, advantages, mask), packed(logits, ids, old_logp, advantages)]
    losses += [from_hidden_states(ids, old_logp, advantages), step(torch.tensor([1.0, 0.0]), logp, old_logp, mask)]
    loss = torch.stack([loss.double() for loss in losses]).sum()
    loss.backward()
    tools(old_logp)
    assert logits.grad is not None
    print(f"{float(loss.detach()):.9f} {float(logits.grad.double().square().sum().sqrt()):.9f}")


if __name__ == "__main__":
    main()
