"""The picture: clipping, ESS and p of each trajectory, and one trajectory's token weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rollouts import Rollouts
from torch import Tensor

from pmpo_kernels.api import PMPOOutput, pmpo_loss_from_logp
from pmpo_kernels.config import LossConfig
from pmpo_kernels.reference import clip_log_ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RAISED, LOWERED, NEUTRAL = "#0b6e99", "#c2571a", "#8a8a8a"
FLAT, ADAPTED, FULL = "#8a8a8a", "#7b2d8b", "#d9a514"


@dataclass(frozen=True)
class Trajectories:
    """The second half under the updated policy; `ess_at_one` (at p = 1) and `tokens` are (B,)."""

    rollouts: Rollouts
    output: PMPOOutput
    ess_at_one: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, rollouts: Rollouts, output: PMPOOutput) -> Trajectories:
        """Make it from the loss's own result."""
        r = rollouts
        at_one = pmpo_loss_from_logp(output.logp, r.old_logp, r.advantages, mask=r.mask, power=1.0, impl="reference")
        return cls(r, output, at_one.ess, r.mask.sum(-1))

    def token_weights(self, row: int, power: float) -> tuple[Tensor, Tensor]:
        """n W_t (n,) of one trajectory at one p, W = softmax(p d'), and which of its tokens are clipped (n,)."""
        r, config = self.rollouts, LossConfig.pmpo()
        keep = r.mask[row]
        d = (self.output.logp[row] - r.old_logp[row])[keep].double()
        sign = r.advantages[row].double().expand_as(d)
        clipped, below, above = clip_log_ratio(d, sign, config.clip_low, config.clip_high, float("inf"), float("inf"))
        return len(d) * torch.softmax(power * clipped, 0), below | above


def token_labels(tokenizer: Any, token_ids: Tensor) -> list[str]:
    """Return one printable string a token, with spaces and line breaks shown and what the font may lack escaped."""
    texts = [str(tokenizer.decode([i])).replace(" ", "\u2423").replace("\n", "\u21b5") for i in token_ids.tolist()]
    known = ["".join(c if c in "\u2423\u21b5" or ord(c) < 0x250 else f"\\{ord(c):x}" for c in text) for text in texts]
    return [text if len(text) <= 14 else text[:13] + "\u2026" for text in known]


def draw(path: Path, data: Trajectories, row: int, tokenizer: Any, title: str) -> None:
    """Write the PNG: three panels over the trajectories, p against clip fraction, and the token weights of `row`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plt.figure(figsize=(13, 11), layout="constrained", dpi=130)
        figure.suptitle(title, fontsize=14, fontweight="bold")
        outer = figure.add_gridspec(2, 1, height_ratios=[1.25, 1])
        upper = figure.add_subfigure(outer[0])
        lower = figure.add_subfigure(outer[1])
        grid = upper.add_gridspec(3, 2, width_ratios=[2, 1])
        first = upper.add_subplot(grid[0, 0])
        panels = [first, *(upper.add_subplot(grid[i, 0], sharex=first) for i in (1, 2))]
        _panels(panels, data, row)
        _scatter(upper.add_subplot(grid[:, 1]), data, row)
        _weights(lower.add_subplot(), data, row, tokenizer)
        figure.savefig(path)
        plt.close(figure)


def _colours(data: Trajectories) -> list[str]:
    return [RAISED if a > 0 else LOWERED if a < 0 else NEUTRAL for a in data.rollouts.advantages.tolist()]


def _panels(panels: list[Axes], data: Trajectories, row: int) -> None:
    """Draw clip fraction, ESS/n and p along the trajectories, sorted by clip fraction."""
    out, colours = data.output, _colours(data)
    order = torch.argsort(out.clip_fraction - 1e-6 * out.power, stable=True).tolist()
    x, colour = list(range(len(order))), [colours[i] for i in order]
    clip, power = (100 * out.clip_fraction)[order].tolist(), out.power[order].tolist()
    ess, ess_at_one = ((e / data.tokens)[order].tolist() for e in (out.ess, data.ess_at_one))
    top, middle, bottom = panels
    full = 100 * LossConfig.pmpo().full_clip_fraction
    top.axhline(full, color=NEUTRAL, lw=1, ls="--")
    top.text(0, full, f"from {full:.0f} % on, p = 0", va="bottom", ha="left", color="#555555", fontsize=9)
    top.bar(x, clip, color=colour, width=0.65)
    top.set_ylabel("clipped tokens, %")
    middle.vlines(x, ess_at_one, ess, color=colour, lw=2, alpha=0.5)
    middle.scatter(x, ess_at_one, s=38, facecolors="white", edgecolors=colour, label="at p = 1", zorder=3)
    middle.scatter(x, ess, s=38, c=colour, label="at its own p", zorder=3)
    middle.set_ylabel("ESS / n")
    middle.legend(loc="lower left", fontsize=9, ncols=2, framealpha=0.9)
    bottom.bar(x, power, color=colour, width=0.65)
    bottom.set_ylabel("p")
    bottom.set_ylim(0, 1.08)
    bottom.set_xlabel("trajectories of the second half, by clip fraction; number = row of the printed table")
    bottom.set_xticks(x, [f"{i + 1}" for i in order])
    bottom.get_xticklabels()[order.index(row)].set_fontweight("bold")
    for panel in (top, middle):
        panel.tick_params(labelbottom=False)
    signs = {RAISED: "A > 0: log-probs pushed up", LOWERED: "A < 0: pushed down", NEUTRAL: "A = 0: no gradient"}
    for n, c in enumerate(c for c in signs if c in colours):
        top.text(0.32, 1 - 0.16 * n, f"\u25a0 {signs[c]}", color=c, transform=top.transAxes, va="top", fontsize=9.5)


def _scatter(axes: Axes, data: Trajectories, row: int) -> None:
    """Draw p against clip fraction, over what the rule gives for small Gaussian log-ratios."""
    out, config = data.output, LossConfig.pmpo()
    f = torch.linspace(0, max(float(out.clip_fraction.max()), config.full_clip_fraction) * 1.05, 400)
    limit = (1 - (f / config.full_clip_fraction).clamp(max=1)).sqrt()
    axes.plot(100 * f, limit, color=NEUTRAL, lw=1.2, ls="--", label="small Gaussian log-ratios: $\\sqrt{1 - s}$")
    clip, power = 100 * out.clip_fraction, out.power
    axes.scatter(clip, power, c=_colours(data), s=46, alpha=0.8, zorder=3)
    axes.scatter(
        clip[row], power[row], s=150, facecolors="none", edgecolors=ADAPTED, lw=1.8, zorder=4, label="shown below"
    )
    axes.set_xlabel("clipped tokens, %")
    axes.set_ylabel("p")
    axes.set_ylim(-0.04, 1.08)
    axes.set_title("p against clipping", fontsize=11)
    axes.legend(loc="upper right", fontsize=9)


def _weights(axes: Axes, data: Trajectories, row: int, tokenizer: Any) -> None:
    """Draw n W_t of one trajectory at p = 0, its own p and p = 1, with clipped tokens shaded."""
    r, own = data.rollouts, float(data.output.power[row])
    keep = r.mask[row]
    x = list(range(int(keep.sum())))
    for power, colour, name in ((0.0, FLAT, "p = 0"), (1.0, FULL, "p = 1"), (own, ADAPTED, f"its own p = {own:.2f}")):
        weights, clipped = data.token_weights(row, power)
        axes.plot(x, weights, color=colour, marker="o", ms=5, lw=1.6, label=name)
    for n, i in enumerate(clipped.nonzero()[:, 0].tolist()):
        label = "clipped: no gradient" if n == 0 else None
        axes.axvspan(i - 0.5, i + 0.5, color="#f0dcd0", zorder=0, lw=0, label=label)
    a, b = r.operands[row].tolist()
    axes.set_title(
        f"Token weights $n\\,W_t$ of trajectory {row + 1} (\u201c{a} + {b}\u201d, "
        f"advantage {float(r.advantages[row]):+.2f}, {100 * float(data.output.clip_fraction[row]):.1f} % clipped)",
        fontsize=11,
    )
    axes.set_ylabel("$n\\,W_t$")
    axes.set_xlim(-0.6, len(x) - 0.4)
    axes.set_xticks(
        x,
        token_labels(tokenizer, r.token_ids[row][keep]),
        rotation=60,
        ha="right",
        rotation_mode="anchor",
        parse_math=False,
    )
    axes.legend(loc="best", fontsize=9, ncols=2)
