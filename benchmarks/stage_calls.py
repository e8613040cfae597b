"""The stages of an implementation, each to be timed alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pmpo_kernels.benchmarking.inputs import Inputs
from pmpo_kernels.config import LossConfig
from pmpo_kernels.ops import stage


def stage_calls(impl: str, inputs: Inputs, config: LossConfig) -> dict[str, Callable[[], object]]:
    """`token_logp`, `trajectory` (p solved where it is adaptive), `dlogits`, and `dlogits_` in place, which writes over the
    logits of the inputs: they have to be restored after it."""
    i = inputs
    B, T = i.mask.shape
    logp, row_max, row_sum, entropy = stage("token_logp", impl)(i.logits, i.token_ids, i.mask, config.temperature)
    tokens = (logp.flatten(), i.old_logp.flatten(), i.advantages, i.mask.flatten())
    offsets = torch.arange(B + 1, device=logp.device) * T
    options = list(config.trajectory_options(has_power=False, has_target_ess=False))
    rest = (offsets, None, None, entropy.flatten(), None, None, None, options)
    dlogp = stage("trajectory", impl)(*tokens, *rest)[0].view(B, T).to(logp.dtype)
    saved = (row_max, row_sum, entropy, dlogp, None, config.temperature)
    return {
        "token_logp": lambda: stage("token_logp", impl)(i.logits, i.token_ids, i.mask, config.temperature),
        "trajectory": lambda: stage("trajectory", impl)(*tokens, *rest),
        "dlogits": lambda: stage("dlogits", impl)(i.logits, i.token_ids, i.mask, *saved),
        "dlogits_": lambda: stage("dlogits_", impl)(i.logits, i.token_ids, i.mask, *saved),
    }
