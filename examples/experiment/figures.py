"""The pictures of the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from logs import Log, Row
from matplotlib.axes import Axes
from methods import FAMILY
from summary import Panel, order

COLOURS = dict(
    zip(FAMILY, ("#4c72b0", "#64b5cd", "#55a868", "#8c8c8c", "#937860", "#da8bc3", "#ccb974", "#c2281e"), strict=True)
)
SPARE = plt.get_cmap("tab20").colors
STYLE = {"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False}
PANELS: tuple[tuple[str, str], ...] = (
    ("accuracy", "accuracy, %"),
    ("clip_fraction", "clipped tokens, %"),
    ("gradient_norm", "gradient norm"),
    ("entropy", "entropy"),
)


def colours(groups: list[Panel]) -> dict[str, object]:
    """Return a colour for each method, in their order."""
    methods = sorted({m for panel in groups for m in panel.methods}, key=order)
    others = [m for m in methods if m not in COLOURS]
    spare = {m: SPARE[i % len(SPARE)] for i, m in enumerate(others)}
    return {m: COLOURS.get(m, spare.get(m)) for m in methods}


def draw_summary(groups: list[Panel], start: float, path: Path) -> None:
    """Draw the final accuracy: each run as a dot, each method as mean and standard error."""
    colour = colours(groups)
    with plt.rc_context(STYLE):
        height = 1.6 + 0.42 * max(len(panel.methods) for panel in groups)
        figure, axes = plt.subplots(
            1, len(groups), figsize=(6 * len(groups), height), sharex=True, squeeze=False, layout="constrained"
        )
        alike = all(panel.methods == groups[0].methods for panel in groups)
        for axis, panel in zip(axes[0], groups, strict=True):
            axis.axvline(100 * start, color="black", lw=1, ls=":")
            axis.annotate(" before", (100 * start, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8)
            for y, s in enumerate(reversed(panel.summaries())):
                runs = [100 * x for x in s.final]
                axis.scatter(runs, [y] * len(runs), s=28, alpha=0.45, lw=0, color=colour[s.method])
                error = 100 * (s.standard_error or 0)
                axis.errorbar(
                    100 * s.accuracy, y, xerr=error, fmt="D", ms=7, capsize=4, color=colour[s.method], mec="white"
                )
            names = panel.methods if axis is axes[0, 0] or not alike else [""] * len(panel.methods)
            axis.set_yticks(range(len(names)), [name.replace(",", ",\n") for name in reversed(names)])
            axis.set_ylim(-0.6, len(panel.methods) - 0.4)
            axis.set_xlabel("accuracy after training, %")
            axis.set_title(wrap(panel.title))
            axis.grid(axis="x", alpha=0.3)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def draw_rates(groups: list[Panel], path: Path) -> bool:
    """Draw the final accuracy over the learning rate. Return False where fewer than three are compared."""
    rates = sorted({panel.learning_rate for panel in groups if panel.learning_rate is not None})
    if len(rates) < 3:
        return False
    colour, levels = colours(groups), sorted({panel.staleness for panel in groups})
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(levels), figsize=(7 * len(levels), 4.6), squeeze=False, layout="constrained")
        for axis, staleness in zip(axes[0], levels, strict=True):
            found = [s for panel in groups if panel.staleness == staleness for s in panel.summaries()]
            for method in dict.fromkeys(s.method for s in found):
                mine = [s for s in found if s.method == method]
                wide = {"lw": 2.8, "zorder": 5} if method == "pmpo" else {"lw": 1.5}
                x = [s.learning_rate for s in mine]
                axis.plot(x, [100 * s.accuracy for s in mine], color=colour[method], marker="o", label=method, **wide)
                for s in mine:
                    y = [100 * value for value in s.final]
                    axis.scatter([s.learning_rate] * s.runs, y, color=colour[method], s=12, alpha=0.5, lw=0)
            axis.set_xscale("log", base=2)
            axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
            axis.set_xlabel("learning rate")
            axis.set_ylabel("accuracy after training, %")
            axis.set_title(Panel(staleness, None, []).title)
            axis.grid(alpha=0.3)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        figure.savefig(path, dpi=130)
        plt.close(figure)
    return True


def draw_runs(groups: list[Panel], path: Path) -> None:
    """Draw each method along training: the mean over the seeds, with a band from the worst to the best seed."""
    colour = colours(groups)
    with plt.rc_context(STYLE):
        size = (6 * len(groups), 2.6 * len(PANELS) + 0.6)
        figure, axes = plt.subplots(
            len(PANELS), len(groups), figsize=size, sharex=True, squeeze=False, layout="constrained"
        )
        for column, panel in enumerate(groups):
            for row, (name, label) in enumerate(PANELS):
                axis = axes[row, column]
                for method in panel.methods:
                    curve(axis, panel.runs(method), name, method, colour[method])
                axis.set_ylabel(label)
                axis.grid(alpha=0.3)
                if name == "gradient_norm" and any(np.nanmax(line.get_ydata()) > 0 for line in axis.get_lines()):
                    axis.set_yscale("log")
            axes[0, column].set_title(wrap(panel.title))
            axes[-1, column].set_xlabel("optimizer step")
        lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
        shown = [m for m in colour if m in lines]
        figure.legend(
            [lines[m] for m in shown], shown, loc="outside lower center", ncols=min(8, len(shown)), frameon=False
        )
        figure.savefig(path, dpi=130)
        plt.close(figure)


def curve(axis: Axes, runs: list[Log], name: str, method: str, colour: object) -> None:
    """Draw one method in one panel."""
    evaluated = name == "accuracy"
    scale = 100 if name in ("accuracy", "clip_fraction") else 1
    tables = [run.evaluations if evaluated else run.rows for run in runs]
    width = 1 if evaluated else runs[0].settings.staleness  # a batch of rollouts is one point
    values = np.stack([scale * means(table, lambda row: row[name], width) for table in tables])
    steps = means(tables[0], lambda row: row["step"], width)
    wide = {"lw": 2.6, "zorder": 5} if method == "pmpo" else {"lw": 1.3}
    axis.plot(steps, values.mean(0), color=colour, label=method, **wide)
    if evaluated:
        axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.1, lw=0)


def means(table: list[Row], value: Callable[[Row], float | None], width: int) -> np.ndarray:
    """Return the means of `width` rows at a time. What is missing stays out, and a group without any is NaN."""
    numbers = np.array([np.nan if value(row) is None else value(row) for row in table], dtype=float)
    groups = np.ma.masked_invalid(numbers[: len(numbers) // width * width].reshape(-1, width))
    return groups.mean(1).filled(np.nan)


def draw_power(groups: list[Panel], path: Path) -> bool:
    """Draw for PMPO how p and ESS/n are spread over the trajectories, along training. Return False where no run adapts p."""
    adapted = [m for panel in groups for m in panel.methods if m.startswith("pmpo")]
    if not adapted:
        return False
    method = min(adapted, key=order)
    shown = [panel for panel in groups if method in panel.methods]
    names = (("power", "p"), ("ess", "ESS / n"))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, len(shown), figsize=(6 * len(shown), 5.6), sharex=True, squeeze=False, layout="constrained"
        )
        for column, panel in enumerate(shown):
            for axis, (name, label) in zip(axes[:, column], names, strict=True):
                fan(axis, panel.runs(method), name)
                axis.set_ylabel(label)
            axes[0, column].set_title(wrap(panel.title))
            axes[-1, column].set_xlabel("optimizer step")
        axes[0, 0].legend(frameon=True, fontsize=8, loc="lower left")
        figure.suptitle(f"{method}: p and effective sample size of the trajectories with a gradient")
        figure.savefig(path, dpi=130)
        plt.close(figure)
    return True


def fan(axis: Axes, runs: list[Log], name: str) -> None:
    """Draw quantiles, as means over the seeds and over each batch of rollouts."""
    width = runs[0].settings.staleness
    quantiles = np.array(
        [[means(r.rows, lambda row, i=i: row[name] and row[name][i], width) for i in range(5)] for r in runs]
    )
    lowest, low, middle, high, highest = np.ma.masked_invalid(quantiles).mean(0)
    steps = means(runs[0].rows, lambda row: row["step"], width)
    axis.fill_between(steps, lowest, highest, color=COLOURS["pmpo"], alpha=0.12, lw=0, label="all")
    axis.fill_between(steps, low, high, color=COLOURS["pmpo"], alpha=0.3, lw=0, label="middle 80 %")
    axis.plot(steps, middle, color=COLOURS["pmpo"], lw=2, label="median")
    axis.grid(alpha=0.3)


def wrap(title: str) -> str:
    """Break a title into lines at its commas."""
    return title.replace(", ", "\n")
