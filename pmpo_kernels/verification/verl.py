"""The cases of verl: its registered policy losses, with its aggregation and its KL estimators, on given log-probs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn, kl_penalty
from verl.workers.config import ActorConfig

from pmpo_kernels.config import LossConfig
from pmpo_kernels.verification.peers import LENGTHS, ParityBatch, ParityCase, token_weights

NO_DUAL_CLIP = 1e9  # verl's vanilla loss always has one, at a ratio of 3 by default


def actor(low: float, high: float, dual_clip: float = NO_DUAL_CLIP) -> ActorConfig:
    """Make verl's actor configuration with these clips. Every bound is given, because `clip_ratio` alone changes none."""
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=2,
        clip_ratio=low,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=dual_clip,
    )


def loss(
    name: str, config: ActorConfig, batch: ParityBatch, logp: Tensor, mode: str = "token-mean", *,
    scale: int = 0, rollout: bool = False, beta: float = 0.0, estimator: str = "k3",
) -> Tensor:  # fmt: skip
    """Loss (0-d) by verl's policy loss `name`, plus beta times the aggregated KL estimate. With a `scale` the batch is the share of
    one of two ranks, and the whole batch is `scale` times as large."""
    config.global_batch_info.clear()
    if scale:
        config.global_batch_info.update(
            dp_size=2,
            batch_num_tokens=int(batch.mask.sum()) * scale,
            global_batch_size=int(batch.mask.any(1).sum()) * scale,
        )
    value, _ = get_policy_loss_fn(name)(
        old_log_prob=batch.old_logp,
        log_prob=logp,
        advantages=batch.advantages[:, None].expand_as(logp),
        response_mask=batch.mask,
        loss_agg_mode=mode,
        config=config,
        rollout_is_weights=batch.rollout_weights if rollout else None,
    )
    if beta:
        kl = kl_penalty(logprob=logp, ref_logprob=batch.ref_logp, kl_penalty=estimator)
        value = value + beta * agg_loss(kl, batch.mask, mode, **config.global_batch_info)
    assert isinstance(value, Tensor)
    return value


def case(
    name: str, preset: str, ours: dict[str, Any], denominator: str = "default", *,
    of: str = "vanilla", clip: tuple[float, ...] = (0.2, 0.2), rollout: bool = False, **options: Any,
) -> ParityCase:  # fmt: skip
    """Make a case of verl's options and ours. `clip` is low, high and perhaps the dual clip."""

    def theirs(batch: ParityBatch, logp: Tensor) -> Tensor:
        return loss(of, actor(*clip), batch, logp, rollout=rollout, **options)

    given = {"rollout_weights": token_weights} if rollout else {}
    return ParityCase(name, theirs, preset, ours, "logp", denominator, given)


def cases() -> list[ParityCase]:
    """The cases: vanilla with every mode of aggregation, gspo, geo_mean, and the KL estimators."""
    T, mean = max(LENGTHS), "seq-mean-token-mean"
    sum_norm, token_sum = "seq-mean-token-sum-norm", "seq-mean-token-sum"
    by_token = {"loss_agg_mode": "token-mean"}
    sequence, narrow = LossConfig.ratio_clip(0.02, 0.03), (0.02, 0.03)
    return [
        case("vanilla, token-mean", "dapo", {}, clip=(0.2, 0.28)),
        case(f"vanilla, {mean}", "grpo", {}, mode=mean),
        case(f"vanilla, {sum_norm}", "dr_grpo", {"max_length": T}, mode=sum_norm),
        case(f"vanilla, {token_sum}", "dr_grpo", {"max_length": 1}, mode=token_sum),
        case("vanilla, token-sum", "grpo", by_token, "1", mode="token-sum"),
        case("vanilla, dual clip", "dapo", {"dual_clip": 1.3}, clip=(0.2, 0.28, 1.3)),
        case(f"vanilla, dual clip, {mean}", "grpo", {"dual_clip": 1.3}, clip=(0.2, 0.2, 1.3), mode=mean),
        case("vanilla, token-mean, 2 ranks", "dapo", {}, "1.5 tokens", clip=(0.2, 0.28), scale=3),
        case(f"vanilla, {mean}, 2 ranks", "grpo", {}, "1.5 non-empty rows", mode=mean, scale=3),
        case(f"vanilla, {sum_norm}, 2 ranks", "dr_grpo", {"max_length": T}, "1.5 non-empty rows",
             mode=sum_norm, scale=3),
        case("vanilla, rollout weights", "dapo", {}, clip=(0.2, 0.28), rollout=True),
        *(case(f"vanilla, {k}", "grpo", {"beta": 0.1, "kl_estimator": k}, mode=mean, beta=0.1, estimator=k)
          for k in ("k1", "k2", "k3")),
        *(case(f"vanilla, {k}+", "grpo", {"beta": 0.1, "kl_estimator": k, "kl_straight_through": True},
               mode=mean, beta=0.1, estimator=f"{k}+") for k in ("k1", "k3")),
        case(f"gspo, {mean}", "gspo", sequence, of="gspo", clip=narrow, mode=mean),
        case("gspo, token-mean", "gspo", {**sequence, **by_token}, of="gspo", clip=narrow),
        case(f"gspo, {mean}, 2 ranks", "gspo", sequence, "1.5 non-empty rows", of="gspo", clip=narrow, mode=mean, scale=3),
        case("geo_mean", "gmpo", {}, "rows", of="geo_mean", clip=(0.4, 0.4)),
        case("geo_mean, rollout weights", "gmpo", {}, "rows", of="geo_mean", clip=(0.4, 0.4), rollout=True),
    ]  # fmt: skip
