"""Run the whole experiment in a pool of processes, then write the report. Runs that are there already are not run again.

python examples/experiment/run_all.py --out out/experiment                                            # 80 runs on a CPU
python examples/experiment/run_all.py --out out/tune --kind tune                                      # learning rates
python examples/experiment/run_all.py --out out/ablation --kind ablation                              # PMPO's rule
python examples/experiment/run_all.py --out out/experiment-smollm2 --model smollm2 --device cuda      # on a GPU
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from logs import Settings, finished
from methods import ABLATION, FAMILY, RATES, Method
from methods import learning_rate as best_rate
from policy import FILE, pretrain
from report import write_report
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tasks import Side
from train import train

USUAL = {
    "small": {"loss": "logits"},
    "smollm2": {"loss": "linear"},
}
"""What each model has instead of the defaults of `Settings`."""
SMOLLM2_RATE = 1e-5
SMOKE = {"steps": 1, "evaluate_every": 1, "compare_every": 1, "evaluation_problems": 3, "prompts": 2, "copies": 4}


@dataclass(frozen=True)
class Kind:
    """An experiment: what it compares, on which problems, with which seeds. Those by which something is chosen have no problem and
    no seed in common with the result."""

    methods: tuple[str, ...]
    first_seed: int
    seeds: int
    staleness: tuple[int, ...]
    evaluate_on: Side
    rates: dict[int, tuple[float, ...]]  # by staleness; where there is none, each method's own


KINDS = {
    "compare": Kind(FAMILY, 0, 5, (4, 16), "held out", {}),
    "tune": Kind(FAMILY, 1000, 2, tuple(RATES), "validation", RATES),
    "ablation": Kind(ABLATION, 2000, 3, (16,), "validation", {16: (1e-4, 4e-4)}),
}


def plan(
    methods: list[str],
    seeds: Iterable[int],
    staleness: list[int],
    rates: Callable[[str], Sequence[float]],
    options: dict,
) -> list[Settings]:
    """List all runs, seed by seed, so that an interrupted experiment has every method. `rates` returns the learning rates of a
    method at a staleness."""
    return [
        Settings(method=m, seed=seed, staleness=k, learning_rate=rate, **options)
        for seed in seeds
        for k in staleness
        for m in methods
        for rate in rates(m, k)
    ]


def execute(runs: list[Settings], out: Path, jobs: int, pretrain_steps: int, console: Console) -> None:
    """Pre-train where it is needed, then run what is missing. The first error ends it."""
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
    kind: Annotated[
        str, typer.Option(help="compare: the methods; tune: their learning rates; ablation: PMPO's rule.")
    ] = "compare",
    method: Annotated[
        list[str] | None,
        typer.Option(help="Instead of the kind's: a preset, perhaps with options: pmpo:clip_low=0.2. Repeatable."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each method, learning rate and staleness.")] = None,
    staleness: Annotated[list[int] | None, typer.Option(min=1, help="Optimizer steps a rollout. Repeatable.")] = None,
    learning_rate: Annotated[
        list[float] | None, typer.Option(min=0, help="Instead of each method's own. Repeatable.")
    ] = None,
    model: Annotated[str, typer.Option(help="small or smollm2.")] = "small",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Of the forward pass.")] = False,
    loss: Annotated[str | None, typer.Option(help="logits, linear or eager.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of a run.")] = None,
    evaluate_every: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    evaluation_problems: Annotated[int | None, typer.Option(min=1, help="Problems of an evaluation.")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Problems of an optimizer step.")] = None,
    copies: Annotated[int | None, typer.Option(min=2, help="Answers to each.")] = None,
    pretrain_steps: Annotated[int, typer.Option(min=1, help="Of the small model.")] = 1000,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 2,
    smoke: Annotated[bool, typer.Option("--smoke", help="One short run of one step.")] = False,
) -> None:
    """Run what is missing, then write the report."""
    for name, value, known in (("model", model, USUAL), ("kind", kind, KINDS)):
        if value not in known:
            raise typer.BadParameter(f"--{name}: expected one of {list(known)}, got {value!r}")
    usual = KINDS[kind]
    options = {"model": model, "device": device, "bfloat16": bfloat16, "evaluate_on": usual.evaluate_on, **USUAL[model]}
    given = {"steps": steps, "evaluate_every": evaluate_every, "evaluation_problems": evaluation_problems}
    given |= {"prompts": prompts, "copies": copies, "loss": loss}
    options |= (SMOKE if smoke else {}) | {name: value for name, value in given.items() if value is not None}
    methods = method or list(usual.methods)
    if smoke:
        methods, seeds, staleness = methods[-1:], 1, [1]

    def rates(m: str, k: int) -> Sequence[float]:
        if learning_rate or model == "smollm2":
            return learning_rate or [SMOLLM2_RATE]
        return usual.rates.get(k) or [best_rate(Method(m).preset, k)]

    numbers = range(usual.first_seed, usual.first_seed + (seeds or usual.seeds))
    try:
        runs = plan(methods, numbers, staleness or list(usual.staleness), rates, options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    execute(runs, out, 1 if device == "cuda" else jobs, pretrain_steps, console)
    write_report(out, console)


if __name__ == "__main__":
    typer.run(main)
