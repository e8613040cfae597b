"""Every run of the experiment, over a pool of processes; what is there already is not run again. Then the report.

python examples/experiment/run_all.py --out out/experiment                                            # 80 runs on a CPU
python examples/experiment/run_all.py --out out/ablation --method pmpo --method pmpo:full_clip_fraction=0.2
python examples/experiment/run_all.py --out out/experiment-smollm2 --model smollm2 --device cuda      # on a GPU
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated

import typer
from logs import Settings, finished
from methods import ABLATION, FAMILY
from policy import FILE, pretrain
from report import write_report
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from train import train

USUAL = {
    "small": {"loss": "logits"},
    "smollm2": {"loss": "linear", "learning_rate": 1e-5},
}
"""What each model has instead of the defaults of `Settings`."""
SMOKE = {"steps": 1, "evaluate_every": 1, "compare_every": 1, "held_out": 3, "prompts": 2, "copies": 4}


def plan(methods: list[str], seeds: int, staleness: list[int], options: dict) -> list[Settings]:
    """All runs, seed by seed, so that an interrupted experiment has every method."""
    return [
        Settings(method=m, seed=seed, staleness=k, **options)
        for seed in range(seeds)
        for k in staleness
        for m in methods
    ]


def execute(runs: list[Settings], out: Path, jobs: int, pretrain_steps: int, console: Console) -> None:
    """Pre-train where it is needed, then the runs that are missing; the first error ends it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        missing = [s for s in runs if not finished(out, s)]
        if runs[0].model == "small" and not (out / FILE).exists():
            bar = progress.add_task("pre-training", total=pretrain_steps)
            pretrain(out / FILE, pretrain_steps, lambda loss: progress.advance(bar))
        bar = progress.add_task("runs", total=len(runs), completed=len(runs) - len(missing))
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max(1, min(jobs, len(missing))), mp_context=spawn) as pool:
            futures = [pool.submit(train, s, out) for s in missing]
            try:
                for future in as_completed(futures):
                    future.result()
                    progress.advance(bar)
            except BaseException:  # an interruption too: what has not begun is not begun
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def main(
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for weights, logs, tables, pictures.")] = Path(
        "out/experiment"
    ),
    method: Annotated[
        list[str] | None,
        typer.Option(help="A preset, perhaps with options: pmpo:clip_low=0.2,clip_high=0.2. Repeatable."),
    ] = None,
    ablation: Annotated[bool, typer.Option("--ablation", help="The methods of the ablation of PMPO's rule.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method and staleness.")] = 5,
    staleness: Annotated[list[int] | None, typer.Option(min=1, help="Optimizer steps a rollout. Repeatable.")] = None,
    model: Annotated[str, typer.Option(help="small or smollm2.")] = "small",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Of the forward pass.")] = False,
    loss: Annotated[str | None, typer.Option(help="logits, linear or eager.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of a run.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0)] = None,
    evaluate_every: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    held_out: Annotated[int | None, typer.Option(min=1, help="Problems of an evaluation.")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Problems of an optimizer step.")] = None,
    copies: Annotated[int | None, typer.Option(min=2, help="Answers to each.")] = None,
    pretrain_steps: Annotated[int, typer.Option(min=1, help="Of the small model.")] = 1200,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 2,
    smoke: Annotated[bool, typer.Option("--smoke", help="One short run of one step.")] = False,
) -> None:
    """Run what is missing, then write the report."""
    if model not in USUAL:
        raise typer.BadParameter(f"--model: expected one of {list(USUAL)}, got {model!r}")
    if ablation and method:
        raise typer.BadParameter("--ablation: expected no --method beside it, which it chooses")
    options = {"model": model, "device": device, "bfloat16": bfloat16, **USUAL[model]}
    given = {"steps": steps, "learning_rate": learning_rate, "evaluate_every": evaluate_every}
    given |= {"held_out": held_out, "prompts": prompts, "copies": copies, "loss": loss}
    options |= (SMOKE if smoke else {}) | {name: value for name, value in given.items() if value is not None}
    methods = method or list(ABLATION if ablation else FAMILY)
    if smoke:
        methods, seeds, staleness = methods[-1:], 1, [1]
    try:
        runs = plan(methods, seeds, staleness or [4, 16], options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    execute(runs, out, 1 if device == "cuda" else jobs, pretrain_steps, console)
    write_report(out, console)


if __name__ == "__main__":
    typer.run(main)
