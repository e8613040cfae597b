"""Draws losses.png: the token weights W(p) and the mean M_p of one real trajectory, and its ESS, against p.

python docs/images/losses.py  (needs what the demo needs; about a minute on a CPU)
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import track

from pmpo_kernels import LossConfig, pmpo_loss_from_logp, token_logp

sys.path.append(str(Path(__file__).parents[2] / "examples" / "demo"))
from demo import Settings, off_policy
from demo_figure import token_labels
from rollouts import Policy
from smollm2 import load_model

OUT = Path(__file__).with_name("losses.png")
SETTINGS = Settings(
    seed=0, prompts=4, completions=8, max_new_tokens=32, learning_rate=4e-5, dtype="float32", device="cpu"
)
SHOWN = {2.0: "HölderPO, p = 2", 1.0: "GRPO, p = 1", 0.5: "p = 1/2", 0.0: "GMPO, p = 0", -1.0: "HMPO, p = -1"}
CONFIG = LossConfig.pmpo()


def trajectory() -> tuple[torch.Tensor, list[str], float]:
    """Clipped log-ratios (n,) and tokens of the rollout of the demo whose p is nearest to 1/2, and that p."""
    console = Console()
    policy = Policy(*load_model(torch.device("cpu")), dtype=torch.float32)
    second, _, _ = off_policy(SETTINGS, policy, console, console.print)
    with torch.no_grad():
        logp = token_logp(policy.logits(second), second.token_ids, mask=second.mask).logp
    out = pmpo_loss_from_logp(logp, second.old_logp, second.advantages, mask=second.mask)
    row = int(((out.power - 0.5).abs() + (second.advantages == 0)).argmin())
    keep, sign = second.mask[row], float(second.advantages[row].sign())
    d = (logp[row] - second.old_logp[row])[keep].double()
    d = d.clamp(max=CONFIG.clip_high) if sign > 0 else d.clamp(min=-CONFIG.clip_low)
    return d, token_labels(policy.tokenizer, second.token_ids[row][keep]), float(out.power[row])


def curves(d: torch.Tensor, powers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """M_p and ESS / n at each p, by the package."""
    zeros, A = torch.zeros(1, len(d), dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    means, ess = [], []
    for p in track(powers.tolist(), "powers"):
        out = pmpo_loss_from_logp(d[None], zeros, A, power=p, config=LossConfig.grpo(clip="none"))
        means.append(-out.loss)
        ess.append(out.ess[0] / len(d))
    return torch.stack(means), torch.stack(ess)


def main() -> None:
    d, labels, adapted = trajectory()
    powers = torch.linspace(-4, 4, 161, dtype=torch.float64)
    means, ess = curves(d, powers)
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plt.figure(figsize=(12, 8), layout="constrained", dpi=130)
        grid = figure.add_gridspec(2, 2, height_ratios=[1.15, 1])
        weights, mean, effective = (figure.add_subplot(grid[0, :]), *(figure.add_subplot(grid[1, i]) for i in (0, 1)))
        colours = plt.cm.viridis(torch.linspace(0, 0.9, len(SHOWN)).numpy())
        for (p, label), colour in zip(SHOWN.items(), colours, strict=True):
            weights.plot(len(d) * torch.softmax(p * d, 0), marker="o", ms=4, color=colour, label=label)
            at = int((powers - p).abs().argmin())
            for axis, curve in ((mean, means), (effective, ess)):
                axis.plot(p, curve[at], "o", color=colour, zorder=3)
        weights.set_xticks(range(len(d)), labels, rotation=60, ha="right", fontsize=8)
        weights.set_ylabel("n W(p), the token's share of the gradient")
        weights.legend(fontsize=9, ncols=len(SHOWN), loc="upper left", framealpha=0.9)
        weights.margins(y=0.15)
        for axis, curve, label in ((mean, means, "M_p, the mean of the ratios"), (effective, ess, "ESS(p) / n")):
            axis.plot(powers, curve, color="#555555", lw=1.5)
            axis.axvline(adapted, color="#c2571a", lw=1.2, ls="--")
            axis.set_xlabel("p")
            axis.set_ylabel(label)
        mean.text(adapted + 0.1, float(means.min()), f"PMPO: p = {adapted:.2f}", color="#c2571a", va="bottom")
        figure.suptitle("One trajectory of SmolLM2-135M, one optimizer step off-policy: what p does", fontweight="bold")
        figure.savefig(OUT)
    print(f"Written: {OUT}")


if __name__ == "__main__":
    main()
