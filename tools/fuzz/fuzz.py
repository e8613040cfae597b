"""Random bad arguments to the public functions of each implementation. As a program:

    TRITON_INTERPRET=1 python tools/fuzz/fuzz.py --seed 1 --calls 20000 --impl cpp

A call that is wrong by the documentation (call_oracle.py) must raise TypeError or ValueError, name the argument, and run no
kernel; one that is right must return, and its backward pass too. The calls are made in a process of its own: if that dies or
hangs, the number of the call is told, which `--first` makes alone.
"""

from __future__ import annotations

import faulthandler
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import typer
from call_arguments import GOOD, Draw
from call_oracle import judge
from torch import Tensor

import pmpo_kernels
from pmpo_kernels import LossConfig, schedules
from pmpo_kernels.distributed import denominator
from pmpo_kernels.impls import IMPLS
from pmpo_kernels.scalars import shown

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from bad_calls import Finished

MESSAGE = re.compile(
    r"[\w./ -]+: (expected .+|\"ess\" needs .+), got .+|.*(unexpected keyword|missing .* required|impl=).*", re.S
)
PROGRESS_BYTES = 20


def function_of(name: str) -> Callable[..., Any]:
    own: dict[str, Callable[..., Any]] = {"denominator": denominator, "ratio_clip": LossConfig.ratio_clip}
    return own.get(name) or getattr(schedules, name, None) or getattr(pmpo_kernels, name)


def parameters(name: str) -> dict[str, Any]:
    """Return the parameters of a function with their defaults."""
    return {p.name: p.default for p in inspect.signature(function_of(name)).parameters.values()}


def make_call(seed: int, index: int, impl: str) -> tuple[str, dict[str, Any], str]:
    """Return function, arguments, and what the oracle says of them."""
    draw = Draw(f"{seed}:{index}")
    name = draw.r.choice([*GOOD, "pmpo_loss", "pmpo_loss_from_logp", "linear_pmpo_loss"])
    known = parameters(name)
    given = GOOD[name](draw)
    if "impl" in known:
        given["impl"] = "cpp" if name == "solve_power" and impl == "triton" else impl
    for _ in range(draw.r.choice([0, 1, 1, 1, 1, 2, 2, 3])):
        argument = draw.r.choice([*known, *given])
        if draw.often(0.03):
            given.pop(argument, None)
        elif draw.often(0.02):
            given["no_such_argument"] = None
        else:
            given[argument] = draw.changed(given.get(argument, known.get(argument)))
    if given.keys() - known.keys() or any(known[p] is inspect.Parameter.empty for p in known.keys() - given.keys()):
        return name, given, "bad"
    return name, given, judge(name, known | given)


def problem(name: str, given: dict[str, Any], verdict: str) -> str | None:
    """Return what is wrong with what a call does, None if nothing is."""
    function, error = function_of(name), None
    leaves = {n: x for n, x in given.items() if isinstance(x, Tensor) and x.requires_grad}
    with Finished() as finished:
        try:
            result = function(**given)
        except Exception as raised:
            error = raised
    if error is None:
        return "a result for a bad call" if verdict == "bad" else backward_problem(result, leaves)
    told = f"{type(error).__name__}: {error}"
    if verdict == "good":
        return f"a right call raised {told}"
    if type(error) not in (TypeError, ValueError) and not (name == "solve_power" and "cannot run" in told):
        return f"not a documented error: {told}"
    if not MESSAGE.fullmatch(str(error)) or len(str(error)) > 1000:
        return f"not a message of the package: {told}"
    return f"ran {finished.names} before {told}" if finished.names else None


def backward_problem(result: Any, leaves: dict[str, Tensor]) -> str | None:
    """Return what is wrong with the backward pass, which must work and give finite gradients of a finite loss. Those of logits and
    log-probs of a dtype with a smaller range than the loss has may overflow where they are rounded to it; the fused head looks
    after its own."""
    loss = getattr(result, "loss", None)
    if loss is None:
        outputs = [
            x for x in (result if isinstance(result, tuple) else [result]) if isinstance(x, Tensor) and x.requires_grad
        ]
        if outputs:
            torch.stack([x.double().sum() for x in outputs]).sum().backward()
        return None
    if not loss.requires_grad:
        return None
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for name, gradient in zip(leaves, gradients, strict=True):
        if gradient is None or not bool(loss.isfinite()):
            continue
        beyond = torch.finfo(gradient.dtype).max < torch.finfo(loss.dtype).max and name in ("logits", "logp", "entropy")
        if not beyond and not bool(gradient.isfinite().all()):
            return f"a finite loss {float(loss)} with the gradient {gradient} of {name}"
    return None


def work(seed: int, first: int, calls: int, impls: Sequence[str], progress: Path) -> bool:
    """Make the calls, and print counts and problems. Returns whether there were none."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    failed = 0
    started = time.monotonic()
    with progress.open("wb", buffering=0) as file:
        for index in range(first, first + calls):
            os.pwrite(file.fileno(), str(index).ljust(PROGRESS_BYTES).encode(), 0)
            impl = impls[index % len(impls)]
            name, given, verdict = make_call(seed, index, impl)
            counts[f"{name} {verdict}"] += 1
            counts[verdict] += 1
            found = problem(name, given, verdict)
            if found:
                failed += 1
                arguments = ", ".join(f"{n}={describe(x)}" for n, x in given.items())
                print(f"seed {seed} call {index} {impl}: {found}\n    {name}({arguments})", flush=True)
    counts["failed"] = failed
    print(json.dumps({"seconds": round(time.monotonic() - started, 1), **dict(sorted(counts.items()))}), flush=True)
    return not failed


def describe(x: Any) -> str:
    return f"{x.dtype} {x.layout} {x.device} {shown(x)}" if isinstance(x, Tensor) and not x.is_nested else shown(x)


def worker_command(seed: int, first: int, calls: int, impls: Sequence[str], progress: Path) -> list[str]:
    numbers = [
        word for name, x in (("seed", seed), ("first", first), ("calls", calls)) for word in (f"--{name}", str(x))
    ]
    return [
        sys.executable,
        __file__,
        *numbers,
        *(word for i in impls for word in ("--impl", i)),
        "--worker",
        str(progress),
    ]


def supervise(command: Sequence[str], progress: Path, hang_s: float) -> str | None:
    """Run a program that writes the number of its call to a file. Returns how it died or hung, and in which call."""
    with subprocess.Popen(command) as process:
        last, since = b"", time.monotonic()
        while process.poll() is None:
            time.sleep(0.05)
            now = progress.read_bytes() if progress.exists() else b""
            if now != last:
                last, since = now, time.monotonic()
            if time.monotonic() - since > hang_s:
                process.kill()
                process.wait()
                return f"hung for {hang_s} s in call {now.decode().strip()}"
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        return f"died of {name} in call {progress.read_bytes().decode().strip()}"
    return f"ended with status {process.returncode}" if process.returncode else None


def main(
    seed: Annotated[int, typer.Option(help="Of all calls.")] = 0,
    calls: Annotated[int, typer.Option(help="How many.")] = 1000,
    first: Annotated[int, typer.Option(help="The number of the first.")] = 0,
    impl: Annotated[list[str], typer.Option(help="Implementations, in turn.")] = list(IMPLS),  # noqa: B006
    hang: Annotated[float, typer.Option(help="Seconds a call may take, the first with all imports.")] = 120,
    worker: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    if worker:
        raise typer.Exit(not work(seed, first, calls, impl, Path(worker)))
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "call"
        found = supervise(worker_command(seed, first, calls, impl, progress), progress, hang)
    if found:
        print(
            f"seed {seed}: {found}; alone: --seed {seed} --first <call> --calls 1 {' '.join('--impl ' + i for i in impl)}"
        )
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
