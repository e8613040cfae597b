"""What a thread has under way in a loop, from the order of the loop's loads, copies and first uses in its binary (SASS)."""

from __future__ import annotations

import re

WIDTH = re.compile(r"\.(128|64|U16|U8)\b")  # of an access, 32 bits if it names none


def is_load(instruction: str) -> bool:
    """Whether an instruction loads from global memory, into registers or into shared memory (LDGDEPBAR does not)."""
    return bool(re.match(r"LDG(STS)?\.", instruction))


def size_of(instruction: str) -> int:
    """Number of bytes of an access."""
    width = WIDTH.search(instruction.split()[0])
    return {"128": 16, "64": 8, "U16": 2, "U8": 1}[width[1]] if width else 4


def needs(body: list[str]) -> dict[int, tuple[int, int]]:
    """Return by the position of each load in a loop its bytes, and the position where they are first needed. That is counted on
    into later steps."""
    found, steps = {}, len(body)
    for i, text in enumerate(body):
        if text.startswith("LDGSTS"):  # a group a step; at the barrier the newest ones may still be under way
            groups = ((j, re.match(r"DEPBAR\.LE SB0, (\w+)", other)) for j, other in enumerate(body))
            barrier, newest = next((j, int(group[1], 0)) for j, group in groups if group)
            found[i] = size_of(text), barrier + steps * (newest + (i > barrier))
        elif is_load(text):
            first, count = int(re.search(r"\bR(\d+)", text)[1]), max(1, size_of(text) // 4)  # type: ignore[index]
            into = {f"R{first + n}" for n in range(count)}
            ring = range(i + 1, i + 1 + steps)
            found[i] = size_of(text), next(j for j in ring if into & set(re.findall(r"\bR\d+\b", body[j % steps])))
    return found


def under_way(body: list[str]) -> dict[str, float]:
    """Return how much a thread has under way in a loop, and for how much of it nothing.

    A step of a loop whose thread waits for memory takes some latencies: one divided by the stages of copies that are under way, or
    two where a load waits for another. During these `under_way` bytes are on their way. Besides, it takes the time of a part of its
    instructions, `exposed`, in which nothing more is asked for."""
    loads = needs(body)

    def time_of_a_step(latency: float, count: int = 12) -> float:
        """Time of a step in instructions, after the first steps. `count` is a multiple of the stages that copies may have."""
        time, arrivals, ends = 0.0, {}, []
        for step in range(2 * count):
            for i in range(len(body)):
                time = max(time, arrivals.pop(step * len(body) + i, 0.0)) + 1
                if i in loads:
                    at = step * len(body) + loads[i][1]
                    arrivals[at] = max(arrivals.get(at, 0.0), time + latency)
            ends.append(time)
        return (ends[-1] - ends[count - 1]) / count

    slow = 1e3 * len(body)
    latencies = (time_of_a_step(2 * slow) - time_of_a_step(slow)) / slow
    total = sum(size for size, _ in loads.values())
    return {
        "under_way": total / latencies,
        "exposed": (time_of_a_step(slow) - latencies * slow) / len(body),
    }
