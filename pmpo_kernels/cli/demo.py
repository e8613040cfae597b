"""`pmpo-kernels demo`: a small language model's rollouts, one policy update, and the loss checked on real logits."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pmpo_kernels.demo.model import DemoUnavailable
from pmpo_kernels.demo.rollouts import MAX_PROMPTS
from pmpo_kernels.demo.run import Settings, run
from pmpo_kernels.impls import interpreted

FILES = ("demo.png", "summary.json")


class Dtype(str, Enum):
    """Dtype of the model's forward pass and of the logits; the weights are float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def command(
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
    existing = [str(out / name) for name in FILES if (out / name).exists()]
    if existing and not overwrite:
        raise typer.BadParameter(
            f"expected a folder without results, got one with {' and '.join(existing)}; "
            "name another folder, or give --overwrite to replace them",
            param_hint="--out",
        )
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
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
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
    """Return the named device if it is there. None chooses CUDA, or the CPU without a GPU or under Triton's interpreter."""
    if device is None:
        return "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        available = "cpu or cuda" if torch.cuda.is_available() else "cpu (no GPU is visible to PyTorch)"
        raise typer.BadParameter(f"expected {available}, got {device!r}", param_hint="--device")
    return device
