"""`PMPOTrainer`: TRL's `GRPOTrainer` with a loss of the power-mean family."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from trl import GRPOTrainer

from pmpo_kernels.api import pmpo_loss_from_logp
from pmpo_kernels.config import LossConfig
from pmpo_kernels.integrations.trl.config import PMPOConfig
from pmpo_kernels.integrations.trl.loss_head import Scoring, add_loss_head
from pmpo_kernels.integrations.trl.metrics import loss_metrics
from pmpo_kernels.linear import linear_pmpo_loss


class PMPOTrainer(GRPOTrainer):
    """`GRPOTrainer` whose loss is one of the power-mean family: PMPO by default, see `PMPOConfig.preset`.

    All arguments are those of `GRPOTrainer`; `args` is a `PMPOConfig`. Old and reference log-probs come from the same kernels
    as the loss, so that an unchanged policy has ratios of 1. The loss of a micro-batch is divided as TRL does it: by its
    completions times the accumulated micro-batches, or for token means by the tokens of the accumulated batch. TRL's logs
    get `pmpo/power_mean` and others beside its own, see `loss_metrics`.

    Raises:
        TypeError: `args` is not a `PMPOConfig`.
        ValueError, RuntimeError: a model whose LM head cannot be fused; use `fused_head=False`.
    """

    _tag_names = ["trl", "pmpo"]  # noqa: RUF012
    _name = "PMPO"
    _paper = {  # noqa: RUF012
        "title": "One Ring to Rule Them All: Unifying Group-Based RL via Dynamic Power-Mean Geometry",
        "id": "2601.22521",
    }

    def __init__(self, model: Any, reward_funcs: Any = None, args: PMPOConfig | None = None, *more: Any, **kwargs: Any):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = PMPOConfig(f"{name.split('/')[-1]}-PMPO")
        if not isinstance(args, PMPOConfig):
            raise TypeError(f"args: expected a PMPOConfig, got {type(args).__name__}")
        self._loss_configs = {"train": args.loss_config(), "eval": args.loss_config()}
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        for scored in (self.model, self.ref_model):
            if scored is not None:
                plain: Any = self.accelerator.unwrap_model(scored)
                add_loss_head(
                    plain.get_base_model() if is_peft_model(plain) else plain,
                    temperature=args.temperature,
                    fused=args.fused_head,
                    float32_head=args.cast_lm_head_to_fp32,
                    impl=args.impl,
                )

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the rewards of all ranks. A preset that depends on them gets its loss for the steps on these completions here."""
        by_function: Tensor = super()._calculate_rewards(*args, **kwargs)
        scored = by_function[~by_function.isnan().all(1)]
        if len(scored):
            config = self.args.reward_rule((scored * self.reward_weights.to(scored)).nansum(1).float())
            self._loss_configs[self._mode] = config or self._loss_configs[self._mode]
        return by_function

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        scoring: Scoring | None = None,
        **kwargs: Any,
    ) -> Any:
        scoring = Scoring(logits_to_keep) if scoring is None else scoring

        def scored(**inputs: Any) -> Any:
            outputs = model(**inputs, scoring=scoring)
            scoring.value = outputs.loss
            return outputs

        return super()._get_per_token_logps_and_entropies(
            scored, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        mode = self._mode
        config = self._loss_configs[mode]
        ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        batch = (torch.cat([inputs["prompt_ids"], ids], 1), torch.cat([inputs["prompt_mask"], mask], 1), ids.shape[1])
        accepted = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
        media: dict[str, Any] = {name: inputs[name] for name in inputs if name in accepted}
        aux: dict[str, Any] = {"compute_aux_loss": True} if self.aux_loss_enabled else {}
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        given: dict[str, Any] = {
            "mask": mask,
            "ref_logp": inputs["ref_per_token_logps"] if config.beta else None,
            "power": self._scheduled_power(),
            "config": config,
            "denominator": self._denominator(inputs, config),
            "impl": self.args.impl,
            **self._rollout_correction(inputs),
        }
        method: Any = self._get_per_token_logps_and_entropies
        score = functools.partial(method, model, *batch, compute_entropy=True, **media, **aux)
        out: Any
        value: Any
        old_logp, advantages = inputs.get("old_per_token_logps"), inputs["advantages"]
        if self.args.fused_head:
            head = {name: getattr(self.args, name) for name in ("max_chunk_tokens", "skip_zero_advantage")}
            loss = functools.partial(
                linear_pmpo_loss, token_ids=ids, old_logp=old_logp, advantages=advantages, **given, **head
            )
            scoring = Scoring(ids.shape[1], loss)
            aux_loss = score(scoring=scoring)[2]
            out, value = scoring.out, scoring.value
        else:
            logp, entropy, aux_loss = score()
            given["policy_mask"] = self._policy_mask(given["policy_mask"], logp, entropy, mask, inputs)
            given["config"] = dataclasses.replace(config, temperature=1.0)  # it is in the log-probs
            out = pmpo_loss_from_logp(logp, old_logp, advantages, entropy=entropy, **given)
            value = out.loss
        for name, measured in loss_metrics(out, mask, advantages, self.accelerator.gather).items():
            self._metrics[mode][name].append(measured)
        if self.aux_loss_enabled:
            value = value + self.router_aux_loss_coef * aux_loss / self._accumulated
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
        return value  # type: ignore[no-any-return]

    @property
    def _accumulated(self) -> int:
        """Number of micro-batches that make an optimizer step; 1 in evaluation."""
        return int(self.current_gradient_accumulation_steps) if self._mode == "train" else 1

    def _scheduled_power(self) -> float | None:
        """p of a preset with a schedule over the optimizer steps, with its start at the first step and its end at the last."""
        last = max(1, self.state.max_steps - 1)
        return self.args.scheduled_power(min(1.0, self.state.global_step / last))  # type: ignore[no-any-return]

    def _denominator(self, inputs: dict[str, Any], config: LossConfig) -> Tensor | float:
        """Return D so that, as in TRL, the gradients of micro-batches add up and those of ranks are averaged."""
        ids, steps = inputs["completion_ids"], self._accumulated
        if config.loss_agg_mode != "token-mean":
            return float(len(ids) * steps)
        if self.args.preset == "bnpo":
            mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            return mask.sum().clamp(min=1) * steps  # type: ignore[no-any-return]
        per_rank: Tensor = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        return per_rank * steps / self.args.steps_per_generation if self._mode == "train" else per_rank

    def _rollout_correction(self, inputs: dict[str, Any]) -> dict[str, Tensor | None]:
        """Return vLLM's importance-sampling ratios as weights in the mean. Tokens that it rules out, at ratio 0, leave the mean."""
        ratio = inputs.get("importance_sampling_ratio")
        if ratio is None:
            return {"rollout_weights": None, "policy_mask": None}
        ratio = ratio if ratio.shape[1] == inputs["completion_ids"].shape[1] else ratio.squeeze(1)
        return {"rollout_weights": ratio, "policy_mask": ratio > 0}

    def _policy_mask(
        self, given: Tensor | None, logp: Tensor, entropy: Tensor, mask: Tensor, inputs: dict[str, Any]
    ) -> Tensor | None:
        """Mask (B, T) of the tokens that TRL's off-policy threshold and entropy quantile keep in the policy term, None for all."""
        logp, entropy = logp.detach(), entropy.detach()
        kept = [] if given is None else [given.view(len(given), -1)]
        if self.off_policy_mask_threshold is not None:
            old_logp = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps", logp))
            A = inputs["advantages"][:, None]
            kept.append(self.get_off_policy_mask(A, logp, old_logp, mask, self.off_policy_mask_threshold) != 0)
        if self.top_entropy_quantile < 1:
            kept.append(self.get_high_entropy_mask(entropy, mask, 1 - self.top_entropy_quantile))
        return functools.reduce(torch.logical_and, kept).expand_as(logp) if kept else None
