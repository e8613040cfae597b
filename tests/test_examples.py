"""The examples run, and do what they say."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, EXAMPLES / name, *options], capture_output=True, text=True)


def test_the_demo_names_a_bad_option(tmp_path: Path) -> None:
    done = run("demo/demo.py", "--prompts", "1")
    assert done.returncode == 2
    assert "prompts" in done.stderr
    (tmp_path / "summary.json").touch()
    done = run("demo/demo.py", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "expected a folder without results" in done.stderr


def test_train_plain(tmp_path: Path) -> None:
    """A model that knows nothing (a tenth of its tokens are right) learns to count; figures of every optimizer step."""
    pytest.importorskip("transformers")
    out = tmp_path / "train"
    done = run("train_plain.py", "--out", str(out), "--steps", "20", "--epochs", "3")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((out / "train.csv").open()))
    assert len(rows) == 60
    first, last = (sum(float(row["reward"]) for row in part) / 9 for part in (rows[:9], rows[-9:]))
    assert first < 0.2
    assert last > 2 * first
    on_policy = [row for row in rows if row["epoch"] == "0"]
    assert all(float(row["p"]) == 1 and float(row["clip_fraction"]) == 0 for row in on_policy)
    assert any(0 < float(row["p"]) < 1 for row in rows)
    assert (out / "train.png").read_bytes().startswith(b"\x89PNG")
    again = run("train_plain.py", "--out", str(out))
    assert again.returncode == 2
    assert "expected a folder without results" in again.stderr
    assert len((EXAMPLES / "train_plain.py").read_text().splitlines()) < 120
