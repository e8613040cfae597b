"""What `test_processes.py` runs in a process of its own: `process_worker.py RANK WORLD STORE NAME...`."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import pytest
import torch
from head_cases import head_case, run_head
from helpers import run, small_case
from torch import Tensor

from pmpo_kernels import PMPOOutput, api, autograd, cpp, solve_power, solver
from pmpo_kernels.impls import IMPLS
from pmpo_kernels.linear import operator
from pmpo_kernels.verification import configurations, make_case

LIMIT = 100  # s; nothing here takes more than some ten
CONFIG = configurations()["pmpo, all terms"]
HERE = [impl for impl in IMPLS if impl != "cpp" or not cpp.problem]
DELAYS = (0.0, 1e-3, 4e-3)  # s between the start of a stage and the signal: at its beginning, and somewhere in it

Call = Callable[[], object]


def device_of(impl: str) -> str:
    return "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"


def bits(out: PMPOOutput, *more: Tensor | None) -> list[bytes]:
    tensors = [*(x for x in out if isinstance(x, Tensor)), *out.metrics.values(), *(x for x in more if x is not None)]
    return [x.detach().cpu().contiguous().numpy().tobytes() for x in tensors]


def everything(impl: str) -> list[bytes]:
    """Return the bits of a loss from logits and one through the head, with their gradients, and of the solver."""
    device = device_of(impl)
    out, grad = run(small_case(device), CONFIG, impl)
    head, gradients = run_head(head_case(torch.float32, device), CONFIG, impl, max_chunk_tokens=12)
    return [*bits(out, grad), *bits(head, *gradients), solved(impl).numpy().tobytes()]


def solved(impl: str, B: int = 4) -> Tensor:
    l = torch.randn(B, 50, generator=torch.Generator().manual_seed(0))
    return solve_power(l, torch.full((B,), 40.0), impl=None if impl == "triton" else impl)


# --- other processes -------------------------------------------------------------------------------------------------


def answer(connection: Connection, impls: list[str]) -> None:
    torch.set_num_threads(1)
    connection.send([everything(impl) for impl in impls])


def in_child(method: str, impls: list[str]) -> None:
    """Compare the bits before a child is started, in it, and after it."""
    want = [everything(impl) for impl in impls]
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=answer, args=(sender, impls), daemon=True)
    child.start()
    sender.close()
    try:
        assert receiver.poll(LIMIT / 2), f"a child by {method} does not answer"
        found = receiver.recv()
    finally:
        child.kill()
        child.join()
    for impl, ours, theirs in zip(impls, want, found, strict=True):
        assert ours == theirs, f"{impl}: other bits in a child by {method}"
        assert method == "spawn" or everything(impl) == ours  # a spawned child shares nothing that it could change


def fork() -> None:
    """Fork after the parent has used its threads. The child does not have them, and must use one."""
    torch.set_num_threads(2)
    torch.randn(1 << 20).exp()  # two threads from here on
    everything("reference")
    torch.set_num_threads(1)
    in_child("fork", [impl for impl in HERE if device_of(impl) == "cpu"])  # CUDA cannot be used after a fork


def spawn() -> None:
    torch.set_num_threads(1)
    in_child("spawn", HERE)


# --- interrupts ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def signal_in(name: str, delay: float) -> Iterator[None]:
    """Send a SIGINT to this process from another thread, `delay` seconds after the first call of a stage has begun."""
    begun, sent = threading.Event(), threading.Event()
    original = autograd.stage

    def send() -> None:
        begun.wait()
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGINT)
        sent.set()

    def stage(found: str, impl: str) -> Callable[..., Any]:
        operator = original(found, impl)

        def call(*args: Any) -> Any:
            if found == name:
                begun.set()
            out = operator(*args)
            if found == name:
                sent.wait()  # of a stage that was faster than the signal
                time.sleep(0.01)
            return out

        return call

    thread = threading.Thread(target=send)
    thread.start()
    try:
        with (
            mock.patch.object(autograd, "stage", stage),
            mock.patch.object(operator, "stage", stage),
            mock.patch.object(solver, "stage", stage),
        ):
            yield
    finally:
        begun.set()
        thread.join()


def interrupt(call: Call, stage: str, function: str, delay: float) -> None:
    """Check that KeyboardInterrupt comes out of `call`, from within `function` of the package."""
    try:
        with signal_in(stage, delay):
            call()
    except KeyboardInterrupt as error:
        frames = traceback.extract_tb(error.__traceback__)
        assert any(f.name == function and "pmpo_kernels" in f.filename for f in frames), frames
    else:
        raise AssertionError(f"{stage}: expected KeyboardInterrupt in {function}")


def interrupts(impl: str) -> None:
    """Interrupt each stage of each call. Afterwards the same call gives the bits that it gave before."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    device = device_of(impl)
    slow = impl == "triton"  # the interpreter takes milliseconds a row
    case = small_case(device) if slow else make_case(torch.float32, B=8, T=32, V=5000, device=device)
    head = head_case(torch.float32, device)

    def loss() -> list[bytes]:
        return bits(*run(case, CONFIG, impl))

    def through_the_head() -> list[bytes]:
        out, gradients = run_head(head, CONFIG, impl, max_chunk_tokens=12)
        return bits(out, *gradients)

    def solver() -> list[bytes]:
        return [solved(impl, 20 if impl == "reference" else 20_000).numpy().tobytes()]

    calls: list[tuple[Callable[[], list[bytes]], str, str]] = [
        (loss, "token_logp", "forward"),
        (loss, "trajectory", "forward"),  # Triton's solver is in it
        (loss, "dlogits", "backward"),
        (through_the_head, "dlogits_", "forward"),
    ]
    calls += [(solver, "solve_power", "solve_power")] * (impl != "triton")
    want = {call: call() for call, _, _ in calls}
    for delay in DELAYS[-1:] if slow else DELAYS:
        for call, stage, function in calls:
            interrupt(call, stage, function, delay)
            assert call() == want[call], f"{call.__name__}: other bits after an interrupt {delay} s into {stage}"


def inplace(impl: str) -> None:
    """Interrupt a backward pass in place, which may have written over the logits. The next one then raises instead of reading
    them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    case = small_case(device_of(impl))
    for written in (False, True):
        z = case.logits.detach().clone().requires_grad_()
        logp = api.token_logp(z, case.token_ids, mask=case.mask, inplace=written, impl=impl).logp
        interrupt(lambda logp=logp: logp.sum().backward(), "dlogits_" if written else "dlogits", "backward", 0.0)
        if not written:
            logp.sum().backward()
            assert torch.equal(z, case.logits)
            continue
        with pytest.raises(RuntimeError, match="unchanged since the forward pass"):
            logp.sum().backward()


SCENARIOS: dict[str, Callable[[], None]] = {
    "fork": fork,
    "spawn": spawn,
    **{f"interrupts {impl}": (lambda impl=impl: interrupts(impl)) for impl in HERE},
    **{f"inplace {impl}": (lambda impl=impl: inplace(impl)) for impl in HERE},
}


if __name__ == "__main__":
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    for scenario in sys.argv[4:]:
        SCENARIOS[scenario]()
