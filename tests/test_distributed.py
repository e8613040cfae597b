"""DDP and FSDP2 over gloo, two processes on the CPU: gradients and parameters of one process. The cases are in the worker."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed

WORKER = Path(__file__).parent / "distributed_worker.py"
LIMIT = 90  # seconds, of two processes together; the worker's own limits are shorter

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="PyTorch without gloo"
)


def run(names: tuple[str, ...], folder: Path) -> None:
    """Both ranks as processes of their own, which end with this call, whatever happens in them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever the machine's name resolves to
    logs = [folder / f"rank{rank}.txt" for rank in range(2)]
    processes = []
    try:
        for rank, path in enumerate(logs):
            with path.open("w") as log:
                command = [sys.executable, str(WORKER), str(rank), str(folder / "store"), *names]
                streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
                processes.append(subprocess.Popen(command, env=environment, **streams))
        end = time.monotonic() + LIMIT
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
    finally:
        for p in processes:  # one that failed leaves the other waiting for it
            if p.poll() is None:
                p.kill()
            p.wait()
    if codes := [p.returncode for p in processes if p.returncode]:
        pytest.fail(f"exit codes {codes}\n" + "\n".join(f"{path.name}:\n{path.read_text()}" for path in logs))


def test_ddp(tmp_path: Path) -> None:
    run(("ddp", "ddp_outside"), tmp_path)


def test_fsdp2(tmp_path: Path) -> None:
    run(("fsdp", "fsdp_head", "fsdp_outside", "dtensors"), tmp_path)


def test_the_documentation_runs(tmp_path: Path) -> None:
    run(("docs",), tmp_path)


def test_a_failure_is_seen(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="KeyError: 'no such scenario'"):
        run(("no such scenario",), tmp_path)
