"""`Report`: a comparison as tables and as JSON, and the progress bar of one that is under way."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pmpo_kernels.benchmarking.allocator import Allocator
from pmpo_kernels.benchmarking.cases import Case
from pmpo_kernels.benchmarking.comparison import WARMUP_ROUNDS, Comparison, Row, Spread, StageCalls, compare, steps
from pmpo_kernels.benchmarking.machine import provenance
from pmpo_kernels.benchmarking.measure import TIME_METHOD
from pmpo_kernels.benchmarking.memory import MEMORY_METHOD
from pmpo_kernels.benchmarking.variants import Variant

P_NOTE = "p is given to the rows that are not fused (solved beforehand, not timed); the fused rows solve it"


def wide_console() -> Console:
    """Make a console as wide as the terminal or COLUMNS. For a file it is 160 wide, because Rich would cut the tables at 80."""
    to_file = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=160 if to_file else None)


def measure(
    case: Case,
    chosen: list[Variant],
    repeats: int,
    settings: list[Allocator],
    console: Console,
    memory: bool = True,
    save: Callable[[Comparison], None] | None = None,
    stages: StageCalls | None = None,
) -> Comparison:
    """Run `comparison.compare` with a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(case.name, total=steps(chosen, repeats, settings, save is not None))

        def advance(what: str) -> None:
            progress.update(task, advance=1, description=f"{case.name}: {what}", refresh=True)

        return compare(case, chosen, repeats, advance, settings, memory, save, stages)


@dataclass(frozen=True)
class Report:
    """A finished comparison, and why some variants are not in it."""

    case: Case
    repeats: int
    comparison: Comparison
    skipped: dict[str, str]

    @property
    def rows(self) -> list[Row]:
        return self.comparison.rows

    @property
    def floor(self) -> dict[str, Spread]:
        return self.comparison.floor

    @property
    def zero_rows(self) -> float:
        """Fraction of the rows of the logits whose gradient is 0."""
        return 1 - self.comparison.gradient_rows / (self.case.batch * self.case.tokens)

    @property
    def title(self) -> str:
        return self.case.title


def speed_table(report: Report) -> Table:
    """Make the table of times: a section for each allocator setting, a line for each variant with its times or its problem."""
    solved = f" {P_NOTE}." if report.case.config.power == "ess" else ""
    floor = ", ".join(f"one {what} of the logits {spread.median:.3g}" for what, spread in report.floor.items())
    caption = (
        f"ms: median (quartiles) of {report.repeats} interleaved rounds; {floor}.{solved} {report.zero_rows:.0%} of the "
        "rows are padding, clipped or have advantage 0."
    )
    allocators = list(dict.fromkeys(a for row in report.rows for a in row.timings))
    if len(allocators) > 1:
        caption += (
            " Allocator: default, each large tensor is fresh memory and its pages are cleared on first use (faults); "
            "reuse, freed memory is kept and taken again."
        )
    out = Table(title=report.title, caption=caption, caption_justify="left")
    out.add_column("allocator")
    out.add_column("variant")
    for name in ("forward ms", "backward ms", "both ms", "vs eager", "page faults"):
        out.add_column(name, justify="right")
    for allocator in allocators:
        out.add_section()
        for row in report.rows:
            if allocator in row.timings:
                t = row.timings[allocator]
                speedup = "-" if t.speedup is None else f"{t.speedup:.2f}x"
                faults = "-" if t.page_faults is None else f"{t.page_faults:,.0f}"
                out.add_row(allocator.value, row.name, ms(t.forward), ms(t.backward), ms(t.both), speedup, faults)
    for row in report.rows:
        if row.problem:
            out.add_row("", row.name, Text(row.problem, style="bold red" if row.wrong else "yellow"))
    return out


PARTS = ("target column", "other columns", "row sum")


def accuracy_table(
    report: Report, parts: tuple[str, ...] = PARTS, what: str = "of the gradient in three parts"
) -> Table:
    """Make the table of errors, red where they exceed their bounds, and of peak memory. `parts` are the names of `Row.parts`."""
    size = report.case.logits_bytes / 2**20
    caption = (
        f"Largest relative errors against float64, {what}. "
        f"Memory beyond the inputs (logits: {size:.0f} MiB): {MEMORY_METHOD[report.case.device]}."
    )
    out = Table(caption=caption, caption_justify="left")
    out.add_column("variant")
    for name in (*parts, "bound", "loss error", "peak MiB"):
        out.add_column(name, justify="right")
    for row in report.rows:
        memory = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.1f}"
        errors = [_error(part, row.gradient_bound) for part in row.parts or [None] * len(parts)]
        bound = "-" if row.gradient_bound is None else f"{row.gradient_bound:.1e}"
        out.add_row(row.name, *errors, bound, _error(row.loss_error, row.loss_bound), memory)
    return out


def ms(spread: Spread) -> str:
    """Write median and quartiles with three digits, or more in front of the point."""
    median, q1, q3 = (f"{x:.3g}" if x < 1000 else f"{x:,.0f}" for x in (spread.median, spread.q1, spread.q3))
    return f"{median} ({q1}-{q3})"


def _error(value: float | None, bound: float | None) -> Text:
    if value is None or bound is None:
        return Text("-")
    return Text(f"{value:.1e}", style="" if value <= bound else "bold red")


def content(report: Report) -> dict[str, Any]:
    """Return all figures and what they depend on, as JSON can hold them."""
    rows: list[dict[str, Any]] = []
    for row in report.rows:
        timings = {
            allocator.value: {**asdict(timing), "samples": [t._asdict() for t in timing.samples]}
            for allocator, timing in row.timings.items()
        }
        parts = None if row.parts is None else row.parts._asdict()
        rows.append({**asdict(row), "parts": parts, "timings": timings})
    return {
        **provenance(),
        "case": {**asdict(report.case), "logits_bytes": report.case.logits_bytes},
        "config": asdict(report.case.config),
        "settings": {
            "repeats": report.repeats,
            "warmup_rounds": WARMUP_ROUNDS,
            "unit": "ms",
            "time": TIME_METHOD[report.case.device],
            "memory": MEMORY_METHOD[report.case.device],
            "adaptive_p": P_NOTE,
            "zero_rows": report.zero_rows,
        },
        "floor": {what: asdict(spread) for what, spread in report.floor.items()},
        "results": rows,
        "skipped": report.skipped,
    }


def files_problem(paths: list[Path], overwrite: bool) -> str | None:
    """Why results cannot be written there: some are there already."""
    existing = [str(path) for path in paths if path.exists()]
    if overwrite or not existing:
        return None
    return (
        f"expected a folder without results, got one with {' and '.join(existing)}; "
        "name another folder, or give --overwrite to replace them"
    )


def write_json(found: dict[str, Any], path: Path) -> None:
    """Write a file of JSON, in one step: if the process is killed, the file is the old one or the new one. JSON has no infinity, so
    an error that is not finite becomes null; its row tells the problem."""
    text = json.dumps(found, indent=2, ensure_ascii=False, default=str).replace(": Infinity", ": null")
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)
