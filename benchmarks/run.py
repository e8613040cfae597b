"""The loss of this package beside eager PyTorch, torch.compile, Liger and TRL, as shares of the copy bandwidth.

python benchmarks/run.py --out benchmarks/results/<machine>

For each case: every row is checked against float64 first, and a wrong one gets no times. Writes run-<case>.json and
run-<case>.png, and run-tokens.png where cases differ in their number of tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from peers import peers
from rich.console import Console
from run_figures import write_roofline, write_tokens
from run_report import RunReport, content, reasons, speed_table, summary_table
from suites import Model, Suite, choose

from pmpo_kernels.benchmarking.allocator import allocators
from pmpo_kernels.benchmarking.cases import Case, Dtype, Preset
from pmpo_kernels.benchmarking.comparison import host_overhead
from pmpo_kernels.benchmarking.report import Report, accuracy_table, wide_console, write_json
from pmpo_kernels.benchmarking.variants import COMPILED, Variant, variants
from pmpo_kernels.cli.bench import check_files, check_memory, measure

TOKENS_FIGURE = "run-tokens.png"


def chosen_variants(case: Case, with_compiled: bool) -> tuple[list[Variant], dict[str, str]]:
    """Every row of a case, and for the others the reason why they are not measured."""
    ours, skipped = variants(case.device, check_interpreted=True)
    others, missing = peers(case)
    if not with_compiled:
        ours, skipped = [v for v in ours if v != COMPILED], {**skipped, COMPILED.name: "left out by --no-compile"}
    return ours + others, skipped | missing


def run_case(case: Case, repeats: int, compiled: bool, memory: bool, out: Path, console: Console) -> RunReport:
    """Measure one case, print it and write its files."""
    torch._dynamo.reset()  # a limit on recompiles would turn torch.compile into eager PyTorch without a word
    chosen, skipped = chosen_variants(case, compiled)
    setting = allocators(case.device)[-1]
    comparison = measure(case, chosen, repeats, [setting], console, memory)
    right = [v for v, row in zip(chosen, comparison.rows, strict=True) if not row.problem]
    report = RunReport(Report(case, repeats, comparison, skipped), setting, host_overhead(case, right, repeats))
    if case.device != "cpu":
        torch.cuda.empty_cache()
    console.print(speed_table(report))
    console.print(accuracy_table(report.base))
    for line in reasons(report):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    json_path, png_path = files(case, out)
    write_json(content(report), json_path)
    write_roofline(report, png_path)
    console.print(f"Written: {json_path}, {png_path}", soft_wrap=True)
    return report


def files(case: Case, out: Path) -> tuple[Path, Path]:
    """What a case writes."""
    return out / f"run-{case.name}.json", out / f"run-{case.name}.png"


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
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="With a row for torch.compile.")] = True,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory.")] = True,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the results.")] = Path("out/run"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results in --out.")] = False,
) -> None:
    """Check, then time forward and backward of the same loss by every package that is installed.

    Without --model, --dtype, --preset, --tokens and --batch the cases are those of --suite. With one of them: all
    combinations of the values given. The fractions replace those of every case. The exit code is 1 if a row is wrong.
    """
    given = {"padded": padded, "clipped": clipped, "zero_advantage": zero_advantage}
    fractions = {name: value for name, value in given.items() if value is not None}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        cases = choose(suite, device, model or [], dtype or [], preset or [], tokens or [], batch, fractions)
    except ValueError as error:
        raise typer.BadParameter(
            str(error), param_hint=f"--{str(error).partition(':')[0].replace('_', '-')}"
        ) from error
    check_files([*(path for case in cases for path in files(case, out)), out / TOKENS_FIGURE], overwrite)
    check_memory(cases, "--model, --tokens, --batch, --dtype")
    console = wide_console()
    reports = [run_case(case, repeats, compiled, memory, out, console) for case in cases]
    console.print(summary_table(reports))
    if write_tokens(reports, out / TOKENS_FIGURE):
        console.print(f"Written: {out / TOKENS_FIGURE}", soft_wrap=True)
    if any(report.base.comparison.wrong for report in reports):
        raise typer.Exit(1)


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
