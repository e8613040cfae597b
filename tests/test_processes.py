"""The loss in several threads at once, in child processes, and after an interrupt in the middle: always the same bits."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch
from head_cases import head_case, run_head
from helpers import FEW, run
from process_worker import bits
from processes import run_ranks
from torch import Tensor

from pmpo_kernels import cpp, pmpo_loss, solve_power
from pmpo_kernels.impls import IMPLS
from pmpo_kernels.verification import configurations, make_case

CONFIGS = configurations()
SECONDS = 120  # for a process that takes some ten

INTERPRETER = (
    "Triton's interpreter keeps the running program's index, and the functions that it puts into triton.language for the time "
    "of a launch, once a process: not for several threads"
)
here = pytest.mark.parametrize("impl", IMPLS)


def skip_where_it_cannot(impl: str) -> None:
    if impl == "triton" and not torch.cuda.is_available():
        pytest.skip(INTERPRETER)
    if impl == "cpp" and cpp.problem:
        pytest.skip(cpp.problem)


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns 500 times as often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


# --- threads ---------------------------------------------------------------------------------------------------------


def calls(impl: str, device: str) -> list[list[bytes]]:
    """The bits of losses of several sizes, dtypes and configurations, from logits and through the head, with their gradients."""
    found = []
    for i, name in enumerate(FEW):
        dtype = (torch.float32, torch.float64)[i % 2]
        out, grad = run(make_case(dtype, B=6, T=12, V=300 + i, device=device, seed=i), CONFIGS[name], impl)
        head, gradients = run_head(head_case(dtype, device), CONFIGS[name], impl, max_chunk_tokens=12)
        found += [bits(out, grad), bits(head, *gradients)]
    return found


@here
@pytest.mark.usefixtures("switching")
def test_calls_in_several_threads_at_once(impl: str) -> None:
    """Each thread makes all calls; switching often, the threads are in different ones."""
    skip_where_it_cannot(impl)
    device = "cuda" if impl == "triton" else "cpu"
    want = calls(impl, device)
    together = threading.Barrier(4)

    def work(_: int) -> list[list[bytes]]:
        together.wait()
        return calls(impl, device)

    with ThreadPoolExecutor(4) as pool:
        several = list(pool.map(work, range(4)))
    assert all(found == want for found in several)


@here
@pytest.mark.usefixtures("switching")
def test_backward_in_another_thread(impl: str) -> None:
    """Several graphs over the same logits, each walked back in a thread that did not make it; inputs stay as they are."""
    skip_where_it_cannot(impl)
    case = make_case(torch.float32, B=6, T=12, V=300, device="cuda" if impl == "triton" else "cpu")
    z = case.logits.clone().requires_grad_()
    given = (case.token_ids, case.old_logp, case.advantages)
    options = {"mask": case.mask, "ref_logp": case.ref_logp, "impl": impl}
    losses = [pmpo_loss(z, *given, config=CONFIGS[name], **options).loss for name in FEW]
    want = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in losses]
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda loss: torch.autograd.grad(loss, z, retain_graph=True)[0], islice(cycle(losses), 16))
        )
    assert all(torch.equal(a, b) for a, b in zip(found, islice(cycle(want), 16), strict=True))
    assert torch.equal(z, case.logits)


@pytest.mark.parametrize("impl", ["reference", "cpp"])
@pytest.mark.usefixtures("switching")
def test_the_solver_in_several_threads(impl: str) -> None:
    skip_where_it_cannot(impl)
    cases = [torch.randn(32, 500 + i, generator=torch.Generator().manual_seed(i)) for i in range(8)]

    def solve(l: Tensor) -> Tensor:
        return solve_power(l, torch.full((32,), 400.0), impl=impl)

    want = [solve(l) for l in cases]
    assert 0 < float(want[0].min()) < 1
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(solve, cases * 4))
    assert all(torch.equal(a, b) for a, b in zip(found, want * 4, strict=True))


# --- processes, interrupts -------------------------------------------------------------------------------------------


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_a_forked_child(tmp_path: Path) -> None:
    """All implementations, after the parent has made the same calls and used two threads."""
    run_ranks("process_worker.py", 1, ("fork",), tmp_path, SECONDS)


def test_a_spawned_child(tmp_path: Path) -> None:
    run_ranks("process_worker.py", 1, ("spawn",), tmp_path, SECONDS)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to one process")
@here
def test_interrupted_calls(impl: str, tmp_path: Path) -> None:
    """SIGINT in each stage, forward, backward, in the head and in the solver: KeyboardInterrupt, and the same bits afterwards. Of an
    interrupted backward pass in place the second one raises."""
    if impl == "cpp" and cpp.problem:
        pytest.skip(cpp.problem)
    run_ranks("process_worker.py", 1, (f"interrupts {impl}", f"inplace {impl}"), tmp_path, SECONDS)
