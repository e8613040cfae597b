"""The command line as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pmpo_kernels.benchmarking.allocator import Allocator, allocators
from pmpo_kernels.cli import app, verify
from pmpo_kernels.verification import ThreePartError, Verdict, configurations

runner = CliRunner(env={"COLUMNS": "200"})
ALL = len(configurations())


def test_info() -> None:
    result = runner.invoke(app, ["info", "--json"])
    assert result.exit_code == 0, result.output
    text = result.output
    assert torch.__version__ in text
    assert json.loads(text)["implementations"]["cpp"].startswith("usable on CPU tensors")
    assert "reference" in runner.invoke(app, ["info"]).output


@pytest.mark.parametrize("missing", ["typer", "rich", "matplotlib"])
def test_a_command_without_the_extra_says_so_in_one_line(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from pmpo_kernels.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "info"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "pmpo-kernels: the command line needs typer, rich and matplotlib: pip install 'pmpo-kernels[cli]'\n"
    )


def test_verify_passes_for_the_reference() -> None:
    result = runner.invoke(app, ["verify", "--impl", "reference", "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    assert f"{ALL} of {ALL} agree with float64" in result.output
    assert "cpp: not checked" in result.output
    assert f"{ALL} of {ALL}" in runner.invoke(app, ["verify", "--impl", "cpp", "--dtype", "bfloat16"]).output


def test_verify_fails_with_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Verdict(0.0, ThreePartError(0.0, 0.05, 0.0), 0.0, 1e-6, 1e-6)
    monkeypatch.setattr(verify, "verify", lambda *args, **kwargs: wrong)
    result = runner.invoke(app, ["verify", "--impl", "reference", "--dtype", "float64"])
    assert result.exit_code == 1
    assert f"0 of {ALL} agree with float64" in result.output
    assert "FAIL" in result.output


def test_verify_names_a_bad_option() -> None:
    result = runner.invoke(app, ["verify", "--dtype", "int8"])
    assert result.exit_code == 2
    assert "expected one of float64, float32, bfloat16, float16" in result.output


def test_bench_writes_results_and_overwrites_none(tmp_path: Path) -> None:
    shape = [
        "--vocab",
        "300",
        "--vocab",
        "300",
        "--dtype",
        "float32",
        "--batch",
        "2",
        "--tokens",
        "6",
        "--repeats",
        "2",
    ]
    arguments = ["bench", *shape, "--out", str(tmp_path)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench-v300-float32.json", "bench-v300-float32.png"]
    text = (tmp_path / "bench-v300-float32.json").read_text()
    rows = {row["name"]: row for row in json.loads(text)["results"]}
    fused = "triton" if torch.cuda.is_available() else "cpp"
    assert list(rows) == ["eager PyTorch", "torch.compile", fused, f"{fused}, in place"]
    assert not any(row["problem"] for row in rows.values())
    settings = {"default", "reuse"} if sys.platform == "linux" and not torch.cuda.is_available() else {"default"}
    assert all(set(row["timings"]) == settings for row in rows.values())
    again = runner.invoke(app, arguments)
    assert again.exit_code != 0
    assert "--overwrite" in again.output
    assert (tmp_path / "bench-v300-float32.json").read_text() == text


@pytest.mark.skipif(Allocator.reuse not in allocators("cpu"), reason="needs mallopt of glibc")
def test_allocator_settings_take_out_page_faults() -> None:
    """Large tensors: fresh memory each time by default, the same memory again with `reuse`; in a process of its own, as
    `bench` measures each case, because what is free on the heap depends on what a process did before."""
    code = (
        "import torch; from pmpo_kernels.benchmarking.allocator import Allocator, page_faults, using\n"
        "def faults(size):\n"
        "    before = page_faults(); torch.empty(size, dtype=torch.uint8).fill_(1); return page_faults() - before\n"
        "faults(2**26); fresh = faults(2**26)\n"
        "with using(Allocator.reuse): faults(2**26 + 2**16); reused = faults(2**26)\n"
        "print(fresh, reused)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    fresh, reused = map(int, done.stdout.split())
    assert fresh >= 2**26 / 2**21 - 1  # a page is at most 2 MiB
    assert reused < fresh / 2
