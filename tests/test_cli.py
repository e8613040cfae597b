"""The command line as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pmpo_kernels.cli import verify
from pmpo_kernels.cli.app import app
from pmpo_kernels.verification import ThreePartError, Verdict

runner = CliRunner(env={"COLUMNS": "200"})


def test_info() -> None:
    result = runner.invoke(app, ["info", "--json"])
    assert result.exit_code == 0, result.output
    text = result.output
    assert torch.__version__ in text
    assert json.loads(text)["implementations"]["cpp"].startswith("usable on CPU tensors")
    assert "reference" in runner.invoke(app, ["info"]).output


def test_verify_passes_for_the_reference() -> None:
    result = runner.invoke(app, ["verify", "--impl", "reference", "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    assert "14 of 14 agree with float64" in result.output
    assert "cpp: not checked" in result.output
    assert "14 of 14" in runner.invoke(app, ["verify", "--impl", "cpp", "--dtype", "bfloat16"]).output


def test_verify_fails_with_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Verdict(0.0, ThreePartError(0.0, 0.05, 0.0), 0.0, 1e-6, 1e-6)
    monkeypatch.setattr(verify, "verify", lambda *args, **kwargs: wrong)
    result = runner.invoke(app, ["verify", "--impl", "reference", "--dtype", "float64"])
    assert result.exit_code == 1
    assert "0 of 14 agree with float64" in result.output
    assert "FAIL" in result.output


def test_verify_names_a_bad_option() -> None:
    result = runner.invoke(app, ["verify", "--dtype", "int8"])
    assert result.exit_code == 2
    assert "expected one of float64, float32, bfloat16, float16" in result.output


def test_bench_writes_results_and_overwrites_none(tmp_path: Path) -> None:
    arguments = ["bench", "--vocab", "300", "--batch", "2", "--tokens", "6", "--repeats", "2", "--out", str(tmp_path)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (found,) = tmp_path.glob("*.json")
    assert list(tmp_path.glob("*.png"))
    text = found.read_text()
    assert "eager" in text
    assert "compile" in text
    again = runner.invoke(app, arguments)
    assert again.exit_code != 0
    assert "--overwrite" in again.output
    assert found.read_text() == text


def test_demo_names_a_bad_option() -> None:
    result = runner.invoke(app, ["demo", "--prompts", "1"])
    assert result.exit_code == 2
    assert "prompts" in result.output
