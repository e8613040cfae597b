"""A small language model's rollouts, one policy update, and the loss checked on real logits: from the first prompt to the picture.

python examples/demo/demo.py --out out/demo
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import demo_report as report
import torch
import typer
from demo_figure import Trajectories, draw
from from_hidden import RUNS, HeadRow, compare_heads, head_table
from from_logits import Row, compare, gradient_changes, in_between, usable
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rollouts import MAX_PROMPTS, Policy, Rollouts, sample, score, update
from smollm2 import DemoUnavailable, load_model
from time_and_memory import MEMORY_METHOD
from torch import Tensor

from pmpo_kernels.api import pmpo_loss
from pmpo_kernels.benchmarking.report import files_problem
from pmpo_kernels.impls import interpreted

FILES = ("demo.png", "summary.json")


class Dtype(str, Enum):
    """Dtype of the model's forward pass and of the logits; the weights are float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The command's options; the same settings give the same numbers on the same machine, times apart."""

    seed: int
    prompts: int
    completions: int
    max_new_tokens: int
    learning_rate: float
    dtype: str
    device: str


def run(settings: Settings, out: Path, console: Console, advance: Callable[[str, int], None]) -> bool:
    """Run everything. `advance(what, steps in all)` is called before each step. Returns whether all agree with float64."""
    device = torch.device(settings.device)
    total = 7 + len(usable(device)) + 1 + len(RUNS)

    def step(what: str) -> None:
        advance(what, total)

    step("loading SmolLM2-135M-Instruct")
    policy = Policy(*load_model(device), dtype=getattr(torch, settings.dtype))
    second, norm, old_metrics = off_policy(settings, policy, console, step)

    step("scoring the second half with the updated policy")
    with torch.no_grad():
        logits = policy.logits(second)
        output = pmpo_loss(logits, second.token_ids, second.old_logp, second.advantages, mask=second.mask)
    data = Trajectories.of(second, output)
    records = report.records(data, policy)
    console.print(report.trajectory_table(records))
    rows = compare(logits, second, step)
    method = MEMORY_METHOD[device.type]
    console.print(report.comparison_table(rows, method))
    console.print(f"Logits: {tuple(logits.shape)} {settings.dtype}, {logits.nbytes / 2**20:.0f} MiB.")
    changes = gradient_changes(logits, second, (1.0, 0.0))
    del logits
    heads = compare_heads(policy, second, step)
    console.print(head_table(heads, method))

    step("drawing")
    out.mkdir(parents=True, exist_ok=True)
    row = int(in_between(output.power, second)[0])
    draw(out / "demo.png", data, row, policy.tokenizer, title(settings, second))
    report.write_summary(
        out / "summary.json",
        asdict(settings),
        {name: float(value) for name, value in output.metrics.items()},
        update={"gradient_norm": norm, **old_metrics},
        trajectories=records,
        comparison=report.comparison_records(rows),
        fused_head=report.comparison_records(heads),
        gradient_change_at_fixed_p=changes,
        memory_method=method,
    )
    console.print(f"Written: {out / 'demo.png'}, {out / 'summary.json'}", soft_wrap=True)
    return verdict(rows, heads, changes, output.power, console)


def off_policy(
    settings: Settings, policy: Policy, console: Console, step: Callable[[str], None]
) -> tuple[Rollouts, float, dict[str, float]]:
    """Sample, score the second half, update on the first. Returns the second half, the gradient's norm and statistics."""
    s = settings
    step("sampling completions")
    rollouts = sample(
        policy, prompts=s.prompts, completions=s.completions, max_new_tokens=s.max_new_tokens, seed=s.seed
    )
    first = s.completions * (s.prompts // 2)
    step("log-probs of the sampling policy")
    second = score(policy, rollouts.take(slice(first, None)), s.completions)
    step("updating the policy on the first half")
    norm = update(policy, rollouts.take(slice(None, first)), s.completions, s.learning_rate)
    statistics = {
        "mean_reward": float(rollouts.rewards.mean()),
        "mean_tokens": float(rollouts.mask.sum(-1).float().mean()),
    }
    console.print(
        f"{s.prompts} prompts x {s.completions} completions (mean reward {statistics['mean_reward']:.3f}, "
        f"{statistics['mean_tokens']:.1f} tokens); one AdamW step, learning rate {s.learning_rate:g}, on the first "
        f"{first} trajectories (gradient norm {norm:.3f})."
    )
    return second, norm, statistics


def title(settings: Settings, second: Rollouts) -> str:
    """The picture's title."""
    return (
        f"PMPO on {len(second)} rollouts of SmolLM2-135M, one AdamW step off-policy\n"
        f"(step on other prompts, learning rate {settings.learning_rate:g}, seed {settings.seed})"
    )


def verdict(
    rows: list[Row], heads: list[HeadRow], changes: dict[float, float], power: Tensor, console: Console
) -> bool:
    """Print what was found. Returns whether there is a result and every row agrees."""
    inside = int(((power > 0) & (power < 1)).sum())
    console.print(f"p lies strictly between 0 and 1 for {inside} of {power.numel()} trajectories.")
    for p, change in changes.items():
        console.print(f"With p = {p:g} for all, the gradient moves by {100 * change:.2g} % of its norm.")
    worst = max(max(row.loss_error, row.worst_part, row.power_residual) for row in rows)
    bound = min(row.tolerance for row in rows)
    agrees = bool(rows) and all(row.ok for row in rows) and all(row.ok for row in heads) and math.isfinite(worst)
    found = "[bold green]Agreement[/bold green]" if agrees else "[bold red]NO AGREEMENT[/bold red]"
    console.print(
        f"{found} with float64: largest error {worst:.1e}, tolerance {bound:.1e} = (2 + 5 p) delta + 16 u, u the "
        "float32 unit roundoff, delta the error of logp from the largest |logit|, log V and the sum over V, p at "
        "most 1; twice the logits' own rounding is added for 16-bit logits (pmpo_kernels.verification.tolerance)."
    )
    console.print(
        f"From hidden states: largest error {max(row.error for row in heads):.1e}, bound {heads[-1].bound:.1e} = eager's error, "
        "of the same product with the head, and the tolerance of what comes after it."
    )
    return agrees


def main(
    seed: Annotated[int, typer.Option(min=0, help="Seed of the prompts and the sampling.")] = 0,
    out: Annotated[Path, typer.Option(file_okay=False, help=f"Folder for {' and '.join(FILES)}.")] = Path("out/demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results in --out.")] = False,
    prompts: Annotated[int, typer.Option(min=2, max=MAX_PROMPTS, help="Prompts; half of them train.")] = 4,
    completions: Annotated[int, typer.Option(min=2, help="Sampled completions a prompt.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens a completion at most.")] = 32,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Of the one AdamW step.")] = 4e-5,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the logits.")] = Dtype.float32,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda if there is one")] = None,
) -> None:
    """Sample from SmolLM2-135M, reward, update once on half of the prompts, and compare the loss on the other half.

    The second half is then off-policy: some tokens clip, and p adapts per trajectory. Loss and gradient of each usable
    implementation are compared with float64 on these logits; exit code 1 if one is further away than rounding explains.
    """
    if problem := files_problem([out / name for name in FILES], overwrite):
        raise typer.BadParameter(problem, param_hint="--out")
    settings = Settings(
        seed=seed,
        prompts=prompts,
        completions=completions,
        max_new_tokens=max_new_tokens,
        learning_rate=learning_rate,
        dtype=dtype.value,
        device=choose_device(device),
    )
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("starting", total=None)
            agrees = run(
                settings,
                out,
                console,
                lambda what, total: progress.update(task, description=what, total=total, advance=1, refresh=True),
            )
    except DemoUnavailable as error:
        Console(stderr=True).print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    raise typer.Exit(0 if agrees else 1)


def choose_device(device: str | None) -> str:
    """The named device if it is there; None: CUDA, or the CPU without a GPU or under Triton's interpreter."""
    if device is None:
        return "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        available = "cpu or cuda" if torch.cuda.is_available() else "cpu (no GPU is visible to PyTorch)"
        raise typer.BadParameter(f"expected {available}, got {device!r}", param_hint="--device")
    return device


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
