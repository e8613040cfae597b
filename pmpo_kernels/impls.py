"""The implementations by name: which of them can run here, why the others cannot, and which one a call uses."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, get_args

import torch

from pmpo_kernels import cpp
from pmpo_kernels.scalars import expect, is_one_of

USABLE = "usable"
INTERPRETER = "set TRITON_INTERPRET=1 to run the Triton kernels on CPU tensors under Triton's interpreter"
Impl = Literal["triton", "cpp", "reference"]
IMPLS: tuple[str, ...] = get_args(Impl)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # asked once: torch.compile cannot trace the question


def _problem(impl: str) -> str | None:
    """Why an implementation cannot run here, or None if it can. torch.compile must be able to trace this: no device is named."""
    if impl == "triton" and not TRITON_INSTALLED:
        return "Triton is not installed (pip install triton)"
    if impl == "triton" and not interpreted() and not torch.cuda.is_available():
        return "no GPU is visible to PyTorch; " + INTERPRETER
    return (cpp.problem or None) if impl == "cpp" else None


def interpreted() -> bool:
    """Whether Triton kernels run under Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def available_impls() -> dict[str, str]:
    """Return each implementation's name with "usable ..." or with the reason why it cannot run here.

    >>> available_impls()["reference"]
    'usable on any device (eager PyTorch, the specification)'
    """
    where = {"reference": "any device (eager PyTorch, the specification)", "cpp": f"CPU tensors ({cpp.isa})"}
    if _problem("triton") is None:
        under = "CPU tensors, under Triton's interpreter (TRITON_INTERPRET=1)"
        where["triton"] = under if interpreted() else f"GPU tensors ({torch.cuda.get_device_name()})"
    return {impl: _problem(impl) or f"{USABLE} on {where[impl]}" for impl in IMPLS}


def default_impls() -> dict[str, str]:
    """Return what impl=None chooses for CPU and for GPU tensors, with the reason where that is a slower one or none.

    >>> default_impls()["GPU tensors"]
    'none: no GPU is visible to PyTorch'
    """
    cpu = "cpp, the fastest" if not cpp.problem else f"reference, slower, because {cpp.problem}"
    if not torch.cuda.is_available():
        gpu = "none: no GPU is visible to PyTorch"
    else:
        gpu = (
            "triton, the fastest" if TRITON_INSTALLED else f"none: {_problem('triton')}; impl='reference' runs, slower"
        )
    return {"CPU tensors": cpu, "GPU tensors": gpu}


def resolve_impl(impl: str | None, device: torch.device) -> str:
    """Return the implementation that runs on `device`: the named one, or the one that None chooses.

    None chooses Triton for GPU tensors, C++ for CPU tensors, and the reference elsewhere and where C++ is not built.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a named implementation that cannot run here, or Triton missing for GPU tensors.
    """
    if impl is None:
        on_cpu = "reference" if cpp.problem else "cpp"
        impl = {"cuda": "triton", "cpu": on_cpu}.get(device.type, "reference")
    expect("impl", is_one_of(impl, IMPLS), f"None or one of {list(IMPLS)}", impl)
    problem = _problem(impl)
    if problem:
        raise RuntimeError(f"impl={impl!r} cannot run on {device.type} tensors: {problem}")
    if impl == "triton" and device.type != "cuda" and not interpreted():
        raise RuntimeError(f"impl='triton' cannot run on {device.type} tensors: {INTERPRETER}")
    if impl == "cpp" and device.type != "cpu":
        raise RuntimeError(f"impl='cpp' cannot run on {device.type} tensors: its kernels are for CPU tensors")
    return impl
