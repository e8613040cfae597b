"""Bad calls of what runs on the host: schedules, `solve_power`, and the denominator of several devices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from bad_calls import (
    INTEGERS,
    MASKS,
    Call,
    Row,
    choice_rows,
    count_rows,
    flag_rows,
    number_rows,
    positive_rows,
    tensor_rows,
)
from bad_calls_loss import IMPLS, offsets_rows

from pmpo_kernels import LossConfig, schedules, solve_power
from pmpo_kernels.distributed import denominator

TWO, LOGP = torch.tensor([0.5, 1.0]), torch.zeros(2, 3)
PACKED = {"cu_seqlens": torch.tensor([0, 3, 4])}
REWARDS = {"rewards": TWO}
BOTH = {"logp": LOGP, "rollout_logp": LOGP}
SOLVED = {"target_ess": torch.ones(2)}
CALLS = {
    "holder_power": Call(schedules.holder_power, {"progress": 0.5}),
    "apmpo_power": Call(schedules.apmpo_power, REWARDS),
    "apmpo_clip": Call(schedules.apmpo_clip, REWARDS),
    "group_advantages": Call(schedules.group_advantages, REWARDS | {"groups": 2}),
    "rollout_weights": Call(schedules.rollout_weights, BOTH),
    "rollout_weights, packed": Call(
        schedules.rollout_weights, {"logp": torch.zeros(4), "rollout_logp": torch.zeros(4)} | PACKED
    ),
    "solve_power": Call(solve_power, {"log_weights": LOGP} | SOLVED),
    "solve_power, packed": Call(solve_power, {"log_weights": torch.zeros(4)} | SOLVED | PACKED),
    "denominator": Call(denominator, {"lengths": torch.tensor([3, 1]), "config": LossConfig.grpo()}),
}


def rewards_rows(call: str) -> Iterator[Row]:
    yield from tensor_rows(call, "rewards", TWO, required=True, leading=True, shapes=False)
    for shape in ((), (2, 1), (2, 0)):
        yield Row(call, {"rewards": torch.zeros(shape)}, ValueError, f"rewards: expected shape (B,), got {shape}")
    for value in (math.nan, math.inf, -math.inf):
        bad = torch.tensor([0.5, value])
        yield Row(call, {"rewards": bad}, ValueError, f"rewards: expected finite numbers, got {value}")


def schedule_rows() -> Iterator[Row]:
    for name in ("progress", "start", "end"):
        yield from number_rows("holder_power", name, "a finite number")
    for x in (-5e-324, 1.0000000000000002, 2, -1, 1e308):
        yield Row("holder_power", {"progress": x}, ValueError, f"progress: expected a number in [0, 1], got {x}")
    far = {"start": 1e308, "end": -1e308}
    yield Row("holder_power", far, ValueError, "end - start: expected a finite number, got -inf")
    yield from choice_rows("holder_power", "shape", ["linear", "square", "cube", "sine"])
    for call in ("apmpo_power", "apmpo_clip"):
        yield from rewards_rows(call)
        none = {"rewards": torch.zeros(0)}
        yield Row(call, none, ValueError, "rewards: expected at least one, got shape (0,)")
        yield Row(call, {"rewards": -torch.ones(2)}, ValueError, "rewards: expected a mean >= 0, got -1.0")
    yield from positive_rows("apmpo_power", "gamma")
    for name in ("eps_min", "eps_max", "delta"):
        yield from positive_rows("apmpo_clip", name)
    low = {"eps_max": 0.1}
    yield Row("apmpo_clip", low, ValueError, "eps_max: expected a number >= eps_min, which is 0.2, got 0.1")
    yield from rewards_rows("group_advantages")
    ids = torch.zeros(2, dtype=torch.long)
    count = "an int > 0 and below 2^63"
    yield from count_rows("group_advantages", "groups", count, skip=[torch.Tensor])
    yield from tensor_rows(
        "group_advantages", "groups", ids, INTEGERS, not_a_tensor=(ValueError, f"expected {count}, got …")
    )
    yield Row(
        "group_advantages", {"groups": 3}, ValueError, "groups: expected a size that divides the 2 rewards, got 3"
    )
    yield from choice_rows("group_advantages", "baseline", ["mean", "leave-one-out"])
    yield from choice_rows("group_advantages", "scale", ["std", None])
    yield from positive_rows("group_advantages", "delta")


def rollout_weight_rows() -> Iterator[Row]:
    call = "rollout_weights"
    yield from tensor_rows(call, "logp", LOGP, required=True, constant=False, leading=True, shapes=False)
    yield from tensor_rows(call, "rollout_logp", LOGP, required=True, constant=False)
    yield from tensor_rows(call, "mask", LOGP.bool(), MASKS)
    for shape in ((), (1, 2, 3)):
        message = f"logp: expected shape (B, T) or (N,), got {shape}"
        yield Row(call, {"logp": torch.zeros(shape)}, ValueError, message)
    yield from choice_rows(call, "level", ["token", "sequence", "geometric"])
    yield from choice_rows(call, "mode", ["truncate", "mask"])
    yield from positive_rows(call, "low", optional=True)
    yield from positive_rows(call, "high")
    d = "logp - rollout_logp: expected numbers"
    infinities = {"rollout_logp": torch.tensor([[math.inf, -math.inf, 0.0]] * 2), "level": "sequence"}
    for change, message in [
        ({"rollout_logp": torch.full((2, 3), math.nan)}, f"{d} where mask is true, got nan"),
        ({"rollout_logp": torch.full((2, 3), math.nan), "mask": torch.ones(2, 3, dtype=torch.bool)}, f"{d} where mask is true, got nan"),
        ({"logp": LOGP - math.inf, "rollout_logp": LOGP - math.inf}, f"{d} where mask is true, got nan"),
        (infinities, f"{d}, without both infinities in a trajectory, got nan"),
        ({"low": 2.0}, "low: expected a number below high, which is 2.0, got 2.0"),
        ({"high": 1e39}, "high: expected a number from 1e-30 to 1e30, got 1e+39"),
        ({"high": 5e-324}, "high: expected a number from 1e-30 to 1e30, got 5e-324"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens: expected None because logp is padded, of shape (2, 3), got a value"),
    ]:  # fmt: skip
        yield Row(call, change, ValueError, message)
    yield from offsets_rows(f"{call}, packed", "logp")


def solver_rows() -> Iterator[Row]:
    call = "solve_power"
    yield from tensor_rows(call, "log_weights", LOGP, required=True, constant=False, leading=True, shapes=False)
    yield from tensor_rows(call, "target_ess", torch.ones(2), required=True, constant=False)
    yield from tensor_rows(call, "mask", LOGP.bool(), MASKS)
    yield from positive_rows(call, "power_max")
    yield from flag_rows(call, "full_output")
    yield from choice_rows(call, "impl", IMPLS, "None or one of {}")
    changes: list[tuple[dict[str, Any], str]] = [
        ({"log_weights": LOGP + math.nan}, "log_weights: expected finite values or -inf where mask is true, got NaN or +inf"),
        ({"log_weights": LOGP + math.inf}, "log_weights: expected finite values or -inf where mask is true, got NaN or +inf"),
        *(({"log_weights": torch.zeros(s)}, f"log_weights: expected shape (B, T) or (N,), got {s}") for s in ((), (1, 2, 3))),
        ({"target_ess": torch.tensor([1.0, math.nan])}, "target_ess: expected numbers >= 0, got nan"),
        ({"target_ess": torch.tensor([1.0, -1.0])}, "target_ess: expected numbers >= 0, got -1.0"),
        ({"power_max": 1e31}, "power_max: expected a number in (0, 1e30], got 1e+31"),
        ({"power_max": 1e308}, "power_max: expected a number in (0, 1e30], got 1e+308"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens: expected None because log_weights is padded, of shape (2, 3), got a value"),
    ]  # fmt: skip
    yield from (Row(call, change, ValueError, message) for change, message in changes)
    where = "impl='triton' cannot run solve_power: its solver is part of its trajectory kernel"
    yield Row(call, {"impl": "triton"}, RuntimeError, where)
    yield from offsets_rows(f"{call}, packed", "log_weights")


def denominator_rows() -> Iterator[Row]:
    call = "denominator"
    lengths = torch.tensor([3, 1])
    for value in (None, 3, 1.5, {3: 1}, iter([lengths])):
        got = type(value).__name__
        yield Row(
            call, {"lengths": value}, TypeError, f"lengths: expected a tensor (B,) or a sequence of them, got {got}"
        )
    empty = "lengths: expected a tensor (B,) or a sequence of them, got an empty sequence"
    yield from (Row(call, {"lengths": value}, ValueError, empty) for value in ([], (), ""))
    for value, of in (
        ([3], "int"),
        ("ab", "str"),
        ([lengths, None], "NoneType"),
        (torch.ones(1, 2), "(1, 2)"),
        (torch.tensor(1), "()"),
    ):
        yield Row(call, {"lengths": value}, ValueError, f"lengths: expected tensors (B,), got {of}")
    yield from (
        Row(call, {"lengths": row.change["lengths"]}, row.error, row.message)
        for row in tensor_rows(call, "lengths", lengths, INTEGERS, leading=True, shapes=False)
        if isinstance(row.change["lengths"], torch.Tensor)
    )
    meta = [lengths, lengths.to("meta")]
    yield Row(call, {"lengths": meta}, ValueError, "lengths: expected a tensor on cpu, got one on meta")
    for value in (-1, -(2**63)):
        bad = torch.tensor([3, value])
        yield Row(call, {"lengths": bad}, ValueError, f"lengths: expected numbers of tokens >= 0, got {float(value)}")
    for config in (None, "grpo", LossConfig, {}):
        message = f"config: expected a LossConfig, got {type(config).__name__}"
        yield Row(call, {"config": config}, TypeError, message)
    for value in ("dp", 1, True, {}):
        message = f"mesh: expected a torch.distributed.device_mesh.DeviceMesh, got {type(value).__name__}"
        yield Row(call, {"mesh": value}, TypeError, message)
    yield from flag_rows(call, "averaged")


ROWS = [*schedule_rows(), *rollout_weight_rows(), *solver_rows(), *denominator_rows()]
