"""Draws mathematics.png: the clip, the ESS of the example of docs/mathematics.md, and p against the clipped fraction.

python docs/images/mathematics.py  (seconds on a CPU)
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from pmpo_kernels import LossConfig, PMPOOutput, pmpo_loss_from_logp

OUT = Path(__file__).with_name("mathematics.png")
EXAMPLE = torch.tensor([[0.6, 0.2, 0.05, -0.1, -0.3]], dtype=torch.float64)
CONFIG = LossConfig.pmpo(full_clip_fraction=0.4)
BLUE, ORANGE, GREY = "#2a6fbb", "#c2571a", "#777777"


def call(d: Tensor, A: float = 1.0, **options: object) -> PMPOOutput:
    """Trajectories (B, n) with these log-ratios and one advantage."""
    advantages = torch.full((len(d),), A, dtype=torch.float64)
    return pmpo_loss_from_logp(d, torch.zeros_like(d), advantages, denominator=1, **options)  # type: ignore[arg-type]


def draw_clip(axis: Axes) -> None:
    ratios = torch.linspace(0.3, 2, 200, dtype=torch.float64)
    for A, colour in ((1.0, BLUE), (-1.0, ORANGE)):
        surrogate = [-call(ratio.log().view(1, 1), A, config=CONFIG).loss for ratio in ratios]
        axis.plot(ratios, surrogate, color=colour, label=f"A = {A:+.0f}")
    for bound in (-CONFIG.clip_low, CONFIG.clip_high):
        axis.axvline(torch.tensor(bound).exp(), color=GREY, lw=0.8, ls=":")
    axis.set(xlabel="ratio of one token", ylabel="surrogate, - loss", title="Clip")
    axis.legend()


def draw_ess(axis: Axes) -> None:
    powers = torch.linspace(0, 1, 101, dtype=torch.float64)
    out = call(EXAMPLE.expand(len(powers), -1), power=powers, config=CONFIG)
    solved = call(EXAMPLE, config=CONFIG)
    p, target = float(solved.power), float(solved.metrics["ess_target"])
    axis.plot(powers, out.ess, color=BLUE)
    axis.plot([0, p, p], [target, target, float(out.ess.min())], color=ORANGE, ls="--")
    axis.plot(p, target, "o", color=ORANGE)
    axis.annotate(f"ESS* = {target:.3f}\np = {p:.3f}", (p, target), (6, 6), textcoords="offset points", color=ORANGE)
    axis.set(xlabel="p", ylabel="ESS(p) of 5 tokens", title="Clipping sets ESS*, ESS* sets p")


def draw_power(axis: Axes) -> None:
    """f of 200 tokens lie at the clip, the others are normal."""
    n, fractions = 200, torch.linspace(0, 0.12, 25)
    normal = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for spread, colour in ((0.02, BLUE), (0.1, "#3b9c6d"), (0.3, ORANGE)):
        d = (spread * normal).clamp(max=0.399).repeat(len(fractions), 1)
        for row, f in zip(d, fractions, strict=True):
            row[: round(float(f) * n)] = 0.5
        out = call(d, config=LossConfig.pmpo())
        axis.plot(out.clip_fraction, out.power, color=colour, label=f"standard deviation {spread}")
    severity = (fractions / 0.1).clamp(max=1)
    axis.plot(fractions, (1 - severity).sqrt(), color=GREY, ls=":", label="sqrt(1 - s)")
    axis.set(xlabel="clipped fraction f", ylabel="p", title="full_clip_fraction = 0.1")
    axis.legend(fontsize=8)


def main() -> None:
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained", dpi=130)
        for draw, axis in zip((draw_clip, draw_ess, draw_power), axes, strict=True):
            draw(axis)
        figure.savefig(OUT)
    print(f"Written: {OUT}")


if __name__ == "__main__":
    main()
