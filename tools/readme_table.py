"""Write the figures into README.md and docs/ (fused_head, performance, performance_cpu) from the files of benchmarks/results/, and
the targets of targets.py into PENDING.md.

python tools/readme_table.py          renews the blocks between the markers
python tools/readme_table.py --check  exits 1 if a block does not say what the files say
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from roofline import H200, Prediction, predict, trajectory_chain

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from targets import OURS, PRODUCTS, find, listed, quotient, ratio

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ROWS, WIDTH = 8192, {"bf16": 2, "fp32": 4}
START, END = "<!-- results:start -->", "<!-- results:end -->"
HEAD_START, HEAD_END = "<!-- head:start -->", "<!-- head:end -->"
TARGETS_START, TARGETS_END = "<!-- targets:start -->", "<!-- targets:end -->"
Content = dict[str, Any]


def load(pattern: str) -> dict[Path, Content]:
    """Return the results by file, folder by folder, those of larger logits first."""
    found = {path: json.loads(path.read_text()) for path in RESULTS.rglob(pattern)}
    rehearsed = [str(path) for path in found if (path.parent / "REHEARSAL.txt").exists()]
    if rehearsed:
        raise SystemExit(f"expected results, got a rehearsal of gpu.sh: {', '.join(rehearsed)}")
    return dict(
        sorted(found.items(), key=lambda item: (item[0].parent, -item[1].get("case", {}).get("logits_bytes", 0)))
    )


def ms(value: float) -> str:
    """Write milliseconds with three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]


def machine(content: Content, device: str) -> str:
    """Say in words what the figures were measured on."""
    devices, versions = content["devices"], content["versions"]
    name = f"{devices['cpu']}, {devices['threads']} threads" if device == "cpu" else devices["cuda:0"]
    return f"{name}, torch {versions['torch']}, triton {versions['triton']}, {content['date'][:10]}"


def comparison(files: dict[Path, Content], root: str = "") -> list[str]:
    """Make the lines of a table for the cases of one machine, a line for each case and variant. `root` is the path from the page to
    the repository."""
    first = next(iter(files.values()))
    device = first["case"]["device"]
    allocators = list(dict.fromkeys(a for c in files.values() for row in c["results"] for a in row["timings"]))
    header = ["logits", "variant"]
    for allocator in allocators:
        suffix = {"default": "", "reuse": ", memory reused"}[allocator] if len(allocators) > 1 else ""
        header += [f"forward + backward ms{suffix}", "against eager"]
    header += ["page faults", "memory beyond inputs", "gradient error"] if device == "cpu" else ["memory", "error"]
    rows = []
    for path, content in files.items():
        case = content["case"]
        shape = f"({case['batch']}, {case['tokens']}, {case['vocab']:,}) {case['dtype']}"
        for i, row in enumerate(content["results"]):
            cells = [f"[{shape}]({root}{path.relative_to(ROOT).as_posix()})" if i == 0 else "", row["name"]]
            if row["problem"]:
                rows.append([*cells, row["problem"], *[""] * (len(header) - 3)])
                continue
            for allocator in allocators:
                timing = row["timings"][allocator]
                parts = " + ".join(ms(timing[part]["median"]) for part in ("forward", "backward"))
                speed = "-" if timing["speedup"] is None else f"{timing['speedup']:.1f}x"
                cells += [f"{parts} = {ms(timing['both']['median'])}", speed]
            faults = row["timings"][allocators[0]]["page_faults"]
            memory = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB"
            cells += [f"{faults:,.0f}"] if device == "cpu" else []
            rows.append([*cells, memory, f"{row['gradient_error']:.1e}"])
    presets = ", ".join(dict.fromkeys(c["case"]["preset"] for c in files.values()))
    return [f"{presets}, {machine(first, device)}:", "", *table(header, rows)]


def shares(files: dict[Path, Content]) -> list[str]:
    """Make the lines of a table for the cases of `run.py` on one machine: a line for each case and call, and for each stage alone,
    whose share of a copy's bandwidth a target is compared with."""
    first = next(iter(files.values()))
    header = ["logits, loss", "call", "forward ms (share of copy)", "backward ms (share)", "both ms", "memory", "error"]
    rows = []
    for path, content in files.items():
        case = content["case"]
        shape = (
            f"{case['model']} ({case['batch']}, {case['tokens']}, {case['vocab']:,}) {case['dtype']}, {case['preset']}"
        )
        for i, row in enumerate(content["results"]):
            cells = [f"[{shape}]({path.relative_to(ROOT).as_posix()})" if i == 0 else "", row["name"]]
            if row["problem"] or not row["timings"]:
                rows.append([*cells, row["problem"] or "stopped before its times", *[""] * (len(header) - 3)])
                continue
            timing, share = next(iter(row["timings"].values())), row["call_share_of_copy"]
            cells += [f"{ms(timing[p]['median'])} ({share[p]:.0%})" for p in ("forward", "backward")]
            memory = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB"
            rows.append([*cells, ms(timing["both"]["median"]), memory, f"{row['gradient_error']:.1e}"])
        for name, at in (("token_logp", 2), ("dlogits", 3), ("dlogits_", 3)):
            if name in content["stages"]:
                found, cells = content["stages"][name], ["", f"stage `{name}` alone", *[""] * (len(header) - 2)]
                cells[at] = f"{ms(found['median'])} ({found['share_of_copy']:.0%})"
                rows.append(cells)
    return [f"{machine(first, first['case']['device'])}:", "", *table(header, rows)]


def folders(files: dict[Path, Content]) -> list[dict[Path, Content]]:
    """Group the files by the machine they are from."""
    return [{p: c for p, c in files.items() if p.parent == folder} for folder in dict.fromkeys(p.parent for p in files)]


def readme() -> str:
    """Return the block of the README, which has the largest vocabulary. All others are in docs/."""
    files = load("bench-*.json")
    on_gpu = {path: c for path, c in load("run-*.json").items() if c["case"]["device"] != "cpu"}
    parts = [
        "\n".join(shares({p: c for p, c in on_gpu.items() if p.parent == f})) for f in {p.parent: 0 for p in on_gpu}
    ]
    if not parts:
        parts.append(
            "Nothing has been measured on a GPU yet: [benchmarks/results/PENDING.md](benchmarks/results/PENDING.md)"
            " lists what is missing, and `benchmarks/gpu.sh` measures it on your machine; what the binaries promise is in"
            " [docs/performance.md](docs/performance.md). On a CPU, medians:"
        )
    for mine in folders(files):
        largest = max(content["case"]["vocab"] for content in mine.values())
        parts.append("\n".join(comparison({p: c for p, c in mine.items() if c["case"]["vocab"] == largest})))
    return "\n\n".join([START, *parts, END])


def heads(files: dict[Path, Content]) -> list[str]:
    """Make the lines of a table for the cases of `head.py` on one machine, a line for each case and row."""
    first = next(iter(files.values()))
    header = ["loss, hidden states, head", "row", "forward + backward ms", "over the products", "against eager"]
    header += ["of the full case", "memory beyond inputs", "gradient error"]
    rows = []
    for path, content in files.items():
        case, tokens = content["case"], content["tokens"]
        about = f"{case['preset']}, {tokens['response']:,} tokens"
        about += f", {case['clipped']:.0%} clipped" * (case["clipped"] > 0)
        about += f", {case['zero_advantage']:.0%} of the trajectories at A = 0" * (case["zero_advantage"] > 0)
        about += f", H = {case['hidden']:,}, V = {case['vocab']:,}, {case['dtype']}"
        times = {row["name"]: next(iter(row["timings"].values())) for row in content["results"] if row["timings"]}
        products = times[content["products"]]["both"]["median"] if content["products"] else None
        full = None
        if case["clipped"] or case["zero_advantage"]:
            alike = {name: case[name] for name in ("preset", "vocab", "hidden", "batch", "tokens", "padded", "dtype")}
            whole = find([*files.values()], alike | {"clipped": 0, "zero_advantage": 0}, case["model"])
            full = quotient(ratio(content, PRODUCTS), ratio(whole, PRODUCTS))
        for i, row in enumerate(content["results"]):
            cells = [f"[{about}](../{path.relative_to(ROOT).as_posix()})" if i == 0 else "", row["name"]]
            if row["name"] not in times:
                rows.append([*cells, row["problem"] or "stopped before its times", *[""] * (len(header) - 3)])
                continue
            timing = times[row["name"]]
            both, speedup = timing["both"]["median"], timing["speedup"]
            parts = " + ".join(ms(timing[part]["median"]) for part in ("forward", "backward"))
            cells += [f"{parts} = {ms(both)}", "-" if products is None else f"{both / products:.2f}x"]
            cells += ["-" if speedup is None else f"{speedup:.2f}x"]
            cells += [f"{full:.2f}x" if full is not None and row["name"] == OURS else ""]
            cells += ["-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB"]
            rows.append([*cells, "-" if row["gradient_error"] is None else f"{row['gradient_error']:.1e}"])
    return [f"{machine(first, first['case']['device'])}:", "", *table(header, rows)]


def fused_head() -> str:
    """Return the block of docs/fused_head.md."""
    keys = ("preset", "zero_advantage", "clipped")  # the full case first
    found = load("head-*.json")
    files = {
        path: found[path] for path in sorted(found, key=lambda p: (p.parent, *(found[p]["case"][k] for k in keys)))
    }
    folders = dict.fromkeys(path.parent for path in files)
    parts = ["\n".join(heads({p: c for p, c in files.items() if p.parent == folder})) for folder in folders]
    return "\n\n".join([HEAD_START, *(parts or ["Not measured yet: `python benchmarks/head.py`."]), HEAD_END])


def stage_rows(kind: str, found: Content, elements: int) -> list[list[str]]:
    """Make the rows of one dtype's stages: times, scaling, bandwidth, and the two floors."""
    one, together = (found["threads"][n] for n in (min(found["threads"], key=int), max(found["threads"], key=int)))
    threads = int(max(found["threads"], key=int))
    rows = []
    # a copy moves three times the logits: source, target fetched, target written
    for name, units, by_bytes in (
        ("read", 1, None),
        ("copy", 2, None),
        ("token_logp", 1, together["read"]["median"]),
        ("dlogits, in place", 2, 2 / 3 * together["copy"]["median"]),
        ("dlogits with entropy, in place", 2, 2 / 3 * together["copy"]["median"]),
        ("dlogits", 2, 2 / 3 * together["copy"]["median"]),
    ):
        alone, time = one[name]["median"], together[name]["median"]
        bandwidth = units * found["logits_bytes"] / time / 1e6
        cells = [kind, name, ms(alone), ms(time), f"{alone / time:.2f}x", f"{bandwidth:.1f}"]
        if by_bytes is None:
            rows.append([*cells, "", "", ""])
        else:
            by_arithmetic = found["cached_ns_an_element"][name] * elements / threads / 1e6
            rows.append([*cells, ms(by_bytes), ms(by_arithmetic), f"{max(by_bytes, by_arithmetic) / time:.0%}"])
    ours = [sum(times[name]["median"] for name in ("token_logp", "dlogits, in place")) for times in (one, together)]
    return [*rows, [kind, "both stages, in place", *map(ms, ours), f"{ours[0] / ours[1]:.2f}x", "", "", "", ""]]


def stages(content: Content) -> str:
    """Return the section about one machine's stages and their floors."""
    B, T, V = content["shape"]
    dtypes, share = content["dtypes"], content["trajectory"]
    threads = max(next(iter(dtypes.values()))["threads"], key=int)
    header = ["dtype", "", "ms, 1 thread", f"ms, {threads} threads", "scaling", "GB/s"]
    header += ["floor by bytes, ms", "floor by arithmetic, ms", "share of the larger floor"]
    fresh = [
        [kind, name, ms(found["fresh"][name]["median"]), f"{found['fresh'][name]['page_faults']:,}"]
        for kind, found in dtypes.items()
        for name in ("clone", "dlogits")
    ]
    _, long_T, long_V = share["shape"]
    percent = 100 * share["trajectory"]["median"] / share["step"]["median"]
    lines = [
        f"Logits ({B}, {T}, {V:,}), {machine(content, 'cpu')}, medians of {content['repeats']}, memory reused:",
        "",
        *table(header, [row for kind, found in dtypes.items() for row in stage_rows(kind, found, B * T * V)]),
        "",
        "Into fresh memory, default allocator, repeated at once:",
        "",
        *table(["dtype", "", "ms", "page faults"], fresh),
        "",
        f"The trajectory stage with p solved, one trajectory of {long_T:,} tokens: {share['trajectory']['median']:.2f} ms,"
        f" {percent:.2f} % of its step in float32 at V = {long_V:,} in place ({share['step']['median']:.0f} ms).",
    ]
    return "\n".join(lines)


def resident(found: Prediction, loop: Content) -> list[str]:
    """Return the cells that tell what a multiprocessor has under way."""
    kib, covered = f"{found.bytes_in_flight / 2**10:.0f}", f"{found.covered_ns:,.0f}"
    return [f"{found.resident_threads:,}", kib, covered, f"{loop['exposed']:.0%}", f"{loop['instructions']:.1f}"]


RESIDENT = ["threads a multiprocessor", "KiB under way", "covers ns", "exposed", "instructions a column"]


def predictions(content: Content) -> str:
    """Return the table of the vocabulary kernels' binaries beside the floor of an H200, as its data sheet has it."""
    header = ["kernel", "registers", *RESIDENT]
    header += ["floor by bytes, ms", "by instructions", "by exponentials", "predicted, ms"]
    rows = []
    for binary in content["binaries"]:
        stage, dtype, vocab = (*binary["kernel"].split(), "", "")[:3]
        if (
            binary["arch"] != "sm_90"
            or not vocab.startswith("V=")
            or "unlike" in binary["kernel"]
            or dtype not in WIDTH
        ):
            continue
        V = int(vocab[2:])
        found = predict(binary, H200, ROWS * V, WIDTH[dtype] * (1 if stage == "token_logp" else 2))
        cells = [f"{stage}, {dtype}, V = {V:,}", str(binary["registers"]), *resident(found, binary["loop"])]
        rows.append([*cells, *map(ms, (found.by_bytes, found.by_instructions, found.by_exponentials, found.ms))])
    spilled = sum(binary["spills"] for binary in content["binaries"])
    count = len(content["binaries"])
    lines = [
        f"Predicted for an {H200.name} (not measured), {ROWS:,} rows, binaries of sm_90, {content['date'][:10]}:",
        "",
        *table(header, rows),
        "",
        f"Spilled in all {count} binaries (sm_80, sm_90, sm_100, gfx942): {spilled} bytes.",
    ]
    return "\n".join(lines)


def settings(content: Content) -> str:
    """Return the table of the steps that sweep.py compares, the default first, by their binaries."""
    rows: list[list[str]] = []
    for binary in content["alternatives"]:
        stage, _, vocab = binary["kernel"].split()
        found = predict(binary, H200, ROWS * int(vocab[2:]), 2 if stage == "token_logp" else 4)
        ahead = ["prefetch"] if binary["prefetch"] else []
        ahead += [f"copies in {binary['num_stages']} stages"] if binary["num_stages"] > 1 else []
        chosen = not rows or not rows[-1][0].startswith(stage)
        cells = [stage + " (chosen)" * chosen, f"{binary['threads']} x {binary['bytes_a_thread']} bytes"]
        cells += [", ".join(ahead + [binary["evict"]] * bool(binary["evict"])), str(binary["registers"])]
        rows.append([*cells, *resident(found, binary["loop"])])
    return "\n".join(table(["kernel", "threads", "ahead", "registers", *RESIDENT], rows))


def trajectory_passes(content: Content) -> str:
    """Return the table of the trajectory stage's kernels on sm_90, and their longest chain."""
    parts = {
        b["kernel"].split()[1]: b
        for b in content["binaries"]
        if b["arch"] == "sm_90" and b["kernel"].startswith("trajectory") and b["kernel"].endswith("fp32")
    }
    tokens, steps, V = 4096, 3, 151_936
    chain = trajectory_chain(parts, H200, tokens, steps, ROWS // tokens)
    power = parts["power"]
    near, far = (f(p["instructions"] for p in power["passes"][-3:-1]) for f in (min, max))
    registers = ", ".join(f"{part} {binary['registers']}" for part, binary in parts.items())
    step = 1e3 * 3 * ROWS * V * 2 / H200.bandwidth
    return (
        f"The trajectory stage is three kernels; their registers: {registers}. `sums` and `gradient` take a block of "
        f"{parts['sums']['columns']} tokens a program, `power` a trajectory with {power['threads']} threads, and {near:.0f} "
        f"instructions a token in a pass at one p where weights are near 1 ({far:.0f} elsewhere). The longest chain of a "
        f"trajectory of {tokens:,} tokens with {steps} Newton steps is at most {chain.instructions:,.0f} instructions of a thread, "
        f"every branch counted as taken: {chain.sums:,.0f} for the sums of a block, {chain.power:,.0f} for p, "
        f"{chain.gradient:,.0f} for the gradient of a block. To issue them takes {chain.issue_ms:.3f} ms, "
        f"{chain.issue_ms / step:.1%} of the {step:.2f} ms that a step on {ROWS // tokens} such trajectories takes by its bytes "
        f"(bfloat16, V = {V:,}); latencies come on top."
    )


def performance() -> str:
    """Return the block of docs/performance.md, what the binaries promise, with a section for each version of Triton."""
    parts = []
    for path in sorted(RESULTS.glob("binaries-*.json")):
        compiled = json.loads(path.read_text())
        title = f"### Triton {compiled['versions']['triton']}"
        parts += [title, predictions(compiled), trajectory_passes(compiled), settings(compiled)]
    return "\n\n".join([START, *parts, END])


def performance_cpu() -> str:
    """Return the block of docs/performance_cpu.md."""
    files = load("stages.json")
    on_cpu = {path: c for path, c in load("bench-*.json").items() if c["case"]["device"] == "cpu"}
    parts = ["A step beside eager PyTorch and `torch.compile`, medians:"]
    parts += ["\n".join(comparison(mine, "../")) for mine in folders(on_cpu)]
    parts += [
        f"{stages(c)}\n\n![Stages and floors](../{p.with_suffix('.png').relative_to(ROOT).as_posix()})"
        for p, c in files.items()
    ]
    return "\n\n".join([START, *parts, END])


def main(check: Annotated[bool, typer.Option(help="Only compare.")] = False) -> None:
    """Renew the blocks, or with --check compare them."""
    docs = ROOT / "docs"
    blocks = [
        (ROOT / "README.md", START, END, readme()),
        (docs / "fused_head.md", HEAD_START, HEAD_END, fused_head()),
        (docs / "performance.md", START, END, performance()),
        (docs / "performance_cpu.md", START, END, performance_cpu()),
        (RESULTS / "PENDING.md", TARGETS_START, TARGETS_END, "\n".join([TARGETS_START, *listed(), TARGETS_END])),
    ]
    for path, start, end, block in blocks:
        text = path.read_text()
        renewed = text[: text.index(start)] + block + text[text.index(end) + len(end) :]
        if check and renewed != text:
            name = path.relative_to(ROOT)
            typer.echo(f"{name}: differs from benchmarks/results/; run python tools/readme_table.py", err=True)
            raise typer.Exit(1)
        path.write_text(renewed)


if __name__ == "__main__":
    typer.run(main)
