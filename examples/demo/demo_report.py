"""The demo's tables and its summary file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from demo_figure import Trajectories
from from_hidden import HeadRow
from from_logits import Row
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from rollouts import Policy


def records(data: Trajectories, policy: Policy) -> list[dict[str, Any]]:
    """Return a record for each trajectory of the second half."""
    r, out = data.rollouts, data.output
    return [
        {
            "trajectory": i + 1,
            "prompt": " + ".join(str(n) for n in r.operands[i].tolist()),
            "completion": policy.text(r.token_ids[i], r.mask[i]),
            "reward": float(r.rewards[i]),
            "advantage": float(r.advantages[i]),
            "tokens": int(data.tokens[i]),
            "clip_fraction": float(out.clip_fraction[i]),
            "ess_per_token": float(out.ess[i] / data.tokens[i]),
            "power": float(out.power[i]),
        }
        for i in range(len(r))
    ]


def trajectory_table(rows: list[dict[str, Any]]) -> Table:
    """Make the table of the second half's trajectories, scored by the policy after the update on the first half."""
    table = Table(
        title="Second half: trajectories under the updated policy",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("prompt", no_wrap=True)
    table.add_column("completion", max_width=40)
    for name in ("reward", "A", "n", "clip %", "ESS/n", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["trajectory"]),
            row["prompt"],
            Text(" ".join(row["completion"].split()), no_wrap=True, overflow="ellipsis"),
            f"{row['reward']:.2f}",
            f"{row['advantage']:+.2f}",
            str(row["tokens"]),
            f"{100 * row['clip_fraction']:.1f}",
            f"{row['ess_per_token']:.4f}",
            f"{row['power']:.3f}",
        )
    return table


def comparison_table(rows: list[Row], memory_method: str) -> Table:
    """Make the table of each implementation against float64."""
    full = max(row.trajectories for row in rows)
    caption = (
        "gradient: |g - g64| / |g64|. row: largest error of a row's target column, other columns or sum, "
        f"at this p. p: |log ESS(p) - log ESS*|. ms: forward + backward, median of "
        f"{max(row.timed_runs for row in rows)}. MiB: {memory_method}."
    )
    if any(row.interpreter for row in rows):
        caption += (
            f" interpreter: the Triton kernels run line by line in Python on "
            f"{min(row.trajectories for row in rows)} of the {full} trajectories, for their numbers; "
            "the time in brackets says nothing about their speed."
        )
    title = "Loss and gradient of the logits against float64"
    table = Table(
        title=title, caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("implementation", no_wrap=True)
    for name in ("B", "loss", "gradient", "row", "p", "ms", "MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name if row.ok else f"[red]{row.name}: FAILED[/red]",
            str(row.trajectories),
            f"{row.loss:+.5f}",
            f"{row.gradient_error:.1e}",
            f"{row.worst_part:.1e}",
            f"{row.power_residual:.1e}",
            f"[dim]({1e3 * row.seconds:.0f})[/dim]" if row.interpreter else f"{1e3 * row.seconds:.0f}",
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
        )
    return table


def write_summary(path: Path, settings: dict[str, Any], metrics: dict[str, float], **sections: Any) -> None:
    """Write the run as JSON. A number that is not finite is written as null."""
    content = {"settings": settings, "metrics": metrics, **sections}
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(json.dumps(json.loads(text, parse_constant=lambda _: None), indent=2, ensure_ascii=False) + "\n")


def comparison_records(rows: list[Row] | list[HeadRow]) -> list[dict[str, Any]]:
    """Return the comparison for the summary."""
    return [{**asdict(row), "agrees": row.ok} for row in rows]
