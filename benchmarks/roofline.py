"""What a binary's figures allow on a chip: a model from data sheets, not a measurement.

A kernel cannot be faster than its bytes at the memory's bandwidth, its instructions at the rate a multiprocessor issues
them, or its exponentials at that of the special function units. `covered_ns` is the memory latency that the loads under way
on a multiprocessor at full bandwidth would cover (Little's law).
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Chip(NamedTuple):
    """Rates a multiprocessor and clock: CUDA C++ programming guide, arithmetic throughput of compute capability 9.0."""

    name: str
    multiprocessors: int
    clock_hz: float  # so that 132 x 128 x 2 of it are the data sheet's 67 TFLOP/s in float32
    bandwidth: float  # bytes/s, data sheet
    instructions: int = 128
    exponentials: int = 16
    registers: int = 65536
    threads: int = 2048
    shared_bytes: int = 228 * 2**10  # of which each program takes 1 KiB more than it asks for


H200 = Chip("H200 SXM", 132, 1.98e9, 4.8e12)


class Prediction(NamedTuple):
    """Milliseconds of one stage by each limit, and what is resident on a multiprocessor."""

    by_bytes: float
    by_instructions: float
    by_exponentials: float
    resident_threads: int
    bytes_in_flight: int
    covered_ns: float

    @property
    def ms(self) -> float:
        return max(self.by_bytes, self.by_instructions, self.by_exponentials)


def predict(binary: dict[str, Any], chip: Chip, columns: float, bytes_a_column: int) -> Prediction:
    """A stage over `columns` = rows x V logits, from the description that `binaries.py` gives of its kernel."""
    threads, loop = binary["threads"], binary["loop"]
    registers = -(-binary["registers"] // 8) * 8 * threads  # given out in eights a thread
    shared = binary["shared_bytes"] + 2**10
    programs = min(chip.registers // registers, chip.threads // threads, chip.shared_bytes // shared)
    seconds = 1e3 * columns / chip.multiprocessors / chip.clock_hz
    in_flight = round(programs * threads * loop["under_way"])
    return Prediction(
        1e3 * columns * bytes_a_column / chip.bandwidth,
        seconds * loop["instructions"] / chip.instructions,
        seconds * loop["exponentials"] / chip.exponentials,
        programs * threads,
        in_flight,
        1e9 * in_flight * chip.multiprocessors / chip.bandwidth,
    )
