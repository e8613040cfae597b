"""PMPO in plain PyTorch: a small Llama learns to count, from its own answers and a rule-based reward. CPU, under a minute.

python examples/train_plain.py --out out/train

Every step samples answers, rewards them, normalises the rewards within each prompt's group, and takes several optimizer
steps on the same rollouts: from the second on they are off-policy, tokens clip, and p adapts per trajectory. Writes
train.csv, a row an optimizer step, and train.png.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import torch
import typer
from rich.progress import track
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pmpo_kernels import LossConfig, linear_pmpo_loss
from pmpo_kernels.schedules import group_advantages

DIGITS, LENGTH, GROUP = 10, 6, 16  # vocabulary; tokens an answer; answers a prompt
SHOWN = ("reward", "p", "ess", "clip_fraction")
Row = dict[str, float]


def small_model() -> LlamaForCausalLM:
    """Make a Llama of two layers with random weights."""
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=DIGITS, num_key_value_heads=4, **size))


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompts: Tensor) -> Tensor:
    """Sample answers. Returns prompt and answer (B, 1 + LENGTH) int64: one digit, then the sampled ones."""
    ids = prompts[:, None]
    for _ in range(LENGTH):
        ids = torch.cat([ids, torch.multinomial(model(ids).logits[:, -1].softmax(-1), 1)], 1)
    return ids


def reward(ids: Tensor) -> Tensor:
    """Reward (B,): the part of the answer that counts on from the prompt, where 9 is followed by 0."""
    wanted = (ids[:, :1] + torch.arange(1, LENGTH + 1)) % DIGITS
    return (ids[:, 1:] == wanted).float().mean(1)


def hidden_states(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Hidden states (B, LENGTH, H). Position t predicts token t of the answer."""
    hidden: Tensor = model.model(ids).last_hidden_state
    return hidden[:, :-1]


def train(model: LlamaForCausalLM, steps: int, prompts: int, epochs: int, config: LossConfig) -> list[Row]:
    """Train, and return a row for each optimizer step."""
    optimizer, rows = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for step in track(range(steps), "training"):
        ids = sample(model, torch.randint(DIGITS, (prompts,)).repeat_interleave(GROUP))
        rewards = reward(ids)
        advantages = group_advantages(rewards, GROUP)
        old_logp = None  # the first epoch is on-policy: every ratio is 1
        for epoch in range(epochs):
            out = linear_pmpo_loss(
                hidden_states(model, ids), model.lm_head.weight, ids[:, 1:], old_logp, advantages,
                config=config, skip_zero_advantage=False,
            )  # fmt: skip
            old_logp = out.logp if old_logp is None else old_logp
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seen = {"reward": rewards.mean(), "p": out.metrics["power_mean"], "ess": out.metrics["ess"] / LENGTH}
            seen |= {name: out.metrics[name] for name in ("clip_fraction", "ratio_max", "entropy")}
            row = {name: float(value) for name, value in seen.items()}
            rows.append({"step": step, "epoch": epoch, "loss": float(out.loss.detach()), **row})
    return rows


def draw(rows: list[Row], path: Path) -> None:
    """Draw reward, p, ESS / n and clip fraction along the optimizer steps."""
    figure, axes = plt.subplots(len(SHOWN), 1, sharex=True, figsize=(7, 8), layout="constrained")
    for axis, name in zip(axes, SHOWN, strict=True):
        axis.plot([row[name] for row in rows], lw=1)
        axis.set_ylabel("ESS / n" if name == "ess" else name)
    axes[-1].set_xlabel("optimizer step")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for train.csv and train.png.")] = Path("out/train"),
    steps: Annotated[int, typer.Option(min=1, help="Batches of rollouts.")] = 60,
    prompts: Annotated[int, typer.Option(min=1, help=f"Prompts a batch, {GROUP} answers each.")] = 16,
    epochs: Annotated[int, typer.Option(min=1, help="Optimizer steps a batch.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and the sampling.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results in --out.")] = False,
) -> None:
    """Train, then write the figures."""
    table, picture = out / "train.csv", out / "train.png"
    if not overwrite and (table.exists() or picture.exists()):
        raise typer.BadParameter(f"expected a folder without results, got {out}; --overwrite replaces them")
    torch.manual_seed(seed)
    rows = train(small_model(), steps, prompts, epochs, LossConfig.pmpo())
    out.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, picture)
    print(f"mean reward {rows[0]['reward']:.2f} -> {rows[-1]['reward']:.2f}; written: {table}, {picture}")


if __name__ == "__main__":
    typer.run(main)
