"""Fused power-mean policy losses for reinforcement learning of language models: GRPO, GMPO, HMPO, GSPO, HölderPO, PMPO."""

from pmpo_kernels import reference, schedules
from pmpo_kernels.api import PMPOOutput, TokenLogp, pmpo_loss, pmpo_loss_from_logp, token_logp
from pmpo_kernels.config import LossConfig
from pmpo_kernels.impls import available_impls
from pmpo_kernels.linear import linear_pmpo_loss
from pmpo_kernels.solver import solve_power
from pmpo_kernels.version import __version__

__all__ = [
    "LossConfig",
    "PMPOOutput",
    "TokenLogp",
    "__version__",
    "available_impls",
    "linear_pmpo_loss",
    "pmpo_loss",
    "pmpo_loss_from_logp",
    "reference",
    "schedules",
    "solve_power",
    "token_logp",
]
