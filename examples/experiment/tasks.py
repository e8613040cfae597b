"""Arithmetic problems with checkable answers: sums and differences of one-digit numbers, one running total after another.

`8+7-9=` is level 2, its solution `15 06`. The level is the number of operations; every total is between 0 and 99. Each problem is
for training, for validation (what is chosen, is chosen on these: learning rates, defaults) or held out (reported, nothing more).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Side = Literal["train", "validation", "held out"]
SIDES: tuple[Side, ...] = get_args(Side)
LEVELS = (2, 4, 6, 8)
FORGOTTEN, SLIP = 0.6, 0.03  # of the noisy solutions' carries; of their steps


@dataclass(frozen=True)
class Problem:
    """A problem: a start, and what is added to it by each operation."""

    start: int
    terms: tuple[int, ...]

    @property
    def level(self) -> int:
        return len(self.terms)

    @property
    def expression(self) -> str:
        """The problem as text, such as `8+7-3`."""
        return str(self.start) + "".join(f"{term:+d}" for term in self.terms)

    @property
    def totals(self) -> tuple[int, ...]:
        """The total after each operation."""
        return tuple(self.start + sum(self.terms[: i + 1]) for i in range(self.level))

    @property
    def side(self) -> Side:
        """Side of the split. It depends on the text alone, so that no problem is on two sides, of which the training side has three
        fifths and the others one each."""
        fifth = hashlib.sha256(self.expression.encode()).digest()[0] % 5
        return SIDES[max(0, fifth - 2)]


def draw_problem(rng: random.Random, level: int, side: Side) -> Problem:
    """Draw a problem of one side of the split, with totals that stay at or above 0.

    Raises:
        ValueError: a level that is not between 1 and the largest of `LEVELS`, or no such side.
    """
    if not 1 <= level <= max(LEVELS):
        raise ValueError(f"level: expected 1 to {max(LEVELS)}, got {level!r}")
    if side not in SIDES:
        raise ValueError(f"side: expected one of {list(SIDES)}, got {side!r}")
    while True:
        start, terms = rng.randint(1, 9), []
        for _ in range(level):
            size = rng.randint(1, 9)
            minus = rng.random() < 0.4 and start + sum(terms) >= size
            terms.append(-size if minus else size)
        problem = Problem(start, tuple(terms))
        if problem.side == side:
            return problem


def draw_problems(key: str, count: int, levels: tuple[int, ...] = LEVELS, side: Side = "train") -> list[Problem]:
    """Draw `count` problems, with the levels in turn. The same key gives the same ones everywhere."""
    rng = random.Random(key)
    return [draw_problem(rng, levels[i % len(levels)], side) for i in range(count)]


def solution(problem: Problem) -> str:
    """Write the solution: all totals, with two digits each."""
    return write(problem.totals)


def noisy_solution(problem: Problem, rng: random.Random) -> str:
    """Write a solution as by someone who mostly forgets to carry (17+8: 15) and to borrow, is off by one now and then, and goes on
    from there."""
    total, totals = problem.start, []
    for term in problem.terms:
        right = total + term
        if right // 10 != total // 10 and rng.random() < FORGOTTEN:
            right = total // 10 * 10 + right % 10
        if rng.random() < SLIP:
            right += rng.choice((-1, 1))
        total = max(right, 0)
        totals.append(total)
    return write(totals)


def write(totals: Iterable[int]) -> str:
    """Write totals with two digits each."""
    return " ".join(f"{total:02d}" for total in totals)


def reward(problem: Problem, text: str, ended: bool) -> float:
    """1 where the text came to its end and the last number in it is the answer, else 0."""
    numbers = re.findall(r"\d+", text)
    return float(ended and bool(numbers) and int(numbers[-1]) == problem.totals[-1])
