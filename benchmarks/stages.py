"""Each stage alone against the floor of this machine.

python benchmarks/stages.py --out benchmarks/results/<machine>

On a GPU, or with --impl triton: the Triton kernels beside a copy of the logits, PMPO with p solved, trajectories of 4,096 and
of 32,768 tokens (`stages_triton.py`); writes stages-triton.json and .png. Else the C++ kernels: bytes moved, and arithmetic on
data in the cache; writes stages.json and .png, which `tools/readme_table.py` puts into docs/performance_cpu.md.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from stages_triton import measure_triton
from suites import TINY_SCALE, rehearsal, solved

from pmpo_kernels import LossConfig, pmpo_loss
from pmpo_kernels.batch import Batch
from pmpo_kernels.benchmarking.allocator import Allocator, page_faults, using
from pmpo_kernels.benchmarking.cases import Case, Dtype
from pmpo_kernels.benchmarking.comparison import Spread
from pmpo_kernels.benchmarking.inputs import build_inputs
from pmpo_kernels.benchmarking.machine import provenance
from pmpo_kernels.benchmarking.report import files_problem, wide_console, write_json
from pmpo_kernels.impls import USABLE, available_impls
from pmpo_kernels.ops import stage

CACHED_V, CACHED_ROWS = 16384, (4, 12)  # logits that stay in the second-level cache, twice: calling costs drop out
LONG = (1, 4096, 49152)  # one long trajectory: where the trajectory stage weighs most
READ, COPY = "read", "copy"
Functions = dict[str, Callable[[], object]]


def median_times(functions: Functions, repeats: int, before: Callable[[], object] = lambda: None) -> dict[str, Spread]:
    """Return the milliseconds of each function, timed in turn. `before` runs before each and is not timed."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for r in range(repeats + 2):  # two rounds to warm up
        for name, f in functions.items():
            before()
            start = time.perf_counter()
            f()
            if r >= 2:
                samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: Spread.of(values) for name, values in samples.items()}


def stage_functions(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[Functions, Callable[[], object]]:
    """Return what is timed on these logits, and a function that restores the copy that `dlogits` in place has overwritten."""
    work, ids = logits.clone(), token_ids
    _, row_max, row_sum, entropy = stage("token_logp", "cpp")(logits, ids, None, 1.0)
    saved = (ids, None, row_max, row_sum, entropy)
    g = torch.randn(ids.shape, generator=torch.Generator().manual_seed(0)).to(row_max.dtype)
    words = logits.flatten().view(torch.int32)
    functions: Functions = {
        READ: words.amax,
        COPY: lambda: work.copy_(logits),
        "token_logp": lambda: stage("token_logp", "cpp")(work, ids, None, 1.0),
        "dlogits, in place": lambda: stage("dlogits_", "cpp")(work, *saved, g, None, 1.0),
        "dlogits": lambda: stage("dlogits", "cpp")(work, *saved, g, None, 1.0),
        "dlogits with entropy, in place": lambda: stage("dlogits_", "cpp")(work, *saved, g, g, 1.0),
    }
    return functions, lambda: work.copy_(logits)


def fresh_memory(logits: torch.Tensor, token_ids: torch.Tensor, repeats: int) -> dict[str, Any]:
    """Time `dlogits` into fresh memory with the default allocator, and a plain copy into it: ms and page faults."""
    functions, _ = stage_functions(logits, token_ids)
    out: dict[str, Any] = {}
    chosen = {"dlogits": functions["dlogits"], "clone": logits.clone}
    times = median_times(chosen, repeats)
    for name, f in chosen.items():
        before = page_faults() or 0
        f()
        out[name] = {**asdict(times[name]), "page_faults": (page_faults() or 0) - before}
    return out


def trajectory_share(repeats: int) -> dict[str, Any]:
    """Time the trajectory stage with p solved, and the whole step that it is part of, float32 in place."""
    B, T, V = LONG
    i = build_inputs(Case(vocab=V, batch=B, tokens=T))
    config = LossConfig.pmpo(full_clip_fraction=0.5)
    logits = i.logits.clone().requires_grad_()
    logp, _, _, entropy = stage("token_logp", "cpp")(i.logits, i.token_ids, i.mask, 1.0)
    options = list(config.trajectory_options(has_power=False, has_target_ess=False))
    batch = Batch(i.advantages, torch.tensor([0, T]), old_logp=i.old_logp.flatten(), mask=i.mask.flatten())
    power: list[float] = []

    def step() -> None:
        out = pmpo_loss(logits, i.token_ids, i.old_logp, i.advantages, mask=i.mask, config=config, inplace=True)
        torch.autograd.grad(out.loss, logits)
        power.append(float(out.power))

    functions: Functions = {
        "trajectory": lambda: stage("trajectory", "cpp")(logp.flatten(), entropy.flatten(), *batch, options),
        "step": step,
    }
    times = median_times(functions, repeats, lambda: logits.detach().copy_(i.logits))
    assert 0 < power[-1] < 1, power
    return {"shape": LONG, "power": power[-1]} | {name: asdict(spread) for name, spread in times.items()}


def cached_times(dtype: Dtype, rows: int, repeats: int) -> dict[str, float]:
    """Return the median ms of each stage on a few rows."""
    cached = build_inputs(Case(batch=1, tokens=rows, vocab=CACHED_V, dtype=dtype))
    functions, restore = stage_functions(cached.logits, cached.token_ids)
    return {name: spread.median for name, spread in median_times(functions, repeats, restore).items()}


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Measure one dtype: into fresh memory, then the stages with one thread and with all, on large and on cached logits."""
    threads = torch.get_num_threads()
    inputs = build_inputs(case)
    out: dict[str, Any] = {"logits_bytes": case.logits_bytes, "threads": {}}
    out["fresh"] = fresh_memory(inputs.logits, inputs.token_ids, repeats)
    with using(Allocator.reuse):
        for n in sorted({1, threads}):
            torch.set_num_threads(n)
            functions, restore = stage_functions(inputs.logits, inputs.token_ids)
            times = median_times(functions, repeats, restore)
            out["threads"][str(n)] = {name: asdict(spread) for name, spread in times.items()}
        torch.set_num_threads(1)
        few, many = (cached_times(case.dtype, rows, 40 * repeats) for rows in CACHED_ROWS)
    elements = (CACHED_ROWS[1] - CACHED_ROWS[0]) * CACHED_V
    out["cached_ns_an_element"] = {name: 1e6 * (many[name] - few[name]) / elements for name in few}
    return out


def figure(content: dict[str, Any], path: Path) -> None:
    """Draw the time of each stage beside the floor that it cannot beat, with all threads."""
    kinds = content["dtypes"]
    names = ["token_logp", "dlogits, in place", "dlogits with entropy, in place", "dlogits"]
    fig, axes = plt.subplots(1, len(kinds), figsize=(5.5 * len(kinds), 2.6), sharey=True, layout="constrained")
    for ax, (kind, found) in zip(axes, kinds.items(), strict=True):
        times = found["threads"][max(found["threads"], key=int)]
        bars = ax.barh(names, [times[name]["median"] for name in names], 0.6)
        ax.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        for line, floor in ((":", READ), ("--", COPY)):
            ax.axvline(times[floor]["median"], color="black", linestyle=line, linewidth=1, label=f"one {floor}")
        ax.set_xlabel(f"ms, {kind}, {max(found['threads'], key=int)} threads")
        ax.margins(x=0.15)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), fontsize=8)
    axes[0].invert_yaxis()
    fig.savefig(path, dpi=150)
    plt.close(fig)


class Impl(str, Enum):
    """Implementation whose stages are timed."""

    cpp = "cpp"
    triton = "triton"


def measure_cpp(shape: tuple[int, int, int], repeats: int, files: dict[str, Path], console: Console) -> None:
    """Measure both dtypes and a long trajectory. The file is renewed after each."""
    batch, tokens, vocab = shape
    kinds: dict[str, Any] = {}
    content = {
        **provenance(),
        "shape": shape,
        "cached": {"vocab": CACHED_V, "rows": CACHED_ROWS},
        "repeats": repeats,
        "unit": "ms",
        "dtypes": kinds,
    }
    cases = [Case(vocab=vocab, batch=batch, tokens=tokens, dtype=kind) for kind in Dtype]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases) + 1)
        for case in cases:
            progress.update(task, description=case.name, refresh=True)
            # each in a fresh process, because memory kept by one would spare the next its page faults
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
                kinds[case.dtype.value] = fresh.submit(measure, case, repeats).result()
            write_json(content, files["json"])
            progress.advance(task)
        progress.update(task, description="trajectory", refresh=True)
        share = content["trajectory"] = trajectory_share(repeats)
        write_json(content, files["json"])
        progress.advance(task)
    figure(content, files["png"])
    table = Table(title=f"logits ({batch}, {tokens}, {vocab})")
    for column in ("dtype", "threads", *next(iter(kinds["float32"]["threads"].values()))):
        table.add_column(column)
    for kind, found in kinds.items():
        for n, times in found["threads"].items():
            table.add_row(kind, n, *(f"{t['median']:.1f}" for t in times.values()))
    console.print(table)
    percent = share["trajectory"]["median"] / share["step"]["median"]
    console.print(f"trajectory stage, {LONG[1]} tokens, V = {LONG[2]}: {percent:.2%} of the step")


def triton_cases(tiny: bool, vocab: int | None, batch: int | None, tokens: int | None) -> list[Case]:
    """Return the cases: PMPO with p solved on two trajectories of 4,096 tokens and on one of 32,768, or the one shape that is
    given."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = solved(device, TINY_SCALE if tiny else 1)
    if tiny:
        cases = rehearsal(cases)
    if batch or tokens:
        cases = [replace(cases[0], batch=batch or cases[0].batch, tokens=tokens or cases[0].tokens)]
    return [replace(case, vocab=vocab, model=f"v{vocab}") for case in cases] if vocab else cases


def main(
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the results.")],
    impl: Annotated[Impl | None, typer.Option(help="Whose stages.", show_default="triton on a GPU, else cpp")] = None,
    vocab: Annotated[int | None, typer.Option(min=2, help="Vocabulary size V.", show_default="151936")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Trajectories B.", show_default="2; triton: 2 and 1")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens T a trajectory.", show_default="512; triton: 4096 and 32768")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 15,
    tiny: Annotated[bool, typer.Option("--tiny", help="Triton, a rehearsal: few tokens and V = 320.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results in --out.")] = False,
) -> None:
    """Time each stage alone: of the Triton kernels, in bfloat16, or of the C++ kernels, in both dtypes, with one thread and
    with all. The exit code is 1 if a result of Triton is wrong."""
    triton = impl is Impl.triton or (impl is None and torch.cuda.is_available())
    if tiny and not triton:
        raise typer.BadParameter(
            "expected --impl triton with it, got cpp, whose shapes are --vocab, --batch and --tokens",
            param_hint="--tiny",
        )
    status = available_impls()[(impl or (Impl.triton if triton else Impl.cpp)).value]
    if not status.startswith(USABLE):
        raise typer.BadParameter(
            f"expected an implementation that runs here, got one that does not: {status}", param_hint="--impl"
        )
    files = {kind: out / f"stages{'-triton' if triton else ''}.{kind}" for kind in ("json", "png")}
    if problem := files_problem(list(files.values()), overwrite):
        raise typer.BadParameter(problem, param_hint="--out")
    out.mkdir(parents=True, exist_ok=True)
    console, wrong = wide_console(), False
    if triton:
        wrong = measure_triton(triton_cases(tiny, vocab, batch, tokens), repeats, files, console)
    else:
        measure_cpp((batch or 2, tokens or 512, vocab or 151936), repeats, files, console)
    console.print(f"Written: {files['json']}, {files['png']}", soft_wrap=True)
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
