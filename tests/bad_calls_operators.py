"""Bad calls of the operators, past the public functions: tensors that do not fit together, of which a kernel would read too much.

The compiled kernels check for themselves, those in Python are checked in `ops.py`; a message may be the longer of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from bad_calls import GAP, Call, Row

from pmpo_kernels import LossConfig
from pmpo_kernels.contract import STATS, TARGET
from pmpo_kernels.ops import IMPLEMENTATIONS, NAMES, stage

B, T, V = 2, 3, 5
OPTIONS = list(LossConfig.grpo().trajectory_options(has_power=False, has_target_ess=False))
Z, IDS, ONE = torch.zeros(B, T, V), torch.zeros(B, T, dtype=torch.long), torch.ones(B, T)
TERMS = LossConfig.grpo().aggregate_options()
FLAT, OFFSETS, EACH = torch.zeros(B * T), torch.tensor([0, 3, 6]), torch.ones(B)
GOOD: dict[str, dict[str, Any]] = {
    "token_logp": {"logits": Z, "token_ids": IDS, "temperature": 1.0},
    "dlogits": {
        "logits": Z,
        "token_ids": IDS,
        "row_max": ONE,
        "row_sum": ONE,
        "entropy": ONE,
        "dlogp": ONE,
        "temperature": 1.0,
    },
    "trajectory": {"logp": FLAT, "advantages": EACH, "cu_seqlens": OFFSETS, "options": OPTIONS},
    "solve_power": {"log_weights": FLAT, "cu_seqlens": OFFSETS, "target_ess": EACH, "power_max": 1.0},
    "aggregate": {"stats": torch.zeros(len(STATS), B).double(), "options": list(TERMS), "dtype": torch.float32},
    "scale_": {"gradient": torch.zeros(B, T), "factor": torch.ones(())},
}
GOOD["dlogits_"] = GOOD["dlogits"]
IMPLS = {name: [impl for impl, its in IMPLEMENTATIONS.items() if name in its.operators] for name in GOOD}


def operator(name: str, impl: str) -> Callable[..., Any]:
    return lambda **given: stage(name, impl)(*(given.get(argument) for argument in NAMES[name]))


CALLS = {f"{name}.{impl}": Call(operator(name, impl), GOOD[name]) for name in GOOD for impl in IMPLS[name]}
PER_TOKEN = {
    "token_logp": ["mask"],
    "dlogits": ["mask", "row_max", "row_sum", "entropy", "dlogp", "dentropy"],
    "trajectory": ["old_logp", "mask", "ref_logp", "rollout_weights", "entropy", "policy_mask"],
    "solve_power": ["mask"],
    "aggregate": [],
    "scale_": [],
}
PER_TOKEN["dlogits_"] = PER_TOKEN["dlogits"]


def rows_of(name: str) -> Iterator[tuple[dict[str, Any], str]]:
    for argument in PER_TOKEN[name]:
        for size in (0, 1, B, B * T - 1, B * T + 1):
            bad = torch.ones(size, dtype=torch.bool if "mask" in argument else torch.float32)
            yield {argument: bad}, f"{argument}: expected {B * T} elements, got {size}"
    for argument in {"trajectory": ["advantages", "power", "target_ess"], "solve_power": ["target_ess"]}.get(name, []):
        if argument != "advantages":
            yield {argument: torch.ones(B + 1)}, f"{argument}: expected {B} elements, got {B + 1}"
    if name == "trajectory":
        yield {"advantages": torch.ones(B - 1)}, f"{GAP}: expected {GAP} elements, got {GAP}"
    if "logits" in NAMES[name]:
        shape = f"logits: expected shape (B, S, V) with token_ids (B, T){GAP}"
        for bad in (Z[0], Z[:1], Z[:, :2], Z[..., :0], Z[None]):
            yield {"logits": bad}, shape
        yield {"token_ids": IDS[0]}, shape
        wide = torch.zeros(B, V, T).transpose(1, 2)
        yield {"logits": wide}, f"logits: expected stride 1 in the vocabulary dimension{GAP}"
        yield {"logits": Z.long()}, f"logits: expected {GAP}dtype{GAP}"
    elif name == "aggregate":
        stats = f"stats: expected float64 of shape ({len(STATS)}, B){GAP}"
        for bad in (
            torch.zeros(len(STATS), B),
            torch.zeros(len(STATS) - 1, B).double(),
            torch.zeros(len(STATS)).double(),
        ):
            yield {"stats": bad}, stats
        for argument in ("denominator", "largest"):
            for size in (0, 2):
                yield {argument: torch.ones(size).double()}, f"{argument}: expected 1 elements, got {size}"
        yield {"skipped": torch.zeros(B + 1, dtype=torch.bool)}, f"skipped: expected {B} elements, got {B + 1}"
        yield {"dtype": torch.bfloat16}, f"dtype: expected float32 or float64, got {GAP}"
    elif name == "scale_":
        contiguous = f"gradient: expected a contiguous floating-point tensor, got {GAP}"
        for bad in (Z[0].t(), IDS):
            yield {"gradient": bad}, contiguous
        for bad in (torch.ones(2), torch.ones(0), torch.ones((), dtype=torch.long)):
            yield {"factor": bad}, f"factor: expected one floating-point number, got {bad.numel()} of {bad.dtype}"
    else:
        wrong = f"cu_seqlens: expected non-decreasing offsets from 0 to the {B * T} tokens{GAP}"
        for offsets in ([0, 4, 5], [1, 3, 6], [0, 7, 6], [0, -1, 6], [0, 2**62, 6], [0, 3, 2**63 - 1]):
            yield {"cu_seqlens": torch.tensor(offsets)}, wrong
    if name == "token_logp":
        ids = torch.where(torch.arange(B * T).view(B, T) == 5, V, IDS)
        yield {"token_ids": ids}, f"token_ids: expected ids in [0, {V}) where mask is true, got {V} at [1, 2]"


def rows() -> Iterator[Row]:
    for name in GOOD:
        for impl in IMPLS[name]:
            yield from (Row(f"{name}.{impl}", change, ValueError, message) for change, message in rows_of(name))
    for impl in IMPLS["trajectory"]:
        for name, options, kind in (
            ("trajectory", OPTIONS, "TrajectoryOptions"),
            ("aggregate", list(TERMS), "AggregateOptions"),
        ):
            for bad in (options[:-1], [*options, 0.0]):
                yield Row(f"{name}.{impl}", {"options": bad}, ValueError, f"options: expected those of {kind}{GAP}")
        target = [TARGET, *OPTIONS[1:]]
        no_target = "target_ess: expected a tensor with this rule of p, got None"
        yield Row(f"trajectory.{impl}", {"options": target}, ValueError, no_target)
    for name, impl in (
        ("token_logp", "triton"),
        ("dlogits", "triton"),
        ("dlogits_", "triton"),
        ("trajectory", "triton"),
    ):
        message = "mask: expected dtype bool, got torch.int64"
        yield Row(f"{name}.{impl}", {"mask": torch.ones(B * T, dtype=torch.int64)}, ValueError, message)


ROWS = list(rows())
