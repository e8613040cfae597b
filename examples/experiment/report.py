"""Tables and pictures of the runs in a folder.

python examples/experiment/report.py out/experiment
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from figures import draw_power, draw_runs, draw_summary
from logs import Log, read_log
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from summary import NOTES, Summary, summarise

HEADER = (
    "method", "runs", "accuracy", "worst seed", "greedy", "collapsed", "gradient norm", "largest", "entropy",
    "clipped %", "p", "ESS/n", "step s, ours", "eager",
)  # fmt: skip


BRIEF = (0, 2, 3, 5, 6, 7, 8, 9)
"""Columns on the terminal; all are in results.md."""


def cells(s: Summary) -> tuple[str, ...]:
    """A row of the table."""
    error = "" if s.standard_error is None else f" ± {100 * s.standard_error:.1f}"
    return (
        s.method, str(s.runs), f"{100 * s.accuracy:.1f}{error}", f"{100 * s.worst:.1f}", f"{100 * s.greedy:.1f}",
        str(s.collapsed), f"{s.gradient_median:.2f}", f"{s.gradient_max:.1f}", f"{s.entropy:.3f}",
        f"{100 * s.clip_fraction:.2f}", quantiles(s.power), quantiles(s.ess), seconds(s.seconds_ours), seconds(s.seconds_eager),
    )  # fmt: skip


def quantiles(values: tuple[float, float, float] | None) -> str:
    """Median, and the tenth parts at either end."""
    return "-" if values is None else f"{values[1]:.2f} ({values[0]:.2f} to {values[2]:.2f})"


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def read_logs(folder: Path) -> list[Log]:
    """All finished runs.

    Raises:
        ValueError: there are none, or they are not of one experiment.
    """
    logs = [read_log(path) for path in sorted((folder / "runs").glob("*.jsonl"))]
    if not logs:
        raise ValueError(f"folder: expected finished runs in {folder / 'runs'}, got none")
    kinds = {(log.settings.model, log.settings.steps) for log in logs}
    if len(kinds) > 1:
        raise ValueError(f"folder: expected runs of one model and length, got {sorted(kinds)}")
    return logs


def write_report(folder: Path, console: Console) -> None:
    """results.md, accuracy.png, runs.png and, where p was adapted, power.png."""
    logs = read_logs(folder)
    s, start = logs[0].settings, logs[0].evaluations[0]["accuracy"]
    about = (
        f"Model {s.model}, {s.steps} optimizer steps of {s.prompts} problems x {s.copies} answers, learning rate "
        f"{s.learning_rate:g}, {s.held_out} held-out problems; before training {100 * start:.1f} % are solved."
    )
    parts = [f"# Results\n\n{about}\n"]
    groups = summarise(logs)
    for staleness, summaries in groups.items():
        title = f"{staleness} optimizer step{'s' * (staleness > 1)} a batch of rollouts"
        rows = [cells(x) for x in summaries]
        table = Table(*(HEADER[i] for i in BRIEF), title=title, box=SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            table.add_row(*(row[i] for i in BRIEF))
        console.print(table)
        lines = [HEADER, ("---",) * len(HEADER), *rows]
        parts.append(f"## {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
    parts.append(NOTES)
    (folder / "results.md").write_text("\n".join(parts))
    draw_summary(groups, start, folder / "accuracy.png")
    draw_runs(logs, folder / "runs.png")
    draw_power(logs, folder / "power.png")
    console.print(f"Written: {folder / 'results.md'} and pictures beside it", soft_wrap=True)


def main(folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="--out of run_all.py.")]) -> None:
    """The report of the runs that are finished."""
    write_report(folder, Console())


if __name__ == "__main__":
    typer.run(main)
