"""Tables and pictures of the runs in a folder.

python examples/experiment/report.py out/experiment
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from figures import draw_power, draw_rates, draw_runs, draw_summary
from logs import Log, Settings, read_log
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from summary import NOTES, Summary, baseline, panels

from pmpo_kernels.benchmarking.machine import provenance

HEADER = (
    "method", "runs", "rate", "accuracy", "worst", "minus {}", "greedy", "collapsed", "gradient", "largest", "entropy",
    "clipped %", "p", "ESS/n", "step s, ours", "eager",
)  # fmt: skip
BRIEF = (0, 2, 3, 4, 5, 7, 8)
"""Columns on the terminal; all are in results.md."""


def header(group: list[Summary]) -> list[str]:
    """Return the header of the table of these summaries."""
    return [text.format(baseline([s.method for s in group]) or "-") for text in HEADER]


def cells(s: Summary) -> tuple[str, ...]:
    """Return the cells of a summary in the table."""
    return (
        s.method, str(s.runs), f"{s.learning_rate:g}", points(s.accuracy, s.standard_error), f"{100 * s.worst:.1f}",
        "-" if s.difference is None else points(*s.difference, sign="+"), f"{100 * s.greedy:.1f}",
        str(s.collapsed), f"{s.gradient_median:.2f}", f"{s.gradient_max:.1f}", f"{s.entropy:.3f}",
        f"{100 * s.clip_fraction:.2f}", quantiles(s.power), quantiles(s.ess), seconds(s.seconds_ours), seconds(s.seconds_eager),
    )  # fmt: skip


def points(value: float, error: float | None, sign: str = "") -> str:
    """Write a value in per cent, with its standard error."""
    return f"{100 * value:{sign}.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def quantiles(values: tuple[float, float, float] | None) -> str:
    """Write the median, and the quantiles 0.1 and 0.9."""
    return "-" if values is None else f"{values[1]:.2f} ({values[0]:.2f} to {values[2]:.2f})"


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def read_logs(folder: Path) -> list[Log]:
    """Read the logs of all finished runs.

    Raises:
        ValueError: there are none, or they are not of one experiment.
    """
    logs = [read_log(path) for path in sorted((folder / "runs").glob("*.jsonl"))]
    if not logs:
        raise ValueError(f"folder: expected finished runs in {folder / 'runs'}, got none")
    kinds = {(log.settings.model, log.settings.steps, log.settings.evaluate_on) for log in logs}
    if len(kinds) > 1:
        raise ValueError(f"folder: expected runs of one model, length and kind of problems, got {sorted(kinds)}")
    return logs


def write_report(folder: Path, console: Console, into: Path | None = None) -> None:
    """Write results.md, results.json and the pictures, into the same folder or another."""
    logs, into = read_logs(folder), into or folder
    start = logs[0].evaluations[0]["accuracy"]
    parts = [f"# Results\n\n{about(logs[0].settings, start)}\n"]
    groups = panels(logs)
    for panel in groups:
        group = panel.summaries()
        rows = [cells(x) for x in group]
        table = Table(*(header(group)[i] for i in BRIEF), title=panel.title, box=SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            table.add_row(*(row[i] for i in BRIEF))
        console.print(table)
        parts.append(f"## {panel.title}\n\n{markdown([header(group), *rows])}\n")
    into.mkdir(parents=True, exist_ok=True)
    (into / "results.md").write_text("\n".join([*parts, NOTES]))
    content = {
        **provenance(),
        "settings": asdict(logs[0].settings),
        "accuracy_before": start,
        "hours": sum(log.end["seconds"] for log in logs) / 3600,
        "panels": [
            {"staleness": p.staleness, "learning_rate": p.learning_rate, "methods": [asdict(s) for s in p.summaries()]}
            for p in groups
        ],
    }
    (into / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    draw_summary(groups, start, into / "accuracy.png")
    draw_runs(groups, into / "runs.png")
    written = ["accuracy.png", "runs.png"]
    written += ["power.png"] * draw_power(groups, into / "power.png")
    written += ["rates.png"] * draw_rates(groups, into / "rates.png")
    console.print(f"{into}: results.md, results.json, {', '.join(written)}", soft_wrap=True)


def about(s: Settings, start: float) -> str:
    """Say in words what was run."""
    return (
        f"Model {s.model}, {s.steps} optimizer steps of {s.prompts} problems x {s.copies} answers; evaluated on "
        f"{s.evaluation_problems} {s.evaluate_on} problems, of which {100 * start:.1f} % are solved before training."
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown. The first row is its header."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def main(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="--out of run_all.py.")],
    into: Annotated[Path | None, typer.Option(file_okay=False, help="Where it is written; the same folder.")] = None,
) -> None:
    """Write the report of the runs that are finished."""
    write_report(folder, Console(), into)


if __name__ == "__main__":
    typer.run(main)
