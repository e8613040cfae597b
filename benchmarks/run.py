"""The loss of this package beside eager PyTorch, torch.compile, Liger and TRL, as shares of the copy bandwidth.

python benchmarks/run.py --out benchmarks/results/<machine>

For each case: every row is checked against float64 first, and a wrong one gets no times. Writes run-<case>.json, renewed after
each row and round so that an interruption loses one of them, and run-<case>.png; run-tokens.png where cases differ in their
number of tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from host_overhead import host_overhead
from other_packages import peers
from rich.console import Console
from run_figures import write_roofline, write_tokens
from run_report import RunReport, content, reasons, speed_table, summary_table
from stage_calls import stage_calls
from suites import Model, Suite, choose

from pmpo_kernels.benchmarking.allocator import allocators
from pmpo_kernels.benchmarking.cases import Case, Dtype, Preset
from pmpo_kernels.benchmarking.comparison import Comparison, Spread
from pmpo_kernels.benchmarking.memory import memory_problem
from pmpo_kernels.benchmarking.report import Report, accuracy_table, files_problem, measure, wide_console, write_json
from pmpo_kernels.benchmarking.variants import COMPILED, Variant, variants

TOKENS_FIGURE = "run-tokens.png"
WHY_NOT = {None: "in the first case only, unless --compile", False: "left out by --no-compile"}


def chosen_variants(case: Case, left_out: str | None) -> tuple[list[Variant], dict[str, str]]:
    """Return every row of a case, and for the others the reason why they are not measured; `left_out` is that of torch.compile."""
    ours, skipped = variants(case.device, check_interpreted=True)
    others, missing = peers(case)
    if left_out:
        ours, skipped = [v for v in ours if v != COMPILED], {**skipped, COMPILED.name: left_out}
    return ours + others, skipped | missing


def run_case(case: Case, repeats: int, left_out: str | None, memory: bool, out: Path, console: Console) -> RunReport:
    """Measure one case, write its file as figures come, print it and draw its picture."""
    torch._dynamo.reset()  # a limit on recompiles would turn torch.compile into eager PyTorch without a word
    chosen, skipped = chosen_variants(case, left_out)
    setting = allocators(case.device)[-1]
    out.mkdir(parents=True, exist_ok=True)
    json_path, png_path = files(case, out)

    def report_of(comparison: Comparison, host: dict[str, Spread]) -> RunReport:
        return RunReport(Report(case, repeats, comparison, skipped), setting, host)

    def save(comparison: Comparison) -> None:
        write_json(content(report_of(comparison, {}), complete=False), json_path)

    comparison = measure(case, chosen, repeats, [setting], console, memory, save, stage_calls)
    right = [v for v, row in zip(chosen, comparison.rows, strict=True) if not row.problem]
    report = report_of(comparison, host_overhead(case, right, repeats))
    write_json(content(report), json_path)
    if case.device != "cpu":
        torch.cuda.empty_cache()
    console.print(speed_table(report))
    console.print(accuracy_table(report.base))
    for line in reasons(report):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    write_roofline(report, png_path)
    console.print(f"Written: {json_path}, {png_path}", soft_wrap=True)
    return report


def files(case: Case, out: Path) -> tuple[Path, Path]:
    """Paths of the JSON file and the picture of a case."""
    return out / f"run-{case.name}.json", out / f"run-{case.name}.png"


def those_that_fit(cases: list[Case], console: Console) -> list[Case]:
    """Return the cases without those that need more memory than there is, which are named; all of them if not one fits."""
    problems = {case: memory_problem(case) for case in cases}
    fitting = [case for case, problem in problems.items() if problem is None]
    for case, problem in problems.items():
        if fitting and problem:
            console.print(f"not measured: {case.name} ({problem})", soft_wrap=True, markup=False, highlight=False)
    return fitting or cases


def main(
    suite: Annotated[Suite, typer.Option(help="Cases to measure, unless an option below names others.")] = Suite.quick,
    model: Annotated[list[Model] | None, typer.Option(help="Vocabularies, by model.")] = None,
    dtype: Annotated[list[Dtype] | None, typer.Option(help="Dtypes of the logits.")] = None,
    preset: Annotated[list[Preset] | None, typer.Option(help="Losses: presets of LossConfig.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Tokens T a trajectory.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Trajectories B.")] = None,
    padded: Annotated[float | None, typer.Option(help="Fraction of positions that are padding, 0 to 0.5.")] = None,
    clipped: Annotated[float | None, typer.Option(help="Fraction of response tokens that are clipped, 0 to 1.")] = None,
    zero_advantage: Annotated[
        float | None, typer.Option(help="Fraction of trajectories with advantage 0, 0 to 1.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds, all rows in each.")] = 10,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="With a row for torch.compile, whose compilation takes most of the time.",
            show_default="in the first case only",
        ),
    ] = None,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory.")] = True,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A rehearsal with few tokens and V = 320: its times say nothing.")
    ] = False,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the results.")] = Path("out/run"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results in --out.")] = False,
) -> None:
    """Check, then time forward and backward of the same loss by every package that is installed.

    Without --model, --dtype, --preset, --tokens and --batch the cases are those of --suite that fit into the memory. With
    one of them: all combinations of the values given. The fractions replace those of every case. The exit code is 1 if a
    row is wrong.
    """
    given = {"padded": padded, "clipped": clipped, "zero_advantage": zero_advantage}
    fractions = {name: value for name, value in given.items() if value is not None}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        cases = choose(suite, device, model or [], dtype or [], preset or [], tokens or [], batch, fractions, tiny)
    except ValueError as error:
        raise typer.BadParameter(
            str(error), param_hint=f"--{str(error).partition(':')[0].replace('_', '-')}"
        ) from error
    console = wide_console()
    if not (model or dtype or preset or tokens or batch):
        cases = those_that_fit(cases, console)
    if problem := files_problem(
        [*(path for case in cases for path in files(case, out)), out / TOKENS_FIGURE], overwrite
    ):
        raise typer.BadParameter(problem, param_hint="--out")
    if problem := memory_problem(*cases):
        raise typer.BadParameter(problem, param_hint="--model, --tokens, --batch, --dtype")
    reports = []
    for number, case in enumerate(cases):
        left_out = None if compiled or (compiled is None and number == 0) else WHY_NOT[compiled]
        reports.append(run_case(case, repeats, left_out, memory, out, console))
    console.print(summary_table(reports))
    if write_tokens(reports, out / TOKENS_FIGURE):
        console.print(f"Written: {out / TOKENS_FIGURE}", soft_wrap=True)
    if any(report.base.comparison.wrong for report in reports):
        raise typer.Exit(1)


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
