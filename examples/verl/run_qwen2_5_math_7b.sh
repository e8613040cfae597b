#!/usr/bin/env bash
# Qwen2.5-Math-7B on MATH with verl 0.9.1, 8 GPUs of 80 GB: bash run_qwen2_5_math_7b.sh METHOD [further overrides of verl's]
# METHOD: pmpo, gmpo, holder (this package's losses), grpo or gspo (verl's own, to compare with). See README.md beside it.
set -euo pipefail

usage="usage: ${0##*/} pmpo|gmpo|holder|grpo|gspo [verl overrides ...]"
method="${1:?${usage}}"
shift

actor=actor_rollout_ref.actor
rollout=actor_rollout_ref.rollout

case "${method}" in
  pmpo)
    # The rule that maps clipping to p is this package's choice (docs/pmpo_rule.md); the clip is GMPO's.
    loss=(
      "${actor}.policy_loss.loss_mode=pmpo"
      "+${actor}.policy_loss.options.clip_low=0.4"
      "+${actor}.policy_loss.options.clip_high=0.4"
      "+${actor}.policy_loss.options.full_clip_fraction=0.1"
    )
    ;;
  gmpo)
    # Token clip 0.4 in log space: arXiv 2507.20673.
    loss=(
      "${actor}.policy_loss.loss_mode=gmpo"
      "+${actor}.policy_loss.options.clip_low=0.4"
      "+${actor}.policy_loss.options.clip_high=0.4"
    )
    ;;
  holder)
    # Sequence clip 1 +- 0.2 (in log space -log 0.8, log 1.2): arXiv 2605.12058, the preset's own. There p falls from 2 to -2;
    # verl tells a loss no step, so p is fixed here: README.md, "p of HölderPO".
    loss=(
      "${actor}.policy_loss.loss_mode=holder"
      "+${actor}.policy_loss.options.power=1.0"
    )
    ;;
  grpo)
    loss=(
      "${actor}.policy_loss.loss_mode=vanilla"
      "${actor}.clip_ratio_low=0.2"
      "${actor}.clip_ratio_high=0.2"
    )
    ;;
  gspo)
    # Sequence ratio clipped to [1 - 3e-4, 1 + 4e-4]: arXiv 2507.18071.
    loss=(
      "${actor}.policy_loss.loss_mode=gspo"
      "${actor}.clip_ratio_low=3e-4"
      "${actor}.clip_ratio_high=4e-4"
    )
    ;;
  *)
    echo "METHOD: expected pmpo, gmpo, holder, grpo or gspo, got ${method}" >&2
    exit 2
    ;;
esac

case "${method}" in
  pmpo | gmpo | holder)
    loss+=("${actor}.policy_loss._target_=pmpo_kernels.integrations.verl.PowerMeanLossConfig")
    ;;
esac

# From the released runs of GMPO and HölderPO: 128 prompts x 8 answers a step, 128 answers an update (16 prompts x 8 in verl's
# count), 1024 + 3000 tokens, temperature 1, learning rate 1e-6 without schedule, no KL, one pass.
papers=(
  algorithm.adv_estimator=grpo
  algorithm.use_kl_in_reward=False
  data.train_batch_size=128
  data.max_prompt_length=1024
  data.max_response_length=3000
  actor_rollout_ref.model.path=Qwen/Qwen2.5-Math-7B
  "${actor}.optim.lr=1e-6"
  "${actor}.optim.lr_scheduler_type=constant"
  "${actor}.ppo_mini_batch_size=16"
  "${actor}.ppo_epochs=1"
  "${actor}.use_kl_loss=False"
  "${actor}.entropy_coeff=0"
  "${actor}.loss_agg_mode=seq-mean-token-mean"
  "${rollout}.n=8"
  "${rollout}.temperature=1.0"
  "${rollout}.top_p=1.0"
)

# Ours: memory, speed, length of the run, files. None of them changes the loss.
machine=(
  data.train_files=data/math/train.parquet
  data.val_files=data/math/test.parquet
  data.filter_overlong_prompts=True
  data.truncation=error
  actor_rollout_ref.model.use_remove_padding=True
  actor_rollout_ref.model.enable_gradient_checkpointing=True
  "${actor}.use_dynamic_bsz=True"
  "${actor}.ppo_max_token_len_per_gpu=16384"
  "${rollout}.log_prob_use_dynamic_bsz=True"
  "${rollout}.log_prob_max_token_len_per_gpu=16384"
  "${rollout}.name=vllm"
  "${rollout}.tensor_model_parallel_size=1"
  "${rollout}.gpu_memory_utilization=0.6"
  trainer.n_gpus_per_node=8
  trainer.nnodes=1
  trainer.total_epochs=20
  trainer.total_training_steps=500
  trainer.save_freq=100
  trainer.test_freq=20
  trainer.project_name=pmpo_kernels
  "trainer.experiment_name=qwen2.5-math-7b-${method}"
  'trainer.logger=["console"]'
)

exec python3 -m verl.trainer.main_ppo "${loss[@]}" "${papers[@]}" "${machine[@]}" "$@"
