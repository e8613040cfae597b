"""The same loss by other packages, called as installed: Liger's Triton GRPO loss, TRL's fused log-probs and entropy.

pip install liger-kernel==0.8.5 packaging trl==1.16.0
"""

from __future__ import annotations

import importlib.util
import math
from functools import partial

from torch import Tensor

from pmpo_kernels import LossConfig
from pmpo_kernels.benchmarking.cases import Case, Preset
from pmpo_kernels.benchmarking.inputs import Inputs
from pmpo_kernels.benchmarking.machine import installed
from pmpo_kernels.benchmarking.variants import INTERPRETED, PEER, LossFunction, Variant
from pmpo_kernels.impls import INTERPRETER, TRITON_INSTALLED, interpreted
from pmpo_kernels.verification.baseline import eager_loss_from_logp

LIGER, TRL = "Liger", "TRL"
LEVELS = {Preset.grpo: "token", Preset.gspo: "sequence"}  # the presets that Liger computes with loss_type="grpo"
DISTRIBUTIONS = ("liger-kernel", "trl", "transformers")


def build_liger(level: str, config: LossConfig) -> LossFunction:
    """Build Liger's `triton_grpo_loss`, out of place. Every argument is given, because its defaults are another loss."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def loss(logits: Tensor, i: Inputs) -> Tensor:
        return triton_grpo_loss(
            logits,
            i.old_logp,
            None,
            i.token_ids,
            i.advantages,
            completion_mask=i.mask,
            temperature=config.temperature,
            beta=0.0,
            eps_low=-math.expm1(-config.clip_low),
            eps_high=math.expm1(config.clip_high),
            inplace=False,
            loss_type="grpo",
            max_completion_length=None,
            importance_sampling_level=level,
            reduce=True,
            vllm_is_ratio=None,
            delta=None,
            use_bias_correction_kl=False,
            num_items_in_batch=None,
        )[0]

    return loss


def build_trl(config: LossConfig) -> LossFunction:
    """Build TRL's `selective_log_softmax_and_entropy` (one fused pass on a GPU) without a gradient of the entropy, then the rest of
    the baseline. On a CPU 16-bit logits become float32, as a mixed-precision model returns them, because TRL would compute in 16
    bits there."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    def loss(logits: Tensor, i: Inputs) -> Tensor:
        logp, entropy = selective_log_softmax_and_entropy(
            logits if logits.is_cuda else logits.float(),
            i.token_ids,
            entropy_requires_grad=False,
            temperature=config.temperature,
            row_mask=i.mask,
        )
        return eager_loss_from_logp(logp.float(), entropy.float(), i.old_logp, i.advantages, i.mask, config, i.power)

    return loss


def peers(case: Case) -> tuple[list[Variant], dict[str, str]]:
    """Return the packages that compute this case's loss here, and for the others the reason why they are not measured."""
    chosen, skipped = [], {}
    level = LEVELS.get(case.preset)
    name = f"{LIGER}, {level} level" if level else LIGER
    if level is None:
        skipped[name] = (
            f"computes no {case.preset.value}; compared on {' and '.join(preset.value for preset in LEVELS)}"
        )
    elif importlib.util.find_spec("liger_kernel") is None:
        skipped[name] = "not installed (pip install liger-kernel packaging)"
    elif not TRITON_INSTALLED:
        skipped[name] = "Triton is not installed (pip install triton)"
    elif case.device != "cuda" and not interpreted():
        skipped[name] = f"no GPU is visible to PyTorch; {INTERPRETER}"
    else:
        untimed = INTERPRETED if interpreted() else None
        chosen.append(Variant(name, PEER, partial(build_liger, level), one_more=True, untimed=untimed))
    if importlib.util.find_spec("trl") is None:
        skipped[TRL] = "not installed (pip install trl)"
    else:
        chosen.append(Variant(TRL, PEER, build_trl))
    return chosen, skipped


def versions() -> dict[str, str]:
    """Versions of the packages that are compared with."""
    return {name: installed(name) for name in DISTRIBUTIONS}
