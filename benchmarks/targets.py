"""The targets on a GPU, and what the results of `gpu.sh` say of each: the target, the figure, and whether it is met.

python benchmarks/targets.py benchmarks/results/<machine>

`readme_table.py` puts the targets into benchmarks/results/PENDING.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

Content = dict[str, Any]
MODEL = "qwen2.5"  # V = 151,936
OURS, PRODUCTS = "linear_pmpo_loss", "time over three products"
HEAD_OVER_PRODUCTS, HEAD_LIGER_OVER_OURS, HEAD_MEMORY, HEAD_HALF_OVER_FULL = 1.10, 2.0, 1.0, 0.6


class Results(NamedTuple):
    """The cases of `run.py` and of `stages.py`, and those of `head.py`, each with the devices it was measured on."""

    runs: list[Content]
    heads: list[Content]

    def run(
        self, preset: str, clipped: float | None = 0, zero_advantage: float = 0, batch: int | None = None
    ) -> Content:
        """Return the case of this preset and these fractions, {} if there is none. `clipped` of None stands for any."""
        wanted = {"preset": preset, "clipped": clipped, "zero_advantage": zero_advantage, "batch": batch, "padded": 0}
        return find(self.runs, {name: value for name, value in wanted.items() if value is not None})

    def head(self, zero_advantage: float = 0) -> Content:
        """Return the case of GRPO with this fraction of the trajectories at A = 0, {} if there is none."""
        return find(self.heads, {"preset": "grpo", "clipped": 0, "zero_advantage": zero_advantage})


class Target(NamedTuple):
    """A target: `read` returns the figure, None where it was not measured, and the case that it is from."""

    name: str
    limit: float
    read: Callable[[Results], tuple[float | None, Content]]
    at_least: bool = False
    percent: bool = False

    def show(self, value: float) -> str:
        return f"{100 * value:.3g} %" if self.percent else f"{value:.3g}"

    @property
    def bound(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.show(self.limit)}"

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def find(cases: list[Content], wanted: dict[str, Any], *models: str) -> Content:
    """Return the first case with these fields, by default of the model that the targets are about, else of a rehearsal."""
    found = [c for c in cases if all(c["case"][name] == value for name, value in wanted.items())]
    return next((c for model in models or (MODEL, "tiny") for c in found if c["case"]["model"] == model), {})


def at(content: Content | None, *path: str) -> Any:
    """Return the entry at this path, None where there is none."""
    for name in path:
        content = content.get(name) if content else None
    return content


def row(content: Content, name: str | None) -> Content:
    return next((r for r in content.get("results", []) if r["name"] == name), {})


def ours(content: Content, suffix: str = "") -> Content:
    """Return the row of this package, out of place, {} if there is none."""
    name = content.get("ours")
    return row(content, name + suffix if name else None)


def median(row: Content, which: str) -> float | None:
    return next((timing[which]["median"] for timing in row.get("timings", {}).values()), None)


def quotient(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def stage(which: str) -> Callable[[Results], tuple[float | None, Content]]:
    return lambda r: (at(r.run("grpo"), "stage_share_of_copy", which), r.run("grpo"))


def whole_call(r: Results) -> tuple[float | None, Content]:
    return at(ours(r.run("grpo")), "call_share_of_copy", "forward"), r.run("grpo")


def trajectory(r: Results) -> tuple[float | None, Content]:
    case = r.run("pmpo", clipped=None, batch=2)
    return case.get("trajectory_share"), case


def over(name: str, preset: str = "grpo") -> Callable[[Results], tuple[float | None, Content]]:
    """Make the `read` of a target: the time of a row over ours."""
    return lambda r: (row(r.run(preset), name).get("both_over_ours"), r.run(preset))


def memory(suffix: str) -> Callable[[Results], tuple[float | None, Content]]:
    def read(r: Results) -> tuple[float | None, Content]:
        case = r.run("grpo")
        return quotient(ours(case, suffix).get("peak_bytes"), at(case, "case", "logits_bytes")), case

    return read


def backward_of_half(**fraction: float) -> Callable[[Results], tuple[float | None, Content]]:
    """Make the `read` of a target: the backward of a case with these fractions over that of the full case."""

    def read(r: Results) -> tuple[float | None, Content]:
        half = r.run("grpo", **fraction)
        return quotient(*(median(ours(case), "backward") for case in (half, r.run("grpo")))), half

    return read


def ratio(content: Content, start: str) -> float | None:
    """Return the figure of `head.py` whose name begins with `start`, None where there is none."""
    return next((x["value"] for x in content.get("ratios", []) if x["name"].startswith(start)), None)


def head(start: str) -> Callable[[Results], tuple[float | None, Content]]:
    return lambda r: (ratio(r.head(), start), r.head())


def head_of_half(r: Results) -> tuple[float | None, Content]:
    """Return the time with half of the trajectories at A = 0 over that of the full case. Each is taken over the products of its own
    rounds, so that a machine that has become slower changes nothing."""
    return quotient(ratio(r.head(0.5), PRODUCTS), ratio(r.head(), PRODUCTS)), r.head(0.5)


SHARE = {"at_least": True, "percent": True}
TARGETS = (
    Target("forward stage with entropy, share of the bandwidth of a copy", 0.90, stage("forward"), **SHARE),
    Target("backward stage, share of the bandwidth of a copy", 0.88, stage("backward"), **SHARE),
    Target("forward of the whole `pmpo_loss`, share of the bandwidth of a copy", 0.88, whole_call, **SHARE),
    Target("trajectory stage at T = 4,096 with p solved, share of forward and backward", 0.03, trajectory, percent=True),
    Target("eager PyTorch over ours, time", 8, over("eager PyTorch"), at_least=True),
    Target("`torch.compile` over ours, time", 2, over("torch.compile"), at_least=True),
    Target("Liger at token level over ours, time", 1.15, over("Liger, token level"), at_least=True),
    Target("Liger at sequence level over ours, time", 1.5, over("Liger, sequence level", "gspo"), at_least=True),
    Target("memory beyond the logits, in their size", 1.01, memory("")),
    Target("memory beyond the logits in place, in their size", 0.01, memory(", in place")),
    Target("half of the tokens clipped: backward over that of the full case", 0.8, backward_of_half(clipped=0.5)),
    Target("half of the trajectories at A = 0: backward over that of the full case", 0.8, backward_of_half(zero_advantage=0.5)),
    Target("LM head: time over the three bare products", HEAD_OVER_PRODUCTS, head(PRODUCTS)),
    Target("LM head: Liger's chunked loss over ours, time", HEAD_LIGER_OVER_OURS, head("Liger over ours, time"), at_least=True),
    Target("LM head: peak memory over logits of a chunk and gradients", HEAD_MEMORY, head("peak memory over logits of a chunk")),
    Target("LM head, half of the trajectories at A = 0: time over that of the full case", HEAD_HALF_OVER_FULL, head_of_half),
)  # fmt: skip


def load(folder: Path, since: float = 0) -> Results:
    """Read what there is of a call of `gpu.sh`, finished or not. What was written before `since` is marked."""

    def cases(pattern: str) -> list[Content]:
        found = []
        for path in sorted(folder.glob(pattern)):
            content = json.loads(path.read_text())
            for case in content.get("cases", [content]):
                found.append(case | {"devices": content["devices"], "earlier": path.stat().st_mtime < since})
        return found

    # of a case in both, the stages' own file: that of `run.py` may have been cut before it had figures
    return Results(cases("stages-triton.json") + cases("run-*.json"), cases("head-*.json"))


def state(target: Target, results: Results) -> tuple[str, str]:
    """Return the figure, and whether it meets the target, as text. Without a GPU, or with another model, it is a rehearsal."""
    value, content = target.read(results)
    if value is None:
        return "-", "not measured"
    if "cuda:0" not in content["devices"] or content["case"]["model"] != MODEL:
        return target.show(value), "rehearsal, no result"
    of = " (of an earlier call)" if content["earlier"] else ""
    return target.show(value), ("met" if target.met(value) else "NOT MET") + of


def listed() -> list[str]:
    """Return the targets as a list for the documentation."""
    return [f"- {target.name}: {target.bound}" for target in TARGETS]


def main(
    folder: Annotated[Path, typer.Argument(file_okay=False, exists=True, help="Results of gpu.sh.")],
    since: Annotated[
        float, typer.Option(help="Seconds since 1970; what was written before is of an earlier call.")
    ] = 0,
) -> None:
    """The targets, a line each: target, measured, met or not."""
    results = load(folder, since)
    gpus = {content["devices"].get("cuda:0", "no GPU") for content in results.runs + results.heads}
    print(f"Targets, {' and '.join(sorted(gpus)) or 'nothing measured'}:")
    for target in TARGETS:
        measured, met = state(target, results)
        print(f"{target.name}: target {target.bound}, measured {measured}: {met}")


if __name__ == "__main__":
    typer.run(main)
