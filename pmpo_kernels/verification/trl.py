"""The cases of TRL: the loss of a real `GRPOTrainer`, or of its `GMPOTrainer`, on given log-probs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from pmpo_kernels.config import LossConfig
from pmpo_kernels.verification.peers import LENGTHS, ParityBatch, ParityCase, entropy, token_weights

ACCUMULATION = 4
OFF_POLICY_THRESHOLD, TOP_ENTROPY = -0.1, 0.6
Made = Callable[[ParityBatch], Tensor]


class GivenLogp(torch.nn.Module):
    """Stands in for the policy where TRL asks for log-probs of prompt and completion. The prompt is one token before `logp`."""

    def __init__(self, logp: Tensor, entropy: Tensor) -> None:
        super().__init__()
        self.logp, self.entropy = logp, entropy

    def forward(self, **_: Any) -> Any:
        """Return what TRL reads of a model's output: `log_probs` and `entropy`, each (B, 1 + T)."""
        logp, entropy = (torch.nn.functional.pad(x, (1, 0)) for x in (self.logp, self.entropy))
        output: Any = CausalLMOutput()
        output.log_probs, output.entropy = logp, entropy
        return output


def trainer(*, gmpo: bool = False, accumulation: int = 1, beta: float = 0.0, **options: Any) -> GRPOTrainer:
    """Make a GRPOTrainer (with `gmpo` a GMPOTrainer) for a model of two words, in training mode, with these options."""
    words = Tokenizer(WordLevel({"<pad>": 0, "a": 1}, unk_token="<pad>"))
    tokenizer: Any = PreTrainedTokenizerFast  # its call has no annotations
    size: dict[str, Any] = dict.fromkeys(("hidden_size", "intermediate_size"), 4)
    count: dict[str, Any] = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    made = (GMPOTrainer if gmpo else GRPOTrainer)(
        model=Qwen2ForCausalLM(Qwen2Config(vocab_size=2, **size, **count)),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        processing_class=tokenizer(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>"),
        train_dataset=Dataset.from_dict({"prompt": ["a"]}),
        args=(GMPOConfig if gmpo else GRPOConfig)(
            output_dir=tempfile.gettempdir(),  # nothing is written
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            per_device_train_batch_size=len(LENGTHS),
            num_generations=len(LENGTHS),
            max_completion_length=max(LENGTHS),
            gradient_accumulation_steps=accumulation,
            **options,
        ),
    )
    made.current_gradient_accumulation_steps = accumulation  # as the loop of `train` sets it
    made.beta = beta  # given at the start, it would load a reference model by its name
    made.model.train()
    return made


def loss(
    made: GRPOTrainer, batch: ParityBatch, logp: Tensor, *, items: float = 1.0, rollout: Tensor | None = None
) -> Tensor:
    """Loss (0-d) by a trainer's `_compute_loss`. The generation batch has `items` times the tokens of this one; `rollout` are
    weights (B, T) or (B, 1)."""
    prompt = torch.ones_like(batch.token_ids[:, :1])
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": batch.token_ids,
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages,
        "num_items_in_batch": batch.mask.sum() * items,
        "old_per_token_logps": batch.old_logp,
        "ref_per_token_logps": batch.ref_logp,
    }
    if rollout is not None:  # what a trainer with a vLLM server has: the option needs the server, its loss does not
        made.use_vllm, made.vllm_importance_sampling_correction = True, True
        inputs["importance_sampling_ratio"] = rollout
    value = made._compute_loss(GivenLogp(logp, entropy(batch)), inputs)
    assert isinstance(value, Tensor)
    return value


def case(
    name: str, preset: str, ours: dict[str, Any], denominator: str = "default", *,
    items: float = 1.0, weights: Made | None = None, policy_mask: Made | None = None, **options: Any,
) -> ParityCase:  # fmt: skip
    """Make a case of TRL's options and ours. The trainer is built when the case runs."""

    def theirs(batch: ParityBatch, logp: Tensor) -> Tensor:
        if options.get("gmpo"):  # it adds -A of an empty row to the loss
            batch = batch._replace(advantages=torch.where(batch.mask.any(1), batch.advantages, 0))
        made = weights and weights(batch)
        rollout = made[:, None] if made is not None and made.dim() == 1 else made
        return loss(trainer(**options), batch, logp, items=items, rollout=rollout)

    made_of = {"rollout_weights": weights, "policy_mask": policy_mask}
    given = {argument: make for argument, make in made_of.items() if make is not None}
    return ParityCase(name, theirs, preset, ours, "logp", denominator, given)


def row_weights(batch: ParityBatch) -> Tensor:
    """Rollout weights (B,), one a row."""
    return batch.rollout_weights[:, 0]


def off_policy(batch: ParityBatch) -> Tensor:
    """Mask (B,) of the rows that TRL keeps at OFF_POLICY_THRESHOLD."""
    kept = GRPOTrainer.get_off_policy_mask(
        batch.advantages[:, None], batch.logp, batch.old_logp, batch.mask.long(), OFF_POLICY_THRESHOLD
    )
    assert isinstance(kept, Tensor)
    return kept[:, 0]


def high_entropy(batch: ParityBatch) -> Tensor:
    """Mask (B, T) of the tokens that TRL keeps at the quantile TOP_ENTROPY."""
    kept = trainer().get_high_entropy_mask(entropy(batch), batch.mask.long(), 1 - TOP_ENTROPY)
    assert isinstance(kept, Tensor)
    return kept


def cases() -> list[ParityCase]:
    """The cases: token-level and sequence-level losses of `GRPOTrainer`, and GMPO."""
    sequence: dict[str, Any] = LossConfig.ratio_clip(0.02, 0.03)
    level: dict[str, Any] = {"importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03}
    # by default TRL multiplies k3 by the ratio
    plain_kl: dict[str, Any] = {"beta": 0.1, "use_bias_correction_kl": False}
    T, by_token = max(LENGTHS), {"loss_agg_mode": "token-mean"}
    token_sum = {"loss_agg_mode": "seq-mean-token-sum-norm", "max_length": 1}
    return [
        case("grpo", "grpo", {}, "rows", loss_type="grpo"),
        case("grpo, delta", "grpo", {"dual_clip": 1.3}, "rows", loss_type="grpo", delta=1.3),
        case("grpo, beta", "grpo", {"beta": 0.1}, "rows", loss_type="grpo", **plain_kl),
        case("grpo, accumulation", "grpo", {}, "4 rows", loss_type="grpo", accumulation=ACCUMULATION),
        case("grpo, rollout weights", "grpo", {}, "rows", loss_type="grpo", weights=token_weights),
        case("bnpo", "grpo", by_token, loss_type="bnpo"),
        case("dr_grpo", "dr_grpo", {"max_length": T}, "rows", loss_type="dr_grpo"),
        case("dapo", "dapo", {}, loss_type="dapo", epsilon_high=0.28),
        case("dapo, more items", "dapo", {}, "1.5 tokens", loss_type="dapo", epsilon_high=0.28, items=1.5),
        case("dapo, beta", "dapo", {"beta": 0.1}, loss_type="dapo", epsilon_high=0.28, **plain_kl),
        case("grpo, sequence level", "gspo", sequence, "rows", loss_type="grpo", **level),
        case("grpo, sequence level, delta, beta", "gspo", {**sequence, "dual_clip": 1.1, "beta": 0.1}, "rows",
             loss_type="grpo", **level, delta=1.1, **plain_kl),
        case("dapo, sequence level", "gspo", {**sequence, **by_token}, loss_type="dapo", **level),
        case("luspo, sequence level", "gspo", {**sequence, **token_sum}, "rows", loss_type="luspo", **level),
        case("grpo, beta, bias correction", "grpo", {"beta": 0.1, "kl_bias_correction": True}, "rows", loss_type="grpo", beta=0.1),
        case("dapo, beta, bias correction", "dapo", {"beta": 0.1, "kl_bias_correction": True},
             loss_type="dapo", epsilon_high=0.28, beta=0.1),
        case("grpo, rollout weights of rows", "grpo", {}, "rows", loss_type="grpo", weights=row_weights),
        case("grpo, off-policy mask, beta", "grpo", {"beta": 0.1}, "rows", loss_type="grpo", **plain_kl,
             policy_mask=off_policy, off_policy_mask_threshold=OFF_POLICY_THRESHOLD),
        case("grpo, entropy mask", "grpo", {}, "rows", loss_type="grpo",
             policy_mask=high_entropy, top_entropy_quantile=TOP_ENTROPY),
        case("dapo, entropy mask, beta", "dapo", {"beta": 0.1}, loss_type="dapo", epsilon_high=0.28, **plain_kl,
             policy_mask=high_entropy, top_entropy_quantile=TOP_ENTROPY),
        case("GMPO", "gmpo", {}, "rows", gmpo=True),
        case("GMPO, beta", "gmpo", {"beta": 0.1}, "rows", gmpo=True, **plain_kl),
    ]  # fmt: skip
