"""Write the README's results block from the JSON files of `pmpo-kernels bench` under benchmarks/results/.

python benchmarks/readme_table.py          renews README.md
python benchmarks/readme_table.py --check  exits 1 if README.md does not say what the files say
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).parent.parent
START, END = "<!-- results:start -->", "<!-- results:end -->"


def section(path: Path) -> str:
    """One Markdown table: a line a variant, medians in ms, and what it was measured on."""
    content: dict[str, Any] = json.loads(path.read_text())
    case, devices, versions = content["case"], content["devices"], content["versions"]
    on_gpu = case["device"] != "cpu"
    machine = devices["cuda"] if on_gpu else f"{devices['cpu']}, {devices['threads']} threads"
    shape = f"({case['batch']}, {case['tokens']}, {case['vocab']:,})"
    lines = [
        f"{case['preset']}, logits {shape} {case['dtype']}, {machine}, torch {versions['torch']},"
        f" triton {versions['triton']}, {content['date'][:10]} ([figures]({path.relative_to(ROOT).as_posix()})):",
        "",
        "| | forward ms | backward ms | both ms | against eager | memory beyond inputs | gradient error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in content["results"]:
        if row["problem"]:
            lines.append(f"| {row['name']} | {row['problem']} | | | | | |")
            continue
        times = [f"{row[part]['median']:.3g}" for part in ("forward", "backward", "both")]
        memory = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f} MiB"
        speed = "-" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        lines.append(f"| {row['name']} | {' | '.join(times)} | {speed} | {memory} | {row['gradient_error']:.1e} |")
    return "\n".join(lines)


def block() -> str:
    """Everything between the two markers of the README."""
    files = sorted((ROOT / "benchmarks" / "results").rglob("bench*.json"))
    if any(json.loads(path.read_text())["case"]["device"] != "cpu" for path in files):
        parts = []
    else:
        parts = [
            "Nothing has been measured on a GPU yet: [benchmarks/results/PENDING.md](benchmarks/results/PENDING.md)"
            " lists what is missing, and `pmpo-kernels bench` measures it on your machine. On a CPU there are no fused"
            " kernels in this version: the default there is the reference, which is the specification and is slower"
            " than plain eager PyTorch."
        ]
    return "\n\n".join([START, *parts, *(section(path) for path in files), END])


def main(check: Annotated[bool, typer.Option(help="Only compare.")] = False) -> None:
    """Renew the block in README.md, or with --check compare it."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    renewed = text[: text.index(START)] + block() + text[text.index(END) + len(END) :]
    if check and renewed != text:
        typer.echo(
            "README.md: its results differ from benchmarks/results/; run python benchmarks/readme_table.py", err=True
        )
        raise typer.Exit(1)
    readme.write_text(renewed)


if __name__ == "__main__":
    typer.run(main)
