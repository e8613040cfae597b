"""`pmpo-kernels bench`: eager PyTorch, torch.compile and the fused loss side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pmpo_kernels.benchmarking.cases import Dtype, Preset

# (batch, tokens): about a minute on two CPU cores; a batch that fills a GPU.
DEFAULT_SHAPE = {"cpu": (8, 16), "cuda": (8, 1024)}


def command(
    vocab: Annotated[int, typer.Option(min=2, help="Vocabulary size V.")] = 49152,
    batch: Annotated[int | None, typer.Option(min=1, help="Trajectories B.", show_default="8")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens T a trajectory.", show_default="16, on a GPU 1024")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the logits.")] = Dtype.float32,
    preset: Annotated[Preset, typer.Option(help="Loss: a preset of LossConfig.")] = Preset.pmpo,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds, all variants in each.")] = 20,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for bench.json and bench.png.")] = Path(
        "out/bench"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results in --out.")] = False,
) -> None:
    """Time forward and backward of the loss and measure its memory, after checking it against float64.

    Compared on this machine's device: eager PyTorch, torch.compile of the same function, and pmpo_loss for each usable
    implementation, out of place and in place. For the two baselines the adaptive p is solved beforehand and not timed;
    the fused rows solve it. A variant whose error exceeds its bound is not timed, and the exit code is 1.
    """
    files = {"json": out / "bench.json", "png": out / "bench.png"}
    existing = [str(path) for path in files.values() if path.exists()]
    if existing and not overwrite:
        raise typer.BadParameter(
            f"expected a folder without results, got one with {' and '.join(existing)}; "
            "name another folder, or give --overwrite to replace them",
            param_hint="--out",
        )
    import torch

    from pmpo_kernels.benchmarking import report as reporting
    from pmpo_kernels.benchmarking.cases import Case, build_inputs, variants
    from pmpo_kernels.benchmarking.comparison import compare, steps
    from pmpo_kernels.benchmarking.figure import write_figure
    from pmpo_kernels.benchmarking.machine import available_memory
    from pmpo_kernels.benchmarking.measure import Bench

    device = "cuda" if torch.cuda.is_available() else "cpu"
    B, T = DEFAULT_SHAPE[device]
    case = Case(vocab=vocab, batch=batch or B, tokens=tokens or T, dtype=dtype, preset=preset, device=device)
    available = available_memory()
    if device == "cpu" and available is not None and case.needed_bytes > available:
        raise typer.BadParameter(
            f"expected a shape that fits into the {available / 2**30:.1f} GiB available, got {case.batch} x "
            f"{case.tokens} x {case.vocab}, which needs about {case.needed_bytes / 2**30:.1f} GiB",
            param_hint="--batch, --tokens, --vocab",
        )
    console = Console()
    chosen, skipped = variants(device)
    for name, reason in skipped.items():
        console.print(f"not timed: {name} ({reason})")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("building inputs", total=steps(chosen, repeats))
        bench = Bench(build_inputs(case))
        rows = compare(
            case, bench, chosen, repeats, lambda what: progress.update(task, advance=1, description=what, refresh=True)
        )
    report = reporting.Report(case, repeats, bench.inputs.zero_rows, rows, skipped)
    console.print(reporting.speed_table(report))
    console.print(reporting.accuracy_table(report))
    out.mkdir(parents=True, exist_ok=True)
    reporting.write_json(report, files["json"])
    write_figure(report, files["png"])
    console.print(f"Written: {files['json']}, {files['png']}", soft_wrap=True)
    if any(row.wrong for row in rows):
        raise typer.Exit(1)
