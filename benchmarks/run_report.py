"""A case of `run.py` as a table and as JSON, and all cases of a run as one table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from other_packages import versions
from rich.table import Table
from rich.text import Text
from traffic import Traffic, copy_bandwidth, model_bytes, share

from pmpo_kernels.benchmarking.allocator import Allocator
from pmpo_kernels.benchmarking.cases import LIMITS
from pmpo_kernels.benchmarking.comparison import Spread, Timing
from pmpo_kernels.benchmarking.report import P_NOTE, Report, ms
from pmpo_kernels.benchmarking.report import content as base_content
from pmpo_kernels.benchmarking.variants import FUSED

PASSES = ("forward", "backward", "both")
PASS_OF = {
    "token_logp": "forward",
    "dlogits": "backward",
    "dlogits_": "backward",
}  # a stage that passes over the logits


@dataclass(frozen=True)
class RunReport:
    """A finished case. `host` is, by row, the host time of a forward and backward on a tiny batch, in microseconds."""

    base: Report
    setting: Allocator
    host: dict[str, Spread]

    @property
    def timed(self) -> dict[str, Timing]:
        """Timings by row. A row that is wrong or could not run is not among them."""
        return {row.name: row.timings[self.setting] for row in self.base.rows if self.setting in row.timings}

    @property
    def ours_name(self) -> str | None:
        """Name of the first fused row that was timed, the one out of place."""
        return next((row.name for row in self.base.rows if row.group == FUSED and row.name in self.timed), None)

    @property
    def ours(self) -> Timing | None:
        return self.timed[self.ours_name] if self.ours_name else None

    @property
    def traffic(self) -> Traffic:
        """The fewest bytes that a pass can move."""
        comparison = self.base.comparison
        return model_bytes(self.base.case, comparison.unmasked_rows, comparison.gradient_rows)

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second of the copy that was measured between the rounds; None where nothing was timed."""
        floor = self.base.floor
        return copy_bandwidth(self.base.case, floor["copy"].median) if "copy" in floor else None

    @property
    def trajectory_share(self) -> float | None:
        """Median of the trajectory stage alone over that of the whole step."""
        stages = self.base.comparison.stages
        return stages["trajectory"].median / self.ours.both.median if stages and self.ours else None

    def share(self, name: str, spread: Spread) -> float:
        """Share of the copy bandwidth: the model bytes of a pass over what a copy moves in that time."""
        assert self.bandwidth is not None
        return share(getattr(self.traffic, name), spread.median, self.bandwidth)

    def call_shares(self, timing: Timing) -> dict[str, float]:
        """Shares of the copy bandwidth of a whole call, by pass."""
        return {name: self.share(name, getattr(timing, name)) for name in PASSES}

    @property
    def stage_shares(self) -> dict[str, float]:
        """Share of the copy bandwidth of each stage alone that passes over the logits."""
        stages = self.base.comparison.stages
        return {name: self.share(PASS_OF[name], spread) for name, spread in stages.items() if name in PASS_OF}


def speed_table(report: RunReport) -> Table:
    """Make the table of times, a line for each row that was run. One with a problem has no times, see `reasons`."""
    out = Table(title=report.base.title, caption=caption(report), caption_justify="left")
    out.add_column("variant")
    for name in PASSES:
        out.add_column(f"{name} ms", justify="right")
    for name in ("vs eager", "call, share of copy: forward", "backward", "both", "host us"):
        out.add_column(name, justify="right")
    for row in report.base.rows:
        if row.name not in report.timed:
            out.add_row(row.name, Text("WRONG", style="bold red") if row.wrong else Text("not timed", style="yellow"))
            continue
        timing = report.timed[row.name]
        shares = [f"{value:.0%}" for value in report.call_shares(timing).values()]
        speedup = "-" if timing.speedup is None else f"{timing.speedup:.2f}x"
        host = f"{report.host[row.name].median:,.0f}" if row.name in report.host else "-"
        times = [ms(getattr(timing, name)) for name in PASSES]
        out.add_row(row.name, *times, speedup, *shares, host)
    for name, value in report.stage_shares.items():
        cells = [f"stage {name}", *[""] * 8]
        at = 1 + PASSES.index(PASS_OF[name])
        cells[at], cells[at + 4] = ms(report.base.comparison.stages[name]), f"{value:.0%}"
        out.add_row(*cells)
    return out


def reasons(report: RunReport) -> list[str]:
    """Return, a line each, why rows have no times or are not there."""
    problems = [f"no times: {row.name} ({row.problem})" for row in report.base.rows if row.problem]
    return problems + [f"not measured: {name} ({reason})" for name, reason in report.base.skipped.items()]


def caption(report: RunReport) -> str:
    """Return the text that says what the figures of the table mean."""
    base, traffic = report.base, report.traffic
    parts = [
        f"Median (quartiles) of {base.repeats} interleaved rounds. {base.zero_rows:.0%} of the rows have no gradient. "
        f"Model: forward {traffic.forward / 1e9:.3g} GB, backward {traffic.backward / 1e9:.3g} GB."
    ]
    if report.bandwidth is not None:
        parts.append(f"Copy of the logits: {ms(base.floor['copy'])} ms, {report.bandwidth / 1e9:,.0f} GB/s.")
        parts.append(f"Read: {ms(base.floor['read'])} ms.")
    if report.trajectory_share is not None:
        alone = ms(base.comparison.stages["trajectory"])
        parts.append(f"Stages: of {report.ours_name}, each alone; a target is held against their share, not a call's.")
        parts.append(f"Stage trajectory: {alone} ms, {report.trajectory_share:.1%} of forward and backward.")
    parts.append("Host: forward and backward on a tiny batch, without waiting for a GPU.")
    if base.case.config.power == "ess":
        parts.append(f"{P_NOTE}.")
    return " ".join(parts)


def summary_table(reports: list[RunReport]) -> Table:
    """Make the table of all cases, a line for each: our times; shares of a copy's bandwidth, of the stage and of the whole call;
    and the backward over that of the same case without rows that it may skip."""
    out = Table(title="this package, out of place")
    out.add_column("case")
    shares = (f"{what} share: {name}" for name in PASSES[:2] for what in ("stage", "call"))
    for name in ("rows without gradient", *(f"{name} ms" for name in PASSES), *shares):
        out.add_column(name, justify="right")
    for name in ("backward of full", "trajectory"):
        out.add_column(name, justify="right")
    full = {shape(report): report.ours for report in reports if report.base.zero_rows == 0}
    for report in reports:
        ours, zero = report.ours, f"{report.base.zero_rows:.0%}"
        if ours is None:
            out.add_row(report.base.case.name, zero, Text("not timed", style="yellow"))
            continue
        whole, call, part = full.get(shape(report)), report.call_shares(ours), report.trajectory_share
        stage = stage_share_of_copy(report)
        out.add_row(
            report.base.case.name,
            zero,
            *(f"{getattr(ours, name).median:.3g}" for name in PASSES),
            *(f"{found[name]:.0%}" for name in PASSES[:2] for found in (stage, call)),
            "-" if whole is None else f"{ours.backward.median / whole.backward.median:.2f}x",
            "-" if part is None else f"{part:.1%}",
        )
    return out


def shape(report: RunReport) -> tuple[Any, ...]:
    """Return what two cases have in common that differ in their fractions alone."""
    return tuple(value for name, value in asdict(report.base.case).items() if name not in LIMITS)


def stage_share_of_copy(report: RunReport) -> dict[str, float]:
    """Share of the copy bandwidth by pass, out of place, which the targets are compared with."""
    return {PASS_OF[name]: value for name, value in report.stage_shares.items() if name != "dlogits_"}


def content(report: RunReport, complete: bool = True) -> dict[str, Any]:
    """Return all figures and what they depend on. `complete` says that the case is done."""
    found = {"complete": complete, **base_content(report.base)}
    found["versions"] |= versions()
    for row, entry in zip(report.base.rows, found["results"], strict=True):
        timing, ours = report.timed.get(row.name), report.ours
        entry["call_share_of_copy"] = report.call_shares(timing) if timing else None
        entry["both_over_ours"] = timing.both.median / ours.both.median if timing and ours else None
    comparison = report.base.comparison
    found["ours"] = report.ours_name
    found["power"] = comparison.power
    found["model_bytes"] = {name: getattr(report.traffic, name) for name in PASSES}
    found["copy_bytes_a_second"] = report.bandwidth
    found["stages"] = {name: stage_figures(report, name) for name in comparison.stages}
    found["stage_share_of_copy"] = stage_share_of_copy(report)
    found["trajectory_share"] = report.trajectory_share
    found["host_microseconds"] = {name: asdict(spread) for name, spread in report.host.items()}
    found["not_measured"] = found.pop("skipped")
    return found


def stage_figures(report: RunReport, name: str) -> dict[str, Any]:
    """Return the milliseconds of a stage, the fewest bytes that it can move, and the rate at which it moves them."""
    spread = report.base.comparison.stages[name]
    moved = getattr(report.traffic, PASS_OF[name]) if name in PASS_OF else None
    rate = None if moved is None else 1e-6 * moved / spread.median
    return asdict(spread) | {
        "bytes": moved,
        "gigabytes_a_second": rate,
        "share_of_copy": report.stage_shares.get(name),
    }
