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
from summary import Summary, order

COLOURS = dict(
    zip(FAMILY, ("#4c72b0", "#64b5cd", "#55a868", "#8c8c8c", "#937860", "#da8bc3", "#ccb974", "#c2281e"), strict=True)
)
SPARE = plt.get_cmap("tab20").colors
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
PANELS: tuple[tuple[str, str], ...] = (
    ("accuracy", "accuracy, %"),
    ("clip_fraction", "clipped tokens, %"),
    ("gradient_norm", "gradient norm"),
    ("entropy", "entropy"),
)


def colours(methods: list[str]) -> dict[str, object]:
    """One for each."""
    others = [m for m in methods if m not in COLOURS]
    return {**COLOURS, **{m: SPARE[i % len(SPARE)] for i, m in enumerate(others)}}


def draw_summary(groups: dict[int, list[Summary]], start: float, path: Path) -> None:
    """Final accuracy: each run a dot, each method its mean and standard error."""
    colour = colours(sorted({s.method for group in groups.values() for s in group}, key=order))
    with plt.rc_context(STYLE):
        height = 1.6 + 0.42 * max(map(len, groups.values()))
        figure, axes = plt.subplots(
            1, len(groups), figsize=(6 * len(groups), height), squeeze=False, layout="constrained"
        )
        for axis, (staleness, group) in zip(axes[0], groups.items(), strict=True):
            axis.axvline(100 * start, color="black", lw=1, ls=":")
            axis.annotate(" before", (100 * start, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8)
            for y, s in enumerate(reversed(group)):
                runs = [100 * x for x in s.final]
                axis.scatter(runs, [y] * len(runs), s=28, alpha=0.45, lw=0, color=colour[s.method])
                error = 100 * (s.standard_error or 0)
                axis.errorbar(
                    100 * s.accuracy, y, xerr=error, fmt="D", ms=7, capsize=4, color=colour[s.method], mec="white"
                )
            axis.set_yticks(range(len(group)), [s.method for s in reversed(group)])
            axis.set_ylim(-0.6, len(group) - 0.4)
            axis.set_xlabel("accuracy after training, %")
            axis.set_title(steps_of(staleness))
            axis.grid(axis="x", alpha=0.3)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def draw_rates(groups: dict[int, list[Summary]], path: Path) -> bool:
    """Final accuracy over the learning rate; False where each method has one rate only."""
    if all(len({s.method for s in group}) == len(group) for group in groups.values()):
        return False
    colour = colours(sorted({s.method for group in groups.values() for s in group}, key=order))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(groups), figsize=(7 * len(groups), 4.6), squeeze=False, layout="constrained")
        for axis, (staleness, group) in zip(axes[0], groups.items(), strict=True):
            for method in dict.fromkeys(s.method for s in group):
                mine = [s for s in group if s.method == method]
                wide = {"lw": 2.8, "zorder": 5} if method == "pmpo" else {"lw": 1.5}
                rates = [s.learning_rate for s in mine]
                axis.plot(
                    rates, [100 * s.accuracy for s in mine], color=colour[method], marker="o", label=method, **wide
                )
                for s in mine:
                    axis.scatter(
                        [s.learning_rate] * s.runs,
                        [100 * x for x in s.final],
                        color=colour[method],
                        s=12,
                        alpha=0.5,
                        lw=0,
                    )
            axis.set_xscale("log", base=2)
            ticks = sorted({s.learning_rate for s in group})
            axis.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
            axis.set_xlabel("learning rate")
            axis.set_ylabel("accuracy after training, %")
            axis.set_title(steps_of(staleness))
            axis.grid(alpha=0.3)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        figure.savefig(path, dpi=130)
        plt.close(figure)
    return True


def draw_runs(logs: list[Log], path: Path) -> None:
    """Along training: mean over the seeds of each method; the band is from the worst to the best seed."""
    levels = sorted({log.settings.staleness for log in logs})
    methods = sorted({log.settings.method for log in logs}, key=order)
    colour = colours(methods)
    with plt.rc_context(STYLE):
        size = (6 * len(levels), 2.6 * len(PANELS) + 0.6)
        figure, axes = plt.subplots(
            len(PANELS), len(levels), figsize=size, sharex=True, squeeze=False, layout="constrained"
        )
        for column, staleness in enumerate(levels):
            for row, (name, label) in enumerate(PANELS):
                axis = axes[row, column]
                for method in methods:
                    runs = [x for x in logs if (x.settings.method, x.settings.staleness) == (method, staleness)]
                    if runs:
                        curve(axis, runs, name, method, colour[method])
                axis.set_ylabel(label)
                axis.grid(alpha=0.3)
                if name == "gradient_norm" and any(np.nanmax(line.get_ydata()) > 0 for line in axis.get_lines()):
                    axis.set_yscale("log")
            axes[0, column].set_title(steps_of(staleness))
            axes[-1, column].set_xlabel("optimizer step")
        lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
        shown = [m for m in methods if m in lines]
        figure.legend(
            [lines[m] for m in shown], shown, loc="outside lower center", ncols=min(8, len(shown)), frameon=False
        )
        figure.savefig(path, dpi=130)
        plt.close(figure)


def curve(axis: Axes, runs: list[Log], name: str, method: str, colour: object) -> None:
    """One method in one panel."""
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
    """Of `width` rows at a time; what is missing stays out, and a group without any is NaN."""
    numbers = np.array([np.nan if value(row) is None else value(row) for row in table], dtype=float)
    groups = np.ma.masked_invalid(numbers[: len(numbers) // width * width].reshape(-1, width))
    return groups.mean(1).filled(np.nan)


def draw_power(logs: list[Log], path: Path) -> bool:
    """Of PMPO: how p and ESS/n are spread over the trajectories, along training; False where no run adapts p."""
    adapted = [log for log in logs if log.settings.method.startswith("pmpo")]
    adapted = [log for log in adapted if log.settings.method == "pmpo"] or adapted
    if not adapted:
        return False
    method, levels = adapted[0].settings.method, sorted({log.settings.staleness for log in adapted})
    names = (("power", "p"), ("ess", "ESS / n"))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, len(levels), figsize=(6 * len(levels), 5.6), sharex=True, squeeze=False, layout="constrained"
        )
        for column, staleness in enumerate(levels):
            runs = [x for x in adapted if (x.settings.method, x.settings.staleness) == (method, staleness)]
            for axis, (name, label) in zip(axes[:, column], names, strict=True):
                fan(axis, runs, name)
                axis.set_ylabel(label)
            axes[0, column].set_title(steps_of(staleness))
            axes[-1, column].set_xlabel("optimizer step")
        axes[0, 0].legend(frameon=True, fontsize=8, loc="lower left")
        figure.suptitle(f"{method}: p and effective sample size of the trajectories with a gradient")
        figure.savefig(path, dpi=130)
        plt.close(figure)
    return True


def fan(axis: Axes, runs: list[Log], name: str) -> None:
    """Quantiles, means over the seeds and over each batch of rollouts."""
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


def steps_of(staleness: int) -> str:
    return f"{staleness} optimizer step{'s' * (staleness > 1)} a batch of rollouts"
