"""Arithmetic prompts, sampled completions, a rule-based reward, group-normalised advantages, and one update."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pmpo_kernels.api import pmpo_loss, token_logp
from pmpo_kernels.schedules import group_advantages

OPERANDS = range(2, 10)
MAX_PROMPTS = len(OPERANDS) ** 2


@dataclass(frozen=True)
class Rollouts:
    """A batch of B trajectories of T completion tokens after S prompt tokens (left-padded), rows grouped by prompt.

    input_ids, attention_mask (B, S + T); token_ids, mask, old_logp (B, T); operands (B, 2); rewards, advantages (B,).
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_ids: Tensor
    mask: Tensor
    operands: Tensor
    rewards: Tensor
    advantages: Tensor
    old_logp: Tensor

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    def take(self, rows: slice | Tensor) -> Rollouts:
        """Return the trajectories at `rows`."""
        return replace(self, **{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def groups(self, size: int) -> Iterator[Rollouts]:
        """Yield `size` trajectories at a time, which are the completions of one prompt."""
        return (self.take(slice(i, i + size)) for i in range(0, len(self), size))


@dataclass(frozen=True)
class Policy:
    """A causal language model and its tokenizer. The weights are float32; `dtype` is that of the forward pass (autocast)."""

    model: Any
    tokenizer: Any
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    def autocast(self) -> torch.autocast:
        """The context of every forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def logits(self, rollouts: Rollouts) -> Tensor:
        """Logits (B, T + 1, V). Position t predicts completion token t; the last one is what the model returns beyond them."""
        position_ids = (rollouts.attention_mask.cumsum(-1) - 1).clamp(min=0)
        with self.autocast():
            logits: Tensor = self.model(
                input_ids=rollouts.input_ids,
                attention_mask=rollouts.attention_mask,
                position_ids=position_ids,
                logits_to_keep=rollouts.token_ids.shape[1] + 1,
                use_cache=False,
            ).logits
        return logits

    def hidden_states(self, rollouts: Rollouts) -> Tensor:
        """Hidden states (B, T + 1, H), of which the LM head makes these logits."""
        position_ids = (rollouts.attention_mask.cumsum(-1) - 1).clamp(min=0)
        with self.autocast():
            hidden: Tensor = self.model.model(
                input_ids=rollouts.input_ids,
                attention_mask=rollouts.attention_mask,
                position_ids=position_ids,
                use_cache=False,
            ).last_hidden_state
        return hidden[:, -rollouts.token_ids.shape[1] - 1 :]

    def text(self, token_ids: Tensor, mask: Tensor) -> str:
        """One completion as text."""
        return str(self.tokenizer.decode(token_ids[mask], skip_special_tokens=True))


def reward(text: str, tokens: int, max_tokens: int, a: int, b: int) -> float:
    """1 for the right sum among the text's numbers, up to 1/4 for restating both operands and 1/4 for brevity."""
    numbers = re.findall(r"\d+", text)
    restated = ((str(a) in numbers) + (str(b) in numbers)) / 2
    return (str(a + b) in numbers) + restated / 4 + (1 - tokens / max_tokens) / 4


@torch.no_grad()
def sample(policy: Policy, *, prompts: int, completions: int, max_new_tokens: int, seed: int) -> Rollouts:
    """Ask for `prompts` different sums, `completions` samples each at temperature 1; old_logp is still NaN."""
    pairs = random.Random(seed).sample(list(product(OPERANDS, OPERANDS)), prompts)
    questions = [
        policy.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"What is {a} + {b}? Answer in one short sentence."}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for a, b in pairs
    ]
    encoded = policy.tokenizer(questions, return_tensors="pt", padding=True).to(policy.device)
    torch.manual_seed(seed)
    with policy.autocast():
        input_ids = policy.model.generate(
            **encoded,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=completions,
            max_new_tokens=max_new_tokens,
        )
    token_ids = input_ids[:, encoded.input_ids.shape[1] :].contiguous()
    ended = (token_ids == policy.tokenizer.eos_token_id).long()
    mask = ended.cumsum(1) - ended == 0  # up to and including the end token
    operands = torch.tensor(pairs).repeat_interleave(completions, 0)
    rewards = torch.tensor(
        [
            reward(policy.text(ids, keep), int(keep.sum()), max_new_tokens, *pair)
            for ids, keep, pair in zip(token_ids, mask, operands.tolist(), strict=True)
        ],
        device=policy.device,
    )
    attention_mask = torch.cat([encoded.attention_mask.repeat_interleave(completions, 0), mask.long()], 1)
    unknown = torch.full(token_ids.shape, torch.nan, device=policy.device)
    advantages = group_advantages(rewards, completions)
    return Rollouts(input_ids, attention_mask, token_ids, mask, operands, rewards, advantages, unknown)


@torch.no_grad()
def score(policy: Policy, rollouts: Rollouts, size: int) -> Rollouts:
    """Return `rollouts` with old_logp, the log-probs under the policy as it is now, computed `size` rows at a time."""
    parts = [token_logp(policy.logits(g), g.token_ids, mask=g.mask).logp for g in rollouts.groups(size)]
    return replace(rollouts, old_logp=torch.cat(parts))


def update(policy: Policy, rollouts: Rollouts, size: int, learning_rate: float) -> float:
    """Take one AdamW step on the PMPO loss, accumulating the gradient `size` rows at a time. Returns the gradient's norm.

    The policy is still the one that sampled: old_logp=None, every ratio is 1 (and p = 1, since nothing is clipped).
    `denominator` is the whole batch's count, so that the accumulated gradient is that of one big batch.
    """
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=learning_rate)
    for g in rollouts.groups(size):
        logits = policy.logits(g)
        out = pmpo_loss(logits, g.token_ids, None, g.advantages, mask=g.mask, denominator=float(len(rollouts)))
        out.loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in policy.model.parameters() if p.grad is not None])
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)
