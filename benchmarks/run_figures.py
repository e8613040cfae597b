"""Figures of `run.py`: each row as a share of the copy bandwidth, and time against the number of tokens."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from run_report import PASS_OF, PASSES, RunReport

from pmpo_kernels.benchmarking.comparison import Spread

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Points = dict[str, list[tuple[int, float]]]
MARKERS = "osD^vPX*"


def bars(report: RunReport) -> dict[str, dict[str, Spread]]:
    """Return the milliseconds by pass of each call that was timed, and of each stage alone that passes over the logits."""
    found = {name: {one: getattr(timing, one) for one in PASSES[:2]} for name, timing in report.timed.items()}
    stages = report.base.comparison.stages
    return found | {f"stage {name}": {PASS_OF[name]: stages[name]} for name in stages if name in PASS_OF}


def write_roofline(report: RunReport, path: Path) -> None:
    """Draw forward and backward of each call and stage as a share of the bandwidth of a copy, which is the roof."""
    found = bars(report)
    fig, ax = plt.subplots(figsize=(8, 1.6 + 0.6 * max(len(found), 1)), layout="constrained")
    for k, name in enumerate(PASSES[:2]):
        drawn = [(y, times[name]) for y, times in enumerate(found.values()) if name in times]
        shares = [100 * report.share(name, spread) for _, spread in drawn]
        drawn_bars = ax.barh([y + 0.4 * (k - 0.5) for y, _ in drawn], shares, 0.38, label=name)
        labels = [f"{value:.3g} %, {spread.median:.3g} ms" for value, (_, spread) in zip(shares, drawn, strict=True)]
        ax.bar_label(drawn_bars, labels, padding=4, fontsize=8)
    ax.axvline(100, color="black", linestyle=":", linewidth=1, label="bandwidth of a copy")
    ax.set_yticks(range(len(found)), list(found))
    ax.invert_yaxis()
    ax.set_xlabel("fewest bytes a pass can move over what a copy moves in its time, %")
    ax.margins(x=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), fontsize=8)
    fig.suptitle(report.base.title)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def series(reports: list[RunReport]) -> dict[str, Points]:
    """Return by model, dtype and loss, for each row, its (tokens, median ms of forward and backward), where the tokens differ."""
    found: dict[str, Points] = {}
    for report in reports:
        case = report.base.case
        kind = (
            f"{case.model}, {case.dtype.value}, {case.preset.value}, {case.padded:g} padded, {case.clipped:g} clipped"
        )
        points = found.setdefault(f"{kind}, {case.zero_advantage:g} at A = 0", {})
        for name, timing in report.timed.items():
            points.setdefault(name, []).append((case.batch * case.tokens, timing.both.median))
    return {
        kind: {name: sorted(values) for name, values in points.items()}
        for kind, points in found.items()
        if any(len({tokens for tokens, _ in values}) > 1 for values in points.values())
    }


def write_tokens(reports: list[RunReport], path: Path) -> bool:
    """Draw the time of forward and backward against B x T, a line for each row, a panel for each loss. Return False if no loss has
    two points."""
    panels = series(reports)
    if not panels:
        return False
    fig, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), layout="constrained", squeeze=False)
    for ax, (kind, points) in zip(axes[0], panels.items(), strict=True):
        for marker, (name, values) in zip(MARKERS * len(points), points.items(), strict=False):
            ax.plot(*zip(*values, strict=True), marker=marker, label=name)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel("tokens (B x T)")
        ax.set_ylabel("forward + backward, ms")
        ax.set_title(kind, fontsize=9)
        ax.grid(alpha=0.3, which="both")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return True
