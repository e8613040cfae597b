"""The cases of Liger: its Triton GRPO loss from logits, and its chunked one from hidden states.

Without a GPU the former runs under Triton's interpreter. Every option is given, because the defaults are another loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from liger_kernel.transformers.grpo_loss import triton_grpo_loss
from torch import Tensor

from pmpo_kernels.config import LossConfig
from pmpo_kernels.impls import INTERPRETER, interpreted
from pmpo_kernels.verification.peers import LENGTHS, ParityBatch, ParityCase, token_weights


class Options(NamedTuple):
    """The options of a loss, which Liger's two ways take by partly different names."""

    loss_type: str
    level: str = "token"
    low: float = 0.2
    high: float = 0.2
    beta: float = 0.0
    delta: float | None = None
    temperature: float = 1.0
    items: float = 1.0
    rollout: bool = False
    bias_correction: bool = False

    def shared(self) -> dict[str, Any]:
        """The arguments that have the same names in both ways, without those that depend on the batch."""
        return {
            "beta": self.beta,
            "delta": self.delta,
            "importance_sampling_level": self.level,
            "loss_type": self.loss_type,
            "max_completion_length": max(LENGTHS),
            "temperature": self.temperature,
            "use_bias_correction_kl": self.bias_correction,
        }

    def of_batch(self, batch: ParityBatch) -> dict[str, Any]:
        """The arguments that have the same names in both ways and depend on the batch."""
        weights = batch.rollout_weights if self.rollout else None
        return {"vllm_is_ratio": weights, "num_items_in_batch": batch.mask.sum() * self.items}


def triton_loss(batch: ParityBatch, logits: Tensor, **options: Any) -> Tensor:
    """Loss (0-d) by Liger's `triton_grpo_loss`, out of place. `options` are those of `Options`."""
    o = Options(**options)
    value = triton_grpo_loss(
        logits, batch.old_logp, batch.ref_logp if o.beta else None, batch.token_ids, batch.advantages,
        completion_mask=batch.mask.long(), inplace=False, reduce=True, eps_low=o.low, eps_high=o.high, **o.shared(),
        **o.of_batch(batch),
    )[0]  # fmt: skip
    assert isinstance(value, Tensor)
    return value


def chunked_loss(batch: ParityBatch, hidden: Tensor, weight: Tensor, *, chunk_size: int = 1, **options: Any) -> Tensor:
    """Loss (0-d) by Liger's `LigerFusedLinearGRPOLoss`, not compiled. `options` are those of `Options`."""
    o = Options(**options)
    function = LigerFusedLinearGRPOLoss(
        compiled=False, use_ref_model=o.beta != 0, chunk_size=chunk_size, epsilon_low=o.low, epsilon_high=o.high,
        **o.shared(),
    )  # fmt: skip
    value = function(
        hidden[:, :-1], weight, batch.token_ids, batch.mask.long(), batch.advantages,
        ref_per_token_logps=batch.ref_logp if o.beta else None, old_per_token_logps=batch.old_logp, **o.of_batch(batch),
    )[0]  # fmt: skip
    assert isinstance(value, Tensor)
    return value


def pair(
    name: str, preset: str, ours: dict[str, Any], denominator: str = "default", *, rollout: bool = False, **options: Any
) -> list[ParityCase]:
    """Make two cases of the same loss, from logits and from hidden states."""
    options["rollout"] = rollout
    given = {"rollout_weights": token_weights} if rollout else {}

    def from_logits(batch: ParityBatch, logits: Tensor) -> Tensor:
        return triton_loss(batch, logits, **options)

    def from_hidden(batch: ParityBatch, hidden: Tensor, weight: Tensor) -> Tensor:
        return chunked_loss(batch, hidden, weight, chunk_size=3, **options)

    return [
        ParityCase(f"{name}, Triton", from_logits, preset, ours, "logits", denominator, given),
        ParityCase(f"{name}, chunked", from_hidden, preset, ours, "hidden", denominator, given),
    ]


def cases() -> list[ParityCase]:
    """The cases, of token and of sequence level. Raises RuntimeError where Triton cannot run."""
    if not interpreted() and not torch.cuda.is_available():
        raise RuntimeError(f"no GPU is visible to PyTorch; {INTERPRETER}")
    sequence: dict[str, Any] = LossConfig.ratio_clip(0.02, 0.03)
    level: dict[str, Any] = {"level": "sequence", "low": 0.02, "high": 0.03}
    # old_logp is that of temperature 1, so at another one the ratios spread: hence a small change and wider clips
    warm: dict[str, Any] = {"temperature": 0.95}
    wide: dict[str, Any] = LossConfig.ratio_clip(0.3, 0.3)
    losses = [
        pair("grpo", "grpo", {}, "rows", loss_type="grpo"),
        pair("grpo, delta", "grpo", {"dual_clip": 1.3}, "rows", loss_type="grpo", delta=1.3),
        pair("grpo, beta", "grpo", {"beta": 0.1}, "rows", loss_type="grpo", beta=0.1),
        pair("grpo, beta, bias correction", "grpo", {"beta": 0.1, "kl_bias_correction": True}, "rows", loss_type="grpo",
             beta=0.1, bias_correction=True),
        pair("grpo, temperature", "grpo", {**wide, **warm}, "rows", loss_type="grpo", low=0.3, high=0.3, **warm),
        pair("grpo, rollout weights", "grpo", {}, "rows", loss_type="grpo", rollout=True),
        pair("bnpo", "grpo", {"loss_agg_mode": "token-mean"}, loss_type="bnpo"),
        pair("dr_grpo", "dr_grpo", {"max_length": max(LENGTHS)}, "rows", loss_type="dr_grpo"),
        pair("dapo", "dapo", {}, loss_type="dapo", high=0.28),
        pair("dapo, more items", "dapo", {}, "1.5 tokens", loss_type="dapo", high=0.28, items=1.5),
        pair("grpo, sequence level", "gspo", sequence, "rows", loss_type="grpo", **level),
        pair("grpo, sequence level, delta, beta", "gspo", {**sequence, "dual_clip": 1.1, "beta": 0.1}, "rows",
             loss_type="grpo", **level, delta=1.1, beta=0.1),
    ]  # fmt: skip
    return [case for both in losses for case in both]
