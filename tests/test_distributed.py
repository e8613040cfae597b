"""DDP and FSDP2 over gloo, two processes on the CPU: gradients and parameters of one process. The cases are in the worker."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run_ranks, with_gloo

LIMIT = 90  # seconds, of two processes together; the worker's own limits are shorter

pytestmark = with_gloo


def run(names: tuple[str, ...], folder: Path) -> None:
    run_ranks("distributed_worker.py", 2, names, folder, LIMIT)


def test_ddp(tmp_path: Path) -> None:
    run(("ddp", "ddp_outside"), tmp_path)


def test_fsdp2(tmp_path: Path) -> None:
    run(("fsdp", "fsdp_head", "fsdp_outside", "dtensors"), tmp_path)


def test_the_documentation_runs(tmp_path: Path) -> None:
    run(("docs",), tmp_path)


def test_a_failure_is_seen(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="KeyError: 'no such scenario'"):
        run(("no such scenario",), tmp_path)
