"""What a method's runs come to, over the seeds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass

from logs import Log
from methods import FAMILY

COLLAPSE = 0.5
NOTES = f"""Per method, over the runs of one staleness, in the order of the columns:

- finished runs;
- held-out problems solved by samples at temperature 1 after training, in per cent, mean ± standard error; the worst seed;
- the same by the likeliest tokens;
- collapsed runs: below {COLLAPSE:g} of what they started with, or with a gradient that is not finite;
- gradient norm before clipping, median and largest of all optimizer steps;
- mean token entropy in the last tenth of the steps;
- clipped tokens in all steps, in per cent; a clipped sequence counts with all its tokens;
- p and ESS/n of the trajectories with a gradient: median (and the tenths at either end), means over steps and runs;
- seconds of forward and backward of an optimizer step with this package's loss, and with the eager one, medians.
"""


@dataclass(frozen=True)
class Summary:
    """One method at one staleness. Accuracies and clip fraction are parts of 1; p and ESS/n: quantiles 0.1, 0.5, 0.9."""

    method: str
    runs: int
    accuracy: float
    standard_error: float | None
    worst: float
    greedy: float
    collapsed: int
    gradient_median: float
    gradient_max: float
    entropy: float
    clip_fraction: float
    power: tuple[float, float, float] | None
    ess: tuple[float, float, float] | None
    seconds_ours: float | None
    seconds_eager: float | None
    final: tuple[float, ...]


def collapsed(log: Log) -> bool:
    """Whether the run lost half of what it began with, or its gradient."""
    first, last = log.evaluations[0]["accuracy"], log.evaluations[-1]["accuracy"]
    return last < COLLAPSE * first or any(row["gradient_norm"] is None for row in log.rows)


def summarise(logs: list[Log]) -> dict[int, list[Summary]]:
    """By staleness, the methods in the order of `FAMILY`, then those with options."""
    groups: dict[int, dict[str, list[Log]]] = defaultdict(lambda: defaultdict(list))
    for log in logs:
        groups[log.settings.staleness][log.settings.method].append(log)
    return {
        staleness: [summary(method, groups[staleness][method]) for method in sorted(groups[staleness], key=order)]
        for staleness in sorted(groups)
    }


def order(method: str) -> tuple[int, str]:
    """For sorting."""
    return (FAMILY.index(method), "") if method in FAMILY else (len(FAMILY), method)


def summary(method: str, logs: list[Log]) -> Summary:
    """Of a method's runs at one staleness."""
    final = [log.evaluations[-1]["accuracy"] for log in logs]
    rows = [row for log in logs for row in log.rows]
    norms = [row["gradient_norm"] for row in rows if row["gradient_norm"] is not None]
    late = [
        row["entropy"] for log in logs for row in log.rows[-max(1, len(log.rows) // 10) :] if row["entropy"] is not None
    ]
    return Summary(
        method,
        len(logs),
        statistics.mean(final),
        statistics.stdev(final) / len(final) ** 0.5 if len(final) > 1 else None,
        min(final),
        statistics.mean(log.evaluations[-1]["greedy"] for log in logs),
        sum(map(collapsed, logs)),
        statistics.median(norms) if norms else float("nan"),
        max(norms, default=float("nan")),
        statistics.mean(late) if late else float("nan"),
        statistics.mean(row["clip_fraction"] for row in rows),
        _quantiles([row["power"] for row in rows]),
        _quantiles([row["ess"] for row in rows]),
        _median([row["seconds_ours"] for log in logs for row in log.times]),
        _median([row["seconds_eager"] for log in logs for row in log.times]),
        tuple(final),
    )


def _quantiles(rows: list[list[float] | None]) -> tuple[float, float, float] | None:
    """Means over the steps of quantiles 0.1, 0.5 and 0.9 of the log's five."""
    known = [row[1:4] for row in rows if row is not None and None not in row]
    if not known:
        return None
    low, middle, high = (statistics.mean(column) for column in zip(*known, strict=True))
    return low, middle, high


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
