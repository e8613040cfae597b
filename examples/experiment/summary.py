"""Results of a method's runs over the seeds, and the panels in which methods are compared."""

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
    """One method at one staleness. Accuracies and clip fraction are parts of 1; p and ESS/n are quantiles 0.1, 0.5, 0.9."""

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


@dataclass(frozen=True)
class Panel:
    """Runs that are compared with each other. They have one staleness and one learning rate (None if each method has its own)."""

    staleness: int
    learning_rate: float | None
    logs: list[Log]

    @property
    def title(self) -> str:
        """Title of the panel, such as `16 optimizer steps a batch of rollouts, learning rate 0.0001`."""
        text = f"{self.staleness} optimizer step{'s' * (self.staleness > 1)} a batch of rollouts"
        return text if self.learning_rate is None else f"{text}, learning rate {self.learning_rate:g}"

    @property
    def methods(self) -> list[str]:
        """The methods in the order of `FAMILY`, then those with options."""
        return sorted({log.settings.method for log in self.logs}, key=order)

    def runs(self, method: str) -> list[Log]:
        """Runs of one method, by seed."""
        return sorted((x for x in self.logs if x.settings.method == method), key=lambda log: log.settings.seed)

    def summaries(self) -> list[Summary]:
        """The summary of each method."""
        base = baseline(self.methods)
        other = None if base is None else self.runs(base)
        return [summary(self.runs(m), None if m == base else other) for m in self.methods]


def panels(logs: list[Log]) -> list[Panel]:
    """Group the runs into panels, by staleness and, where a method has several learning rates, by these."""
    rates: dict[tuple[int, str], set[float]] = defaultdict(set)
    for log in logs:
        rates[log.settings.staleness, log.settings.method].add(log.settings.learning_rate)
    apart = any(len(found) > 1 for found in rates.values())
    groups: dict[tuple[int, float | None], list[Log]] = defaultdict(list)
    for log in logs:
        groups[log.settings.staleness, log.settings.learning_rate if apart else None].append(log)
    return [Panel(*key, groups[key]) for key in sorted(groups, key=lambda key: (key[0], key[1] or 0))]


def baseline(methods: list[str]) -> str | None:
    """Return the method that the others are compared with: grpo, or among variants of pmpo pmpo itself."""
    return next((m for m in ("grpo", "pmpo") if m in methods), None)


def order(method: str) -> tuple[int, str]:
    """Key by which methods are sorted."""
    return (FAMILY.index(method), "") if method in FAMILY else (len(FAMILY), method)


def summary(logs: list[Log], other: list[Log] | None) -> Summary:
    """Summarise a method's runs at one staleness and learning rate. `other` are the runs that they are compared with."""
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
    """Accuracy after training, by samples."""
    return float(log.evaluations[-1]["accuracy"])


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard error, None for that of a single value."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def difference(logs: list[Log], other: list[Log]) -> tuple[float, float | None] | None:
    """Mean difference of the accuracies, with its standard error, over the seeds that both have."""
    known = {log.settings.seed: last_accuracy(log) for log in other}
    pairs = [last_accuracy(log) - known[log.settings.seed] for log in logs if log.settings.seed in known]
    return mean_and_error(pairs) if pairs else None


def _quantiles(rows: list[list[float] | None]) -> tuple[float, float, float] | None:
    """Means over the steps of the quantiles 0.1, 0.5 and 0.9, out of the five in the log."""
    known = [row[1:4] for row in rows if row is not None and None not in row]
    if not known:
        return None
    low, middle, high = (statistics.mean(column) for column in zip(*known, strict=True))
    return low, middle, high


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
