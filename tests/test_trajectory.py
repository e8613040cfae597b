"""A trajectory is cut into blocks of tokens: any length, any place in the batch, and programs enough for a long one."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from conftest import CONFIGURATIONS, device_of
from torch import Tensor

from pmpo_kernels import LossConfig
from pmpo_kernels.batch import Batch
from pmpo_kernels.contract import STATS
from pmpo_kernels.ops import stage
from pmpo_kernels.triton.launch import BLOCK_TOKENS, STEP_TOKENS

# empty ones in front, one after the other, and at the end; no offset but the first is a multiple of a block
LENGTHS = [0, 1, BLOCK_TOKENS - 1, 0, BLOCK_TOKENS, 5, BLOCK_TOKENS + 1, 0, 0, 3 * BLOCK_TOKENS + 5, STEP_TOKENS + 1, 0]
MANY = [33 * BLOCK_TOKENS + 7]  # more blocks than are added in a step
TERMS = CONFIGURATIONS["pmpo, all terms"]


def make_inputs(lengths: list[int], device: str) -> dict[str, Tensor]:
    """Every input of the stage, of tokens and of trajectories, in float32."""
    random, N, B = torch.Generator().manual_seed(len(lengths)), sum(lengths), len(lengths)
    logp, noise, more = (torch.randn(N, generator=random) for _ in range(3))
    tokens = {
        "logp": logp, "old_logp": logp + noise / 4, "mask": noise < 1.5, "ref_logp": logp + more / 4,
        "rollout_weights": (more / 8).exp(), "entropy": noise.abs(), "policy_mask": more < 1.5,
    }  # fmt: skip
    tokens["advantages"] = torch.where(torch.arange(B) % 2 == 0, 1.0, -0.5)
    return {name: x.to(device) for name, x in tokens.items()}


def run(impl: str, x: dict[str, Tensor], lengths: list[int], config: LossConfig, power: Tensor | None = None) -> Any:
    """(dlogp, dentropy, stats) of the stage."""
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(x["logp"].device)
    options = config.trajectory_options(has_power=power is not None, has_target_ess=False)
    tokens = {name: x[name] for name in ("old_logp", "mask", "ref_logp", "rollout_weights", "policy_mask")}
    batch = Batch(x["advantages"], offsets, **tokens, power=power)
    return stage("trajectory", impl)(x["logp"], x["entropy"], *batch, list(options))


@pytest.mark.parametrize("lengths", [LENGTHS, MANY], ids=["lengths", "many blocks"])
def test_agrees_with_float64(impl: str, device: str, lengths: list[int]) -> None:
    x = make_inputs(lengths, device)
    dlogp, dentropy, stats = run(impl, x, lengths, TERMS)
    power = stats[STATS.index("power")]  # right to 1e-10 in log ESS: compare the rest at that p
    assert bool(((power > 0) & (power < 1)).any())
    wide = {name: t.double() if t.is_floating_point() else t for name, t in x.items()}
    want = run("reference", wide, lengths, TERMS, power)
    n, u = max(lengths), torch.finfo(torch.float64).eps / 2
    for name, a, b in zip(STATS, stats, want[2], strict=True):
        if name != "ess_target":
            # sums of n terms of both signs, whose sizes add up to at most 100 times the sum
            assert torch.allclose(a, b, rtol=100 * n * u, atol=n * u), name
    assert torch.allclose(dlogp, want[0], rtol=100 * n * u, atol=n * u)
    assert torch.allclose(dentropy, want[1], rtol=4 * u, atol=0)


@pytest.mark.parametrize("name", ["pmpo, all terms", "dapo"])
def test_company_changes_no_bit(impl: str, device: str, name: str) -> None:
    """Each trajectory alone, from its own first token, and between others that begin and end anywhere."""
    config, x = CONFIGURATIONS[name], make_inputs(LENGTHS, device)
    dlogp, dentropy, stats = run(impl, x, LENGTHS, config)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    for i, length in enumerate(LENGTHS):
        own = slice(starts[i], starts[i] + length)
        alone = {key: t[i : i + 1] if key == "advantages" else t[own].clone() for key, t in x.items()}
        want = (dlogp[own], dentropy[own], stats[:, i : i + 1])
        assert all(torch.equal(a, b) for a, b in zip(run(impl, alone, [length], config), want, strict=True))


def test_a_long_trajectory_has_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One trajectory of 32k tokens: its passes over tokens fill a multiprocessor each, 32 at least."""
    module, programs = importlib.import_module("pmpo_kernels.triton.trajectory"), {}

    def record(kernel: Any, *args: Any, grid: Any, **options: Any) -> None:
        programs[kernel.fn.__name__] = grid

    monkeypatch.setattr(type(module._trajectory_sums_kernel), "run", record)
    logp, offsets = torch.zeros(2**15, device=device_of("triton")), torch.tensor([0, 2**15], device=device_of("triton"))
    options = LossConfig.pmpo().trajectory_options(has_power=False, has_target_ess=False)
    module.trajectory(logp, None, Batch(logp[:1], offsets, old_logp=logp), options)
    (sums,), (power,), (gradient,) = programs.values()
    assert list(programs) == [f"_trajectory_{part}_kernel" for part in ("sums", "power", "gradient")]
    assert power == 1
    assert sums == gradient >= 32


def test_blocks_in_front_of_all_trajectories() -> None:
    """Offsets that a GPU does not check leave whole blocks of tokens to no trajectory: their gradient is zero."""
    start, stop, N = 2 * BLOCK_TOKENS + 3, 3 * BLOCK_TOKENS, 5 * BLOCK_TOKENS
    module, device = importlib.import_module("pmpo_kernels.triton.trajectory"), device_of("triton")
    logp, offsets = torch.full((N,), -1.0, device=device), torch.tensor([start, stop], device=device)
    options = LossConfig.pmpo().trajectory_options(has_power=False, has_target_ess=False)
    dlogp, _, stats = module.trajectory(logp, None, Batch(logp[:1], offsets, old_logp=logp - 0.1), options)
    assert (dlogp != 0).nonzero()[:, 0].tolist() == list(range(start, stop))
    assert stats[STATS.index("tokens")] == stop - start
