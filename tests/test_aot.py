"""Every kernel and combination in use compiles for four architectures without a GPU, and its binary is looked at."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from roofline import H200, predict, trajectory_chain
from under_way import under_way

NVIDIA = ["sm_80", "sm_90", "sm_100"]
# six of (V, dtype), each token_logp, its merge, and dlogits with like and unlike alignments; trajectory, three kernels in two
# dtypes; aggregate in two, scale in three
COMBINATIONS = 6 * 4 + 3 * 2 + 2 + 3
WIDE, NARROW = "V=151936", "V=50257"


def described(arch: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).parents[1] / "tools" / "binaries.py"
    done = subprocess.run(
        [sys.executable, str(program), arch], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@functools.cache
def architectures() -> dict[str, list[dict[str, Any]]]:
    """The binaries of each, as many programs at a time as there are processors."""
    names = [*NVIDIA, "gfx942"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(described, names), strict=True))


def binaries(arch: str) -> list[dict[str, Any]]:
    return architectures()[arch]


@pytest.mark.parametrize("arch", [*NVIDIA, "gfx942"])
def test_every_combination_compiles_without_spills(arch: str) -> None:
    assert len({binary["kernel"] for binary in binaries(arch)}) == COMBINATIONS
    for binary in binaries(arch):
        assert binary["reported"] > 0, f"no resource figures: {binary}"
        assert binary["spills"] == 0, binary


def of(arch: str, stage: str, vocab: str = "") -> list[dict[str, Any]]:
    """The binaries of a stage's main kernel."""
    found = [b for b in binaries(arch) if re.match(rf"{stage} \w+ {vocab}\S*$", b["kernel"])]
    assert found
    return found


def loads(binary: dict[str, Any], wide: bool) -> int:
    """Of 128 bits or narrower, into registers or into shared memory."""
    widths: dict[str, int] = binary["widths"]
    return sum(n for key, n in widths.items() if key.startswith("LDG") and key.endswith(".128") == wide)


@pytest.mark.parametrize("arch", NVIDIA)  # gfx942's figures do not name widths
def test_vocabulary_loops_are_128_bits_wide(arch: str) -> None:
    """Narrow accesses are the per-row scalars and the edges of a row alone, outside the loops."""
    for binary in of(arch, "token_logp", WIDE):
        assert loads(binary, wide=True) >= 2, binary
        assert loads(binary, wide=False) <= 3, binary  # mask, id, target logit
    for binary in of(arch, "dlogits"):  # any V
        assert loads(binary, wide=True) >= 2, binary
        assert loads(binary, wide=False) <= 9, (
            binary
        )  # mask, id, 3 statistics, 2 gradients; the edge, 64 bits in two halves
        stores = {key: n for key, n in binary["widths"].items() if key.startswith("STG") and key != "STG.128"}
        assert sum(stores.values()) <= 2, binary  # the edge: zero or a gradient


@pytest.mark.parametrize("arch", NVIDIA)
def test_scale_is_128_bits_wide(arch: str) -> None:
    """Narrow accesses are the factor's and those of the last block, which is not whole: 16 elements a thread."""
    found = [b for b in binaries(arch) if b["kernel"].startswith("scale")]
    assert len(found) == 3
    for binary in found:
        assert loads(binary, wide=True) >= 2, binary
        assert loads(binary, wide=False) <= 1 + 16, binary


@pytest.mark.parametrize("arch", NVIDIA)
def test_a_multiprocessor_has_32_kib_under_way(arch: str) -> None:
    """Where its threads wait for memory. And nearly without gaps: `dlogits` asks for the next step within the first third of a
    step's instructions; where `token_logp` can copy, two steps are under way at each wait, so every second one finds its own."""
    multiprocessor = H200._replace(shared_bytes=164 * 2**10) if arch == "sm_80" else H200
    for binary in [*of(arch, "token_logp"), *of(arch, "dlogits")]:
        if "fp64" not in binary["kernel"]:  # bound by its arithmetic
            assert predict(binary, multiprocessor, 1, 1).bytes_in_flight >= 2**15, binary
    for binary in of(arch, "dlogits"):
        assert binary["loop"]["exposed"] < 1 / 3, binary
    for binary in of(arch, "token_logp", WIDE):
        assert binary["loop"]["exposed"] <= 0.5, binary


@pytest.mark.parametrize("arch", NVIDIA)
def test_instructions_and_exponentials_a_column(arch: str) -> None:
    """At 16 exponentials and 128 instructions a clock, a multiprocessor of an H200 (132, 1.98 GHz, 4.8 TB/s) has 0.87 and 7.0
    in the time of one byte: 14 instructions for a bfloat16 read, 28 for a read and a write, and one exponential is enough."""
    for binary in [*of(arch, "token_logp"), *of(arch, "dlogits")]:
        if "fp64" in binary["kernel"]:
            continue
        units = 1 if binary["kernel"].startswith("token_logp") else 2
        size = 4 if "fp32" in binary["kernel"] else 2
        assert binary["loop"]["instructions"] < 7.0 * units * size, binary
        assert 1 <= binary["loop"]["exponentials"] < min(1.25, 0.87 * units * size), binary


@pytest.mark.parametrize("arch", NVIDIA)
def test_the_trajectory_stage_does_not_grow_with_its_tokens(arch: str) -> None:
    """Two kernels without a loop but the search for their block, and one that issues a trajectory of 4,096 tokens, with the others,
    in 3 % of the time of its step's bytes at V = 151,936: two reads and a write of bfloat16 logits of 8,192 tokens on an H200."""
    parts = {b["kernel"].split()[1]: b for b in binaries(arch) if re.match(r"trajectory \w+ fp32", b["kernel"])}
    assert [len(parts[name]["passes"]) for name in ("sums", "gradient")] == [1, 1]
    step_ms = 1e3 * 3 * 8192 * 151_936 * 2 / H200.bandwidth
    assert trajectory_chain(parts, H200, 4096, 3, 2).issue_ms <= 0.03 * step_ms


LOAD, NEXT = "LDG.E.128 R4, desc[UR4][R2.64] ;", "LDG.E.128 R12, desc[UR4][R2.64+0x200] ;"
USE, USE_NEXT, OTHER = "FADD R8, R5, R9 ;", "FADD R8, R12, R9 ;", "FMUL R8, R8, R8 ;"
COPY, SENT = "LDGSTS.E.BYPASS.128 [R10], desc[UR4][R2.64] ;", "LDGDEPBAR ;"
LOOPS = {
    "at once": ([LOAD, USE, *[OTHER] * 8], 16, 1.0),
    "two at once": ([LOAD, NEXT, USE, USE_NEXT, *[OTHER] * 6], 32, 0.9),
    "one after the other": ([LOAD, USE, NEXT, USE_NEXT, *[OTHER] * 6], 16, 1.0),
    "the next step's": ([USE, LOAD, *[OTHER] * 8], 16, 0.2),
    "copies, one under way while computing": (["DEPBAR.LE SB0, 0x1 ;", *[OTHER] * 7, COPY, SENT], 32, 0.45),
}


@pytest.mark.parametrize("name", list(LOOPS))
def test_what_is_under_way_in_a_loop(name: str) -> None:
    """Ten instructions: the latencies that a step waits for, and the instructions before the next load."""
    body, bytes_under_way, exposed = LOOPS[name]
    found = under_way(body)
    assert found["under_way"] == pytest.approx(bytes_under_way)
    assert found["exposed"] == pytest.approx(exposed)
