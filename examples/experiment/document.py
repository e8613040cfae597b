"""Write the experiment's figures into docs/experiment.md and docs/pmpo_rule.md, from benchmarks/results/experiment/.

python examples/experiment/document.py          renews the blocks between the markers
python examples/experiment/document.py --check  exits 1 if a block does not say what the files say
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from report import cells, markdown, points, quantiles, seconds
from summary import Summary

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "experiment"
MARKERS = ("<!-- {}:start -->", "<!-- {}:end -->")
WIDE = (
    "method",
    "accuracy",
    "worst",
    "minus grpo",
    "greedy",
    "collapsed",
    "gradient",
    "largest",
    "entropy",
    "clipped %",
)


def load(kind: str) -> tuple[dict[str, Any], dict[tuple[int, float | None], list[Summary]]]:
    """Return a committed results.json, and its panels by staleness and learning rate."""
    content = json.loads((RESULTS / kind / "results.json").read_text())
    found = {(p["staleness"], p["learning_rate"]): [Summary(**s) for s in p["methods"]] for p in content["panels"]}
    return content, found


def origin(content: dict[str, Any], runs: int) -> str:
    """Say in words where and when it was run."""
    s = content["settings"]
    return (
        f"{runs} runs of {s['steps']} optimizer steps, {s['evaluation_problems']} {s['evaluate_on']} problems, "
        f"{100 * content['accuracy_before']:.1f} % solved before training; {content['devices']['cpu']}, torch "
        f"{content['versions']['torch']}, {content['date'][:10]}, {content['hours']:.1f} hours of one core."
    )


def count(panels: dict[tuple[int, float | None], list[Summary]]) -> int:
    return sum(s.runs for group in panels.values() for s in group)


def tuned() -> str:
    """Return the table of accuracy by staleness, method and learning rate, with the best in bold."""
    content, panels = load("tune")
    parts = []
    for staleness in dict.fromkeys(k for k, _ in panels):
        by_rate = {rate: {s.method: s for s in group} for (k, rate), group in panels.items() if k == staleness}
        rows = [["method", *(f"{rate:g}" for rate in by_rate)]]
        for method in next(iter(by_rate.values())):
            best = chosen()[staleness][method]
            values = {rate: f"{100 * found[method].accuracy:.1f}" for rate, found in by_rate.items()}
            rows.append([method, *(f"**{text}**" if rate == best else text for rate, text in values.items())])
        parts += [f"**{staleness} optimizer steps a batch of rollouts**", markdown(rows)]
    return "\n\n".join([*parts, origin(content, count(panels))])


def chosen() -> dict[int, dict[str, float]]:
    """Return the learning rate with the highest accuracy, by staleness and method."""
    best: dict[int, dict[str, Summary]] = {}
    for (staleness, _), group in load("tune")[1].items():
        found = best.setdefault(staleness, {})
        for s in group:
            if s.method not in found or s.accuracy > found[s.method].accuracy:
                found[s.method] = s
    return {staleness: {m: s.learning_rate for m, s in found.items()} for staleness, found in best.items()}


def compared() -> str:
    """Return a table of the methods for each staleness."""
    content, panels = load("compare")
    parts = []
    for (staleness, _), group in panels.items():
        rows = [[*WIDE[:1], "rate", *WIDE[1:]]]
        for s in group:
            method, _, rate, *others = cells(s)
            rows.append([method, rate, *others[: len(WIDE) - 1]])
        parts += [f"**{staleness} optimizer steps a batch of rollouts**", markdown(rows)]
    return "\n\n".join([*parts, origin(content, count(panels))])


def spread() -> str:
    """Return the table of p and ESS/n of every method."""
    _, panels = load("compare")
    rows = [["method", *(f"{name}, staleness {k}" for k, _ in panels for name in ("p", "ESS/n"))]]
    for found in zip(*panels.values(), strict=True):
        rows.append([found[0].method, *(quantiles(x) for s in found for x in (s.power, s.ess))])
    return markdown(rows)


def timed() -> str:
    """Return the table of the seconds that forward and backward of an optimizer step take."""
    _, panels = load("compare")
    rows = [["method", "ours, s", "eager, s", "ours / eager"]]
    for found in zip(*panels.values(), strict=True):
        ours, eager = (sum(x) / len(x) for x in ([s.seconds_ours for s in found], [s.seconds_eager for s in found]))
        rows.append([found[0].method, seconds(ours), seconds(eager), f"{ours / eager:.2f}"])
    return markdown(rows)


def ablated() -> str:
    """Return the table of PMPO's rule and clip, with a column for each learning rate."""
    content, panels = load("ablation")
    header = ["variant"]
    for _, rate in panels:
        header += [f"accuracy at {rate:g}", "minus pmpo", "clipped %"]
    rows = [[*header, "p"]]
    for found in zip(*panels.values(), strict=True):
        row = [found[0].method]
        for s in found:
            change = "-" if s.difference is None else points(*s.difference, sign="+")
            row += [points(s.accuracy, s.standard_error), change, f"{100 * s.clip_fraction:.2f}"]
        rows.append([*row, quantiles(found[-1].power)])
    return f"{markdown(rows)}\n\n{origin(content, count(panels))}"


PAGES = {
    "experiment.md": {"tune": tuned, "compare": compared, "spread": spread, "time": timed},
    "pmpo_rule.md": {"ablation": ablated},
}


def main(check: Annotated[bool, typer.Option("--check", help="Only compare.")] = False) -> None:
    """Renew the blocks, or with --check compare them."""
    for name, blocks in PAGES.items():
        page = ROOT / "docs" / name
        text = renewed = page.read_text()
        for block, write in blocks.items():
            start, end = (marker.format(block) for marker in MARKERS)
            renewed = renewed[: renewed.index(start)] + f"{start}\n\n{write()}\n\n" + renewed[renewed.index(end) :]
        if check and renewed != text:
            typer.echo(f"docs/{name}: differs from benchmarks/results/experiment", err=True)
            raise typer.Exit(1)
        if not check:
            page.write_text(renewed)


if __name__ == "__main__":
    typer.run(main)
