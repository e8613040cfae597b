"""Settings of the C library's allocator, with and without page faults on large buffers, and a count of the faults."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h of glibc
_DEFAULTS = {_M_TRIM_THRESHOLD: 128 * 1024, _M_MMAP_MAX: 65536}


class Allocator(str, Enum):
    """How large tensors get their memory.

    `default`: each is fresh memory, whose pages the system clears on first use. `reuse`: freed memory is kept and taken again, so
    that after a warm-up nothing but the computation is timed. Page faults are reported to show whether it is so: glibc before
    2.38 does not always take an aligned block again for one of exactly its size."""

    default = "default"
    reuse = "reuse"


def allocators(device: str) -> list[Allocator]:
    """Return the settings that can be compared: both on a CPU with glibc, else the default. A GPU has PyTorch's own allocator."""
    return list(Allocator) if device == "cpu" and _mallopt() else [Allocator.default]


@contextmanager
def using(allocator: Allocator) -> Iterator[None]:
    """Use this setting in this process until the end of the block."""
    mallopt = _mallopt()
    if allocator is Allocator.default or mallopt is None:
        yield
        return
    assert mallopt(_M_MMAP_MAX, 0)
    assert mallopt(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        for option, value in _DEFAULTS.items():
            mallopt(option, value)
        ctypes.CDLL(None).malloc_trim(0)


def map_every_large_tensor() -> None:
    """Give every large tensor a mapping of its own, so that freeing it lowers the resident set."""
    mallopt = _mallopt()
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**18)


def page_faults() -> int | None:
    """Number of page faults of this process so far that needed no disk, None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _mallopt() -> Callable[[int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    # musl has neither function, and other C libraries number the options differently
    return libc.mallopt if hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version") else None
