"""Run many loss steps of changing shapes, dtypes and options, forward and backward, and see whether memory stays flat, nothing is
compiled again, and the bits stay the same.

python tools/soak/soak.py --out benchmarks/results/soak/cpp.json

Writes the JSON file and a picture beside it; exits 1 if something grew or changed. What is watched, and by how much it may grow, is
`ALLOWED` and `Soaked.growth` in growth.py.
"""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from growth import ALLOWED, WITHOUT_CACHES, Soaked, soak_in_fresh_process
from loss_steps import FIRST
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pmpo_kernels.benchmarking.machine import provenance
from pmpo_kernels.benchmarking.report import wide_console
from pmpo_kernels.impls import resolve_impl

MOST_SAMPLES, FEWEST_SAMPLES, STEPS_A_SAMPLE = 200, 8, 100  # at least two samples a quarter


def figure(found: Soaked, title: str, path: Path) -> None:
    """Draw the memory in MiB, and below it every count less its median of the second quarter."""
    fig, (memory, counts) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    at = np.array(found.at)
    second = (at > at[-1] / 4) & (at <= at[-1] / 2)
    for name, values in found.held.items():
        y = np.array(values)
        if "bytes" in name:
            memory.plot(at, y / 2**20, label=name.removesuffix(" bytes"))
        else:
            counts.plot(at, y - np.median(y[second]), label=name)
    memory.set_ylabel("MiB")
    memory.set_ylim(bottom=0)
    counts.set_ylabel("more than in the second quarter")
    counts.set_ylim(*(f(limit, y) for f, limit, y in zip((min, max), counts.get_ylim(), (-10, 10), strict=True)))
    counts.set_xlabel("steps")
    for ax in (memory, counts):
        ax.axvspan(0, at[-1] / 4, color="0.92")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, ncols=3, fontsize=8)
    memory.set_title(title, fontsize=10)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def growth_table(found: Soaked, title: str) -> Table:
    table = Table(
        title=title, caption="rise and trend: growth over half of the steps, by maxima and by the median slope"
    )
    for column in ("", "first", "last", "rise", "trend", "allowed", "flat"):
        table.add_column(column, justify="left" if not column else "right")
    for name, g in found.growth().items():
        numbers = (found.held[name][0], found.held[name][-1], g["rise"], g["trend"], ALLOWED[name])
        table.add_row(name, *(f"{x:,.0f}" for x in numbers), "yes" if g["flat"] else "[red]NO[/red]")
    return table


def main(
    out: Annotated[Path, typer.Option(dir_okay=False, help="JSON file; the picture gets its name with .png.")],
    steps: Annotated[int, typer.Option(min=8 * FIRST, help="Loss steps.")] = 50_000,
    seed: Annotated[int, typer.Option(help="Of the batches.")] = 0,
    impl: Annotated[str | None, typer.Option(help="triton, cpp or reference; default: what runs here.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files.")] = False,
) -> None:
    """Run the steps in a process of their own and judge what it holds after them."""
    picture = out.with_suffix(".png")
    if not overwrite and (out.exists() or picture.exists()):
        raise typer.BadParameter("expected a new file; give --overwrite to replace it", param_hint="--out")
    device = "cuda" if torch.cuda.is_available() and impl != "cpp" else "cpu"
    try:
        impl = resolve_impl(impl, torch.device(device))
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error), param_hint="--impl") from None
    samples = max(FEWEST_SAMPLES, min(MOST_SAMPLES, steps // STEPS_A_SAMPLE))
    steps -= steps % samples
    console = wide_console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"{impl} on {device}", total=steps)
        found = soak_in_fresh_process(
            lambda done: progress.update(task, completed=done), steps, samples, seed, impl, device
        )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    content: dict[str, Any] = {
        **provenance(),
        "impl": impl,
        "device": device,
        "steps": steps,
        "seed": seed,
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "environment": WITHOUT_CACHES,
        "allowed": {name: ALLOWED[name] for name in found.held},
        "growth": found.growth(),
        "repeated_steps": FIRST,
        **found._asdict(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=2) + "\n")
    title = f"{impl} on {device}, {steps:,} steps"
    figure(found, title, picture)
    console.print(growth_table(found, title))
    console.print(
        f"The first {FIRST} steps again: " + (f"OTHER BITS in {found.changed}" if found.changed else "same bits")
    )
    console.print(f"Written: {out}, {picture}", soft_wrap=True)
    if not found.ok:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
