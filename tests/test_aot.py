"""Every kernel and combination in use compiles for four architectures without a GPU, and its binary is looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "gfx942"]
COMBINATIONS = 14  # (token_logp, dlogits) x (bf16, fp32 at two V; fp16, fp64 at one), trajectory x 2


@pytest.fixture(scope="module", params=ARCHITECTURES)
def binaries(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("aot.py")
    done = subprocess.run(
        [sys.executable, str(program), request.param], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_combination_compiles_without_spills(binaries: list[dict[str, Any]]) -> None:
    assert len({binary["kernel"] for binary in binaries}) == COMBINATIONS
    for binary in binaries:
        assert binary["reported"] > 0, f"no resource figures: {binary}"
        assert binary["spills"] == 0, binary


def test_scaling_and_centring_are_not_fused(binaries: list[dict[str, Any]]) -> None:
    """x = logits / temperature is rounded before row_max is subtracted (see `launch.VOCAB_OPTIONS`)."""
    if binaries[0]["arch"] == "gfx942":
        return  # its exp and log are made of fused operations too
    for binary in binaries:
        if not binary["kernel"].startswith("trajectory"):
            assert binary["fused"] == 0, binary


def test_vocabulary_loops_are_128_bits_wide(binaries: list[dict[str, Any]]) -> None:
    """Where V is a multiple of 8; narrow accesses are then the per-row scalars alone, outside the loops."""
    if binaries[0]["arch"] == "gfx942":
        return  # its figures do not name widths
    for binary in binaries:
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
