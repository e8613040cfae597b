"""What a method's runs come to, over the seeds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass

from logs import Log
from methods import FAMILY

COLLAPSE = 0.5
NOTES = f"""Per method, over the runs of one staleness, in the order of the columns:

- finished runs, and their learning rate;
- evaluation problems solved by samples at temperature 1 after training, in per cent, mean ± standard error; the worst seed;
- how much more than the method named there, which has the same seeds and problems: mean over the seeds of the difference ± its
  standard error;
- solved by the likeliest tokens;
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
    learning_rate: float
    runs: int
    accuracy: float
    standard_error: float | None
    worst: float
    difference: tuple[float, float | None] | None
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
    """By staleness, the methods in the order of `FAMILY`, then those with options; several learning rates of one apart."""
    groups: dict[int, dict[tuple[str, float], list[Log]]] = defaultdict(lambda: defaultdict(list))
    for log in logs:
        groups[log.settings.staleness][log.settings.method, log.settings.learning_rate].append(log)
    found = {}
    for staleness, group in sorted(groups.items()):
        keys = sorted(group, key=lambda key: (order(key[0]), key[1]))
        against = [key for key in keys if key[0] == baseline([m for m, _ in keys])]
        other = group[against[0]] if len(against) == 1 else None
        found[staleness] = [summary(group[key], None if group[key] is other else other) for key in keys]
    return found


def baseline(methods: list[str]) -> str | None:
    """What the others are compared with: grpo, or among variants of pmpo pmpo itself."""
    return next((m for m in ("grpo", "pmpo") if m in methods), None)


def order(method: str) -> tuple[int, str]:
    """For sorting."""
    return (FAMILY.index(method), "") if method in FAMILY else (len(FAMILY), method)


def summary(logs: list[Log], other: list[Log] | None) -> Summary:
    """Of a method's runs at one staleness and learning rate; `other`: the runs that they are compared with."""
    final = [last_accuracy(log) for log in logs]
    rows = [row for log in logs for row in log.rows]
    norms = [row["gradient_norm"] for row in rows if row["gradient_norm"] is not None]
    late = [
        row["entropy"] for log in logs for row in log.rows[-max(1, len(log.rows) // 10) :] if row["entropy"] is not None
    ]
    return Summary(
        logs[0].settings.method,
        logs[0].settings.learning_rate,
        len(logs),
        *mean_and_error(final),
        min(final),
        None if other is None else difference(logs, other),
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


def last_accuracy(log: Log) -> float:
    """After training, by samples."""
    return float(log.evaluations[-1]["accuracy"])


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard error; a single value has none."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def difference(logs: list[Log], other: list[Log]) -> tuple[float, float | None] | None:
    """Of the accuracies of the seeds that both have."""
    known = {log.settings.seed: last_accuracy(log) for log in other}
    pairs = [last_accuracy(log) - known[log.settings.seed] for log in logs if log.settings.seed in known]
    return mean_and_error(pairs) if pairs else None


def _quantiles(rows: list[list[float] | None]) -> tuple[float, float, float] | None:
    """Means over the steps of quantiles 0.1, 0.5 and 0.9 of the log's five."""
    known = [row[1:4] for row in rows if row is not None and None not in row]
    if not known:
        return None
    low, middle, high = (statistics.mean(column) for column in zip(*known, strict=True))
    return low, middle, high


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
