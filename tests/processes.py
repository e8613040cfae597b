"""Several ranks as processes of their own, which end with the call, whatever happens in them."""

from __future__ import annotations

import datetime
import faulthandler
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

with_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch without gloo")


def run_ranks(worker: str, world: int, names: tuple[str, ...], folder: Path, limit: float) -> None:
    """Run `tests/<worker> RANK WORLD STORE NAME...` for each rank. It fails with what they wrote where one fails, or after `limit`
    seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever the machine's name resolves to
    logs = [folder / f"rank{rank}.txt" for rank in range(world)]
    processes: list[subprocess.Popen[bytes]] = []
    late = False
    try:
        for rank, path in enumerate(logs):
            with path.open("w") as log:
                program = Path(__file__).parent / worker
                command = [sys.executable, str(program), str(rank), str(world), str(folder / "store"), *names]
                streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
                processes.append(subprocess.Popen(command, env=environment, **streams))
        end = time.monotonic() + limit
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes) and not late:
            late = time.monotonic() > end
            time.sleep(0.05)
    finally:
        for p in processes:  # one that failed leaves the others waiting for it
            if p.poll() is None:
                p.kill()
            p.wait()
    codes = [p.returncode for p in processes]
    if late or any(codes):
        told = "\n".join(f"{path.name}:\n{path.read_text()}" for path in logs)
        pytest.fail(f"exit codes {codes}" + f", more than {limit} s" * late + f"\n{told}")


def take_part(
    rank: int, world: int, store: str, scenarios: dict[str, Callable[[], None]], names: tuple[str, ...], limit: float
) -> None:
    """Do the work of such a process: run the scenarios, one after the other, in a group over gloo."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(limit, exit=True)  # a process that waits says where
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=limit / 2)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    for name in names:
        scenarios[name]()
    Path(f"{store}.{rank}").touch()
    while not all(Path(f"{store}.{other}").exists() for other in range(world)):
        time.sleep(0.01)  # a connection must not close under another
    sys.stdout.flush()
    os._exit(
        0
    )  # all is checked; now and then a process aborts while PyTorch and the interpreter take their threads down
