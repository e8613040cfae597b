"""The loss over vocabulary, sequence and data parallel ranks against one process, on 2 and 4 processes over gloo. The cases are in
tests/ranks_worker.py; each process compares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_ranks, with_gloo

from pmpo_kernels.distributed.ranks import fingerprint

SCENARIOS = {
    "vocabulary": (
        "vocabulary",
        "vocabulary_of_minus_infinity",
        "vocabulary_options",
        "vocabulary_of_a_head",
        "dtensors",
    ),
    "sequence": ("sequence", "sequence_packed", "sequence_of_a_head", "sequence_options", "sequence_from_logp"),
    "data": ("data", "denominators"),
    "errors": ("wrong_arguments", "errors", "disagreements", "collectives", "hosts"),
    "documentation": ("docs", "default_chunk"),
    "killed": ("killed",),
}
FOUR = {**SCENARIOS, "together": ("combinations", "three_dimensions")}
LIMIT = 120

pytestmark = with_gloo


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks(name: str, tmp_path: Path) -> None:
    run_ranks("ranks_worker.py", 2, SCENARIOS[name], tmp_path, LIMIT)


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks(name: str, tmp_path: Path) -> None:
    run_ranks("ranks_worker.py", 4, FOUR[name], tmp_path, LIMIT)


def test_fingerprints_are_of_values_not_of_strides() -> None:
    """One element may have any stride and still count as contiguous."""
    one = torch.tensor([1.5, 7.0])[::2]
    assert one.stride() == (2,)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert fingerprint(one.to(dtype)) == fingerprint(torch.tensor([1.5], dtype=dtype))
        assert fingerprint(torch.stack([one, one], 1).to(dtype)[:, 0]) == fingerprint(one.to(dtype))
    assert fingerprint(one) != fingerprint(one + 1)
