"""The stages of the Triton kernels beside a copy of the logits; called by `stages.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from run_figures import write_roofline
from run_report import RunReport, content, reasons, speed_table
from stage_calls import stage_calls

from pmpo_kernels.benchmarking.allocator import allocators
from pmpo_kernels.benchmarking.cases import Case
from pmpo_kernels.benchmarking.comparison import Comparison
from pmpo_kernels.benchmarking.machine import provenance
from pmpo_kernels.benchmarking.measure import TIME_METHOD
from pmpo_kernels.benchmarking.memory import memory_problem
from pmpo_kernels.benchmarking.report import Report, measure, write_json
from pmpo_kernels.benchmarking.variants import INTERPRETED, fused_variants
from pmpo_kernels.impls import interpreted


def measure_triton(cases: list[Case], repeats: int, files: dict[str, Path], console: Console) -> bool:
    """Check the fused calls against float64, then time them, their stages, and a read and a copy of the logits, interleaved.

    The file is renewed after each round. A case that needs more memory than there is is named and left out. Returns whether a
    result was wrong; a wrong one has no times.
    """
    found: dict[str, Any] = {
        "complete": False,
        **provenance(),
        "times": INTERPRETED if interpreted() else TIME_METHOD[cases[0].device],
        "cases": [],
        "not_measured": {},
    }
    reports = []
    for case in cases:
        problem = memory_problem(case)
        if problem:
            found["not_measured"][case.name] = problem
            console.print(f"not measured: {case.name} ({problem})", soft_wrap=True, markup=False, highlight=False)
            continue
        reports.append(measure_case(case, repeats, found, files["json"], console))
        if len(reports) == 1:
            write_roofline(reports[0], files["png"])
    found["complete"] = True
    write_json(found, files["json"])
    return any(report.base.comparison.wrong for report in reports)


def measure_case(case: Case, repeats: int, found: dict[str, Any], path: Path, console: Console) -> RunReport:
    """Measure one case, the last of `found["cases"]`."""
    setting = allocators(case.device)[-1]
    done = found["cases"]

    def report_of(comparison: Comparison) -> RunReport:
        return RunReport(Report(case, repeats, comparison, {}), setting, {})

    def save(comparison: Comparison, complete: bool = False) -> None:
        found["cases"] = [*done, content(report_of(comparison), complete)]
        write_json(found, path)

    comparison = measure(
        case, fused_variants("triton"), repeats, [setting], console, memory=False, save=save, stages=stage_calls
    )
    save(comparison, complete=True)
    report = report_of(comparison)
    console.print(speed_table(report))
    for line in reasons(report):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if comparison.power:
        console.print(f"p from {comparison.power[0]:.3g} to {comparison.power[1]:.3g}")
    if case.device != "cpu":
        torch.cuda.empty_cache()
    return report
