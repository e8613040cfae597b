"""What is Triton's own: launch settings, rows shared by several programs, row alignments, real vocabularies."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sweep
import torch
import typer
from conftest import device_of
from torch import Tensor

from pmpo_kernels import reference
from pmpo_kernels.benchmarking.cases import Dtype
from pmpo_kernels.benchmarking.comparison import Spread
from pmpo_kernels.ops import stage
from pmpo_kernels.triton.launch import MULTIPROCESSORS, LaunchConfig, launch_config

DEVICE = device_of("triton")
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
token_logp_module = importlib.import_module("pmpo_kernels.triton.token_logp")
dlogits_module = importlib.import_module("pmpo_kernels.triton.dlogits")


@pytest.mark.parametrize("capability", [*MULTIPROCESSORS, "sm_75"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_launch_config(capability: str, dtype: torch.dtype) -> None:
    """Settings that the kernels can run with, for every vocabulary; rows decide over `parts` alone."""
    warp = 64 if capability.startswith("gfx") else 32
    for V in (2, 63, 64, 1000, 32_001, 49_152, 50_257, 128_256, 151_936, 262_144):
        few, many = (launch_config(V, dtype, capability, rows) for rows in (1, 100_000))
        for a, b in zip(few, many, strict=True):
            assert a._replace(parts=1) == b
            assert b.parts == 1 <= a.parts <= math.ceil(V / a.BLOCK_V)
            assert math.log2(a.BLOCK_V).is_integer()
            assert 64 <= a.BLOCK_V <= 16384 // dtype.itemsize
            assert a.num_warps == max(1, a.threads // warp)
            assert a.threads <= 256
        assert few.token_logp.parts == math.ceil(V / few.token_logp.BLOCK_V)
        enough = MULTIPROCESSORS.get(capability, 128)
        for rows, stages in ((2 * enough, "token_logp"), (8 * enough, "dlogits")):
            assert getattr(launch_config(V, dtype, capability, rows), stages).parts == 1


def make_rows(V: int, dtype: torch.dtype, rows: int = 3) -> tuple[Tensor, Tensor]:
    """(logits (1, rows, V), ids (1, rows)), sampled."""
    random = torch.Generator().manual_seed(V)
    logits = (3 * torch.randn(1, rows, V, generator=random)).to(dtype)
    ids = torch.multinomial(logits[0].double().softmax(-1), 1, generator=random).T
    return logits.to(DEVICE), ids.to(DEVICE)


def force(monkeypatch: pytest.MonkeyPatch, parts: int | None) -> None:
    """Launch with 1 program a row, `parts`, or as many as there are blocks (None)."""

    def forced(V: int, dtype: torch.dtype, capability: str, rows: int) -> LaunchConfig:
        config = launch_config(V, dtype, capability, rows)
        forward = math.ceil(V / config.token_logp.BLOCK_V)
        backward = math.ceil(V / config.dlogits.BLOCK_V)
        return LaunchConfig(
            config.token_logp._replace(parts=1 if parts == 1 else forward),
            config.dlogits._replace(parts=min(parts or backward, backward)),
        )

    monkeypatch.setattr(token_logp_module, "launch_config", forced)
    monkeypatch.setattr(dlogits_module, "launch_config", forced)


@pytest.mark.parametrize("V", [40_000, 32_768, 16_391])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_programs_a_row_change_no_bit(monkeypatch: pytest.MonkeyPatch, V: int, dtype: torch.dtype) -> None:
    """Few rows are shared by several programs: the same bits as one program a row, so the batch's size changes nothing."""
    logits, ids = make_rows(V, dtype)
    mask = torch.tensor([[True, False, True]], device=DEVICE)
    small = reference.compute_dtype(dtype)
    g, h = (torch.tensor([[0.7, 1.0, x]], dtype=small, device=DEVICE) for x in (0.0, 0.0))
    results = []
    for parts in (1, 2, 3, None):
        force(monkeypatch, parts)
        saved = stage("token_logp", "triton")(logits, ids, mask, 0.7)
        gradient = stage("dlogits", "triton")(logits, ids, mask, *saved[1:], g, 0.1 * h, 0.7)
        results.append((*saved, gradient))
    assert (results[0][-1][0, 1:] == 0).all()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("V", [*range(1, 18), 23, 1003, 4101])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment_changes_no_bit_of_the_gradient(V: int, dtype: torch.dtype) -> None:
    """In place at every offset from a 16-byte boundary: the same bits, and nothing is written before or after the rows."""
    logits, ids = make_rows(V, dtype)
    small = reference.compute_dtype(dtype)
    g = torch.tensor([[0.7, 0.0, -0.3]], dtype=small, device=DEVICE)
    saved = reference.token_logp(logits, ids, None, 1.0)[1:]
    gradients = []
    for offset in range(16 // dtype.itemsize + 1):
        storage = torch.full((16 + 3 * V + 16,), 7.0, dtype=dtype, device=DEVICE)
        rows = storage[8 + offset : 8 + offset + 3 * V].view(1, 3, V)
        rows.copy_(logits)
        stage("dlogits_", "triton")(rows, ids, None, *saved, g, None, 1.0)
        gradients.append(rows.clone())
        rows.fill_(7.0)
        assert (storage == 7.0).all()
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])
    apart = torch.zeros(3 * V + 1, dtype=dtype, device=DEVICE)[1:].view(1, 3, V)
    dlogits_module.dlogits(logits, ids, None, *saved, g, None, 1.0, out=apart)  # boundaries unlike those of the logits
    assert torch.equal(apart, gradients[0])


@pytest.mark.parametrize(
    "V", [151_936, 128_256, 49_152, 50_257, 262_144], ids=["qwen2.5", "llama3", "smollm2", "gpt2", "gemma"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_vocabularies_of_real_models(V: int, dtype: torch.dtype) -> None:
    """Two rows against float64, the entropy's gradient included."""
    logits, ids = make_rows(V, dtype, rows=2)
    got = stage("token_logp", "triton")(logits, ids, None, 1.0)
    want = reference.token_logp(logits.double(), ids, None, 1.0)
    # a lane adds the columns of a step, then the steps; 256 lanes are a tree; log and the centred logits carry log V and 15
    # (5 sd of 3) roundings
    block = launch_config(V, dtype, "sm_90", 2).token_logp.BLOCK_V
    serial = block / 256 + math.ceil(V / block)
    bound = torch.finfo(torch.float32).eps / 2 * (serial + 8 + 2 * math.log(V) + 2 * 15 + 16)
    for a, b in zip(got, want, strict=True):
        assert ((a.double() - b).abs() <= bound * b.abs().clamp(min=1)).all()
    g = torch.tensor([[0.7, -0.3]], device=DEVICE)
    h = torch.tensor([[0.1, 0.0]], device=DEVICE)
    gradient = stage("dlogits", "triton")(logits, ids, None, *got[1:], g, h, 1.0).double()
    exact = reference.dlogits(logits.double(), ids, None, *want[1:], g.double(), h.double(), 1.0)
    stored = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0  # the interpreter truncates where a GPU rounds
    at = ids[..., None]
    assert ((gradient - exact).gather(-1, at).abs() <= (bound + stored) * exact.gather(-1, at).abs()).all()
    error = (gradient - exact).scatter(-1, at, 0).norm(dim=-1)
    assert (error <= (2 * bound + stored) * exact.scatter(-1, at, 0).norm(dim=-1)).all()


def test_no_further_compiles_over_lengths() -> None:
    """Four vocabularies, 50 shapes (B, T), presets, temperatures, optional inputs there or not, slices of any alignment:
    one variant of each kernel a vocabulary, one of each trajectory kernel and of `aggregate` in all; `dlogits` has another one
    where rows of logits and gradient lie unlike to 16-byte boundaries, as slices do if V is odd."""
    program = Path(__file__).with_name("launches.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["all"] == found["first"]
    assert found["all"] == {
        "_dlogits_bwd_kernel": 6, "_token_logp_fwd_kernel": 4, "_token_logp_merge_kernel": 2, "_aggregate_fwd_kernel": 1,
        "_trajectory_sums_kernel": 1, "_trajectory_power_kernel": 1, "_trajectory_gradient_kernel": 1,
        "_scale_bwd_kernel": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["token_logp", "dlogits"])
def test_settings_of_the_sweep_are_right(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """benchmarks/sweep.py times nothing that is wrong; here every setting runs, is right, and is another one."""
    monkeypatch.setattr(sweep, "WARMUP", 0)
    settings = [sweep.Setting(step) for step in sweep.steps(name)]
    settings += [sweep.Setting(settings[0].step, shared) for shared in (False, True)]
    f = sweep.stages(3, 20_003, torch.bfloat16, DEVICE)[name]
    for setting in settings:
        assert isinstance(sweep.compare(name, f, setting, 1, DEVICE == "cuda"), tuple), setting
    configs = {sweep.config_of(name, setting, 20_003, torch.bfloat16, "sm_90", 3000) for setting in settings}
    assert len(configs) == len(settings) - 1  # a program a row is the default


def test_the_sweep_refuses_wrong_results() -> None:
    want = torch.zeros(3)
    results = iter([(want,), (want + 1,)])
    setting = sweep.Setting(sweep.Step(128, 32))
    found = sweep.compare("token_logp", lambda: next(results), setting, 1, cuda=False)
    assert found == "wrong result, not timed"


def test_an_interrupted_sweep_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At any moment sweep.json holds every setting that was finished."""
    finished: list[sweep.Setting] = []

    def compare(name: str, f: object, setting: sweep.Setting, *rest: object) -> tuple[Spread, Spread]:
        if finished:
            assert len(json.loads((tmp_path / "sweep.json").read_text())["results"]) == len(finished)
        if len(finished) == 3:
            raise KeyboardInterrupt
        finished.append(setting)
        return Spread.of([1.0]), Spread.of([2.0])

    monkeypatch.setattr(sweep, "compare", compare)
    with pytest.raises(typer.Exit) as stopped:
        sweep.main(vocab=64, dtype=Dtype.float32, rows=2, repeats=1, out=tmp_path, overwrite=False)
    assert stopped.value.exit_code == 130
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert content["interpreted"] == (DEVICE == "cpu")
    assert [(row["stage"], row["num_stages"], row["prefetch"]) for row in content["results"]] == [
        (name, *setting.step[2:4])
        for name, setting in zip(("token_logp", "dlogits", "token_logp"), finished, strict=True)
    ]
