"""In TRL: real training with every preset, and loss and gradients of stock `GRPOTrainer` where the loss is the same."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import pmpo_kernels
from pmpo_kernels import LossConfig, pmpo_loss
from pmpo_kernels.config import Preset
from pmpo_kernels.schedules import apmpo_clip, apmpo_power, holder_power
from pmpo_kernels.verification import configurations

pytest.importorskip("trl", reason="TRL is not installed; `make peers` tests with it")
pytest.importorskip("peft", reason="peft is not installed; `make peers` tests with it")

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import GRPOConfig, GRPOTrainer, TrlParser
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from pmpo_kernels.integrations.trl import PMPOConfig, PMPOTrainer
from pmpo_kernels.integrations.trl import trainer as trainer_module
from pmpo_kernels.integrations.trl.config import APMPO_CLIP, APMPO_POWER, HOLDER, NO_CHOICE
from pmpo_kernels.integrations.trl.loss_head import Scoring, check_probe

CHARACTERS = "0123456789+= "
VOCABULARY = {"<pad>": 0, "<eos>": 1, **{c: i + 2 for i, c in enumerate(CHARACTERS)}}
V, B, P, T = len(VOCABULARY), 8, 4, 12  # words, completions, tokens of a prompt and of a completion
LENGTHS = (12, 0, 1, 7, 9, 12, 5, 8)  # padding, an empty completion, one of one token
ADVANTAGES = (1.2, 0.8, -0.6, -1.4, 0.9, 0.0, -0.7, 2.0)
SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PRESETS = get_args(Preset)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The model is so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokenizer() -> Any:
    """A word is a character."""
    words = Tokenizer(WordLevel(VOCABULARY, unk_token="<pad>"))
    words.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def llama() -> Any:
    """Two layers, random weights, the same at every call."""
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, num_key_value_heads=1, **SIZE, **ends))


def saved(folder: Path) -> Any:
    """The model from a folder, from where TRL loads the reference."""
    llama().save_pretrained(folder / "model")
    return LlamaForCausalLM.from_pretrained(folder / "model")


def ones(completions: list[str], **_: Any) -> list[float]:
    return [completion.count("1") / T for completion in completions]


def options(folder: Path, **given: Any) -> dict[str, Any]:
    fixed: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "per_device_train_batch_size": B,
        "per_device_eval_batch_size": B, "num_generations": 4, "max_completion_length": T, "learning_rate": 1e-2,
    }  # fmt: skip
    return fixed | given


def trainer(
    of: Any, config: Any, folder: Path, model: Any = None, more: dict[str, Any] | None = None, **given: Any
) -> Any:
    return of(
        llama() if model is None else model,
        ones,
        config(**options(folder, **given)),
        train_dataset=Dataset.from_dict({"prompt": ["1+1=", "2+3=", "12+4", "3+5="] * 4}),
        processing_class=tokenizer(),
        **(more or {}),
    )


def ours(folder: Path, **given: Any) -> Any:
    return trainer(PMPOTrainer, PMPOConfig, folder, **given)


def stock(folder: Path, **given: Any) -> Any:
    return trainer(GRPOTrainer, GRPOConfig, folder, **given)


def batch(made: Any, accumulation: int = 1, *, rows: slice = slice(None), **more: Tensor) -> dict[str, Any]:
    """What TRL hands to `_compute_loss`: old and reference log-probs some tenths from the model's own."""
    torch.manual_seed(1)
    mask = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.where(mask != 0, torch.randint(2, V, (B, T)), 0)
    inputs = {
        "prompt_ids": torch.randint(2, V, (B, P)),
        "prompt_mask": torch.ones(B, P, dtype=torch.long),
        "completion_ids": ids,
        "completion_mask": mask,
    }
    with torch.no_grad():
        whole = [torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask")]
        logits = made.model(*whole).logits[:, P - 1 : -1] / made.temperature
        logp = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    inputs |= {
        "advantages": torch.tensor(ADVANTAGES),
        "old_per_token_logps": logp + 0.25 * torch.randn(B, T),
        "ref_per_token_logps": logp + 0.3 * torch.randn(B, T),
        **more,
    }
    inputs = {name: value[rows] for name, value in inputs.items()}
    made.current_gradient_accumulation_steps = accumulation  # as the loop of `train` sets it
    made.model.train()
    return inputs | {"num_items_in_batch": (mask * inputs.get("tool_mask", 1) if rows == slice(None) else mask).sum()}


def result(made: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradients of the parameters that have one."""
    made.model.zero_grad()
    loss = made._compute_loss(made.model, inputs)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}


def assert_same(
    got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]], bound: float = 1e-5
) -> None:
    """Loss and the norm of every gradient's difference to 1e-5 (what is asked for float32); each gradient over its own size."""
    assert abs(got[0] - want[0]) <= bound * max(abs(want[0]), 0.1)
    assert got[1].keys() == want[1].keys()
    for name, g in want[1].items():
        assert g.norm() > 0, name
        assert (got[1][name] - g).norm() <= bound * g.norm(), name


def tool_mask() -> Tensor:
    """Two tokens in the middle of every completion are a tool's."""
    mask = torch.ones(B, T, dtype=torch.long)
    mask[:, 3:5] = 0
    return mask


def ratios(width: int) -> Tensor:
    ratio = (0.2 * torch.randn(B, width, generator=torch.Generator().manual_seed(2))).exp()
    ratio[0, 0] = 0  # ruled out
    return ratio


SAME = {
    "grpo": ({"loss_type": "grpo"}, {"preset": "grpo"}),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"preset": "dapo"}),
    "bnpo": ({"loss_type": "bnpo"}, {"preset": "bnpo"}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"preset": "dr_grpo"}),
    "grpo, clips": (
        {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.4},
        {"preset": "grpo", "epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.4},
    ),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        {"preset": "gspo"},
    ),
    "grpo, temperature": ({"loss_type": "grpo", "temperature": 0.7}, {"preset": "grpo", "temperature": 0.7}),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", SAME)
def test_loss_and_gradients_are_those_of_grpo_trainer(name: str, fused: bool, tmp_path: Path) -> None:
    theirs, mine = SAME[name]
    known = {"skip_zero_advantage": False} if fused else {}  # so that the entropy is that of all tokens
    want = stock(tmp_path, **theirs)
    got = ours(tmp_path, **mine, fused_head=fused, **known)
    for accumulation, more in ((1, {}), (4, {}), (1, {"tool_mask": tool_mask()})):
        assert_same(result(got, batch(got, accumulation, **more)), result(want, batch(want, accumulation, **more)))
    # where TRL's clip_ratio counts sequences, not tokens, or leaves out what delta clips
    differs = theirs.keys() & {"importance_sampling_level", "delta"}
    for metric, values in want._metrics["train"].items():
        if not differs or not metric.startswith("clip_ratio"):
            assert got._metrics["train"][metric] == pytest.approx(values, rel=1e-5, abs=1e-7), metric
    losses = []
    for made in (got, want):
        inputs = batch(made, 4)
        made.args.steps_per_generation = 2
        made.model.eval()
        with torch.no_grad():
            losses.append(made._compute_loss(made.model, inputs))
    assert abs(losses[0] - losses[1]) <= 1e-5 * max(abs(losses[1]), 0.1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_kl_as_grpo_trainer(name: str, corrected: bool, fused: bool, tmp_path: Path) -> None:
    theirs, mine = SAME[name]
    given = {"beta": 0.1, "use_bias_correction_kl": corrected}
    want = stock(tmp_path, model=saved(tmp_path), **theirs, **given)
    want_result = result(want, batch(want))
    got = ours(tmp_path, model=saved(tmp_path), **mine, fused_head=fused, **given)
    assert_same(result(got, batch(got)), want_result)


def test_reference_log_probs(tmp_path: Path) -> None:
    """They come from the reference model by the same kernels: at the first step the KL is 0, later it is not."""
    for fused in (True, False):
        made = ours(tmp_path, model=saved(tmp_path), max_steps=4, num_iterations=2, beta=0.1, fused_head=fused)
        made.train()
        kl = [row["kl"] for row in made.state.log_history if "loss" in row]
        assert abs(kl[0]) <= 1e-12 < kl[-1]  # k3 of log-probs that differ by some eps is their square
        ids = torch.randint(2, V, (2, 6))
        with torch.no_grad():
            out = made.ref_model(input_ids=ids, labels=ids, fused_lm_head=True, scoring=Scoring(3))
        assert out.log_probs.shape == (2, 3)


@pytest.mark.parametrize("fused", [True, False])
def test_old_log_probs_have_the_temperature(fused: bool, tmp_path: Path) -> None:
    made = ours(tmp_path, max_steps=2, num_iterations=2, temperature=0.6, fused_head=fused)
    made.train()
    first = next(row for row in made.state.log_history if "loss" in row)
    assert first["pmpo/ratio_max"] == pytest.approx(1, abs=1e-5)  # log-probs of some 24 eps


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("width", [1, T])
@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_rollout_correction_as_grpo_trainer(name: str, width: int, fused: bool, tmp_path: Path) -> None:
    """Ratios of tokens and of whole completions, one of them 0."""
    theirs, mine = SAME[name]
    want, got = stock(tmp_path, **theirs), ours(tmp_path, **mine, fused_head=fused)
    want.use_vllm = want.vllm_importance_sampling_correction = True  # the option needs a server, its loss does not
    more = {"importance_sampling_ratio": ratios(width)}
    assert_same(result(got, batch(got, **more)), result(want, batch(want, **more)))


def test_a_token_that_is_ruled_out_does_not_empty_a_geometric_mean(tmp_path: Path) -> None:
    made = ours(tmp_path, preset="gmpo")
    ratio = torch.ones(B, T)
    plain, _ = result(made, batch(made, importance_sampling_ratio=ratio))
    ratio = ratio.clone()
    ratio[0, 0] = 0
    ruled, _ = result(made, batch(made, importance_sampling_ratio=ratio))
    share = ADVANTAGES[0] / B  # of the first completion at ratios near 1
    assert 0 < abs(ruled - plain) < 0.5 * share


@pytest.mark.parametrize(
    "chosen", [{"top_entropy_quantile": 0.6}, {"off_policy_mask_threshold": -0.1}, {"top_entropy_quantile": 0.6, "off_policy_mask_threshold": -0.1}]
)  # fmt: skip
def test_chosen_tokens_as_grpo_trainer(chosen: dict[str, float], tmp_path: Path) -> None:
    theirs, mine = SAME["grpo"]
    got, want = ours(tmp_path, **mine, **chosen, fused_head=False), stock(tmp_path, **theirs, **chosen)
    without = ours(tmp_path, **mine, fused_head=False)
    assert_same(result(got, batch(got)), result(want, batch(want)))
    more = {"sampling_per_token_logps": batch(want)["old_per_token_logps"].flip(1)}  # vLLM's
    assert_same(result(got, batch(got, **more)), result(want, batch(want, **more)))
    assert abs(result(without, batch(without))[0] - result(want, batch(want))[0]) > 1e-3


def test_gmpo_as_gmpo_trainer(tmp_path: Path) -> None:
    """TRL's takes -A of an empty completion into the loss: without one, they agree."""
    want = trainer(GMPOTrainer, GMPOConfig, tmp_path)
    got = ours(tmp_path, preset="gmpo")
    assert_same(result(got, batch(got, rows=slice(2, None))), result(want, batch(want, rows=slice(2, None))))


@pytest.mark.parametrize("preset", ["pmpo", "grpo", "dapo", "gspo"])
def test_micro_batches_add_up(preset: str, tmp_path: Path) -> None:
    """8 completions at once, as 2 times 4, as 8 times 1: the same loss and gradients."""
    made = ours(tmp_path, preset=preset)
    want = result(made, batch(made))
    for parts in (2, 8):
        size = B // parts
        made.args.steps_per_generation = parts
        each = [result(made, batch(made, parts, rows=slice(i * size, (i + 1) * size))) for i in range(parts)]
        total = sum(loss for loss, _ in each)
        gradients = {name: sum(g[name] for _, g in each) for name in want[1]}
        assert_same((total, gradients), want)


def test_on_policy_without_old_log_probs(tmp_path: Path) -> None:
    made, want = ours(tmp_path, preset="grpo"), stock(tmp_path, loss_type="grpo")
    results = []
    for one in (made, want):
        inputs = batch(one)
        del inputs["old_per_token_logps"]
        results.append(result(one, inputs))
    assert_same(*results)
    assert made._metrics["train"]["pmpo/ratio_max"] == [1.0]


@pytest.mark.parametrize("given", [{"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("fused", [True, False])
def test_gradient_checkpointing(fused: bool, given: dict[str, bool], tmp_path: Path) -> None:
    """TRL's default: the layers run again in the backward pass."""
    norms = []
    for more in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": given}):
        made = ours(tmp_path, max_steps=2, num_iterations=2, fused_head=fused, **more)
        made.train()
        norms.append([row["grad_norm"] for row in made.state.log_history if "loss" in row])
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_training(preset: str, tmp_path: Path) -> None:
    """Six optimizer steps on three rollouts, accumulated over two micro-batches; TRL's metrics and ours, and all weights move."""
    made = ours(
        tmp_path, preset=preset, max_steps=6, num_iterations=2, gradient_accumulation_steps=2, learning_rate=3e-2
    )
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    logs = [row for row in made.state.log_history if "loss" in row]
    assert len(logs) == 6
    for row in logs:
        for name in ("entropy", "grad_norm", "clip_ratio/region_mean", "clip_ratio/high_max", "pmpo/ess"):
            assert math.isfinite(row[name]), name
        assert row["pmpo/power_min"] <= row["pmpo/power_mean"] <= row["pmpo/power_max"]
    assert all(math.isfinite(row["reward"]) for row in logs[::2])  # of new completions
    assert logs[0]["pmpo/ratio_mean"] == pytest.approx(1, abs=1e-5)  # 12 tokens of 24 eps
    assert max(row["pmpo/ratio_max"] for row in logs) > 1.01
    assert all(not torch.equal(p, before[name]) for name, p in made.model.named_parameters())
    powers = [row["pmpo/power_mean"] for row in logs]
    if preset in ("holder", "holder_token"):
        assert powers == pytest.approx([holder_power(step / 5) for step in range(6)], rel=1e-6)
    elif preset == "apmpo":  # accumulated batches share the rewards of their generation
        assert powers[::2] == pytest.approx([math.exp(-0.8 * row["reward"]) for row in logs[::2]], rel=1e-5)
    elif preset == "pmpo":
        assert any(0 < power < 1 for power in powers)
    else:
        assert powers == [configurations()[preset].power] * 6


def test_apmpo_takes_its_clip_from_the_rewards(tmp_path: Path) -> None:
    """Weighted, without completions that no function scores; of a batch that none scores the last loss stays."""
    made = ours(tmp_path, preset="apmpo", apmpo_gamma=0.5, apmpo_eps_max=0.6)
    made.reward_weights = torch.tensor([2.0])
    made.model.train()

    def scored(*completions: str | None) -> Any:
        made.reward_funcs = [lambda completions, **_: [None if c is None else c.count("1") / T for c in completions]]
        made._calculate_rewards([{"prompt": "1"}] * 4, ["1"] * 4, completions, [[3]] * 4)
        return made._loss_configs["train"]

    config, rewards = scored("111", "1", None, "11"), 2 * torch.tensor([3.0, 1, 2]) / T
    assert config.power == pytest.approx(apmpo_power(rewards, gamma=0.5))
    assert config.clip_high == pytest.approx(math.log1p(apmpo_clip(rewards, eps_max=0.6)))
    assert made._loss_configs["eval"] != config
    assert scored(None, None, None, None) is config


def test_resumed_training_goes_on_with_its_schedule(tmp_path: Path) -> None:
    given = {"preset": "holder_token", "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    ours(tmp_path, **given).train()
    made = ours(tmp_path, **given)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    powers = {row["step"]: row["pmpo/power_mean"] for row in made.state.log_history if "loss" in row}
    assert powers == {step + 1: pytest.approx(holder_power(step / 5), rel=1e-6) for step in range(6)}
    assert "PMPO" in (tmp_path / "README.md").read_text()


def test_evaluation(tmp_path: Path) -> None:
    more = {"eval_dataset": Dataset.from_dict({"prompt": ["1+1=", "2+2="]})}
    made = ours(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, more=more)
    made.train()
    rows = [row for row in made.state.log_history if "eval_loss" in row]
    assert len(rows) == 2
    assert all(math.isfinite(row["eval_loss"]) and row["eval_pmpo/ratio_max"] == 1 for row in rows)


@pytest.mark.parametrize("fused", [True, False])
def test_lora(fused: bool, tmp_path: Path) -> None:
    """Adapters learn, the base model stays, the reference is the base model: at the start the KL is exactly 0."""
    more = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}
    made = ours(tmp_path, max_steps=4, num_iterations=2, beta=0.1, fused_head=fused, more=more)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    moved = {name for name, p in made.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    kl = [row["kl"] for row in made.state.log_history if "loss" in row]
    assert abs(kl[0]) <= 1e-12 < kl[-1]  # k3 of log-probs that differ by some eps is their square


def test_lora_gradients_are_those_of_grpo_trainer(tmp_path: Path) -> None:
    results = []
    for make, given in ((ours, {"preset": "grpo"}), (stock, {"loss_type": "grpo"})):
        torch.manual_seed(3)
        adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        made = make(tmp_path, **given, more={"peft_config": adapter})
        results.append(result(made, batch(made)))
    assert_same(*results)
    assert all("lora_" in name for name in results[0][1])


def scaled_models() -> dict[str, Any]:
    """A bias, a scale of the logits, a softcap, tied embeddings, experts with a loss of their own."""
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "vocab_size": V, "num_key_value_heads": 1}
    cohere = CohereConfig(logit_scale=0.3, **SIZE, **ends)
    gemma = Gemma2Config(final_logit_softcapping=0.5, head_dim=8, **SIZE, **ends)
    mixtral = MixtralConfig(num_local_experts=2, router_aux_loss_coef=0.5, output_router_logits=True, **SIZE, **ends)
    phi = PhiConfig(**SIZE, **ends | {"num_key_value_heads": 2})
    makers = {"bias": (PhiForCausalLM, phi), "scale": (CohereForCausalLM, cohere), "softcap": (Gemma2ForCausalLM, gemma), "experts": (MixtralForCausalLM, mixtral)}  # fmt: skip
    models = {name: make(config) for name, (make, config) in makers.items()}
    torch.nn.init.normal_(models["bias"].lm_head.bias)
    return models


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["bias", "scale", "softcap", "experts"])
def test_models_with_more_than_a_linear_head(name: str, fused: bool, tmp_path: Path) -> None:
    want = stock(tmp_path, loss_type="grpo", model=scaled_models()[name])
    got = ours(tmp_path, preset="grpo", model=scaled_models()[name], fused_head=fused)
    assert_same(result(got, batch(got, 4)), result(want, batch(want, 4)))
    assert ("aux_loss" in got._metrics["train"]) == (name == "experts")


def test_a_model_that_does_more_to_its_logits_raises(tmp_path: Path) -> None:
    class Shifted(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits + 1
            return outputs

    made = ours(tmp_path, preset="grpo", model=Shifted(llama().config))
    with pytest.raises(RuntimeError, match="fused_head: expected False for Shifted, whose logits are not scale and"):
        made._compute_loss(made.model, batch(made))
    check_probe(torch.tensor([-30, -4, -0.5, 0, 0.25, 1, 8, 60]) * 0.3, "", logit_scale=0.3, logit_softcap=None)
    with pytest.raises(RuntimeError, match="expected"):
        check_probe(torch.tensor([-30, -4, -0.5, 0, 0.25, 1, 8, 60]), "", logit_scale=0.98, logit_softcap=None)


def test_a_head_that_is_not_linear_raises(tmp_path: Path) -> None:
    model = llama()
    model.lm_head = nn.Sequential(model.lm_head)
    model.lm_head.weight, model.lm_head.bias = model.lm_head[0].weight, None
    with pytest.raises(ValueError, match=r"fused_head: expected False for LlamaForCausalLM.*got True and Sequential"):
        ours(tmp_path, model=model)


def test_float32_head_and_autocast(tmp_path: Path) -> None:
    """A model in bfloat16 with its head in float32, and a float32 model under autocast: both paths train and agree."""
    for given in ({"cast_lm_head_to_fp32": True}, {"bf16": True}):
        losses = []
        for fused in (True, False):
            model = llama().bfloat16() if "cast_lm_head_to_fp32" in given else llama()
            made = ours(tmp_path, preset="grpo", model=model, fused_head=fused, max_steps=2, num_iterations=2, **given)
            made.train()
            losses.append([row["grad_norm"] for row in made.state.log_history if "loss" in row])
        assert losses[0][0] > 0
        # the same completions; 16 products' roundings to bfloat16, 2^-9 each, of 2 layers forward and backward
        assert losses[0][0] == pytest.approx(losses[1][0], rel=16 * 2**-9)


@pytest.mark.parametrize("fused", [True, False])
def test_a_float32_head_under_autocast_as_grpo_trainer(fused: bool, tmp_path: Path) -> None:
    """Hidden states in bfloat16, the head's product not; its own forward pass is there again afterwards."""
    given = {"cast_lm_head_to_fp32": True, "bf16": True}
    got = ours(tmp_path, preset="grpo", fused_head=fused, **given)
    want, rounded = stock(tmp_path, loss_type="grpo", **given), stock(tmp_path, loss_type="grpo", bf16=True)
    own, inputs = got.model.lm_head.__dict__["forward"], batch(got)
    mine, theirs, other = (result(made, batch(made) | inputs)[0] for made in (got, want, rounded))
    assert got.model.lm_head.__dict__["forward"] is own
    assert abs(mine - theirs) <= 1e-5 * abs(theirs) < abs(other - theirs)


def test_the_original_forward_is_untouched(tmp_path: Path) -> None:
    """Generation and plain calls are the model's; the head has its own forward again after a loss."""
    made, plain = ours(tmp_path), llama()
    ids = torch.randint(2, V, (2, 5))
    inputs = batch(made)
    assert torch.equal(made.model(ids).logits, plain(ids).logits)
    result(made, inputs)
    assert "forward" not in made.model.lm_head.__dict__
    assert torch.equal(made.model(ids).logits, plain(ids).logits)
    with pytest.raises(ValueError, match="advantages: expected shape"):
        result(made, inputs | {"advantages": torch.ones(3)})
    assert "forward" not in made.model.lm_head.__dict__
    widths = []
    made.model.lm_head.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    result(made, inputs)
    assert widths == [T + 1]  # not the prompt
    with pytest.raises(RuntimeError, match="model: expected the one that the trainer was given, got a copy"):
        made._compute_loss(copy.deepcopy(made.model), inputs)
    labels = torch.where(torch.arange(5) < 2, -100, ids)
    with_graph = made.model(
        input_ids=ids, labels=labels, fused_lm_head=True, scoring=Scoring(3)
    )  # TRL's own, differentiable
    assert with_graph.log_probs.requires_grad
    with torch.no_grad():
        scored = made.model(input_ids=ids, labels=labels, fused_lm_head=True, scoring=Scoring(3))
    assert (scored.log_probs - with_graph.log_probs[:, -3:]).abs().max() < 1e-5


def test_what_the_model_gets_and_the_loss_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of other media reach TRL's call of the model; `impl`, `max_chunk_tokens` and `skip_zero_advantage` the loss."""
    seen: dict[str, Any] = {}
    call, loss = GRPOTrainer._get_per_token_logps_and_entropies, trainer_module.linear_pmpo_loss

    def scores(
        self: Any, model: Any, ids: Tensor, mask: Tensor, length: int, *, pixel_values: Any = None, **given: Any
    ) -> Any:
        seen["pixel_values"] = pixel_values
        return call(self, model, ids, mask, length, **given)

    def recorded(*args: Any, **given: Any) -> Any:
        seen.update(given)
        return loss(*args, **given)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", scores)
    monkeypatch.setattr(trainer_module, "linear_pmpo_loss", recorded)
    options = {"impl": "reference", "max_chunk_tokens": 7, "skip_zero_advantage": False}
    made = ours(tmp_path, **options)
    pixels = torch.ones(B)
    result(made, batch(made, pixel_values=pixels))
    assert torch.equal(seen["pixel_values"], pixels)
    assert {name: seen[name] for name in options} == options


def test_metrics_are_those_of_the_loss(tmp_path: Path) -> None:
    made = ours(tmp_path, fused_head=False, full_clip_fraction=0.5)
    inputs = batch(made)
    result(made, inputs)
    whole = [torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask")]
    with torch.no_grad():
        logits = made.model(*whole).logits[:, P - 1 : -1]
    given = [inputs[name] for name in ("completion_ids", "old_per_token_logps", "advantages")]
    out = pmpo_loss(logits, *given, mask=inputs["completion_mask"], config=made._loss_configs["train"])
    logged = {name: values[-1] for name, values in made._metrics["train"].items()}
    for name in ("power_mean", "power_min", "power_max", "ess", "ess_target", "ratio_mean", "ratio_max", "approx_kl"):
        assert logged[f"pmpo/{name}"] == pytest.approx(float(out.metrics[name]), rel=1e-5), name
    assert logged["pmpo/power_min"] < logged["pmpo/power_mean"] < logged["pmpo/power_max"]
    assert logged["pmpo/ess_target"] != logged["pmpo/ratio_mean"]
    low = [float(f) for f, A, n in zip(out.clip_fraction, ADVANTAGES, LENGTHS, strict=True) if A < 0 and n]
    assert logged["clip_ratio/low_min"] == 0  # of completions with A > 0
    assert logged["clip_ratio/low_mean"] == pytest.approx(
        sum(
            f * n
            for f, n in zip(low, [n for A, n in zip(ADVANTAGES, LENGTHS, strict=True) if A < 0 and n], strict=True)
        )
        / sum(LENGTHS),
        rel=1e-5,
    )


def test_nothing_is_known_of_skipped_completions(tmp_path: Path) -> None:
    """A batch without any advantage: loss and gradients 0, and no number for what was not computed."""
    made = ours(tmp_path)
    inputs = batch(made, advantages=torch.zeros(B))
    made.model.zero_grad()
    loss = made._compute_loss(made.model, inputs)
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in made.model.parameters())
    logged = made._metrics["train"]
    assert all(
        math.isnan(logged[name][0]) for name in ("entropy", "pmpo/power_mean", "pmpo/power_min", "pmpo/ratio_max")
    )
    assert logged["clip_ratio/region_mean"] == [0]


WRONG = {
    "loss_type: expected None, because preset chooses": {"loss_type": "dapo"},
    "importance_sampling_level: expected 'token'": {"importance_sampling_level": "sequence"},
    "use_adaptive_entropy: expected False": {"use_adaptive_entropy": True},
    "preset: expected one of": {"preset": "ppo"},
    "power_start: expected None, because only preset 'holder'": {"power_start": 1.0},
    "power_schedule: expected None": {"preset": "holder", "power": 1.0, "power_schedule": "cube"},
    "power_schedule: expected one of": {"preset": "holder", "power_schedule": "round"},
    "power_end: expected a finite number": {"preset": "holder", "power_end": math.inf},
    "apmpo_gamma: expected a finite number > 0": {"preset": "apmpo", "apmpo_gamma": 0.0},
    "apmpo_gamma: expected None": {"preset": "grpo", "apmpo_gamma": 1.0},
    "apmpo_eps_max: expected None": {"apmpo_eps_max": 1.0},
    "epsilon_high: expected None, because only a preset other than 'apmpo'": {"preset": "apmpo", "epsilon_high": 0.3},
    "full_clip_fraction: expected None, because only preset 'pmpo'": {"preset": "gmpo", "full_clip_fraction": 0.1},
    "ess_sharpness: expected None": {"power": 0.5, "ess_sharpness": 2.0},
    "ess_sharpness: expected a finite number > 0": {"ess_sharpness": -2.0},
    "max_chunk_tokens: expected None, because only fused_head": {"fused_head": False, "max_chunk_tokens": 4},
    "max_chunk_tokens: expected an int > 0": {"max_chunk_tokens": 0},
    "clip_low: expected None, because only epsilon=None": {"epsilon": 0.2, "clip_low": 0.2},
    "clip_high: expected None, because only epsilon and": {"epsilon_high": 0.2, "clip_high": 0.2},
    "epsilon: expected None or a number in": {"epsilon": 1.5},
    "epsilon_high: expected None or a finite number > 0": {"epsilon_high": 0.0},
    "delta: expected None or a ratio above the upper clip, which is 1.49182": {"delta": 1.4},
    "delta: expected None or a ratio above the upper clip, which is 1.4, got": {"preset": "apmpo", "delta": 1.3},
    "delta: expected None or a finite ratio": {"delta": math.inf},
    "sapo_temperature_pos: expected 1.0, because no loss": {"sapo_temperature_pos": 2.0},
    "vespo_k_neg: expected 3.0": {"vespo_k_neg": 1.0},
    "entropy_target: expected 0.2": {"entropy_target": 0.5},
    "entropy_coef_delta: expected 0.005": {"entropy_coef_delta": 0.5},
    "ess_floor: expected None, because only ess_rule='absolute'": {"ess_floor": 0.9},
    "entropy_coef: expected 0 with top_entropy_quantile": {
        "entropy_coef": 0.1,
        "top_entropy_quantile": 0.5,
        "fused_head": False,
    },
    "fused_head: expected False with top_entropy_quantile": {"top_entropy_quantile": 0.2},
    "fused_head: expected False with top_entropy_quantile or off": {"off_policy_mask_threshold": 0.2},
    "torch_compile: expected False with fused_head": {"torch_compile": True},
    "loss_agg_mode: expected one of": {"loss_agg_mode": "mean"},
    "kl_estimator: expected one of": {"kl_estimator": "k4"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_options_raise(message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        PMPOConfig(**options(tmp_path, **WRONG[message]))


def test_wrong_configuration_class_raises(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args: expected a PMPOConfig, got GRPOConfig"):
        trainer(PMPOTrainer, GRPOConfig, tmp_path)


def test_options_reach_the_loss(tmp_path: Path) -> None:
    """Every option of the loss changes it, on both paths."""
    base: dict[str, Any] = {"preset": "pmpo", "full_clip_fraction": 0.9}
    changes: list[dict[str, Any]] = [
        {"power": 0.3, "full_clip_fraction": None}, {"power_min": 0.9}, {"power_max": 0.5}, {"ess_rule": "absolute"}, {"full_clip_fraction": 0.5},
        {"ess_sharpness": 0.3}, {"epsilon": 0.1}, {"epsilon_high": 0.1}, {"clip_low": 0.1}, {"clip_high": 0.1},
        {"loss_agg_mode": "token-mean"}, {"loss_agg_mode": "seq-mean-token-sum-norm"}, {"entropy_coef": 0.1}, {"delta": 1.5, "epsilon": 0.4},
        {"temperature": 0.5}, {"preset": "hmpo", "full_clip_fraction": None},
    ]  # fmt: skip
    inputs = batch(ours(tmp_path))
    for fused in (True, False):
        losses = [result(made := ours(tmp_path, **base | change, fused_head=fused), batch(made) | inputs)[0] for change in ({}, *changes)]  # fmt: skip
        assert all(abs(loss - losses[0]) > 1e-5 for loss in losses[1:]), (losses, fused)
    floors = [
        PMPOConfig(**options(tmp_path, ess_rule="absolute", ess_floor=x)).loss_config().ess_floor for x in (0.2, 0.7)
    ]
    assert floors == [0.2, 0.7]


def test_every_option_of_the_loss_is_offered() -> None:
    """By its name; or by another of TRL's; or, the last three, not."""
    named_by_trl = {"max_length", "dual_clip", "kl_bias_correction"}
    not_offered = {"clip", "clip_sides", "kl_straight_through"}
    named = {option.name for option in fields(PMPOConfig)}
    assert {option.name for option in fields(LossConfig)} - named == named_by_trl | not_offered


def test_the_page_has_every_option_and_its_default() -> None:
    page = (Path(__file__).parent.parent / "docs" / "trl.md").read_text()
    rows = re.findall(r"^\| (`\w+`.*?) \| (.*?) \|(.*)\|$", page.partition("## Options")[2].partition("\n## ")[0], re.M)
    own = set(PMPOConfig.__annotations__) - set(NO_CHOICE)
    assert own - set(re.findall(r"`(\w+)`", str(rows))) == set()
    defaults = {option.name: option.default for option in fields(PMPOConfig)}
    for function, options_of_it in ((holder_power, HOLDER), (apmpo_power, APMPO_POWER), (apmpo_clip, APMPO_CLIP)):
        arguments = inspect.signature(function).parameters
        defaults |= {name: arguments[argument].default for name, argument in options_of_it.items()}
    told = {}
    for names, values, _ in rows:
        pairs = re.findall(r"`(\w+)`", names), values.split(", ")
        told |= dict(zip(*pairs, strict=True)) if len(pairs[0]) == len(pairs[1]) else {}
    assert len(told) > 12
    for name, value in told.items():
        words = ("preset's", "chosen", "fastest")
        assert (None if value in words else ast.literal_eval(value.strip("`"))) == defaults[name], name


def test_command_line(tmp_path: Path) -> None:
    """TRL's parser takes every option, and shows help for it."""
    parser = TrlParser((PMPOConfig,))
    line = [
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "--bf16",
        "False",
        "--preset",
        "holder",
        "--power_schedule",
        "cube",
    ]
    line += ["--power_start", "1.5", "--clip_low", "0.3", "--fused_head", "False", "--loss_agg_mode", "token-mean"]
    (config,) = parser.parse_args_and_config(line)
    assert config.scheduled_power(0.0) == 1.5
    made = config.loss_config()
    assert (made.clip, made.clip_low, made.loss_agg_mode) == ("sequence", 0.3, "token-mean")
    assert config.fused_head is False
    own = set(PMPOConfig.__annotations__)
    helps = {action.dest: action.help for action in parser._actions}
    assert own <= helps.keys()
    assert all(len(helps[name]) > 20 for name in own)
    with pytest.raises(SystemExit):
        parser.parse_args_and_config([*line, "--preset", "ppo"])


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.create_server(("127.0.0.1", 0)) as server:  # closed again: the port is free
        port = server.getsockname()[1]
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    program += ["--master-port", str(port), str(Path(__file__).parent / "trl_worker.py"), str(folder)]
    found = str(Path(pmpo_kernels.__file__).parent.parent)  # for a working tree that is not installed
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": found}
    done = subprocess.run(program, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(torch.load(folder / "gradients.pt", weights_only=True))


@pytest.mark.parametrize("preset", ["pmpo", "dapo"])
@pytest.mark.parametrize("wrapping", ["ddp", "fsdp", "fsdp_head", "fsdp_bf16"])
def test_two_ranks_have_the_gradients_of_one(
    wrapping: str, preset: str, of_two_ranks: dict[str, Any], tmp_path: Path
) -> None:
    """DDP; FSDP2 with the LM head among the root's weights, with the head sharded on its own, and with parameters gathered in bfloat16.
    Metrics over both ranks."""
    gradients, metrics = of_two_ranks[f"{wrapping}, {preset}"]
    made = ours(tmp_path, preset=preset)
    want = result(made, batch(made))
    # bfloat16: weights and activations of two layers, forward and backward, 2^-9 each, in ratios and p
    bound = 32 * 2**-9 if wrapping == "fsdp_bf16" else 1e-5
    assert_same((want[0], gradients), want, bound)
    for name, values in made._metrics["train"].items():
        assert metrics[name] == pytest.approx(values[-1], rel=bound, abs=bound if wrapping == "fsdp_bf16" else 1e-12), (
            name
        )


@pytest.mark.parametrize("page", ["README.md", "docs/trl.md"])
def test_the_lines_of_the_documentation_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block with TRL, as it stands, with a small model, on a CPU."""
    monkeypatch.chdir(tmp_path)
    on_cpu = functools.partialmethod(PMPOConfig.__init__, use_cpu=True, report_to="none", logging_steps=1)
    monkeypatch.setattr(PMPOConfig, "__init__", on_cpu)
    text = (Path(__file__).parent.parent / page).read_text()
    blocks = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "integrations.trl" in block]
    assert len(blocks) == 1
    names = {
        "model": llama(),
        "reward": ones,
        "dataset": Dataset.from_dict({"prompt": ["1+1="]}),
        "tokenizer": tokenizer(),
    }
    exec(compile(blocks[0], page, "exec"), names)
    rows = [row for row in names["trainer"].state.log_history if "train_loss" in row]
    assert len(rows) == 1
    assert math.isfinite(rows[0]["train_loss"])
    assert isinstance(names["trainer"], PMPOTrainer)
