"""`pmpo-kernels bench`: eager PyTorch, torch.compile and the fused loss side by side."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

from pmpo_kernels.benchmarking.cases import Case, Dtype, Preset

VOCABS = (151936, 49152)  # Qwen2.5, SmolLM2
# (batch, tokens): one takes minutes on two CPU cores, the other fills a GPU.
DEFAULT_SHAPE = {"cpu": (2, 128), "cuda": (8, 1024)}


def command(
    vocab: Annotated[
        list[int] | None, typer.Option(min=2, help="Vocabulary sizes V.", show_default="151936 and 49152")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Trajectories B.", show_default="2, on a GPU 8")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens T a trajectory.", show_default="128, on a GPU 1024")
    ] = None,
    dtype: Annotated[list[Dtype] | None, typer.Option(help="Dtypes of the logits.", show_default="both")] = None,
    preset: Annotated[Preset, typer.Option(help="Loss: a preset of LossConfig.")] = Preset.pmpo,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds, all variants in each.")] = 20,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for bench-<case>.json and .png.")] = Path(
        "out/bench"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results in --out.")] = False,
) -> None:
    """Time forward and backward of the loss and measure its memory, after checking it against float64.

    Compared on this machine's device, for each vocabulary and dtype: eager PyTorch, torch.compile of the same function,
    and pmpo_loss out of place and in place. On a CPU with the C library's default allocator, where every large tensor is
    fresh memory, and with one that reuses memory, so that page faults are taken out. For the two baselines the adaptive
    p is solved beforehand and not timed; the fused rows solve it. A variant whose error exceeds its bound is not timed,
    and the exit code is 1.
    """
    import torch

    from pmpo_kernels.benchmarking.memory import memory_problem
    from pmpo_kernels.benchmarking.report import files_problem

    device = "cuda" if torch.cuda.is_available() else "cpu"
    B, T = DEFAULT_SHAPE[device]
    cases = [
        Case(vocab=V, batch=batch or B, tokens=tokens or T, dtype=kind, preset=preset, device=device)
        for V in dict.fromkeys(vocab or VOCABS)
        for kind in dict.fromkeys(dtype or Dtype)
    ]
    if problem := files_problem([path for case in cases for path in files(case, out).values()], overwrite):
        raise typer.BadParameter(problem, param_hint="--out")
    if problem := memory_problem(*cases):
        raise typer.BadParameter(problem, param_hint="--batch, --tokens, --vocab")
    wrong = []
    for case in cases:
        # each case in a fresh process, because memory kept by one would spare the next its page faults
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            wrong.append(fresh.submit(run, case, repeats, out, torch.get_num_threads()).result())
    if any(wrong):
        raise typer.Exit(1)


def files(case: Case, out: Path) -> dict[str, Path]:
    """Paths of the files that a case writes, by kind ("json", "png")."""
    return {kind: out / f"bench-{case.name}.{kind}" for kind in ("json", "png")}


def run(case: Case, repeats: int, out: Path, threads: int) -> bool:
    """Measure one case, print its tables and write its files. Return whether a variant was wrong."""
    import torch

    from pmpo_kernels.benchmarking import report as reporting
    from pmpo_kernels.benchmarking.allocator import allocators
    from pmpo_kernels.benchmarking.figure import write_figure
    from pmpo_kernels.benchmarking.variants import variants

    torch.set_num_threads(threads)
    console = reporting.wide_console()
    chosen, skipped = variants(case.device)
    for name, reason in skipped.items():
        console.print(f"not timed: {name} ({reason})")
    comparison = reporting.measure(case, chosen, repeats, allocators(case.device), console)
    report = reporting.Report(case, repeats, comparison, skipped)
    console.print(reporting.speed_table(report))
    console.print(reporting.accuracy_table(report))
    out.mkdir(parents=True, exist_ok=True)
    written = files(case, out)
    reporting.write_json(reporting.content(report), written["json"])
    write_figure(report, written["png"])
    console.print(f"Written: {written['json']}, {written['png']}", soft_wrap=True)
    return comparison.wrong
