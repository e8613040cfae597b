"""The two models: a small Llama that reads characters, made here, and SmolLM2-135M-Instruct; and sampling from either."""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from tasks import LEVELS, Problem, draw_problem, noisy_solution
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "demo"))
from smollm2 import load_model

ModelName = Literal["small", "smollm2"]
CHARACTERS = " 0123456789+-=\n"
END = CHARACTERS.index("\n")
PROMPT = 2 * max(LEVELS) + 2  # characters of the longest problem, with its `=`
SIZE = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4}
QUESTION = "What is {}? Write the total after each step, and the result as the last number. No other text."
SMOLLM2_LEVELS = (1, 2, 3)
FILE = "small.pt"


@dataclass
class Rollouts:
    """B trajectories of T response tokens after S prompt tokens (left-padded).

    input_ids, attention_mask (B, S + T); token_ids, mask, old_logp (B, T); rewards, advantages (B,).
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_ids: Tensor
    mask: Tensor
    rewards: Tensor
    advantages: Tensor
    old_logp: Tensor

    def take(self, rows: slice) -> Rollouts:
        """Return the trajectories at `rows`."""
        return Rollouts(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


@dataclass(frozen=True)
class Policy:
    """A causal language model with what is needed to ask it and to read its answers. The weights are float32."""

    model: Any
    encode: Callable[[list[Problem]], tuple[Tensor, Tensor]]  # token ids and attention mask (B, S), padded on the left
    decode: Callable[[Tensor], str]
    end: int
    levels: tuple[int, ...]
    max_new_tokens: int
    bfloat16: bool = False  # of the forward pass (autocast)

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    def autocast(self) -> torch.autocast:
        """The context of every forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def hidden_states(self, r: Rollouts) -> Tensor:
        """Hidden states (B, T, H). Position t predicts response token t."""
        with self.autocast():
            hidden: Tensor = self.model.model(
                input_ids=r.input_ids,
                attention_mask=needed(r.attention_mask),
                position_ids=positions(r),
                use_cache=False,
            ).last_hidden_state
        return hidden[:, -r.token_ids.shape[1] - 1 : -1]

    def logits(self, r: Rollouts) -> Tensor:
        """Logits (B, T, V) of the response tokens."""
        with self.autocast():
            logits: Tensor = self.model.lm_head(self.hidden_states(r))
        return logits


def needed(attention_mask: Tensor) -> Tensor | None:
    """Return the mask, or None where it masks nothing, so that attention is simply causal."""
    return None if bool(attention_mask.all()) else attention_mask


def positions(r: Rollouts) -> Tensor:
    """Position of each token, counted from the first of its prompt."""
    return (r.attention_mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def sample(
    policy: Policy, problems: list[Problem], copies: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample `copies` answers to each problem in turn. Returns input_ids, attention_mask, token_ids, mask as in `Rollouts`.

    It samples at temperature 1 by `generator`; None takes the likeliest token. Responses end with the end token, or are cut off.
    """
    prompt, seen = policy.encode(problems)
    cache, token, kept = DynamicCache(), prompt, []
    place = (seen.cumsum(-1) - 1).clamp(min=0)
    ended = torch.zeros(copies * len(problems), dtype=torch.bool, device=prompt.device)
    attention = seen
    for step in range(policy.max_new_tokens):
        with policy.autocast():
            logits = policy.model(
                input_ids=token, attention_mask=needed(attention), position_ids=place,
                past_key_values=cache, use_cache=True, logits_to_keep=1,
            ).logits[:, -1].float()  # fmt: skip
        if step == 0:  # the prompts were read once each
            cache.batch_repeat_interleave(copies)
            logits, place, attention = (x.repeat_interleave(copies, 0) for x in (logits, place[:, -1:], attention))
        chosen = (
            logits.argmax(-1) if generator is None else logits.softmax(-1).multinomial(1, generator=generator)[:, 0]
        )
        token = torch.where(ended, policy.end, chosen)[:, None]
        kept.append(token)
        ended = ended | (token[:, 0] == policy.end)
        place, attention = place + 1, torch.cat([attention, torch.ones_like(token)], 1)
        if bool(ended.all()):
            break
    token_ids = torch.cat(kept, 1)
    is_end = (token_ids == policy.end).long()
    mask = is_end.cumsum(1) - is_end == 0  # up to and including the end token
    # what follows the end is read by nobody: causal attention, and the loss is given the mask
    return torch.cat([prompt.repeat_interleave(copies, 0), token_ids], 1), attention, token_ids, mask


def encode_characters(problems: list[Problem]) -> tuple[Tensor, Tensor]:
    """Encode problems as characters, `8+7-9=` with blanks after it. All have one length, so nothing is masked."""
    ids = torch.tensor([[CHARACTERS.index(c) for c in f"{p.expression}=".ljust(PROMPT)] for p in problems])
    return ids, torch.ones_like(ids)


def decode_characters(ids: Tensor) -> str:
    """Decode characters, without the end of the text."""
    return "".join(CHARACTERS[i] for i in ids.tolist()).removesuffix("\n")


def small_policy(state: dict[str, Tensor] | None = None) -> Policy:
    """Make the small Llama, with random weights or with these."""
    config = LlamaConfig(vocab_size=len(CHARACTERS), max_position_embeddings=64, attn_implementation="sdpa", **SIZE)
    model = LlamaForCausalLM(config)
    if state is not None:
        model.load_state_dict(state)
    longest = 3 * max(LEVELS)  # two digits a total, a blank or the end after each
    return Policy(model, encode_characters, decode_characters, END, LEVELS, longest)


def pretrain(path: Path, steps: int, advance: Callable[[float], None], *, batch: int = 128, seed: int = 0) -> None:
    """Teach the small model noisy solutions of training problems, by cross-entropy of the response, and save it to `path`."""
    torch.manual_seed(seed)
    rng, policy = random.Random(seed), small_policy()
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, i / 20) * (0.01 + math.cos(math.pi / 2 * i / steps))
    )
    for _ in range(steps):
        problems = [draw_problem(rng, rng.choice(LEVELS), "train") for _ in range(batch)]
        prompt, _ = encode_characters(problems)
        texts = [noisy_solution(p, rng) + "\n" for p in problems]
        longest = max(map(len, texts))
        response = torch.tensor([[CHARACTERS.index(c) for c in t.ljust(longest, "\n")] for t in texts])
        mask = torch.arange(longest) < torch.tensor([[len(t)] for t in texts])
        logits = policy.model(input_ids=torch.cat([prompt, response], 1)).logits[:, PROMPT - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits[mask], response[mask])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        advance(float(loss.detach()))
    part = path.with_suffix(".part")
    torch.save(policy.model.state_dict(), part)
    os.replace(part, path)


def smollm2_policy(device: torch.device, bfloat16: bool, max_new_tokens: int = 64) -> Policy:
    """Load SmolLM2-135M-Instruct from the installed package. It is asked in its chat form, at levels 1 to 3."""
    model, tokenizer = load_model(device)

    def encode(problems: list[Problem]) -> tuple[Tensor, Tensor]:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": QUESTION.format(p.expression)}], tokenize=False, add_generation_prompt=True
            )
            for p in problems
        ]
        encoded = tokenizer(texts, return_tensors="pt", padding=True).to(device)
        return encoded.input_ids, encoded.attention_mask

    def decode(ids: Tensor) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    return Policy(model, encode, decode, tokenizer.eos_token_id, SMOLLM2_LEVELS, max_new_tokens, bfloat16)


def load_policy(name: ModelName, folder: Path, device: torch.device, bfloat16: bool) -> Policy:
    """Load the model that every run starts from. The small one must have been made by `pretrain` in `folder`."""
    if name == "smollm2":
        return smollm2_policy(device, bfloat16)
    policy = small_policy(torch.load(folder / FILE, weights_only=True))
    return policy
