"""A case of `run.py` as a table and as JSON, and all cases of a run as one table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from peers import versions
from rich.table import Table
from rich.text import Text

from pmpo_kernels.benchmarking.allocator import Allocator
from pmpo_kernels.benchmarking.cases import LIMITS
from pmpo_kernels.benchmarking.comparison import Row, Spread, Timing
from pmpo_kernels.benchmarking.report import P_NOTE, Report, ms
from pmpo_kernels.benchmarking.report import content as base_content
from pmpo_kernels.benchmarking.traffic import copy_bandwidth, share
from pmpo_kernels.benchmarking.variants import FUSED

PASSES = ("forward", "backward", "both")


@dataclass(frozen=True)
class RunReport:
    """A finished case; `host`: microseconds of host time of a forward and backward on a tiny batch, by row."""

    base: Report
    setting: Allocator
    host: dict[str, Spread]

    @property
    def timed(self) -> dict[str, Timing]:
        """By row; a row that is wrong or could not run is not here."""
        return {row.name: row.timings[self.setting] for row in self.base.rows if self.setting in row.timings}

    @property
    def ours(self) -> Timing | None:
        """The first fused row: out of place."""
        names = [row.name for row in self.base.rows if row.group == FUSED and self.setting in row.timings]
        return self.timed[names[0]] if names else None

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second of the copy measured between the rounds; None where nothing was timed."""
        floor = self.base.floor
        return copy_bandwidth(self.base.case, floor["copy"].median) if "copy" in floor else None

    @property
    def trajectory_share(self) -> float | None:
        """Median of the trajectory stage alone over that of the whole step."""
        stages = self.base.comparison.stages
        return stages["trajectory"].median / self.ours.both.median if stages and self.ours else None

    def shares(self, timing: Timing) -> dict[str, float]:
        """Of the copy bandwidth, by pass: model bytes over what a copy moves in that time."""
        traffic = self.base.comparison.traffic
        assert self.bandwidth is not None
        return {name: share(getattr(traffic, name), getattr(timing, name).median, self.bandwidth) for name in PASSES}


def speed_table(report: RunReport) -> Table:
    """A line a row that was run; one with a problem has no times, see `reasons`."""
    out = Table(title=report.base.title, caption=caption(report), caption_justify="left")
    out.add_column("variant")
    for name in PASSES:
        out.add_column(f"{name} ms", justify="right")
    for name in ("vs eager", "share of copy: forward", "backward", "both", "host us"):
        out.add_column(name, justify="right")
    for row in report.base.rows:
        if row.name not in report.timed:
            out.add_row(row.name, Text("WRONG", style="bold red") if row.wrong else Text("not timed", style="yellow"))
            continue
        timing = report.timed[row.name]
        shares = [f"{value:.0%}" for value in report.shares(timing).values()]
        speedup = "-" if timing.speedup is None else f"{timing.speedup:.2f}x"
        host = f"{report.host[row.name].median:,.0f}" if row.name in report.host else "-"
        times = [ms(getattr(timing, name)) for name in PASSES]
        out.add_row(row.name, *times, speedup, *shares, host)
    return out


def reasons(report: RunReport) -> list[str]:
    """Why rows have no times or are not there, a line each."""
    problems = [f"no times: {row.name} ({row.problem})" for row in report.base.rows if row.problem]
    return problems + [f"not measured: {name} ({reason})" for name, reason in report.base.skipped.items()]


def caption(report: RunReport) -> str:
    """What the figures of a case's table mean."""
    base, traffic = report.base, report.base.comparison.traffic
    parts = [
        f"Median (quartiles) of {base.repeats} interleaved rounds. {base.zero_rows:.0%} of the rows have no gradient. "
        f"Model: forward {traffic.forward / 1e9:.3g} GB, backward {traffic.backward / 1e9:.3g} GB."
    ]
    if report.bandwidth is not None:
        parts.append(f"Copy of the logits: {ms(base.floor['copy'])} ms, {report.bandwidth / 1e9:,.0f} GB/s.")
    stages = base.comparison.stages
    if stages:
        alone = ", ".join(f"{name} {ms(spread)}" for name, spread in stages.items())
        parts.append(f"Stages alone, ms: {alone}.")
    if report.trajectory_share is not None:
        parts.append(f"Trajectory stage: {report.trajectory_share:.1%} of forward and backward.")
    parts.append("Host: forward and backward on a tiny batch, without waiting for a GPU.")
    if base.case.config.power == "ess":
        parts.append(f"{P_NOTE}.")
    return " ".join(parts)


def summary_table(reports: list[RunReport]) -> Table:
    """A line a case: our times and shares; the backward also over that of the same case without rows that it may skip."""
    out = Table(title="this package, out of place")
    out.add_column("case")
    for name in ("rows without gradient", *(f"{name} ms" for name in PASSES), "share: forward", "backward"):
        out.add_column(name, justify="right")
    for name in ("backward of full", "trajectory"):
        out.add_column(name, justify="right")
    full = {shape(report): report.ours for report in reports if report.base.zero_rows == 0}
    for report in reports:
        ours, zero = report.ours, f"{report.base.zero_rows:.0%}"
        if ours is None:
            out.add_row(report.base.case.name, zero, Text("not timed", style="yellow"))
            continue
        whole, shares, part = full.get(shape(report)), report.shares(ours), report.trajectory_share
        out.add_row(
            report.base.case.name,
            zero,
            *(f"{getattr(ours, name).median:.3g}" for name in PASSES),
            *(f"{shares[name]:.0%}" for name in PASSES[:2]),
            "-" if whole is None else f"{ours.backward.median / whole.backward.median:.2f}x",
            "-" if part is None else f"{part:.1%}",
        )
    return out


def shape(report: RunReport) -> tuple[Any, ...]:
    """What two cases that differ in their fractions alone have in common."""
    return tuple(value for name, value in asdict(report.base.case).items() if name not in LIMITS)


def content(report: RunReport) -> dict[str, Any]:
    """All figures with what they depend on."""
    found = base_content(report.base)
    found["versions"] |= versions()
    for row, entry in zip(report.base.rows, found["results"], strict=True):
        entry["share_of_copy"] = _shares(report, row)
    comparison = report.base.comparison
    found["model_bytes"] = {name: getattr(comparison.traffic, name) for name in PASSES}
    found["copy_bytes_a_second"] = report.bandwidth
    found["stages"] = {name: asdict(spread) for name, spread in comparison.stages.items()}
    found["trajectory_share"] = report.trajectory_share
    found["host_microseconds"] = {name: asdict(spread) for name, spread in report.host.items()}
    found["not_measured"] = found.pop("skipped")
    return found


def _shares(report: RunReport, row: Row) -> dict[str, float] | None:
    return report.shares(report.timed[row.name]) if row.name in report.timed else None
