"""An update by verl's own engine on a CPU: its micro-batches, its counts over data-parallel ranks, a model of two layers.

verl has no engine for CPUs. Here its FSDP engine is built without FSDP around the model; everything from the rollout's tensors to the
gradient of the parameters is verl's code. Skipped without verl, as tests/test_verl.py.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

PROBLEM = ""
try:
    import verl.workers.engine.fsdp.transformer_impl as fsdp
    from tensordict import TensorDict
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from verl.utils import seqlen_balancing, tensordict_utils
    from verl.workers.config import ActorConfig, PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss
    from verl.workers.utils.padding import left_right_2_no_padding

    from pmpo_kernels.integrations.verl import PowerMeanLossConfig
except ImportError as error:
    PROBLEM = f"{type(error).__name__}: {error}"

ROOT = Path(__file__).parent.parent
V, P, T = 61, 5, 12  # vocabulary, prompt and response width
LENGTHS = (12, 3, 1, 7, 9, 12, 5, 8)  # response tokens; row 1 is masked
ADVANTAGES = (1.2, 0.8, -0.6, -1.4, 0.9, 0.0, -0.7, 2.0)
# norms (5), rotary embeddings (2) and the temperature (1) are float32 in these models whatever their dtype
TOLERANCE = 8 * torch.finfo(torch.float32).eps
NAMES, MEAN = ("pmpo", "gmpo", "holder"), "seq-mean-token-mean"
CASES = [
    ("pmpo", MEAN, 1),
    ("gmpo", "token-mean", 4),
    ("holder", "seq-mean-token-sum-norm", None),
    ("gmpo", "token-sum", 2),
]


@pytest.fixture(autouse=True)
def _verl_is_there(request: pytest.FixtureRequest) -> None:
    if PROBLEM:
        missing = pytest.fail if request.config.getoption("--require-peers") else pytest.skip
        missing(f"{PROBLEM}; `make peers` runs these tests")


def rollout() -> Any:
    """Eight responses as verl's trainer holds them (prompts padded left, responses right), a TensorDict."""
    random = torch.Generator().manual_seed(0)
    B, lengths = 8, torch.tensor(LENGTHS)
    response = torch.arange(T) < lengths[:, None]
    prompt = torch.arange(P) >= torch.arange(B)[:, None] % 3
    attention = torch.cat([prompt, response], 1).long()
    ids = torch.randint(V, (B, P + T), generator=random) * attention
    mask = response.clone()
    mask[1] = False
    old = -4 + 0.3 * torch.randn(B, T, generator=random)
    return TensorDict(
        {
            "input_ids": ids,
            "prompts": ids[:, :P],
            "responses": ids[:, P:],
            "attention_mask": attention,
            "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
            "response_mask": mask.long(),
            "old_log_probs": old * response,
            "advantages": torch.tensor(ADVANTAGES)[:, None] * mask,
        },
        batch_size=B,
    )


class Engine(fsdp.FSDPEngineWithLMHead if not PROBLEM else object):  # type: ignore[misc]
    """verl's engine around a plain module."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
        config = Qwen2Config(vocab_size=V, num_hidden_layers=2, attn_implementation="eager", **sizes)
        self.module = Qwen2ForCausalLM(config).double()
        self.ulysses_sequence_parallel_size, self.ulysses_device_mesh, self.pad_to_length = 1, None, False
        self._autocast_dtype = torch.float32  # no autocast

    def _gradient_sync_context(self, is_last_micro_batch: bool) -> Any:
        return contextlib.nullcontext()  # nothing is sharded; `update` averages over ranks


def on_cpu() -> None:
    """verl takes its device from the platform, of which it has none for CPUs."""
    for module in (fsdp, seqlen_balancing):
        module.get_device_id = module.get_device_name = lambda: "cpu"


def update(name: str, mode: str, micro: int | None) -> tuple[Tensor, float]:
    """Gradient of all parameters and loss, averaged over ranks as data parallelism does, each with its share of the rollout.

    `micro`: trajectories a micro-batch; None for verl's dynamic ones of at most 40 tokens."""
    if name == "geo_mean":
        section = PolicyLossConfig(loss_mode=name)
    else:
        section = PowerMeanLossConfig(loss_mode=name, options={"power": 2.0} if name == "holder" else {})
    needed = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1, "loss_scale_factor": 10}
    config = ActorConfig(**needed, loss_agg_mode=mode, policy_loss=section)
    rank, world = dist.get_rank(), dist.get_world_size()
    data = tensordict_utils.index_select_tensor_dict(left_right_2_no_padding(rollout()), list(range(rank, 8, world)))
    split = {"micro_batch_size_per_gpu": micro} if micro else {"max_token_len_per_gpu": 40}
    split["use_dynamic_bsz"] = micro is None
    tensordict_utils.assign_non_tensor(data, use_remove_padding=False, global_batch_size=8, temperature=1.0, **split)
    engine = Engine()
    found = engine.forward_backward_batch(data, partial(ppo_loss, config=config))
    grad = torch.cat([parameter.grad.reshape(-1) for parameter in engine.module.parameters()])
    loss = torch.tensor(sum(found["loss"]), dtype=torch.float64)
    for value in (grad, loss):
        dist.all_reduce(value)
    return grad / world, float(loss) / world


@pytest.fixture(scope="module")
def _one_rank() -> Iterator[None]:
    if PROBLEM:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for module in (fsdp, seqlen_balancing):
            for name in ("get_device_id", "get_device_name"):
                patch.setattr(module, name, getattr(module, name, None), raising=False)
        on_cpu()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def agree(found: tuple[Tensor, float], expected: tuple[Tensor, float]) -> bool:
    """Both within `TOLERANCE`, which padding to another width can change; the sums are float64."""
    grad, loss = found
    norm = expected[0].norm()
    assert norm > 0.01
    return bool((grad - expected[0]).norm() <= TOLERANCE * norm) and abs(loss - expected[1]) <= TOLERANCE * abs(
        expected[1]
    )


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("name", NAMES)
def test_an_update_does_not_depend_on_the_micro_batches(name: str, mode: str) -> None:
    whole = update(name, mode, 8)
    for micro in (4, 1, None):
        assert agree(update(name, mode, micro), whole), micro


@pytest.mark.usefixtures("_one_rank")
def test_an_update_of_geo_mean_does() -> None:
    grad, loss = update("geo_mean", MEAN, 8)
    for micro, factor in ((4, 2), (1, 8)):
        found = update("geo_mean", MEAN, micro)
        assert agree(found, (factor * grad, factor * loss)), micro
        assert not agree(found, (grad, loss))


@pytest.mark.usefixtures("_one_rank")
def test_two_ranks_take_the_step_of_one(tmp_path: Path) -> None:
    """Ranks with different numbers of tokens, each with its own micro-batches."""
    command = [sys.executable, __file__, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ranks = [subprocess.Popen([*command, str(rank)], env=env, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for rank in ranks:
        _, log = rank.communicate(timeout=300)
        assert rank.returncode == 0, log
    found = torch.load(tmp_path / "found.pt")
    for case in CASES:
        assert agree(found[case], update(*case[:2], 8)), case


def main(folder: Path, rank: int) -> None:
    """One of two ranks, started by the test above."""
    assert not PROBLEM, PROBLEM
    on_cpu()
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    found = {case: update(*case) for case in CASES}
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
