"""`stage_functions`: the stages of an implementation as functions, to time each alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pmpo_kernels.batch import Batch
from pmpo_kernels.benchmarking.inputs import Inputs
from pmpo_kernels.config import LossConfig
from pmpo_kernels.ops import stage


def stage_calls(impl: str, inputs: Inputs, config: LossConfig) -> dict[str, Callable[[], object]]:
    """Return `token_logp`, `trajectory`, `dlogits` and `dlogits_` as functions without arguments. An adaptive p is solved.
    `dlogits_` writes over the logits of the inputs, which have to be restored after it."""
    i = inputs
    B, T = i.mask.shape
    logp, row_max, row_sum, entropy = stage("token_logp", impl)(i.logits, i.token_ids, i.mask, config.temperature)
    offsets = torch.arange(B + 1, device=logp.device) * T
    options = list(config.trajectory_options(has_power=False, has_target_ess=False))
    batch = Batch(i.advantages, offsets, old_logp=i.old_logp.flatten(), mask=i.mask.flatten())
    arguments = (logp.flatten(), entropy.flatten(), *batch, options)
    dlogp = stage("trajectory", impl)(*arguments)[0].view(B, T).to(logp.dtype)
    saved = (row_max, row_sum, entropy, dlogp, None, config.temperature)
    return {
        "token_logp": lambda: stage("token_logp", impl)(i.logits, i.token_ids, i.mask, config.temperature),
        "trajectory": lambda: stage("trajectory", impl)(*arguments),
        "dlogits": lambda: stage("dlogits", impl)(i.logits, i.token_ids, i.mask, *saved),
        "dlogits_": lambda: stage("dlogits_", impl)(i.logits, i.token_ids, i.mask, *saved),
    }
