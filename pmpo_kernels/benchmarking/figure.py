"""A comparison as a figure."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from pmpo_kernels.benchmarking.comparison import Spread
from pmpo_kernels.benchmarking.report import Report

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def write_figure(report: Report, path: Path) -> None:
    """Grouped bars of forward and backward with their quartiles, and the peak memory beside them."""
    rows = [row for row in report.rows if not row.problem]
    names, positions = [row.name for row in rows], range(len(rows))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.6 + 0.55 * len(rows)), sharey=True, width_ratios=(2, 1), layout="constrained"
    )
    for offset, label in ((-0.2, "forward"), (0.2, "backward")):
        spreads: list[Spread] = [getattr(row, label) for row in rows]
        medians = [s.median for s in spreads]
        whiskers = [[s.median - s.q1 for s in spreads], [s.q3 - s.median for s in spreads]]
        bars = left.barh([p + offset for p in positions], medians, 0.38, xerr=whiskers, label=label, capsize=2)
        left.bar_label(bars, labels=[f"{m:.3g}" for m in medians], padding=4, fontsize=8)
    left.set_yticks(list(positions), names)
    left.set_xlabel(f"ms (median and quartiles of {report.repeats} rounds)")
    left.margins(x=0.12)
    left.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    left.invert_yaxis()
    memory = [(row.peak_bytes or 0) / 2**20 for row in rows]
    right.bar_label(right.barh(list(positions), memory, 0.6, color="tab:gray"), fmt="%.0f", padding=4, fontsize=8)
    right.axvline(
        report.case.logits_bytes / 2**20, color="black", linestyle=":", linewidth=1, label="size of the logits"
    )
    right.set_xlabel("peak memory beyond the inputs, MiB")
    right.margins(x=0.2)
    right.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(report.title)
    figure.savefig(path, dpi=150)
    plt.close(figure)
