"""`write_figure`: a comparison as a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from pmpo_kernels.benchmarking.report import Report

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes


def write_figure(report: Report, path: Path) -> None:
    """Draw the times with each allocator setting, forward and backward stacked, and the peak memory beside them."""
    rows = [row for row in report.rows if not row.problem]
    allocators = list(dict.fromkeys(a for row in rows for a in row.timings))
    figure, axes = plt.subplots(
        1, len(allocators) + 1, figsize=(4 + 4 * len(allocators), 1.8 + 0.45 * len(rows)), sharey=True, layout="constrained"
    )  # fmt: skip
    positions = list(range(len(rows)))
    for ax, allocator in zip(axes, allocators, strict=False):
        timings = [row.timings[allocator] for row in rows]
        left = [0.0] * len(rows)
        for label in ("forward", "backward"):
            medians = [getattr(t, label).median for t in timings]
            ax.barh(positions, medians, 0.6, left=left, label=label)
            left = [a + b for a, b in zip(left, medians, strict=True)]
        both = [t.both for t in timings]
        whiskers = [[s.median - s.q1 for s in both], [s.q3 - s.median for s in both]]
        ax.errorbar([s.median for s in both], positions, xerr=whiskers, fmt="none", ecolor="black", capsize=2)
        for position, timing in zip(positions, timings, strict=True):
            milliseconds = timing.both.median
            text = f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds:,.0f} ms"
            text += "" if timing.speedup is None else f" ({timing.speedup:.1f}x)"
            ax.annotate(
                text, (timing.both.q3, position), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8
            )
        name = f", {allocator.value} allocator" if len(allocators) > 1 else ""
        ax.set_xlabel(f"ms{name}\n(median and quartiles of {report.repeats} rounds)")
        ax.margins(x=0.35)
        if "read" in report.floor:
            # forward and backward read the logits twice and write them once: a read and a copy
            _line(ax, sum(spread.median for spread in report.floor.values()), "one read + one copy of the logits")
        ax.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), fontsize=8)
    memory = [(row.peak_bytes or 0) / 2**20 for row in rows]
    axes[-1].bar_label(axes[-1].barh(positions, memory, 0.6, color="tab:gray"), fmt="%.0f", padding=4, fontsize=8)
    _line(axes[-1], report.case.logits_bytes / 2**20, "size of the logits")
    axes[-1].set_xlabel("MiB beyond the inputs,\nat the peak")
    axes[-1].margins(x=0.2)
    axes[-1].legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), fontsize=8)
    axes[0].set_yticks(positions, [row.name for row in rows])
    axes[0].invert_yaxis()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(report.title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _line(ax: Axes, x: float, label: str) -> None:
    ax.axvline(x, color="black", linestyle=":", linewidth=1, label=label)
