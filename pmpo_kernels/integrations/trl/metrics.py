"""`loss_metrics`: the loss's metrics for TRL's logs, over all ranks, with one transfer to the host for a micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pmpo_kernels.api import PMPOOutput

COUNTS = ("tokens", "tokens of known trajectories", "known trajectories")
MEANS = {  # name in the log: name in the loss's metrics, and which of COUNTS it is a mean over
    "clip_ratio/low_mean": ("clip_fraction_low", 0),
    "clip_ratio/high_mean": ("clip_fraction_high", 0),
    "clip_ratio/region_mean": ("clip_fraction", 0),
    "entropy": ("entropy", 1),
    "kl": ("ref_kl", 1),
    "pmpo/ratio_mean": ("ratio_mean", 1),
    "pmpo/approx_kl": ("approx_kl", 1),
    "pmpo/power_mean": ("power_mean", 2),
    "pmpo/ess": ("ess", 2),
    "pmpo/ess_target": ("ess_target", 2),
}


def loss_metrics(
    out: PMPOOutput, mask: Tensor, advantages: Tensor, gather: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Return TRL's `entropy`, `kl`, `clip_ratio/low_mean`, `high_mean`, `region_mean`, `low_min`, `high_max`, and as `pmpo/...`:
    `power_mean`, `power_min`, `power_max`, `ess`, `ess_target` (tokens), `ratio_mean`, `ratio_max`, `approx_kl`.

    They are means over the tokens or the non-empty trajectories of all ranks. Trajectories that were skipped because their
    advantage is 0 are left out, because nothing is known of them; only `clip_ratio` counts them, because nothing of them is
    clipped. Where none is left it is NaN, which TRL leaves out of its means.

    Args:
        out: the loss's output for a micro-batch of this rank, (B, T) tokens.
        mask: (B, T), nonzero on the response tokens.
        advantages: (B,).
        gather: concatenates tensors of the same shape over the ranks, along the first dimension.
    """
    valid = mask != 0
    some = valid.any(1)
    known = some & ~out.power.isnan()
    counts = torch.stack([valid.sum(), (valid & known[:, None]).sum(), known.sum()]).double()
    means = {name: of for name, of in MEANS.items() if of[0] in out.metrics}
    sums = [out.metrics[key] * counts[count] for key, count in means.values()]
    low = torch.where(some, torch.where(advantages < 0, out.clip_fraction, 0), torch.inf)
    high = torch.where(some, torch.where(advantages > 0, out.clip_fraction, 0), -torch.inf)
    of_known = {"pmpo/ratio_max": out.metrics["ratio_max"], "pmpo/power_max": out.metrics["power_max"]}
    maxima = {name: torch.where(known.any(), value, -torch.inf) for name, value in of_known.items()}
    maxima["clip_ratio/high_max"] = high.amax()
    minima = {"pmpo/power_min": torch.where(known.any(), out.metrics["power_min"], torch.inf)}
    minima["clip_ratio/low_min"] = low.amin()
    parts = [torch.stack([*sums, *counts]), torch.stack([*maxima.values()]), torch.stack([*minima.values()])]
    sizes = [len(part) for part in parts]
    per_rank = gather(torch.cat([part.double() for part in parts])[None]).split(sizes, dim=1)
    whole = torch.cat([per_rank[0].sum(0), per_rank[1].amax(0), per_rank[2].amin(0)]).tolist()
    n, total = len(means), whole[len(means) : len(means) + len(COUNTS)]
    found = {
        name: value / total[count] if total[count] else math.nan
        for (name, (_, count)), value in zip(means.items(), whole[:n], strict=True)
    }
    ends = zip((*maxima, *minima), whole[n + len(COUNTS) :], strict=True)
    return found | {name: value if math.isfinite(value) else math.nan for name, value in ends}
