"""README and docs/pytorch.md say what is true: their code runs, and the results are those of the files under benchmarks/results/."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def blocks(*, in_trainers: bool) -> list[str]:
    """The Python blocks of the section on trainers, or of all others."""
    before, section, after = re.split(
        r"^## In your trainer$(.*?)(?=^## )", (ROOT / "README.md").read_text(), flags=re.S | re.M
    )
    return re.findall(r"```python\n(.*?)```", section if in_trainers else before + after, re.S)


def test_every_python_block_runs_in_order() -> None:
    found = blocks(in_trainers=False)
    assert len(found) >= 5
    exec(compile("\n".join(found), "README.md", "exec"), {})


def test_the_training_step_in_plain_pytorch_runs() -> None:
    """The other blocks on trainers run in tests/test_trl.py and tests/test_verl.py, where those are installed."""
    torch.manual_seed(0)
    found = [block for block in blocks(in_trainers=True) if "integrations" not in block]
    assert len(found) == 1
    exec(compile(found[0], "README.md", "exec"), {})


def test_every_block_about_pytorch_runs_in_order() -> None:
    """Those for several processes are run by test_distributed.py."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "pytorch.md").read_text(), re.S)
    alone = [block for block in blocks if "dist." not in block]
    assert len(alone) == len(blocks) - 2 >= 5
    torch._dynamo.reset()
    exec(compile("\n".join(alone), "docs/pytorch.md", "exec"), {})


def test_results_come_from_files() -> None:
    program = ROOT / "tools" / "readme_table.py"
    done = subprocess.run([sys.executable, str(program), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
