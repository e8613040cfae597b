"""Write the predictions into docs/scaling.md and draw docs/images/scaling.png. Nothing is measured.

python benchmarks/scaling/tables.py          renews the blocks between the markers, and the picture
python benchmarks/scaling/tables.py --check  exits 1 if a block does not say what the model says; the picture is not compared
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Annotated

import typer
from counts import Call, Head, Scheme, memory
from network import Device, collectives
from picture import draw
from prediction import H100, H200, MODELS, Model, Prediction, predict
from schemes import (
    CALL,
    GPUS,
    LENGTH,
    MEMORY_OF,
    QUARTER,
    ROOT,
    SCHEMES,
    SMALLER,
    SMALLER_CHUNK,
    TOKENS,
    break_even,
    step,
)

PAGE = ROOT / "docs" / "scaling.md"
MARKERS = "<!-- {}:start -->", "<!-- {}:end -->"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]


def number(x: float) -> str:
    """Write a number with three digits and a prefix."""
    for size, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if x >= size:
            return f"{x / size:.3g}{prefix}"
    return f"{x:.3g}"


def comma(x: float) -> str:
    return f"{x:,.0f}"


def percent(x: float) -> str:
    return f"{100 * x:.2g} %" if x < 0.995 else f"{100 * x:.0f} %"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.2g}"


def per_token() -> list[str]:
    """Make the table of what a token costs under each scheme, in the middle of the range."""
    model, gpus = MODELS[0], 64
    header = ["scheme", "FLOPs of products", "bytes of products", "bytes of passes", "sent by the loss"]
    header += [
        "sent for the head's weight",
        "ns of products",
        "of passes",
        "of the loss's collectives",
        "of the weight's",
    ]
    rows = []
    for name in SCHEMES:
        found = step(model, name, 1e7, gpus)
        passes = found.passes * H100.bandwidth * H100.of_bandwidth
        cells = [found.flops, found.moved - passes, passes, found.sent, found.weight_sent]
        times = [found.products, found.passes, found.exchange, found.weight]
        rows.append(
            [name, *(number(x / found.tokens) for x in cells), *(f"{1e9 * t / found.tokens:,.0f}" for t in times)]
        )
    return [
        f"**A token** of a step of {number(1e7)} tokens on {gpus} {H100.name}, {model.name}, calls of {CALL:,} tokens a GPU;"
        " all per token that falls to a GPU:",
        "",
        *table(header, rows),
    ]


def predictions() -> list[str]:
    """Make the table of predictions, a line for each model, number of tokens and of GPUs."""
    shown = ["eager, FSDP", "fused, FSDP", "fused, tp 8", "fused, cp 8, FSDP"]
    header = ["model", "tokens a step", "GPUs", "tokens a GPU", "step, s"]
    header += ["eager, FSDP", "`pmpo_loss` or fused, FSDP", "fused, tp 8", "fused, cp 8, FSDP"]
    header += ["loss alone: eager", "fused", "fused, tp 8", "weight's collectives over head and loss: FSDP", "tp 8"]
    header += ["agreement of dp, ms"]
    rows = []
    for model in MODELS:
        for tokens in TOKENS:
            for gpus in GPUS:
                found = {name: step(model, name, tokens, gpus) for name in SCHEMES}
                fsdp, tp = found["fused, FSDP"], found["fused, tp 8"]
                assert percent(fsdp.share) == percent(found["`pmpo_loss`, FSDP"].share)  # one column for both
                cells = [model.name, number(tokens), f"{gpus:,}", f"{fsdp.tokens:,.0f}"]
                cells += [f"{fsdp.head + fsdp.below:,.3g}"]
                cells += [percent(found[name].share) for name in shown]
                cells += [percent(found[name].loss_share) for name in shown[:3]]
                cells += [percent(x.weight / x.head) for x in (fsdp, tp)]
                cells += [milliseconds(fsdp.agreement)]
                rows.append(cells)
    return [
        "**Share of the training step** (forward and backward of the model) that head and loss take, and the loss alone,"
        f" {H100.name}, calls of {CALL:,} tokens a GPU, trajectories of {LENGTH:,}:",
        "",
        *table(header, rows),
    ]


def most_tokens(head: Head, scheme: Scheme, room: float) -> int:
    """Most tokens of one call whose peak is within `room`, found by halving."""
    low, high = 0, 1 << 32
    while high - low > 1:
        middle = (low + high) // 2
        fits = memory(head, scheme, Call(middle, max(1, middle // LENGTH))) <= room
        low, high = (middle, high) if fits else (low, middle)
    return low


def memories() -> list[str]:
    header = ["model", "", *MEMORY_OF]
    rows = []
    for model in MODELS:
        for tokens in (CALL, 8 * CALL):
            call = Call(tokens, tokens // LENGTH)
            peaks = [f"{memory(model.head, scheme, call) / 1e9:.3g}" for scheme in MEMORY_OF.values()]
            rows.append([model.name, f"peak of a call of {tokens:,} tokens, GB", *peaks])
        most = [f"{most_tokens(model.head, scheme, QUARTER):,}" for scheme in MEMORY_OF.values()]
        rows.append([model.name, f"most tokens of a call in {QUARTER / 1e9:.0f} GB", *most])
    return [
        "**Memory** of a call on a rank, logits and gradients without the weight (bfloat16):",
        "",
        *table(header, rows),
    ]


def other_assumptions() -> list[Device]:
    """Return devices with every assumed share a third less or more, at most 1, in every combination."""
    shares = ("of_flops", "of_flops_below", "of_bandwidth", "of_link")
    factors = product((2 / 3, 4 / 3), repeat=len(shares))
    changes = [
        {name: min(1.0, f * getattr(H100, name)) for name, f in zip(shares, row, strict=True)} for row in factors
    ]
    return [replace(H100, **change) for change in changes]


def spread(values: list[float], form: Callable[[float], str]) -> str:
    values = sorted(values)
    ends = [form(values[0]), form(values[-1])]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def widest(model: Model, scheme: Scheme) -> float:
    """Hidden size at which the loss's passes take as long as the head's products. Both grow with V and the tokens."""
    found = predict(model, scheme, H100, 1e7, CALL, LENGTH)
    return model.head.hidden * found.passes / found.products


def findings() -> list[str]:
    """Return what the tables say as sentences with their numbers."""
    places = [(model, 1e7, 64) for model in MODELS]  # bound by arithmetic
    everywhere = [(model, tokens, gpus) for model in MODELS for tokens in TOKENS for gpus in GPUS]

    def of(name: str, value: Callable[[Prediction], float], device: Device = H100) -> str:
        return spread([value(step(model, name, *place, device)) for model, *place in places], percent)

    def loss(found: Prediction) -> float:
        return found.loss_share

    def exchange(found: Prediction) -> float:
        return found.exchange / found.head

    varied = [
        spread([step(MODELS[0], name, 1e7, 64, device).loss_share for device in other_assumptions()], percent)
        for name in ("eager, FSDP", "`pmpo_loss`, FSDP")
    ]
    eager, logits, split = "eager, FSDP", "`pmpo_loss`, FSDP", "fused, tp 8"
    small = [step(SMALLER[0], name, 1e7, 64).loss_share for name in (eager, logits)]
    hidden = [widest(MODELS[0], SCHEMES[name](64)) for name in (eager, logits)]
    even = [break_even(model, Scheme(dp=512)) for model in MODELS]
    bound = [place for place in everywhere if step(place[0], "fused, FSDP", *place[1:]).weight_bound]
    (gather,) = (c for c in collectives(MODELS[0].head, Scheme(tp=8, path="logits"), Call(8, 1)) if "log" in c.what)
    twice = [
        step(model, "the same, 4,096 a chunk", *place).head / step(model, "fused, cp 8, FSDP", *place).head
        for model, *place in places
    ]
    host = step(MODELS[0], "fused, FSDP", 1e6, 4096)
    call = Call(CALL, CALL // LENGTH)
    peaks = [
        spread([memory(model.head, MEMORY_OF[name], call) / 1e9 for model in MODELS], lambda x: f"{x:.2g}")
        for name in ("eager", "`pmpo_loss`", "fused", "fused, 4,096 a chunk")
    ]
    return [
        "What the tables say:",
        "",
        f"1. **From 7B on the loss is not what a step waits for**, eager or not: eager PyTorch's takes {of(eager, loss)} of it,"
        f" `pmpo_loss` {of(logits, loss)} (H200: {of(logits, loss, H200)}). In small models it is: {SMALLER[0].name}"
        f" {percent(small[0])} and {percent(small[1])}. Beside the head's products, which stay, the loss's passes take longer"
        f" where H is below {hidden[0]:,.0f} (eager) or {hidden[1]:,.0f} (`pmpo_loss`), whatever V is.",
        "2. **The share does not depend on the size of the step or the number of GPUs** while a GPU has enough tokens. With FSDP"
        f" over several nodes, below {spread(even, comma)} tokens a GPU and call the weight's gather and its gradient's reduction"
        " take longer than products and loss, whatever H and V are: both grow with V x H. No kernel helps then, only more tokens a"
        f" call. In the table these are {len(bound)} of {len(everywhere)} rows, those with"
        f" {spread([tokens / gpus for _, tokens, gpus in bound], comma)} tokens a GPU.",
        f"3. **The gather of a split vocabulary is negligible**: {gather.sent:,.0f} bytes sent for each token that falls to a GPU"
        f' (tp 8), {1e9 * gather.sent / H100.link(8, 1):.1f} ns. What "tp" costs is the sum of dhidden, which a column-parallel'
        f" head needs with any loss, and the start of its collectives: {of(split, exchange)} of head and loss. What it saves is"
        " the weight's traffic in steps of many calls: once a step instead of once a call.",
        f'4. **The gather of "cp" is {of("fused, cp 8, FSDP", exchange)} of head and loss.** Where the logits of all of the'
        " rank's tokens take no more than a quarter of the free memory, they are one chunk by default. A rank with more tokens than"
        f" a chunk projects twice, {spread(twice, lambda x: f'{x:.2f}')} times the time of head and loss.",
        "5. **Memory, not time, decides between logits and the fused head.** The model gives both the same time (that products of"
        f" {SMALLER_CHUNK:,} tokens are as fast as longer ones is an assumption); a call of {CALL:,} tokens takes {peaks[0]} GB"
        f" in eager PyTorch, {peaks[1]} GB with `pmpo_loss`, {peaks[2]} GB fused, {peaks[3]} GB in chunks of {SMALLER_CHUNK:,}.",
        "6. **An exchange between hosts grows with the ranks**: among"
        f' {4096:,} of "dp" {milliseconds(host.agreement)} ms at the assumed {1e6 * H100.host_latency:.0f} us a hop, when a step of'
        f" 1 M tokens takes {milliseconds(host.head + host.below)} ms. It is not in the shares: take D once a step with"
        ' `denominator`, and leave "dp" out of the mesh of the calls.',
        f"7. **What hangs on the assumed shares**: with each a third less or more, in every combination, the loss takes {varied[0]}"
        f" (eager) or {varied[1]} (`pmpo_loss`) of a step of {MODELS[0].name}, and the weight's collectives take longer below"
        f" {spread([break_even(MODELS[0], Scheme(dp=512), device) for device in other_assumptions()], comma)} tokens a GPU and"
        " call. Memory and bytes sent do not depend on them.",
    ]


def rates() -> list[str]:
    """Make the tables of the devices' figures, from data sheets, and assumed shares, and of the models' parameters."""
    header = ["", *(device.name for device in (H100, H200)), "share assumed"]
    figures: list[tuple[str, Callable[[Device], str], str]] = [
        ("dense bfloat16, TFLOP/s", lambda d: f"{d.flops / 1e12:,.0f}", f"products {percent(H100.of_flops)}, the layers below"
         f" {percent(H100.of_flops_below)}"),
        ("memory bandwidth, TB/s", lambda d: f"{d.bandwidth / 1e12:.3g}", percent(H100.of_bandwidth)),
        ("memory, GB", lambda d: f"{d.memory / 1e9:.0f}", ""),
        (f"sent within a node of {H100.node}, GB/s", lambda d: f"{d.intra / 1e9:.0f}", percent(H100.of_link)),
        ("sent beyond it, a GPU's card, GB/s", lambda d: f"{d.inter / 1e9:.0f}", percent(H100.of_link)),
        ("latency of each of log2 R steps, us", lambda d: f"{1e6 * d.latency:.0f}", "assumed itself"),
        ("between hosts, of each of R - 1 hops, us", lambda d: f"{1e6 * d.host_latency:.0f}", "assumed itself"),
    ]  # fmt: skip
    rows = [[what, *(of(device) for device in (H100, H200)), share] for what, of, share in figures]
    models = [
        [m.name, comma(m.head.hidden), comma(m.head.vocabulary), number(m.active), number(m.sharded)]
        for m in (*SMALLER, *MODELS)
    ]
    header_of_models = [
        "model",
        "H",
        "V",
        "parameters below the head that a token passes",
        "whose weights FSDP gathers",
    ]
    return [*table(header, rows), "", *table(header_of_models, models)]


def blocks() -> dict[str, str]:
    """Return the block between each pair of markers."""
    tables = [per_token(), predictions(), memories(), findings()]
    return {"predictions": "\n\n".join("\n".join(part) for part in tables), "rates": "\n".join(rates())}


def main(check: Annotated[bool, typer.Option(help="Only compare.")] = False) -> None:
    """Renew the blocks and the picture, or with --check compare the blocks."""
    text = renewed = PAGE.read_text()
    for name, block in blocks().items():
        start, end = (marker.format(name) for marker in MARKERS)
        renewed = renewed[: renewed.index(start)] + f"{start}\n\n{block}\n\n" + renewed[renewed.index(end) :]
    if check and renewed != text:
        typer.echo("docs/scaling.md: differs from the formulas; run python benchmarks/scaling/tables.py", err=True)
        raise typer.Exit(1)
    if not check:
        PAGE.write_text(renewed)
        draw()


if __name__ == "__main__":
    typer.run(main)
