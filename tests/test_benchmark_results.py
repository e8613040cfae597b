"""What is on file when a measurement is cut, the stages of the Triton kernels, and the cache that a timed region starts from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import run
import stages
import stages_triton
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from pmpo_kernels import LossConfig
from pmpo_kernels.benchmarking import comparison, measure
from pmpo_kernels.benchmarking.cases import Case, Dtype, Preset
from pmpo_kernels.benchmarking.comparison import Comparison, compare
from pmpo_kernels.benchmarking.inputs import Inputs, build_inputs
from pmpo_kernels.benchmarking.report import wide_console
from pmpo_kernels.benchmarking.variants import EAGER, LossFunction, Variant, build_eager

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Case(vocab=40, batch=2, tokens=3, dtype=Dtype.bfloat16, device=DEVICE, padded=0.0, zero_advantage=0.0)


# --- the cache -------------------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Each operator called, with its tensors and its result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[Tensor], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, [x for x in args if isinstance(x, Tensor)], result))
        return result


def test_the_cache_is_emptied_by_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that are written would go back to memory within the timed region, on its account."""
    size = 1 << 20
    cuda = SimpleNamespace(
        get_device_properties=lambda device: SimpleNamespace(L2_cache_size=size),
        current_device=lambda: 0,
        _sleep=lambda cycles: None,
    )
    device = SimpleNamespace(  # what the module knows of PyTorch: a GPU whose memory is the CPU's
        cuda=cuda, device=torch.device, int32=torch.int32, zeros=lambda n, dtype, device: torch.zeros(n, dtype=dtype)
    )
    monkeypatch.setattr(measure, "torch", device)
    scrap = measure._scrap.__wrapped__(0)
    monkeypatch.setattr(measure, "_scrap", lambda device: scrap)
    with Operators() as operators:
        measure.settle(True)
    assert sum(x.nbytes for _, tensors, _ in operators.calls for x in tensors) >= 2 * size
    assert not any(func._schema.is_mutable for func, _, _ in operators.calls)
    assert sum(result.nbytes for _, _, result in operators.calls) <= 8


# --- files while a measurement goes on -------------------------------------------------------------------------------


def test_every_step_is_saved_and_torch_compile_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it begins to compile, everything else is on file with all its rounds, and stays there."""
    seen: list[list[int]] = []  # rounds on file of each row, save by save

    def save(found: Comparison) -> None:
        seen.append([sum(len(t.samples) for t in row.timings.values()) for row in found.rows])

    def build(config: LossConfig) -> LossFunction:
        assert seen[-1] == [3, 0, 3]
        return build_eager(config)

    late = Variant("late", "compiled", build)
    monkeypatch.setattr(comparison, "COMPILED", late)
    chosen = [EAGER, late, replace(EAGER, name="another")]
    case = replace(SMALL, device="cpu", preset=Preset.grpo)
    found = compare(case, chosen, 3, lambda what: None, run.allocators("cpu")[-1:], memory=False, save=save)
    assert [[0, 0, 0]] * 2 + [[r, 0, r] for r in (1, 2, 3)] + [[3, 0, 3]] == seen
    assert [row.name for row in found.rows] == [variant.name for variant in chosen]
    (timing,) = found.rows[1].timings.values()
    assert len(timing.samples) == 3


def test_each_stage_is_timed_on_the_logits_of_the_case() -> None:
    """One writes over them."""
    seen: list[Tensor] = []

    def destroyed(impl: str, i: Inputs, config: LossConfig) -> dict[str, Any]:
        def stage() -> None:
            seen.append(i.logits.clone())
            i.logits.zero_()

        return {"first": stage, "second": stage}

    case, ours = replace(SMALL, device="cpu"), replace(EAGER, group="fused", impl="cpp")
    found = compare(case, [ours], 2, lambda what: None, run.allocators("cpu")[-1:], memory=False, stages=destroyed)
    assert list(found.stages) == ["first", "second"]
    assert len(seen) == 2 * (2 + comparison.WARMUP_ROUNDS)
    assert all(torch.equal(logits, build_inputs(case).logits) for logits in seen)


def test_a_run_that_is_killed_leaves_files_that_can_be_read(tmp_path: Path) -> None:
    """At no moment is there a file that is half written, and the rounds that were done are in it."""
    words = ["--suite", "main", "--tiny", "--no-compile", "--no-memory", "--repeats", "100000", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(ROOT / "benchmarks" / "run.py"), *words]
    process = subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        limit, rounds, reads = time.monotonic() + 120, 0, 0
        while (rounds < 3 or reads < 200) and time.monotonic() < limit and process.poll() is None:
            content = read(tmp_path)
            rounds, reads = rounds_of(content), reads + bool(content)
    finally:
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    content = read(tmp_path)
    assert content["complete"] is False
    assert rounds_of(content) >= 3
    assert content["stage_share_of_copy"]["forward"] > 0


def read(folder: Path) -> dict[str, Any]:
    found: list[dict[str, Any]] = [json.loads(path.read_text()) for path in folder.glob("run-*.json")]
    return found[0] if found else {}


def rounds_of(content: dict[str, Any]) -> int:
    timings = [timing for row in content.get("results", []) for timing in row["timings"].values()]
    return min((len(timing["samples"]) for timing in timings), default=0)


# --- stages of the Triton kernels ------------------------------------------------------------------------------------


def test_stages_of_triton_are_written_case_by_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {kind: tmp_path / f"stages-triton.{kind}" for kind in ("json", "png")}
    large = replace(SMALL, tokens=5)
    saved: list[dict[str, Any]] = []
    write = stages_triton.write_json

    def kept(found: dict[str, Any], path: Path) -> None:
        write(found, path)
        saved.append(json.loads(path.read_text()))

    monkeypatch.setattr(stages_triton, "write_json", kept)
    monkeypatch.setattr(stages_triton, "memory_problem", lambda case: "too large" if case == large else None)
    cases = [SMALL, large, replace(SMALL, batch=1)]
    assert stages_triton.measure_triton(cases, 1, files, wide_console()) is False
    content = saved[-1]
    assert [[case["complete"] for case in file["cases"]] for file in saved[1:3] + saved[-1:]] == [[False]] * 2 + [
        [True] * 2
    ]
    assert [file["complete"] for file in saved] == [False] * (len(saved) - 1) + [True]
    assert content["not_measured"] == {large.name: "too large"}
    assert [case["case"]["batch"] for case in content["cases"]] == [2, 1]
    if DEVICE == "cpu":
        assert content["times"].endswith("say nothing about their speed")
    for case in content["cases"]:
        assert {"token_logp", "trajectory", "dlogits", "dlogits_"} == set(case["stages"])
        assert set(case["stage_share_of_copy"]) == {"forward", "backward"}
        assert [row["name"] for row in case["results"]] == ["triton", "triton, in place"]
        assert case["trajectory_share"] > 0
        assert case["power"] is not None
    assert files["png"].stat().st_size > 10_000


def test_a_wrong_gradient_has_no_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(config: LossConfig) -> LossFunction:
        def loss(z: Tensor, i: Inputs) -> Tensor:
            right = build_eager(config)(z, i)
            return 1.05 * right - 0.05 * right.detach()

        return loss

    wrong = [Variant("triton", "fused", build, "triton")]
    monkeypatch.setattr(stages_triton, "fused_variants", lambda impl: wrong)
    monkeypatch.setattr(stages, "solved", lambda device, scale: [replace(SMALL, device=device)])
    result = CliRunner().invoke(typer_app(), ["--impl", "triton", "--out", str(tmp_path)])
    assert result.exit_code == 1, result.output
    content = json.loads((tmp_path / "stages-triton.json").read_text())
    assert content["cases"][0]["stages"] == {}


def typer_app() -> Any:
    import typer

    app = typer.Typer()
    app.command()(stages.main)
    return app


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--impl", "triton"], "got one that does not"),
        (["--impl", "cpp", "--tiny"], "expected --impl triton"),
        (["--impl", "rust"], "'triton'"),
    ],
)
def test_stages_names_a_bad_option(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if DEVICE == "cuda" and arguments == ["--impl", "triton"]:
        pytest.skip("Triton runs here")
    result = CliRunner(env={"COLUMNS": "200"}).invoke(typer_app(), [*arguments, "--out", str(tmp_path / "new")])
    assert result.exit_code == 2
    assert expected in result.output
    assert not (tmp_path / "new").exists()


def test_stages_of_triton_have_one_shape_if_it_is_given() -> None:
    assert [(c.batch, c.tokens, c.vocab) for c in stages.triton_cases(False, None, None, None)] == [
        (2, 4096, 151936),
        (1, 32768, 151936),
    ]
    assert [(c.batch, c.tokens, c.vocab) for c in stages.triton_cases(False, 50257, None, 64)] == [(2, 64, 50257)]
    assert [(c.batch, c.tokens, c.vocab) for c in stages.triton_cases(True, None, None, None)] == [
        (2, 4, 320),
        (1, 32, 320),
    ]
