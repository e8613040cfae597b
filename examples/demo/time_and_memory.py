"""Wall time and peak memory of a function."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")

MEMORY_METHOD = {
    "cpu": "peak of PyTorch's CPU allocator during one forward and backward, less what was allocated before "
    "(torch.profiler)",
    "cuda": "torch.cuda.max_memory_allocated during one forward and backward, less what was allocated before",
}


def timed(run: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Return the seconds of one run, until the device is done, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Return the bytes at the peak of `run` beyond what was allocated before, measured as `MEMORY_METHOD` says."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its banner lines would break the progress bar
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(file))
        events = [e for e in json.loads(file.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    events = sorted((e for e in events if e["args"]["Device Type"] == 0), key=lambda e: float(e["ts"]))
    change = peak = 0
    for event in events:
        change += int(event["args"]["Bytes"])
        peak = max(peak, change)
    return peak
