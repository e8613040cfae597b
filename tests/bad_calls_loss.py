"""Bad calls of `token_logp` and of the three losses."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from bad_calls import (
    FLOATS,
    INTEGERS,
    MASKS,
    NOT_NUMBERS,
    Call,
    Row,
    choice_rows,
    count_rows,
    flag_rows,
    positive_rows,
    tensor_rows,
)

from pmpo_kernels import LossConfig, linear_pmpo_loss, pmpo_loss, pmpo_loss_from_logp, token_logp
from pmpo_kernels.impls import IMPLS

B, T, V, H = 2, 3, 5, 4
PER_TOKEN, PACKED = torch.zeros(B, T), torch.zeros(4)
COMMON = {"old_logp": PER_TOKEN, "advantages": torch.ones(B)}
PACKED_COMMON = {"old_logp": PACKED, "advantages": torch.ones(B), "cu_seqlens": torch.tensor([0, 3, 4])}
IDS, PACKED_IDS = torch.zeros(B, T, dtype=torch.long), torch.zeros(4, dtype=torch.long)
LOGITS = {"logits": torch.zeros(B, T, V), "token_ids": IDS}
HEAD = {"hidden": torch.zeros(B, T, H), "weight": torch.zeros(V, H), "token_ids": IDS}

CALLS = {
    "token_logp": Call(token_logp, LOGITS),
    "pmpo_loss": Call(pmpo_loss, LOGITS | COMMON),
    "pmpo_loss, packed": Call(
        pmpo_loss, {"logits": torch.zeros(4, V), "token_ids": PACKED_IDS} | PACKED_COMMON
    ),
    "pmpo_loss_from_logp": Call(pmpo_loss_from_logp, {"logp": PER_TOKEN} | COMMON),
    "pmpo_loss_from_logp, packed": Call(pmpo_loss_from_logp, {"logp": PACKED} | PACKED_COMMON),
    "linear_pmpo_loss": Call(linear_pmpo_loss, HEAD | COMMON),
    "linear_pmpo_loss, packed": Call(
        linear_pmpo_loss,
        {"hidden": torch.zeros(4, H), "weight": HEAD["weight"], "token_ids": PACKED_IDS} | PACKED_COMMON,
    ),
}  # fmt: skip

NO_TENSOR_OFFSETS = (ValueError, "expected a tensor of shape (B + 1,), got {}")


def offsets_rows(call: str, tokens: str) -> Iterator[Row]:
    """Yield bad `cu_seqlens` of a packed call of two trajectories of 4 tokens."""
    good = torch.tensor([0, 3, 4])
    yield from tensor_rows(call, "cu_seqlens", good, INTEGERS, shapes=False, not_a_tensor=NO_TENSOR_OFFSETS)
    for bad in (torch.zeros(2, 2, dtype=torch.long), torch.tensor(4), torch.zeros(0, dtype=torch.long)):
        message = f"cu_seqlens: expected a tensor of shape (B + 1,), got {tuple(bad.shape)}"
        yield Row(call, {"cu_seqlens": bad}, ValueError, message)
    extremes = [[0, 2**62, 4], [0, -(2**63), 4], [-(2**63), 3, 4], [0, 3, 2**63 - 1], [2**31, 3, 4]]
    for values in ([1, 3, 4], [0, 4, 3], [0, 5, 4], [0, 3, 5], [0, 3, 3], [-1, 3, 4], [0, 0, 0], [0], *extremes):
        expected = f"cu_seqlens: expected non-decreasing offsets from 0 to the 4 tokens, got {values}"
        yield Row(call, {"cu_seqlens": torch.tensor(values)}, ValueError, expected)
    shown = "[0, 1, 1, 1, 1, 1, 1, 1, '...', 1, 1, 1, 1, 1, 1, 9]"
    many = torch.tensor([0, *[1] * 18, 9])
    yield Row(call, {"cu_seqlens": many}, ValueError, f"cu_seqlens: expected non-decreasing offsets …, got {shown}")
    message = f"cu_seqlens: expected offsets (B + 1,) because {tokens} has shape (4,), got None"
    yield Row(call, {"cu_seqlens": None}, ValueError, message)


def common_rows(call: str, tokens: str) -> Iterator[Row]:
    """Yield the bad calls that the three losses have in common."""
    floats = torch.ones(B, T)
    yield from tensor_rows(call, "old_logp", floats)
    yield from tensor_rows(call, "ref_logp", floats)
    yield from tensor_rows(call, "mask", floats.bool(), MASKS)
    yield from tensor_rows(call, "rollout_weights", floats, or_one_a_trajectory=B)
    yield from tensor_rows(call, "policy_mask", floats.bool(), MASKS, or_one_a_trajectory=B)
    yield from tensor_rows(call, "rollout_weights", torch.ones(B), shapes=False)
    yield from tensor_rows(call, "policy_mask", torch.ones(B, dtype=torch.int8), MASKS, shapes=False)
    yield from tensor_rows(call, "advantages", torch.ones(B), required=True)
    yield from tensor_rows(call, "power", torch.ones(B), number=True)
    yield from tensor_rows(call, "target_ess", torch.ones(B))
    zero_dim = torch.tensor(2.0)
    yield from tensor_rows(call, "denominator", zero_dim, f"{FLOATS}, {INTEGERS}", number=True, shapes=False,
                           not_a_tensor=(ValueError, "expected a finite number > 0, got …"))  # fmt: skip
    yield from (row for row in positive_rows(call, "denominator", optional=True, skip=[torch.Tensor]))
    no_power = f"a finite number or a tensor of shape ({B},)"
    for value, got in NOT_NUMBERS:
        if isinstance(value, (int, float)) and not isinstance(value, complex):
            yield Row(call, {"power": value}, ValueError, f"power: expected {no_power}, got {got}")
    yield from choice_rows(call, "impl", IMPLS, "None or one of {}")
    yield from choice_rows(call, "sequence_split", ["contiguous"], "'contiguous' without a mesh")
    for value in ("tp", 1, True, {}, torch.zeros(2)):
        got = type(value).__name__
        message = f"mesh: expected a torch.distributed.device_mesh.DeviceMesh, got {got}"
        yield Row(call, {"mesh": value}, TypeError, message)
        if call != "pmpo_loss_from_logp":
            message = f"group: expected a torch.distributed.ProcessGroup, got {got}"
            yield Row(call, {"group": value}, TypeError, message)
    if call != "pmpo_loss_from_logp":
        both = {"group": "tp", "mesh": "tp"}
        yield Row(call, both, ValueError, "mesh: expected None when group is given, got both")
    for value in ("grpo", {"power": 1.0}, LossConfig, 1):
        got = type(value).__name__
        yield Row(call, {"config": value}, TypeError, f"config: expected a LossConfig or None, got {got}")
    for change, error, message in [
        ({"advantages": torch.ones(B, T)}, ValueError, f"advantages: expected shape ({B},), one number a trajectory, got ({B}, {T}); if they are constant along each trajectory, pass one column"),
        ({"rollout_weights": torch.full((B, T), -0.5)}, ValueError, "rollout_weights: expected finite weights >= 0 where mask is true, got -0.5"),
        ({"rollout_weights": torch.tensor([1.0, math.nan])}, ValueError, "rollout_weights: expected finite weights >= 0 where mask is true, got nan"),
        ({"rollout_weights": torch.tensor([1.0, math.inf])}, ValueError, "rollout_weights: expected finite weights >= 0 where mask is true, got inf"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, f"cu_seqlens: expected None because {tokens} is padded, of shape ({B}, {T}), got a value"),
        ({"cu_seqlens": [0, 3]}, ValueError, f"cu_seqlens: expected None because {tokens} is padded, of shape ({B}, {T}), got a value"),
        ({"power": 1e31}, ValueError, "power: expected a number from -1e30 to 1e30, got 1e+31"),
        ({"power": -(10**40)}, ValueError, "power: expected a number from -1e30 to 1e30, got an int of 133 bits"),
        ({"power": torch.tensor([1.0, math.nan])}, ValueError, "power: expected numbers from -1e30 to 1e30, got nan"),
        ({"power": torch.tensor([1.0, -1e200]).double()}, ValueError, "power: expected numbers from -1e30 to 1e30, got -inf"),
        ({"power": torch.tensor([1.0, -1e200], dtype=torch.float64)}, ValueError, "power: expected numbers from -1e30 to 1e30, got -1e+200"),
        ({"power": torch.ones(B), "target_ess": torch.ones(B)}, ValueError, "target_ess: expected None when power is given, got both"),
        ({"power": 1, "target_ess": torch.ones(B)}, ValueError, "target_ess: expected None when power is given, got both"),
        ({"target_ess": torch.ones(B), "config": LossConfig.grpo()}, ValueError, 'target_ess: expected None unless config.power is "ess", got it with power 1.0'),
        ({"target_ess": torch.tensor([1.0, -1.0])}, ValueError, "target_ess: expected numbers >= 0, got -1.0"),
        ({"target_ess": torch.tensor([1.0, math.nan])}, ValueError, "target_ess: expected numbers >= 0, got nan"),
        ({"config": LossConfig.pmpo(clip="sequence")}, ValueError, 'config.power: "ess" needs clip="token" or an explicit target_ess, got clip="sequence"'),
        ({"config": LossConfig.pmpo(clip="none")}, ValueError, 'config.power: "ess" needs clip="token" or an explicit target_ess, got clip="none"'),
        ({"config": LossConfig.grpo(beta=0.1)}, ValueError, "ref_logp: expected a tensor because config.beta is 0.1, got None"),
        ({"denominator": torch.ones(2)}, ValueError, "denominator: expected shape (), got (2,)"),
        ({"denominator": torch.tensor(0.0)}, ValueError, "denominator: expected a finite number > 0 whose inverse is finite, got 0.0"),
        ({"denominator": 5e-324}, ValueError, "denominator: expected a finite number > 0 whose inverse is finite, got 5e-324"),
        ({"denominator": torch.tensor(1e-310, dtype=torch.float64)}, ValueError, "denominator: expected a finite number > 0 whose inverse is finite, got 1e-310"),
        ({"power": torch.tensor([1.0, math.inf], dtype=torch.float16)}, ValueError, "power: expected numbers from -1e30 to 1e30, got inf"),
        ({"denominator": torch.tensor(math.inf)}, ValueError, "denominator: expected a finite number > 0 whose inverse is finite, got inf"),
        ({"denominator": torch.tensor(-(2**63))}, ValueError, f"denominator: expected a finite number > 0 whose inverse is finite, got {-2.0**63}"),
    ]:  # fmt: skip
        yield Row(call, change, error, message)


def vocabulary_rows(call: str, first: str) -> Iterator[Row]:
    """Yield bad ids of the calls that have them. `first` is the argument that says how many tokens there are."""
    yield from tensor_rows(call, "token_ids", IDS, INTEGERS, required=True)
    wrong = f"token_ids: expected ids in [0, {V}) where mask is true, got"
    for value in (V, -1, -100, 2**31, 2**63 - 1, -(2**63)):
        ids = torch.full((B, T), 0)
        ids[1, 2] = value
        yield Row(call, {"token_ids": ids}, ValueError, f"{wrong} {value} at [1, 2]")
        masked = {"token_ids": ids, "mask": torch.ones(B, T, dtype=torch.bool)}
        yield Row(call, masked, ValueError, f"{wrong} {value} at [1, 2]")
    long = {first: torch.zeros(B, T + 2, H if first == "hidden" else V)}
    yield Row(call, long, ValueError, f"token_ids: expected shape ({B}, {T + 2}), got ({B}, {T})")


def logits_rows(call: str) -> Iterator[Row]:
    yield from tensor_rows(
        call, "logits", torch.zeros(B, T, V), required=True, constant=False, leading=True, shapes=False
    )
    for shape in ((V,), (), (1, B, T, V)):
        message = f"logits: expected shape (B, T, V), (B, T + 1, V) or (N, V), got {shape}"
        yield Row(call, {"logits": torch.zeros(shape)}, ValueError, message)
    message = f"logits: expected a vocabulary of at least 1, got shape ({B}, {T}, 0)"
    yield Row(call, {"logits": torch.zeros(B, T, 0)}, ValueError, message)
    stride = "logits: expected stride 1 in the vocabulary dimension, got strides"
    yield Row(call, {"logits": torch.zeros(B, V, T).transpose(1, 2)}, ValueError, f"{stride} (15, 1, 3)")
    yield Row(call, {"logits": torch.zeros(B, T, 1).expand(B, T, V)}, ValueError, f"{stride} (3, 1, 0)")
    yield from flag_rows(call, "inplace")
    rows = "logits: expected rows that do not overlap with inplace=True, got strides"
    for logits in (torch.zeros(1, T, V).expand(B, T, V), torch.zeros(40).as_strided((B, T, V), (20, 4, 1))):
        yield Row(call, {"logits": logits, "inplace": True}, ValueError, f"{rows} {logits.stride()}")
    yield from vocabulary_rows(call, "logits")


def head_rows() -> Iterator[Row]:
    call = "linear_pmpo_loss"
    hidden, weight, bias = torch.zeros(B, T, H), torch.zeros(V, H), torch.zeros(V)
    yield from tensor_rows(call, "hidden", hidden, required=True, constant=False, leading=True, shapes=False)
    yield from tensor_rows(call, "weight", weight, "float32", required=True, constant=False, shapes=False)
    yield from tensor_rows(call, "bias", bias, "float32", constant=False)
    for shape in ((H,), (), (1, B, T, H)):
        message = f"hidden: expected shape (B, T, H), (B, T + 1, H) or (N, H), got {shape}"
        yield Row(call, {"hidden": torch.zeros(shape)}, ValueError, message)
    for shape in ((V, H - 1), (0, H), (V,), (), (H, V), (1, V, H)):
        message = f"weight: expected shape (V, {H}), V at least 1, got {shape}"
        yield Row(call, {"weight": torch.zeros(shape)}, ValueError, message)
    empty = {"hidden": torch.zeros(B, T, 0), "weight": torch.zeros(V, 0)}
    yield Row(call, empty, ValueError, f"hidden: expected H at least 1, got shape ({B}, {T}, 0)")
    yield from flag_rows(call, "skip_zero_advantage")
    yield from count_rows(call, "max_chunk_tokens", "an int > 0 and below 2^63", optional=True)
    representable = "a number from 1e-30 to 1e30"
    for name, optional in (("logit_scale", False), ("logit_softcap", True)):
        yield from positive_rows(call, name, optional=optional)
        for value in (1e-31, 1e31, 5e-324, 1e308):
            yield Row(call, {name: value}, ValueError, f"{name}: expected {representable}, got {value}")
    hot = {"logit_scale": 1e-20, "config": LossConfig.grpo(temperature=1e20)}
    yield Row(call, hot, ValueError, f"config.temperature / logit_scale: expected {representable}, got 1e+40")
    capped = {"logit_scale": 1e-20, "logit_softcap": 1e20}
    yield Row(call, capped, ValueError, f"logit_scale / logit_softcap: expected {representable}, got 1e-40")
    unexpected = "linear_pmpo_loss() got an unexpected keyword argument 'inplace'"
    yield Row(call, {"inplace": True}, TypeError, unexpected)
    yield from vocabulary_rows(call, "hidden")


def from_logp_rows() -> Iterator[Row]:
    call = "pmpo_loss_from_logp"
    yield from tensor_rows(call, "logp", PER_TOKEN, required=True, constant=False, leading=True, shapes=False)
    yield from tensor_rows(call, "entropy", torch.ones(B, T), constant=False)
    for shape in ((), (B, T, V)):
        message = f"logp: expected shape (B, T) or (N,), got {shape}"
        yield Row(call, {"logp": torch.zeros(shape)}, ValueError, message)
    message = "entropy: expected a tensor because config.entropy_coef is 0.1, got None"
    yield Row(call, {"config": LossConfig.grpo(entropy_coef=0.1)}, ValueError, message)
    message = "config.temperature: expected 1 for a loss from log-probs, got 0.7"
    yield Row(call, {"config": LossConfig.grpo(temperature=0.7)}, ValueError, message)


def token_logp_rows() -> Iterator[Row]:
    call = "token_logp"
    yield from tensor_rows(call, "mask", torch.ones(B, T, dtype=torch.bool), MASKS)
    yield from positive_rows(call, "temperature")
    for value in (1e-31, 1e31, 5e-324, 1e308, 10**31):
        message = f"temperature: expected a number from 1e-30 to 1e30, got {value}"
        yield Row(call, {"temperature": value}, ValueError, message)
    yield from choice_rows(call, "impl", IMPLS, "None or one of {}")


ROWS = [
    *token_logp_rows(),
    *logits_rows("token_logp"),
    *logits_rows("pmpo_loss"),
    *head_rows(),
    *from_logp_rows(),
    *(r for c, n in (("pmpo_loss", "token_ids"), ("linear_pmpo_loss", "token_ids"), ("pmpo_loss_from_logp", "logp")) for r in common_rows(c, n)),
    *(r for c, n in (("pmpo_loss", "token_ids"), ("linear_pmpo_loss", "token_ids"), ("pmpo_loss_from_logp", "logp")) for r in offsets_rows(f"{c}, packed", n)),
]  # fmt: skip
