"""Which calls are right, by the documentation alone: no check of the package is used here.

`judge(name, arguments)` is "good", "bad", or "either" where rounding decides (the sign of a mean that is nearly 0).
All tensors of a call belong on the CPU.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pmpo_kernels import LossConfig

FLOAT = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
INT = {torch.int32, torch.int64}
SMALLEST = math.nextafter(1 / sys.float_info.max, 1)  # of which the inverse is finite
MASK = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


class Bad(Exception):
    """The call is not a right one."""


class Either(Exception):
    """Rounding decides whether the call is right."""


def need(ok: Any, what: str) -> None:
    if not ok:
        raise Bad(what)


def number(x: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number of Python in [low, high]."""
    need(isinstance(x, (int, float)) and not isinstance(x, bool), "a number")
    try:
        value = float(x)
    except OverflowError:
        raise Bad("too large") from None
    need(math.isfinite(value) and low <= value <= high, "range")
    return value


def positive(x: Any, high: float = math.inf) -> float:
    return number(x, 5e-324, high)


def factor(x: Any) -> float:
    return number(x, 1e-30, 1e30)


def count(x: Any) -> int:
    need(isinstance(x, int) and not isinstance(x, bool) and 1 <= x <= 2**63 - 1, "a count")
    return int(x)


def flag(x: Any) -> bool:
    need(x is True or x is False, "a flag")
    return bool(x)


def word(x: Any, *choices: str) -> str:
    need(isinstance(x, str) and x in choices, "a word")
    return str(x)


def tensor(x: Any, dtypes: set[torch.dtype], shape: Sequence[int] | None = None, *, constant: bool = False) -> Tensor:
    need(isinstance(x, Tensor), "a tensor")
    need(not x.is_nested and x.layout == torch.strided and not x.is_quantized, "dense")
    need(x.dtype in dtypes and x.device == torch.device("cpu"), "dtype and device")
    need(shape is None or list(x.shape) == list(shape), "shape")
    need(not (constant and x.requires_grad), "a constant")
    return x.detach()


def has_shape(x: Any, shape: Sequence[int]) -> bool:
    return isinstance(x, Tensor) and not x.is_nested and list(x.shape) == list(shape)


def owners(tokens: Tensor, cu_seqlens: Any) -> list[int]:
    """Return the trajectory of each token in flat order, and as the last element the number of trajectories."""
    if tokens.dim() == 2:
        need(cu_seqlens is None, "padded")
        B, T = tokens.shape
        return [i for i in range(B) for _ in range(T)] + [B]
    ends = tensor(cu_seqlens, INT).tolist() if isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1 else None
    need(ends, "offsets")
    assert ends is not None
    need(ends[0] == 0 and ends[-1] == tokens.numel() and ends == sorted(ends), "offsets")
    return [i for i in range(len(ends) - 1) for _ in range(ends[i + 1] - ends[i])] + [len(ends) - 1]


def flags_of(x: Any, shape: Sequence[int], owner: list[int] | None = None) -> list[bool] | None:
    """A mask of the tokens, or of the trajectories of `owner`, for each token."""
    if x is None:
        return None
    if owner is not None and has_shape(x, [owner[-1]]) and not has_shape(x, shape):
        whole = (tensor(x, MASK, constant=True) != 0).tolist()
        return [whole[i] for i in owner[:-1]]
    return (tensor(x, MASK, shape, constant=True) != 0).flatten().tolist()


def common(k: dict[str, Any], tokens: Tensor, *, group: bool = True) -> LossConfig:
    """Judge what the three losses have in common."""
    shape, owner = tokens.shape, owners(tokens, k["cu_seqlens"])
    B = owner[-1]
    need(not group or k["group"] is None, "group")
    need(k["mesh"] is None, "mesh")
    word(k["sequence_split"], "contiguous")
    implementation(k["impl"])
    need(k["config"] is None or isinstance(k["config"], LossConfig), "config")
    config: LossConfig = k["config"] or LossConfig.pmpo()
    for name in ("old_logp", "ref_logp"):
        if k[name] is not None:
            tensor(k[name], FLOAT, shape, constant=True)
    tensor(k["advantages"], FLOAT, [B], constant=True)
    mask, policy = flags_of(k["mask"], shape), flags_of(k["policy_mask"], shape, owner)
    weights = k["rollout_weights"]
    if weights is not None:
        if has_shape(weights, [B]) and not has_shape(weights, shape):
            each = tensor(weights, FLOAT, [B], constant=True).double().tolist()
            values = [each[i] for i in owner[:-1]]
        else:
            values = tensor(weights, FLOAT, shape, constant=True).double().flatten().tolist()
        for i, v in enumerate(values):
            if (mask is None or mask[i]) and (policy is None or policy[i]):
                need(math.isfinite(v) and v >= 0, "a weight")
    power, target = k["power"], k["target_ess"]
    if isinstance(power, Tensor):
        need(all(abs(p) <= 1e30 for p in tensor(power, FLOAT, [B], constant=True).double().tolist()), "power")
    elif power is not None:
        number(power, -1e30, 1e30)
    if target is not None:
        need(all(x >= 0 for x in tensor(target, FLOAT, [B], constant=True).double().tolist()), "target_ess")
        need(power is None and config.power == "ess", "target_ess")
    need(config.power != "ess" or config.clip == "token" or power is not None or target is not None, "nothing sets p")
    need(not config.beta or k["ref_logp"] is not None, "ref_logp")
    D = k["denominator"]
    if isinstance(D, Tensor):
        number(float(tensor(D, FLOAT | INT, [], constant=True).double()), SMALLEST)
    elif D is not None:
        number(D, SMALLEST)
    return config


def implementation(impl: Any) -> None:
    if impl is not None:
        word(impl, "triton", "cpp", "reference")


def token_ids(k: dict[str, Any], shape: Sequence[int]) -> Tensor:
    """Ids for positions of this shape, of which the last of each row may be ignored."""
    ids = tensor(k["token_ids"], INT)
    shapes = [list(shape)] + ([[shape[0], shape[1] - 1]] if len(shape) == 2 and shape[1] else [])
    need(list(ids.shape) in shapes, "shape of the ids")
    return ids


def in_vocabulary(ids: Tensor, mask: Any, V: int) -> None:
    keep = flags_of(mask, ids.shape)
    for i, y in enumerate(ids.flatten().tolist()):
        need(0 <= y < V or not (keep is None or keep[i]), "an id")


def logits(k: dict[str, Any]) -> Tensor:
    z = tensor(k["logits"], FLOAT)
    need(z.dim() in (2, 3) and z.shape[-1] >= 1, "shape of the logits")
    need(z.stride(-1) == 1 or z.shape[-1] == 1, "stride")
    if flag(k["inplace"]):
        at = torch.zeros(z.shape, dtype=torch.long)
        for dim, (size, stride) in enumerate(zip(z.shape, z.stride(), strict=True)):
            at += (torch.arange(size) * stride).view([-1] + [1] * (z.dim() - dim - 1))
        need(at.unique().numel() == z.numel(), "rows overlap")
    return z


def judge_token_logp(k: dict[str, Any]) -> None:
    z = logits(k)
    ids = token_ids(k, z.shape[:-1])
    factor(k["temperature"])
    implementation(k["impl"])
    in_vocabulary(ids, k["mask"], z.shape[-1])


def judge_pmpo_loss(k: dict[str, Any]) -> None:
    z = logits(k)
    ids = token_ids(k, z.shape[:-1])
    common(k, ids)
    in_vocabulary(ids, k["mask"], z.shape[-1])


def judge_pmpo_loss_from_logp(k: dict[str, Any]) -> None:
    logp = tensor(k["logp"], FLOAT)
    need(logp.dim() in (1, 2), "shape of logp")
    config = common(k, logp, group=False)
    need(config.temperature == 1, "temperature")
    if k["entropy"] is not None:
        tensor(k["entropy"], FLOAT, logp.shape)
    need(not config.entropy_coef or k["entropy"] is not None, "entropy")


def judge_linear_pmpo_loss(k: dict[str, Any]) -> None:
    hidden = tensor(k["hidden"], FLOAT)
    need(hidden.dim() in (2, 3) and hidden.shape[-1] >= 1, "shape of the hidden states")
    ids = token_ids(k, hidden.shape[:-1])
    weight = tensor(k["weight"], {hidden.dtype})
    need(weight.dim() == 2 and weight.shape[0] >= 1 and weight.shape[1] == hidden.shape[-1], "shape of the weight")
    if k["bias"] is not None:
        tensor(k["bias"], {hidden.dtype}, weight.shape[:1])
    flag(k["skip_zero_advantage"])
    if k["max_chunk_tokens"] is not None:
        count(k["max_chunk_tokens"])
    config = common(k, ids)
    scale = factor(k["logit_scale"])
    if k["logit_softcap"] is None:
        factor(config.temperature / scale)
    else:
        factor(scale / factor(k["logit_softcap"]))
    in_vocabulary(ids, k["mask"], weight.shape[0])


def judge_solve_power(k: dict[str, Any]) -> None:
    l = tensor(k["log_weights"], FLOAT)
    need(l.dim() in (1, 2), "shape of the weights")
    B = owners(l, k["cu_seqlens"])[-1]
    need(all(x >= 0 for x in tensor(k["target_ess"], FLOAT, [B]).double().tolist()), "target_ess")
    keep = flags_of(k["mask"], l.shape)
    for i, x in enumerate(l.double().flatten().tolist()):
        need(x < math.inf or not (keep is None or keep[i]), "a weight")
    positive(k["power_max"], 1e30)
    flag(k["full_output"])
    need(k["impl"] is None or word(k["impl"], "cpp", "reference"), "impl")


def rewards(k: dict[str, Any]) -> list[float]:
    r = tensor(k["rewards"], FLOAT, constant=True)
    need(r.dim() == 1 and bool(r.isfinite().all()), "rewards")
    return [float(x) for x in r.double().tolist()]


def of_mean(k: dict[str, Any]) -> None:
    r = rewards(k)
    need(r, "a reward")
    total, size = math.fsum(x / len(r) for x in r), max(map(abs, r))
    if 0 < abs(total) <= 1e-12 * size:
        raise Either
    need(total >= 0, "a mean")


def judge_apmpo_power(k: dict[str, Any]) -> None:
    of_mean(k)
    positive(k["gamma"])


def judge_apmpo_clip(k: dict[str, Any]) -> None:
    of_mean(k)
    need(positive(k["eps_min"]) <= positive(k["eps_max"]), "bounds")
    positive(k["delta"])


def judge_group_advantages(k: dict[str, Any]) -> None:
    r = rewards(k)
    if isinstance(k["groups"], Tensor):
        tensor(k["groups"], INT, [len(r)])
    else:
        need(len(r) % count(k["groups"]) == 0, "a size")
    word(k["baseline"], "mean", "leave-one-out")
    need(k["scale"] is None or word(k["scale"], "std"), "scale")
    positive(k["delta"])


def judge_holder_power(k: dict[str, Any]) -> None:
    number(k["progress"], 0, 1)
    number(number(k["end"]) - number(k["start"]))
    word(k["shape"], "linear", "square", "cube", "sine")


def judge_rollout_weights(k: dict[str, Any]) -> None:
    logp = tensor(k["logp"], FLOAT)
    need(logp.dim() in (1, 2), "shape of logp")
    other = tensor(k["rollout_logp"], FLOAT, logp.shape)
    owner, keep = owners(logp, k["cu_seqlens"]), flags_of(k["mask"], logp.shape)
    need((0.0 if k["low"] is None else positive(k["low"])) < factor(k["high"]), "bounds")
    word(k["mode"], "truncate", "mask")
    level = word(k["level"], "token", "sequence", "geometric")
    d = (logp.double() - other.double()).flatten().tolist()
    kept = [(owner[i], x) for i, x in enumerate(d) if keep is None or keep[i]]
    need(not any(math.isnan(x) for _, x in kept), "NaN")
    if level != "token":
        for i in range(owner[-1]):
            mine = [x for at, x in kept if at == i]
            need(not {math.inf, -math.inf} <= set(mine), "both infinities")
            if any(1e300 < abs(x) < math.inf for x in mine):
                raise Either  # the sum may overflow on the way


def judge_denominator(k: dict[str, Any]) -> None:
    lengths = k["lengths"]
    parts = [lengths] if isinstance(lengths, Tensor) else lengths
    need(isinstance(parts, Sequence) and len(parts), "lengths")
    for part in parts:
        need(isinstance(part, Tensor) and not part.is_nested and part.dim() == 1, "lengths")
        need(all(n >= 0 for n in tensor(part, INT).tolist()), "lengths")
    need(isinstance(k["config"], LossConfig) and k["mesh"] is None, "config")
    flag(k["averaged"])


def judge_ratio_clip(k: dict[str, Any]) -> None:
    need(number(k["eps_low"], 5e-324) < 1, "eps_low")
    positive(k["eps_high"])


def judge_LossConfig(k: dict[str, Any]) -> None:
    if not (isinstance(k["power"], str) and k["power"] == "ess"):
        number(k["power"], -1e30, 1e30)
    need(number(k["power_min"], 0) <= positive(k["power_max"], 1e30), "bracket")
    for name in ("full_clip_fraction", "ess_floor"):
        positive(k[name], 1)
    for name in ("clip_low", "clip_high", "ess_sharpness"):
        positive(k[name])
    for name in ("beta", "entropy_coef"):
        number(k[name])
    factor(k["temperature"])
    clip, sides = word(k["clip"], "token", "sequence", "none"), word(k["clip_sides"], "one", "two")
    need(sides == "one" or clip != "none", "sides")
    if k["dual_clip"] is not None:
        need(number(k["dual_clip"]) > 1 and clip != "none" and sides == "one", "dual_clip")
    word(k["ess_rule"], "relative", "absolute")
    estimator = word(k["kl_estimator"], "k1", "k2", "k3")
    straight, bias = flag(k["kl_straight_through"]), flag(k["kl_bias_correction"])
    need(not straight or (estimator != "k2" and not bias), "straight through")
    mode = word(k["loss_agg_mode"], "seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm")
    need(count(k["max_length"]) if mode == "seq-mean-token-sum-norm" else k["max_length"] is None, "max_length")


JUDGES: dict[str, Callable[[dict[str, Any]], None]] = {
    name.removeprefix("judge_"): function for name, function in list(globals().items()) if name.startswith("judge_")
}


def judge(name: str, arguments: dict[str, Any]) -> str:
    """Judge a call by all its arguments, defaults among them."""
    try:
        JUDGES[name](arguments)
    except Bad:
        return "bad"
    except Either:
        return "either"
    return "good"
