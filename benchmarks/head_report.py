"""A case of `head.py` as tables and as JSON: its times, and how they compare with the products alone, with other packages and with
a full case."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from head_inputs import HeadCase
from head_rows import FLOOR, LIGER_NLL, OURS, TORCH_NLL, HeadVariant
from other_packages import LIGER, TRL, versions
from rich.table import Table
from rich.text import Text
from targets import HEAD_HALF_OVER_FULL, HEAD_LIGER_OVER_OURS, HEAD_MEMORY, HEAD_OVER_PRODUCTS

from pmpo_kernels.benchmarking.allocator import Allocator
from pmpo_kernels.benchmarking.cases import LIMITS
from pmpo_kernels.benchmarking.comparison import Row, Timing
from pmpo_kernels.benchmarking.report import P_NOTE, Report, ms
from pmpo_kernels.benchmarking.report import content as base_content
from pmpo_kernels.benchmarking.variants import EAGER

PASSES = ("forward", "backward", "both")
ERROR_PARTS = ("dhidden", "dweight, targets", "dweight, others")
ERROR_NOTE = "of the gradients' rows over the sum of the norms of their terms"


class Ratio(NamedTuple):
    """A figure and its target, which it should reach at least or at most; the target is None where there is none on this device."""

    name: str
    value: float
    target: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


@dataclass(frozen=True)
class HeadReport:
    """A finished case.

    `tokens` is the number of response tokens, `acting` that of those in trajectories with A != 0. `chunks` are the tokens of the
    largest chunk of each row of `linear_pmpo_loss`. `float32_sum` tells whether 16-bit products add to a float32 sum by themselves,
    and is None for float32."""

    base: Report
    case: HeadCase
    setting: Allocator
    variants: dict[str, HeadVariant]
    tokens: int
    acting: int
    chunks: dict[str, int]
    float32_sum: bool | None

    @property
    def chunk(self) -> int:
        """Tokens of the largest chunk of `linear_pmpo_loss` by default."""
        return self.chunks.get(OURS, 0)

    @property
    def timed(self) -> dict[str, Timing]:
        return {row.name: row.timings[self.setting] for row in self.base.rows if self.setting in row.timings}

    @property
    def rows(self) -> dict[str, Row]:
        return {row.name: row for row in self.base.rows}

    @property
    def floor(self) -> str | None:
        """Name of the fastest chunk size of the products alone."""
        names = [name for name in self.timed if self.variants[name].group == FLOOR]
        return min(names, key=lambda name: self.timed[name].both.median, default=None)

    @property
    def over_products(self) -> float | None:
        """Time of `linear_pmpo_loss` over that of the products in the same rounds. Cases can be compared by it even if the machine
        was slower in one of them."""
        if self.floor is None or OURS not in self.timed:
            return None
        return self.timed[OURS].both.median / self.timed[self.floor].both.median

    def ratios(self, full: HeadReport | None) -> list[Ratio]:
        """Return how this case's `linear_pmpo_loss` compares. `full` is the same case with every token in its products."""
        if OURS not in self.timed:
            return []
        cuda, mine = self.case.device != "cpu", self.timed[OURS].both.median
        found = []

        def add(name: str, value: float, target: float | None, at_least: bool = False) -> None:
            found.append(Ratio(name, value, target, at_least))

        whole = self.case.clipped <= 0.05 and self.case.zero_advantage == 0
        if self.over_products is not None:
            add(f"time over {self.floor}", self.over_products, HEAD_OVER_PRODUCTS if cuda and whole else None)
        if EAGER.name in self.timed:
            add("time over eager PyTorch", mine / self.timed[EAGER.name].both.median, None if cuda else 1.0)
        for name, target in (
            (LIGER, HEAD_LIGER_OVER_OURS if cuda else None),
            (TRL, None),
            (LIGER_NLL, None),
            (TORCH_NLL, None),
        ):
            if name in self.timed:
                add(f"{name} over ours, time", self.timed[name].both.median / mine, target, at_least=True)
        if LIGER in self.timed:
            work = self.timed[LIGER].both.median * self.tokens / (self.case.batch * self.case.tokens)
            add(f"{LIGER} over ours, time a token in the products (it has padding among them)", work / mine, None, True)
        if not whole and full is not None and full.over_products is not None and self.over_products is not None:
            target = HEAD_HALF_OVER_FULL if self.case.zero_advantage >= 0.5 else None
            add("time over the full case", self.over_products / full.over_products, target)
        peak = self.rows[OURS].peak_bytes
        if peak is not None:
            least = self.chunk * self.case.row_bytes + self.case.gradient_bytes
            add("peak memory over logits of a chunk + gradients", peak / least, HEAD_MEMORY if cuda else None)
            eager = self.rows[EAGER.name].peak_bytes if EAGER.name in self.rows else None
            if eager is not None:
                add("peak memory over eager PyTorch", peak / eager, None if cuda else 0.25)
        return found


def full_case(report: HeadReport, reports: list[HeadReport]) -> HeadReport | None:
    """Return the case that differs in its fractions alone and has all of its tokens in the products of both passes."""

    def shape(r: HeadReport) -> tuple[Any, ...]:
        return tuple(value for name, value in asdict(r.case).items() if name not in LIMITS or name == "padded")

    return next(
        (r for r in reports if shape(r) == shape(report) and r.case.clipped <= 0.05 and r.case.zero_advantage == 0),
        None,
    )


def speed_table(report: HeadReport) -> Table:
    """Make the table of times, a line for each row. One with a problem has no times."""
    out = Table(title=report.base.title, caption=caption(report), caption_justify="left")
    out.add_column("row")
    for name in (*(f"{name} ms" for name in PASSES), "over the products", "vs eager", "peak MiB"):
        out.add_column(name, justify="right")
    floor = report.timed[report.floor].both.median if report.floor else None
    for row in report.base.rows:
        if row.name not in report.timed:
            out.add_row(row.name, Text("WRONG", style="bold red") if row.wrong else Text("not timed", style="yellow"))
            continue
        timing = report.timed[row.name]
        times = [ms(getattr(timing, name)) for name in PASSES]
        over = "-" if floor is None else f"{timing.both.median / floor:.2f}x"
        speedup = "-" if timing.speedup is None else f"{timing.speedup:.2f}x"
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}"
        out.add_row(row.name, *times, over, speedup, peak)
    return out


def caption(report: HeadReport) -> str:
    """Return the text that says what the figures of the table mean."""
    slots, solved = report.case.batch * report.case.tokens, report.case.config.power == "ess"
    sums = {None: "", True: " Products add to the float32 sum.", False: " Products are rounded before they are added."}
    return (
        f"Median (quartiles) of {report.base.repeats} interleaved rounds. {report.tokens:,} response tokens, "
        f"{report.acting:,} with A != 0, {report.base.comparison.gradient_rows:,} with a gradient. Packed but for "
        f"{LIGER} and the padded row, which are given {slots:,} positions. Products: one forward, two backward, of all "
        f"response tokens. By default {report.chunk:,} tokens in the largest chunk."
        + sums[report.float32_sum]
        + f" {P_NOTE}." * solved
    )


def ratio_table(reports: list[HeadReport]) -> Table:
    """Make the table of the figures that have targets, a line for each."""
    out = Table(title=f"{OURS} by default, forward and backward")
    out.add_column("case")
    out.add_column("figure")
    for name in ("value", "target", "met"):
        out.add_column(name, justify="right")
    for report in reports:
        out.add_section()
        for ratio in report.ratios(full_case(report, reports)):
            target = "-" if ratio.target is None else f"{'>=' if ratio.at_least else '<='} {ratio.target:g}"
            met = {None: Text("-"), True: Text("yes", style="green"), False: Text("no", style="bold red")}[ratio.met]
            out.add_row(report.case.name, ratio.name, f"{ratio.value:.2f}", target, met)
    return out


def reasons(report: HeadReport) -> list[str]:
    """Return, a line each, why rows have no times or are not there."""
    problems = [f"no times: {row.name} ({row.problem})" for row in report.base.rows if row.problem]
    return problems + [f"not measured: {name} ({reason})" for name, reason in report.base.skipped.items()]


def content(report: HeadReport, full: HeadReport | None) -> dict[str, Any]:
    """Return all figures and what they depend on."""
    found = base_content(report.base)
    found["versions"] |= versions()
    found["case"]["gradient_bytes"] = report.case.gradient_bytes
    for entry in found["results"]:
        variant = report.variants[entry["name"]]
        entry["padded"], entry["chunk"] = variant.padded, variant.chunk
        if variant.name in report.chunks:
            entry["largest_chunk"] = report.chunks[variant.name]
    found["tokens"] = {"response": report.tokens, "with_advantage": report.acting, "largest_chunk": report.chunk}
    found["products"] = report.floor
    found["products_add_to_float32"] = report.float32_sum
    found["ratios"] = [ratio._asdict() | {"met": ratio.met} for ratio in report.ratios(full)]
    found["not_measured"] = found.pop("skipped")
    return found
