"""Free memory of a device."""

from __future__ import annotations

from pathlib import Path

import torch


def available_memory(device: str | torch.device) -> int | None:
    """Free memory in bytes that PyTorch could use on a device, or None where the system does not tell. On a GPU this includes what
    PyTorch's allocator holds unused. On a CPU it is what is available without swapping (Linux only)."""
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
