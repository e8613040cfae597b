"""README and docs/pytorch.md say what is true: their code runs, and the results are those of the files under benchmarks/results/."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def test_every_python_block_runs_in_order() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) >= 5
    exec(compile("\n".join(blocks), "README.md", "exec"), {})


def test_every_block_about_pytorch_runs_in_order() -> None:
    """Those for several processes are run by test_distributed.py."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "pytorch.md").read_text(), re.S)
    alone = [block for block in blocks if "dist." not in block]
    assert len(alone) == len(blocks) - 2 >= 5
    torch._dynamo.reset()
    exec(compile("\n".join(alone), "docs/pytorch.md", "exec"), {})


def test_results_come_from_files() -> None:
    program = ROOT / "benchmarks" / "readme_table.py"
    done = subprocess.run([sys.executable, str(program), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
