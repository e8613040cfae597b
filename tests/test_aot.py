"""Every kernel and combination in use compiles for four architectures without a GPU, and its binary is looked at."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NVIDIA = ["sm_80", "sm_90", "sm_100"]
COMBINATIONS = 14  # (token_logp, dlogits) x (bf16, fp32 at two V; fp16, fp64 at one), trajectory x 2


@functools.cache
def binaries(arch: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("aot.py")
    done = subprocess.run(
        [sys.executable, str(program), arch], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("arch", [*NVIDIA, "gfx942"])
def test_every_combination_compiles_without_spills(arch: str) -> None:
    assert len({binary["kernel"] for binary in binaries(arch)}) == COMBINATIONS
    for binary in binaries(arch):
        assert binary["reported"] > 0, f"no resource figures: {binary}"
        assert binary["spills"] == 0, binary


@pytest.mark.parametrize("arch", NVIDIA)  # gfx942's exp and log are made of fused operations too
def test_scaling_and_centring_are_not_fused(arch: str) -> None:
    """x = logits / temperature is rounded before row_max is subtracted (see `launch.VOCAB_OPTIONS`)."""
    for binary in binaries(arch):
        if not binary["kernel"].startswith("trajectory"):
            assert binary["fused"] == 0, binary


@pytest.mark.parametrize("arch", NVIDIA)  # gfx942's figures do not name widths
def test_vocabulary_loops_are_128_bits_wide(arch: str) -> None:
    """Where V is a multiple of 8; narrow accesses are then the per-row scalars alone, outside the loops."""
    for binary in binaries(arch):
        if "V=151936" not in binary["kernel"]:
            continue
        widths = binary["widths"]
        wide, narrow = (
            widths.get("LDG.128", 0),
            sum(n for key, n in widths.items() if key.startswith("LDG") and key != "LDG.128"),
        )
        assert wide >= 2, binary
        scalars = (
            3 if binary["kernel"].startswith("token_logp") else 7
        )  # mask, id, target logit; mask, id, 3 statistics, 2 gradients
        assert narrow <= scalars, binary
        if binary["kernel"].startswith("dlogits"):
            assert {key for key in widths if key.startswith("STG")} == {"STG.128"}, binary
