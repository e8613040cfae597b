"""A short soak through the code of `make soak`, and proof that it finds what grows: each thing it watches, leaked on purpose."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import pytest
import soak
import torch
import typer
from growth import BLOCKS, CACHED, GRAPHS, HEAP, OBJECTS, RESIDENT, TENSORS, VARIANTS, WITHOUT_CACHES, RunStep, Soaked
from torch import Tensor
from typer.testing import CliRunner

from pmpo_kernels import cpp, pmpo_loss
from pmpo_kernels.verification import make_case

app = typer.Typer()
app.command()(soak.main)

# --- what leaks: each keeps something of every step ------------------------------------------------------------------

kept: list[object] = []


@cache
def kept_result(index: int) -> None:
    return None


def keep_memory(bytes_a_step: int) -> None:
    """Of the C library, where Python does not see it."""
    malloc = ctypes.CDLL(None).malloc
    malloc.restype = ctypes.c_void_p
    ctypes.memset(malloc(ctypes.c_size_t(bytes_a_step)), 1, bytes_a_step)


def keep_graph(index: int) -> None:
    if index % 10 == 0:
        torch.compile(eval(f"lambda x: x + {index}"), backend="eager")(torch.ones(3))


def keep_variant(index: int) -> None:
    from pmpo_kernels.triton.dlogits import _dlogits_bwd_kernel as kernel

    dict.setdefault(kernel.device_caches, 0, ({}, {}))[0][index] = None


LEAKS: dict[str, tuple[Callable[[int], object], set[str]]] = {
    "nothing": (lambda i: None, set()),
    "a tensor of 4 KiB": (lambda i: kept.append(torch.zeros(1024)), {TENSORS, OBJECTS, BLOCKS, HEAP, RESIDENT}),
    "a tensor of 4 KiB, now and then": (
        lambda i: i % 20 or kept.append(torch.zeros(1024)),
        {TENSORS, OBJECTS, HEAP},
    ),
    "a list": (lambda i: kept.append([]), {OBJECTS, BLOCKS}),
    "a number": (lambda i: kept.append(float(i)), {BLOCKS}),
    "memory": (lambda i: keep_memory(4096), {HEAP, RESIDENT}),
    "32 bytes": (lambda i: keep_memory(32), {HEAP}),
    "a cached result": (kept_result, {CACHED}),
    "a graph": (keep_graph, {GRAPHS}),
    "a compiled kernel": (keep_variant, {VARIANTS}),
}


def step(seed: int, index: int, impl: str | None, device: str, leak: str = "nothing") -> list[Tensor]:
    """A small loss, and a leak."""
    case = make_case(torch.float32, B=4, T=4, V=8 + index % 9, seed=index)
    z = case.logits.requires_grad_()
    loss = pmpo_loss(z, case.token_ids, case.old_logp, case.advantages, mask=case.mask).loss
    loss.backward()
    LEAKS[leak][0](index)
    return [loss.detach(), z.grad]


def other_bits(seed: int, index: int, impl: str | None, device: str) -> list[Tensor]:
    """Step 3 has them from its second time on."""
    found = step(seed, index, impl, device)
    if index == 3:
        kept.append(index)
        found[0] = found[0] + len(kept)
    return found


def run_here(step: RunStep) -> Soaked:
    from growth import soak

    torch.set_num_threads(1)
    return soak(320, 8, 0, None, "cpu", step)


@pytest.fixture(scope="module")
def fresh() -> ProcessPoolExecutor:
    """One process for all leaks, in which Triton's kernels are compiled, not interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        for name, value in WITHOUT_CACHES.items():
            patch.setenv(name, value)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(os.getpid).result()
            yield pool


@pytest.mark.skipif(sys.platform != "linux", reason="the C heap and the resident set are read on Linux only")
@pytest.mark.parametrize("leak", list(LEAKS))
def test_a_leak_is_found(leak: str, fresh: ProcessPoolExecutor) -> None:
    found = fresh.submit(run_here, partial(step, leak=leak)).result()
    growing = {name for name, g in found.growth().items() if not g["flat"]}
    assert LEAKS[leak][1] <= growing, found.growth()
    if leak == "nothing":
        assert found.ok, found.growth()


def test_other_bits_are_found(fresh: ProcessPoolExecutor) -> None:
    found = fresh.submit(run_here, other_bits).result()
    assert found.changed == [3]
    assert not found.ok


# --- the real steps --------------------------------------------------------------------------------------------------


def test_two_thousand_steps_stay_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of call, dtype and option, through the command."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    impl, out = "reference" if cpp.problem else "cpp", tmp_path / "soak.json"
    done = CliRunner().invoke(app, ["--steps", "2000", "--impl", impl, "--out", str(out)])
    assert done.exit_code == 0, done.output
    content = json.loads(out.read_text())
    assert content["steps"] == content["at"][-1] == 2000
    assert content["changed"] == []
    assert content["held"][GRAPHS][-1] == 1
    assert all(len(values) == len(content["at"]) for values in content["held"].values())
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert CliRunner().invoke(app, ["--out", str(out)]).exit_code == 2  # nothing is overwritten unasked


def test_the_command_fails_where_something_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = list(range(20, 180, 20))
    growing = Soaked(at, {TENSORS: [0, 0, 0, 0, 1, 1, 1, 1], HEAP: [9] * 8}, [])
    monkeypatch.setattr(soak, "soak_in_fresh_process", lambda *arguments: growing)
    done = CliRunner().invoke(app, ["--steps", "160", "--impl", "reference", "--out", str(tmp_path / "soak.json")])
    assert done.exit_code == 1
    assert "NO" in done.output
