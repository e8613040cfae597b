"""Draws docs/images/scaling.png: shares of the step over models, times over tokens a GPU, memory over tokens of a call."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from counts import Call, Scheme, memory
from prediction import H100, H200, MODELS, predict
from schemes import LENGTH, MEMORY_OF, ROOT, SCHEMES, SMALLER, break_even, step

PICTURE = ROOT / "docs" / "images" / "scaling.png"
COLOURS = {"eager": "#c2571a", "logits": "#2f6db3", "fused": "#1d8a5f", "below": "#9a9a9a", "weight": "#7a3fa0"}


def draw() -> None:
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained", dpi=130)
        draw_shares(axes[0])
        draw_times(axes[1])
        draw_memory(axes[2])
        figure.suptitle("Predicted, not measured: head and loss of a training step on H100 SXM", fontweight="bold")
        figure.savefig(PICTURE)


def draw_shares(axis: Any) -> None:
    """Draw bars for products and loss, eager beside ours, over the models."""
    models = [*SMALLER, *MODELS]
    for i, model in enumerate(models):
        for shift, name, path in ((-0.2, "eager, FSDP", "eager"), (0.2, "`pmpo_loss`, FSDP", "logits")):
            found = step(model, name, 1e7, 64)
            loss, head = 100 * found.loss_share, 100 * found.share
            axis.bar(i + shift, head - loss, 0.36, color="#d0d0d0")
            axis.bar(i + shift, loss, 0.36, bottom=head - loss, color=COLOURS[path])
            axis.text(i + shift, head + 0.4, f"{loss:.2g}", ha="center", fontsize=8, color=COLOURS[path])
    axis.set_xticks(range(len(models)), [model.name for model in models])
    axis.set_ylabel("% of the training step")
    for colour, label in (
        (COLOURS["eager"], "loss, eager PyTorch"),
        (COLOURS["logits"], "loss, pmpo_loss"),
        ("#d0d0d0", "the head's products"),
    ):
        axis.bar(0, 0, color=colour, label=label)
    axis.legend(frameon=False)
    axis.set_title("The loss matters less, the larger the model\n(10 M tokens, 64 GPUs)", fontsize=10)


def draw_times(axis: Any) -> None:
    """Draw lines for the milliseconds a call of each part over the tokens a GPU."""
    model, tokens = MODELS[0], [2**k for k in range(5, 15)]
    tp = [predict(model, SCHEMES["fused, tp 8"](512), H100, 512 * n) for n in tokens]
    fsdp = [predict(model, SCHEMES["fused, FSDP"](512), H100, 512 * n) for n in tokens]
    cp = [predict(model, SCHEMES["fused, cp 8, FSDP"](512), H100, 512 * n) for n in tokens]
    eager = [predict(model, SCHEMES["eager, FSDP"](512), H100, 512 * n) for n in tokens]
    lines = (
        ("model below", [p.below for p in fsdp], COLOURS["below"], "-"),
        ("the head's weight: gather, reduction", [p.weight for p in fsdp], COLOURS["weight"], "-"),
        ("the head's products", [p.products for p in fsdp], "black", "-"),
        ("loss, eager", [p.passes for p in eager], COLOURS["eager"], "-"),
        ("loss, fused", [p.passes for p in fsdp], COLOURS["fused"], "-"),
        ("tp 8: its collectives", [p.exchange for p in tp], COLOURS["logits"], "--"),
        ("cp 8: its collectives", [p.exchange for p in cp], COLOURS["logits"], ":"),
    )
    for label, seconds, colour, style in lines:
        axis.loglog(tokens, [1e3 * t for t in seconds], style, color=colour, label=label, lw=1.8, base=2)
    axis.set_yscale("log", base=10)
    axis.set_ylim(top=1e6)  # room for the legend
    axis.axvline(break_even(model, Scheme(dp=512)), color=COLOURS["weight"], lw=0.8, ls=(0, (2, 3)))
    axis.set_xlabel("tokens a GPU and call")
    axis.set_ylabel("ms a call")
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    axis.set_title("With few tokens a GPU, the weight's traffic dominates\n(7B, 512 GPUs)", fontsize=10)


def draw_memory(axis: Any) -> None:
    """Draw lines for the peak memory over the tokens of a call."""
    head, tokens = MODELS[1].head, [2**k for k in range(10, 19)]
    styles = {
        "eager": (COLOURS["eager"], "-"),
        "`pmpo_loss`": (COLOURS["logits"], "-"),
        "in place": (COLOURS["logits"], "--"),
        "in place, tp 8": (COLOURS["logits"], ":"),
        "fused": (COLOURS["fused"], "-"),
        "fused, 4,096 a chunk": (COLOURS["fused"], "--"),
        "fused, tp 8": (COLOURS["fused"], ":"),
    }
    for name, scheme in MEMORY_OF.items():
        peaks = [memory(head, scheme, Call(n, max(1, n // LENGTH))) / 1e9 for n in tokens]
        colour, style = styles[name]
        axis.loglog(tokens, peaks, style, color=colour, label=name.strip("`"), lw=1.8, base=2)
    axis.set_yscale("log", base=10)
    axis.set_ylim(top=2e4)
    for device in (H100, H200):
        axis.axhline(device.memory / 1e9, color="#555555", lw=0.8)
        axis.text(tokens[0], device.memory / 1e9 * 1.06, device.name, fontsize=8, color="#555555")
    axis.set_xlabel("tokens of a call")
    axis.set_ylabel("GB of logits and gradients")
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    axis.set_title("Memory, not time, asks for the fused head\n(32B, bfloat16)", fontsize=10)
