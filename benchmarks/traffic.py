"""The fewest bytes that a pass over the logits can move, and the share of the copy bandwidth that a time amounts to."""

from __future__ import annotations

from typing import NamedTuple

from pmpo_kernels.benchmarking.cases import Case


class Traffic(NamedTuple):
    """Bytes of one pass by the model of docs/design.md, which does not count tensors of the size of the tokens."""

    forward: int
    backward: int

    @property
    def both(self) -> int:
        return self.forward + self.backward


def model_bytes(case: Case, unmasked_rows: int, gradient_rows: int) -> Traffic:
    """Count the bytes: forward reads the unmasked rows; backward reads the rows that have a gradient and writes all B T rows."""
    return Traffic(unmasked_rows * case.row_bytes, (gradient_rows + case.batch * case.tokens) * case.row_bytes)


def copy_bandwidth(case: Case, milliseconds: float) -> float:
    """Bytes a second, read and written, of a copy of the logits that takes so many milliseconds."""
    return 2e3 * case.logits_bytes / milliseconds


def share(moved: int, milliseconds: float, bandwidth: float) -> float:
    """Ratio of `moved` to the bytes that the copy bandwidth (bytes a second) moves in that time. 1 is as fast as a copy."""
    return 1e3 * moved / (milliseconds * bandwidth)
