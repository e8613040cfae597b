"""What a measured figure depends on besides the shape: versions, devices, the commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pmpo_kernels.version import __version__


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def installed(distribution: str) -> str:
    """Version of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Versions of this package, of Python, of the libraries that decide the speed, and the operating system."""
    return {
        "pmpo_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "numpy": installed("numpy"),
        "cuda (torch build)": torch.version.cuda or "none",
        "hip (torch build)": torch.version.hip or "none",
        "os": f"{platform.system()} {platform.machine()}",
    }


def devices() -> dict[str, str]:
    """Names of the CPU and of each GPU with its memory and compute capability, and the number of PyTorch's threads."""
    found = {
        "cpu": f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": f"{torch.get_num_threads()} (PyTorch)",
    }
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}"
    if torch.cuda.device_count() == 0:
        found["cuda"] = "no GPU visible to PyTorch"
    return found


@cache
def commit() -> str | None:
    """Last commit that touched the package, with "-dirty" if the files differ from it; None outside a repository."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *args, "--", "."]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        found = git("log", "-1", "--format=%H")
        return found + "-dirty" * bool(git("status", "--porcelain")) if found else None
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance() -> dict[str, Any]:
    """Return what every file of results begins with: date, commit, versions, devices."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "devices": devices(),
    }
