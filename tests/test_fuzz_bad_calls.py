"""The fuzz of the public functions: a fixed part of it, and that it notices what it is there for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from call_arguments import GOOD
from fuzz import problem, supervise, worker_command

from pmpo_kernels import solver
from pmpo_kernels.impls import IMPLS

LOGP = torch.zeros(2, 3)
SOLVE = {"log_weights": LOGP, "target_ess": torch.ones(2), "impl": "reference"}


def test_random_calls(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Good and bad ones of every function, by all implementations in turn."""
    progress = tmp_path / "call"
    found = supervise(worker_command(20, 0, 700, list(IMPLS), progress), progress, hang_s=120)
    told = capfd.readouterr().out
    assert found is None, f"{found}\n{told}"
    counts = json.loads(told.splitlines()[-1])
    assert counts["failed"] == 0
    assert counts["good"] + counts["bad"] + counts.get("either", 0) == 700
    assert all(counts.get(f"{name} {verdict}", 0) for name in GOOD for verdict in ("good", "bad"))


def test_a_death_and_a_hang_are_told(tmp_path: Path) -> None:
    progress = tmp_path / "call"
    for end, hang_s, told in (
        ("os.abort()", 60.0, "died of SIGABRT in call 7"),
        ("time.sleep(60)", 5.0, "hung for 5.0 s in call 7"),
    ):
        code = f"import os, time; open({str(progress)!r}, 'w').write('7'); {end}"
        assert supervise([sys.executable, "-c", code], progress, hang_s=hang_s) == told
    assert supervise([sys.executable, "-c", "exit(1)"], progress, hang_s=60) == "ended with status 1"
    assert supervise([sys.executable, "-c", "pass"], progress, hang_s=60) is None


def test_what_a_call_does_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(given: dict[str, Any], verdict: str) -> str:
        return problem("solve_power", given, verdict) or ""

    assert told(SOLVE, "good") == ""
    assert told(SOLVE, "bad") == "a result for a bad call"
    assert "a right call raised ValueError: target_ess" in told(SOLVE | {"target_ess": torch.ones(3)}, "good")
    bad = SOLVE | {"target_ess": torch.tensor([1.0, -1.0])}
    assert told(bad, "bad") == ""
    monkeypatch.setattr(solver.checks, "check_all", lambda name, value, good, expected: 1 / 0)
    assert told(bad, "bad") == "not a documented error: ZeroDivisionError: division by zero"

    def mumble(*args: object) -> None:
        raise ValueError("target_ess is wrong")

    monkeypatch.setattr(solver.checks, "check_all", mumble)
    assert told(bad, "bad") == "not a message of the package: ValueError: target_ess is wrong"
    monkeypatch.undo()
    run = solver.stage

    def late(name: str, impl: str) -> Any:
        def call(*args: Any) -> None:
            run(name, impl)(*args)
            raise ValueError("target_ess: expected more, got less")

        return call

    monkeypatch.setattr(solver, "stage", late)
    ran = "ran ['pmpo_kernels.solve_power.reference'] before ValueError: target_ess: expected more, got less"
    assert told(SOLVE, "bad") == ran
