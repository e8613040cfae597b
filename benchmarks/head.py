"""The loss from hidden states and an LM head: `linear_pmpo_loss` beside the bare products, eager PyTorch, PyTorch's
`linear_cross_entropy`, Liger and TRL.

python benchmarks/head.py --out benchmarks/results/<machine>

For each case: every row is checked against float64 first, and a wrong one gets no times. Writes head-<case>.json and
head-<case>.png. The rows of Liger and TRL need: pip install liger-kernel==0.8.5 packaging trl==1.16.0, and Liger's scaled
cross entropy on a Hopper GPU: pip install "liger-kernel[cutedsl]==0.8.5". That of PyTorch's own needs PyTorch 2.13.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import head_accuracy
import torch
import typer
from head_inputs import HeadBench, HeadCase, HeadInputs, build_head_inputs
from head_report import (
    ERROR_NOTE,
    ERROR_PARTS,
    HeadReport,
    content,
    full_case,
    ratio_table,
    reasons,
    speed_table,
)
from head_rows import FLOOR, OURS, HeadVariant, head_rows
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from suites import MODELS, NO_ZEROS, WHOLE, Model
from torch import Tensor

from pmpo_kernels.benchmarking.allocator import Allocator, allocators, using
from pmpo_kernels.benchmarking.cases import Dtype, Preset
from pmpo_kernels.benchmarking.comparison import Comparison, Row, judge, run_once, summarise
from pmpo_kernels.benchmarking.figure import write_figure
from pmpo_kernels.benchmarking.measure import Steps, Times, rotating
from pmpo_kernels.benchmarking.memory import memory_problem, peak_allocated, peak_resident
from pmpo_kernels.benchmarking.report import Report, accuracy_table, files_problem, wide_console, write_json
from pmpo_kernels.linear.projection import adds_to_float32

HIDDEN = {"qwen2.5": 3584, "smollm2": 576, "ministral": 4096}
USUAL = {"cpu": ("smollm2", "float32", 8, 512, 3), "cuda": ("qwen2.5", "bfloat16", 6, 4096, 5)}
"""Model, dtype, trajectories, tokens of the longest, rounds. With the usual padding the shortest has a quarter of that."""


class Suite(str, Enum):
    """Which cases to measure. `main`: the first one, which is wanted most. `more`: the others. `all`: both."""

    main = "main"
    more = "more"
    all = "all"


TINY = {"vocab": 320, "hidden": 16, "tokens": 8, "model": "tiny"}  # of a rehearsal


class Planned(NamedTuple):
    """A case, and whether only the floor and `linear_pmpo_loss` are measured."""

    case: HeadCase
    brief: bool


def suite(device: str) -> list[Planned]:
    """Return the cases, the ones wanted most first: GRPO beside everybody; what half of the trajectories at A = 0 and half of the
    tokens clipped save; PMPO with p solved; on a GPU the largest shape of Liger's table, 8,192 tokens without padding."""
    model, dtype, B, T, _ = USUAL[device]
    padded = {"padded": 0.375}
    cases = [
        ("grpo", NO_ZEROS | padded, False),
        ("grpo", NO_ZEROS | padded | {"zero_advantage": 0.5}, True),
        ("grpo", NO_ZEROS | padded | {"clipped": 0.5}, True),
        ("pmpo", WHOLE | padded, device == "cpu"),
    ]
    plan = [
        Planned(head_case(Model(model), Dtype(dtype), Preset(preset), B, T, None, device, fractions), brief)
        for preset, fractions, brief in cases
    ]
    if device != "cpu":
        table = (Model("ministral"), Dtype("bfloat16"), Preset("grpo"), 2, 4096, None, device, NO_ZEROS)
        plan.append(Planned(head_case(*table), False))
    return plan


def head_case(
    model: Model,
    dtype: Dtype,
    preset: Preset,
    batch: int,
    tokens: int,
    hidden: int | None,
    device: str,
    fractions: dict[str, float],
) -> HeadCase:
    """Make a case with a model's vocabulary and, unless `hidden` says otherwise, its width."""
    return HeadCase(
        vocab=MODELS[model.value],
        hidden=hidden or HIDDEN.get(model.value, 1024),
        batch=batch,
        tokens=tokens,
        dtype=dtype,
        preset=preset,
        device=device,
        model=model.value,
        **fractions,
    )


def load_bench(path: Path, variant: HeadVariant, case: HeadCase) -> tuple[Steps, Callable[..., Tensor]]:
    """Load inputs that another process has written, and return what a fresh process measures the memory of."""
    inputs = HeadInputs(*torch.load(path, weights_only=True))
    return HeadBench(inputs, variant.padded), variant.build(case.config)


def peak(case: HeadCase, variant: HeadVariant, bench: HeadBench, f: Callable[..., Tensor], path: Path) -> int | None:
    """Return the bytes at the peak beyond the inputs, measured as `MEMORY_METHOD` says."""
    return (
        peak_allocated(bench, f) if bench.cuda else peak_resident(partial(load_bench, path, variant, case), warmups=1)
    )


def largest_chunk(case: HeadCase, inputs: HeadInputs, limit: int | None) -> int:
    """Number of tokens in the largest chunk of `linear_pmpo_loss` that `limit` allows, or by its default."""
    from pmpo_kernels.linear.chunks import default_chunk_tokens, pack

    lengths = [n for n, a in zip(inputs.mask.sum(1).tolist(), inputs.advantages.tolist(), strict=True) if a]
    limit = limit or default_chunk_tokens(max(lengths, default=0), case.row_bytes, inputs.hidden.device)
    return max((min(sum(lengths[part]), limit) for part in pack(lengths, limit)), default=0)


def check(row: Row, bench: HeadBench, f: Callable[..., Tensor], case: HeadCase, want: head_accuracy.HeadExact) -> None:
    """Run the row once and fill in its errors and, if they exceed their bounds, the problem. The floor only has to run."""
    found = run_once(row, bench, f)
    if found is None or row.group == FLOOR:
        return
    loss, dhidden, dweight = found
    row.parts, row.loss_error = head_accuracy.errors(loss, dhidden, dweight, bench.inputs, want)
    row.gradient_error = max(row.parts)
    row.gradient_bound, row.loss_bound = head_accuracy.bounds(bench.inputs, want, case.config)
    judge(row)


def compare(
    case: HeadCase,
    chosen: list[HeadVariant],
    repeats: int,
    advance: Callable[[str], None],
    setting: Allocator,
    memory: bool,
    save: Callable[[Comparison, HeadInputs], object] = lambda found, inputs: None,
) -> tuple[Comparison, HeadInputs]:
    """Build the inputs, check, time in rounds, measure memory. On a CPU the check is the warm-up; a GPU has one more round for it.

    `save` is called with what there is after each checked row, each timed round and each memory figure.
    """
    advance("building inputs")
    inputs = build_head_inputs(case)
    benches = {padded: HeadBench(inputs, padded) for padded in {variant.padded for variant in chosen}}
    advance("float64")
    want = head_accuracy.exact(inputs, case.config)
    rows = [Row(variant.name, variant.group) for variant in chosen]
    found = Comparison(rows, {}, {}, len(inputs.hidden), want.gradient_rows)
    functions = {}
    with using(setting):
        for variant, row in zip(chosen, rows, strict=True):
            advance(f"checking {variant.name}")
            f = variant.build(case.config)
            check(row, benches[variant.padded], f, case, want)
            if not row.problem:
                functions[variant.name] = (benches[variant.padded], f)
            save(found, inputs)
        times: dict[str, list[Times]] = {name: [] for name in functions}
        warmups = 0 if case.device == "cpu" else 1
        for i, names in enumerate(rotating(list(functions), warmups + repeats)):
            for name in names:
                advance(f"timing {name}")
                bench, f = functions[name]
                laps = bench.time(f)
                if i >= warmups:
                    times[name].append(laps)
            if i >= warmups:
                summarise(rows, setting, times)
                save(found, inputs)
    with tempfile.TemporaryDirectory() if memory else nullcontext() as folder:
        path = Path(folder or ".") / "inputs.pt"
        if memory and case.device == "cpu":
            torch.save(tuple(inputs), path)
        for variant, row in zip(chosen, rows, strict=True):
            advance(f"memory of {variant.name}")
            if memory and variant.name in functions:
                row.peak_bytes = peak(case, variant, *functions[variant.name], path)
                save(found, inputs)
    return found, inputs


def run_case(
    planned: Planned, repeats: int, compiled: bool, memory: bool, out: Path, done: list[HeadReport], console: Console
) -> HeadReport:
    """Measure one case, print it and write its files, the JSON after each step. `done` are the cases before it."""
    torch._dynamo.reset()
    case = planned.case
    chosen, skipped = head_rows(case, compiled, planned.brief)
    setting = allocators(case.device)[-1]
    out.mkdir(parents=True, exist_ok=True)
    json_path, png_path = files(case, out)

    def report_of(comparison: Comparison, inputs: HeadInputs) -> HeadReport:
        return HeadReport(
            Report(case, repeats, comparison, skipped),
            case,
            setting,
            {variant.name: variant for variant in chosen},
            len(inputs.hidden),
            int(inputs.mask[inputs.advantages != 0].sum()),
            {v.name: largest_chunk(case, inputs, v.chunk) for v in chosen if v.name.startswith(OURS)},
            None if case.dtype is Dtype.float32 else adds_to_float32(inputs.hidden.device, inputs.weight.dtype),
        )

    def save(report: HeadReport, complete: bool) -> None:
        write_json(content(report, full_case(report, [*done, report])) | {"complete": complete}, json_path)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        warmups = 0 if case.device == "cpu" else 1
        task = progress.add_task(case.name, total=2 + (2 + warmups + repeats) * len(chosen))

        def advance(what: str) -> None:
            progress.update(task, advance=1, description=f"{case.name}: {what}", refresh=True)

        so_far = partial(compare, case, chosen, repeats, advance, setting, memory)
        report = report_of(*so_far(lambda found, inputs: save(report_of(found, inputs), complete=False)))
    console.print(speed_table(report))
    console.print(accuracy_table(report.base, ERROR_PARTS, ERROR_NOTE))
    for line in reasons(report):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    save(report, complete=True)
    write_figure(report.base, png_path)
    console.print(f"Written: {json_path}, {png_path}", soft_wrap=True)
    return report


def files(case: HeadCase, out: Path) -> tuple[Path, Path]:
    """Paths of the JSON file and the picture of a case."""
    return out / f"head-{case.name}.json", out / f"head-{case.name}.png"


def main(
    suite_name: Annotated[
        Suite, typer.Option("--suite", help="Cases, unless an option below names others.")
    ] = Suite.all,
    model: Annotated[Model | None, typer.Option(help="Vocabulary and width, by model.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Width H of the hidden states.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of hidden states and head.")] = None,
    preset: Annotated[list[Preset] | None, typer.Option(help="Losses that clip tokens: presets of LossConfig.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens T of the longest trajectory.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Trajectories B.")] = None,
    padded: Annotated[float | None, typer.Option(help="Fraction of positions that are padding, 0 to 0.5.")] = None,
    clipped: Annotated[float | None, typer.Option(help="Fraction of response tokens that are clipped, 0 to 1.")] = None,
    zero_advantage: Annotated[
        float | None, typer.Option(help="Fraction of trajectories with advantage 0, 0 to 1.")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Timed rounds, all rows in each.", show_default="3, on a GPU 5")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="With a row for torch.compile.")] = True,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory.")] = True,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A rehearsal: the cases in a size whose times say nothing.")
    ] = False,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the results.")] = Path("out/head"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results in --out.")] = False,
) -> None:
    """Check, then time forward and backward of the loss and the LM head by every package that is installed.

    Without --model, --hidden, --dtype, --preset, --tokens and --batch: the cases of --suite, where those of fractions
    that save work have few rows. With one of them: one case a preset, all rows. The fractions replace those of every case. The
    exit code is 1 if a row is wrong.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    usual_model, usual_dtype, B, T, rounds = USUAL[device]
    given = {"padded": padded, "clipped": clipped, "zero_advantage": zero_advantage}
    fractions = {name: value for name, value in given.items() if value is not None}
    try:
        first, *others = suite(device)
        plan = {Suite.main: [first], Suite.more: others, Suite.all: [first, *others]}[suite_name]
        plan = [Planned(replace(case, **fractions), brief) for case, brief in plan]
        if model or hidden or dtype or preset or tokens or batch:
            shape = (batch or B, tokens or T, hidden, device, {"zero_advantage": 0.0, **fractions})
            kind = (model or Model(usual_model), dtype or Dtype(usual_dtype))
            plan = [Planned(head_case(*kind, p, *shape), False) for p in dict.fromkeys(preset or [Preset.grpo])]
    except ValueError as error:
        raise typer.BadParameter(
            str(error), param_hint=f"--{str(error).partition(':')[0].replace('_', '-')}"
        ) from error
    if tiny:
        plan = [Planned(replace(case, **TINY), brief) for case, brief in plan]
    plan = list({planned.case: planned for planned in plan}.values())
    if problem := files_problem([path for planned in plan for path in files(planned.case, out)], overwrite):
        raise typer.BadParameter(problem, param_hint="--out")
    if problem := memory_problem(*(planned.case for planned in plan)):
        raise typer.BadParameter(problem, param_hint="--model, --hidden, --tokens, --batch, --dtype")
    console = wide_console()
    reports: list[HeadReport] = []
    for planned in plan:
        reports.append(run_case(planned, repeats or rounds, compiled, memory, out, reports, console))
        if device != "cpu":
            torch.cuda.empty_cache()
    console.print(ratio_table(reports))
    if any(report.base.comparison.wrong for report in reports):
        raise typer.Exit(1)


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
