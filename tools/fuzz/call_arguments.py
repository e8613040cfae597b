"""Random calls of the public functions: a right call, some of whose arguments are then changed to anything."""

from __future__ import annotations

import decimal
import fractions
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmpo_kernels import LossConfig

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MASKS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
DTYPES = [*FLOATS, *MASKS, torch.complex64, torch.complex128, torch.float8_e5m2, torch.uint16, torch.uint64]
NUMBERS: list[Any] = [
    *(0, 1, 2, -1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 10**31, 10**308, 10**309, 10**400, -(10**5000)),
    *(0.0, -0.0, 0.3, 0.5, 1.0, 1.5, -0.5, 2.0, math.nan, math.inf, -math.inf, 5e-324, 1e-310, 1e-31, 1e-30, 1e30, 1e31),
    *(1e150, 1.7e308, -1.7e308, True, False, 1j, np.float32(1), np.float64(0.5), np.int64(2), np.bool_(True)),
    *(fractions.Fraction(1, 2), decimal.Decimal("0.5")),
]  # fmt: skip
WORDS: list[Any] = ["x", "", b"x", "ess", "token", "sequence", "geometric", "none", "one", "two", "mean", "std", "contiguous",
    "zigzag", "triton", "cpp", "reference", "linear", "sine", "truncate", "mask", "k1", "k2", "relative", "absolute",
    "token-mean", "seq-mean-token-sum-norm", "cuda", "leave-one-out"]  # fmt: skip
OTHERS: list[Any] = [None, [], [1.0], (1, 2), {}, {"a": 1}, set(), object(), len, int, ..., range(3), slice(2), np.ones(2),
    np.array("x"), LossConfig, LossConfig(), LossConfig.grpo(beta=0.1), LossConfig.gspo(), LossConfig(temperature=0.5),
    LossConfig.pmpo(clip="none"), torch.float32, torch.device("cpu"), torch.Generator()]  # fmt: skip
EXTREMES = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    5.0,
    -100.0,
    65504.0,
    3e38,
    -3e38,
    1e308,
    -1e308,
    5e-324,
    math.nan,
    math.inf,
    -math.inf,
]
INTEGERS = [0, 1, -1, 2, 5, 127, -100, 2**15, 2**31 - 1, -(2**31), 2**62, 2**63 - 1, -(2**63)]


class Draw:
    """The source of all that is random in a call, from one seed."""

    def __init__(self, seed: str) -> None:
        self.r = random.Random(seed)
        self.tensors = torch.Generator().manual_seed(self.r.getrandbits(60))

    def often(self, probability: float = 0.4) -> bool:
        return self.r.random() < probability

    def floats(self, *shape: int, low: float = -2.0, high: float = 2.0, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.rand(shape, generator=self.tensors, dtype=torch.float64) * (high - low) + low
        return x.to(dtype or self.r.choice(FLOATS))

    def ids(self, *shape: int, high: int) -> Tensor:
        return torch.randint(high, shape, generator=self.tensors).to(self.r.choice([torch.int64, torch.int32]))

    def mask(self, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.tensors) < 0.7).to(self.r.choice(MASKS))

    def anything(self) -> Any:
        kind = self.r.random()
        if kind < 0.4:
            return self.r.choice(NUMBERS)
        if kind < 0.6:
            return self.r.choice(WORDS)
        if kind < 0.8:
            return self.r.choice(OTHERS)
        shape = [self.r.choice([0, 1, 2, 3]) for _ in range(self.r.choice([0, 1, 1, 2, 2, 3, 4]))]
        return self.changed(torch.ones(shape, dtype=self.r.choice(DTYPES)))

    def changed(self, x: Any) -> Any:
        """Return a tensor with another dtype, shape, layout, device, value or stride, which is sometimes as good as before."""
        if not isinstance(x, Tensor) or self.often(0.1):
            return self.anything()
        x = x.detach()
        change = self.r.choice(CHANGES)
        try:
            with warnings.catch_warnings():  # of prototypes, and of parts that are lost
                warnings.simplefilter("ignore")
                return change(self, x)
        except (RuntimeError, IndexError, TypeError, NotImplementedError, ValueError):  # PyTorch cannot make it from x
            return None


def poke(draw: Draw, x: Tensor) -> Tensor:
    """Make one or all elements extreme."""
    x = x.clone()
    values = (
        [v for v in INTEGERS if torch.iinfo(x.dtype).min <= v <= torch.iinfo(x.dtype).max]
        if x.dtype in MASKS[1:]
        else EXTREMES
    )
    value = draw.r.choice(values)
    if draw.often(0.3):
        return x.fill_(value)
    x.view(-1)[draw.r.randrange(max(x.numel(), 1))] = value
    return x


def strided(draw: Draw, x: Tensor) -> Tensor:
    """Return the same numbers as every second element of a longer last dimension, or behind an offset."""
    if draw.often(0.5):
        return torch.stack([x, x], -1)[..., draw.r.randrange(2)]
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


CHANGES: list[Callable[[Draw, Tensor], Any]] = [
    *([poke] * 5),
    *([strided] * 2),
    lambda draw, x: x.to(draw.r.choice(DTYPES)),
    lambda draw, x: x.to(draw.r.choice(DTYPES)),
    lambda draw, x: x.to("meta"),
    lambda draw, x: x.to_sparse(),
    lambda draw, x: x.to_sparse_csr(),
    lambda draw, x: torch.nested.nested_tensor([x, x[:1]]),
    lambda draw, x: torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged),
    lambda draw, x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    lambda draw, x: x.to_mkldnn(),
    lambda draw, x: x.clone().requires_grad_(),
    lambda draw, x: torch.nn.Parameter(x.clone(), requires_grad=draw.often()),
    lambda draw, x: x[None],
    lambda draw, x: x[..., None],
    lambda draw, x: x.flatten(),
    lambda draw, x: x.transpose(0, -1),
    lambda draw, x: x[0],
    lambda draw, x: x[:-1],
    lambda draw, x: x[..., 1:],
    lambda draw, x: x[..., :0],
    lambda draw, x: x[:0],
    lambda draw, x: torch.cat([x, x[:1]]),
    lambda draw, x: torch.cat([x, x[..., :1]], -1),
    lambda draw, x: x[:1].expand(x.shape),
    lambda draw, x: x[..., :1].expand(x.shape),
    lambda draw, x: torch.view_as_complex(torch.stack([x, -x], -1)).conj().imag,  # negated when it is read
    lambda draw, x: x.tolist(),
    lambda draw, x: x.numpy(),
    lambda draw, x: x.flip(0),
    lambda draw, x: draw.floats(*x.shape),
]  # fmt: skip


# --- right calls, by function ----------------------------------------------------------------------------------------


def config(draw: Draw, **fixed: Any) -> dict[str, Any]:
    r = draw.r
    k: dict[str, Any] = {
        "power": r.choice(["ess", 1.0, 0, -1.0, 0.3, -3, 1e30]), "power_min": r.choice([0, 0.0, 0.25]),
        "power_max": r.choice([1, 0.5, 3.0, 1e30]), "ess_rule": r.choice(["relative", "absolute"]),
        "full_clip_fraction": r.choice([0.1, 1, 5e-324]), "ess_sharpness": r.choice([1, 0.5, 1e308]),
        "ess_floor": r.choice([0.5, 1, 5e-324]), "clip": r.choice(["token", "token", "sequence", "none"]),
        "clip_low": r.choice([0.4, 5e-324, 1e308]), "clip_high": r.choice([0.4, 2, 1e308]),
        "loss_agg_mode": r.choice(["seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"]),
        "beta": r.choice([0, 0, 0, 0.1, -1.0, 1e308]), "kl_estimator": r.choice(["k1", "k2", "k3"]),
        "kl_bias_correction": draw.often(0.2), "entropy_coef": r.choice([0, 0, 0, 0.1, -1e300]), "temperature": 1.0,
    }  # fmt: skip
    if k["clip"] != "none":
        k |= (
            {"dual_clip": r.choice([None, 3, 1.0000000000000002, 1e308])}
            if draw.often()
            else {"clip_sides": r.choice(["one", "two"])}
        )
    if k["kl_estimator"] != "k2" and not k["kl_bias_correction"]:
        k["kl_straight_through"] = draw.often(0.2)
    if k["loss_agg_mode"] == "seq-mean-token-sum-norm":
        k["max_length"] = r.choice([1, 8, 2**62])
    return {
        name: value
        for name, value in (k | fixed).items()
        if draw.often(0.6) or name in fixed or name in ("clip", "loss_agg_mode", "max_length")
    }


class Tokens:
    """The shapes of a batch, padded or packed, and the arguments that say so."""

    def __init__(self, draw: Draw) -> None:
        r = draw.r
        self.B, self.V = r.choice([0, 1, 2, 3]), r.choice([1, 2, 5, 17])
        self.cu: dict[str, Any] = {}
        if draw.often(0.3):
            ends = [0]
            for _ in range(self.B):
                ends.append(ends[-1] + r.choice([0, 1, 2, 4]))
            self.shape = [ends[-1]]
            self.cu = {"cu_seqlens": torch.tensor(ends, dtype=r.choice([torch.int32, torch.int64]))}
        else:
            self.shape = [self.B, r.choice([0, 1, 2, 4])]

    def rows(self, draw: Draw) -> list[int]:
        """Return the shape of the logits without V, perhaps with one more position."""
        more = len(self.shape) == 2 and draw.often(0.2)
        return [self.shape[0], self.shape[1] + 1] if more else self.shape


def common(draw: Draw, at: Tokens, *, entropy: bool = True) -> dict[str, Any]:
    r, B = draw.r, at.B
    options = config(draw) if draw.often(0.8) else {}
    if not entropy or draw.often(0.6):
        options |= {"temperature": 1.0} if not entropy else {"temperature": r.choice([1, 0.7, 1e-30, 1e30])}
    k: dict[str, Any] = {
        **at.cu,
        "advantages": draw.floats(B),
        "old_logp": draw.floats(*at.shape, low=-3, high=0) if draw.often(0.8) else None,
    }
    if options.get("power", "ess") == "ess" and options.get("clip", "token") != "token":
        if draw.often(0.5):
            k["target_ess"] = draw.floats(B, low=0.0, high=4)
        else:
            k["power"] = r.choice([1.0, 0, -(10**30)])
    elif draw.often(0.2):
        k["power"] = draw.floats(B)
    elif options.get("power", "ess") == "ess" and draw.often(0.3):
        k["target_ess"] = draw.floats(B, low=0.0, high=4)
    if options.get("beta") or draw.often(0.2):
        k["ref_logp"] = draw.floats(*at.shape, low=-3, high=0)
    if draw.often():
        k["mask"] = draw.mask(*at.shape)
    if draw.often(0.3):
        k["rollout_weights"] = draw.floats(*r.choice([at.shape, [B]]), low=0.0)
    if draw.often(0.2):
        k["policy_mask"] = draw.mask(*r.choice([at.shape, [B]]))
    if draw.often(0.3):
        k["denominator"] = r.choice([4, 0.5, 1e-307, 10**300, torch.tensor(3), torch.tensor(2.0)])
    k["config"] = None if not options and draw.often() else LossConfig(**options)
    return k


def differentiable(draw: Draw, x: Tensor) -> Tensor:
    return x.requires_grad_(draw.often(0.7))


def token_logp(draw: Draw) -> dict[str, Any]:
    at = Tokens(draw)
    k: dict[str, Any] = {
        "logits": differentiable(draw, draw.floats(*at.rows(draw), at.V)),
        "token_ids": draw.ids(*at.shape, high=at.V),
    }
    if draw.often():
        k |= {"mask": draw.mask(*at.shape), "temperature": draw.r.choice([1, 0.5, 1e-30, 1e30])}
    return k | ({"inplace": True} if draw.often(0.2) else {})


def pmpo_loss(draw: Draw) -> dict[str, Any]:
    at = Tokens(draw)
    z = {"logits": differentiable(draw, draw.floats(*at.rows(draw), at.V)), "token_ids": draw.ids(*at.shape, high=at.V)}
    return z | common(draw, at) | ({"inplace": True} if draw.often(0.2) else {})


def pmpo_loss_from_logp(draw: Draw) -> dict[str, Any]:
    at = Tokens(draw)
    k = common(draw, at, entropy=False)
    if draw.often(0.3) or (k["config"] and k["config"].entropy_coef):
        k["entropy"] = draw.floats(*at.shape, low=0.0)
    return {"logp": differentiable(draw, draw.floats(*at.shape, low=-3, high=0))} | k


def linear_pmpo_loss(draw: Draw) -> dict[str, Any]:
    at, H, dtype = Tokens(draw), draw.r.choice([1, 3, 8]), draw.r.choice(FLOATS)
    k: dict[str, Any] = {
        "hidden": differentiable(draw, draw.floats(*at.rows(draw), H, dtype=dtype)),
        "weight": differentiable(draw, draw.floats(at.V, H, dtype=dtype)),
        "token_ids": draw.ids(*at.shape, high=at.V),
    } | common(draw, at)  # fmt: skip
    k["config"] = k["config"] if not k["config"] or k["config"].temperature == 1 or draw.often() else None
    if draw.often(0.3):
        k["bias"] = draw.floats(at.V, dtype=dtype)
    if draw.often(0.3):
        k |= {"logit_scale": draw.r.choice([1, 0.5]), "logit_softcap": draw.r.choice([None, 30, 1.0])}
    if draw.often(0.3):
        k |= {"max_chunk_tokens": draw.r.choice([1, 3, 2**62]), "skip_zero_advantage": draw.often()}
    return k


def solve_power(draw: Draw) -> dict[str, Any]:
    at = Tokens(draw)
    k: dict[str, Any] = {
        "log_weights": draw.floats(*at.shape),
        "target_ess": draw.floats(at.B, low=0.0, high=4),
    } | at.cu
    if draw.often():
        k |= {"mask": draw.mask(*at.shape), "power_max": draw.r.choice([1, 0.5, 3.0, 1e30, 5e-324])}
    return k | ({"full_output": True} if draw.often() else {})


def holder_power(draw: Draw) -> dict[str, Any]:
    r = draw.r
    ends = {"start": r.choice([2, -1.0, 1e300]), "end": r.choice([-2.0, 1e307, 2])} if draw.often() else {}
    return {"progress": r.choice([0, 0.25, 1]), "shape": r.choice(["linear", "square", "cube", "sine"])} | ends


def apmpo_power(draw: Draw) -> dict[str, Any]:
    return {"rewards": draw.floats(draw.r.choice([1, 2, 5]), low=0.0)} | ({"gamma": 0.5} if draw.often() else {})


def apmpo_clip(draw: Draw) -> dict[str, Any]:
    k = {"rewards": draw.floats(draw.r.choice([1, 2, 5]), low=0.0)}
    return k | ({"eps_min": 0.2, "eps_max": draw.r.choice([0.2, 0.4]), "delta": 1e-6} if draw.often() else {})


def group_advantages(draw: Draw) -> dict[str, Any]:
    B = draw.r.choice([0, 2, 4, 6])
    groups = draw.ids(B, high=3) if draw.often() else draw.r.choice([1, 2])
    k: dict[str, Any] = {"rewards": draw.floats(B), "groups": groups}
    return k | ({"baseline": "leave-one-out", "scale": draw.r.choice(["std", None])} if draw.often() else {})


def rollout_weights(draw: Draw) -> dict[str, Any]:
    at = Tokens(draw)
    k: dict[str, Any] = {"logp": draw.floats(*at.shape), "rollout_logp": draw.floats(*at.shape)} | at.cu
    if draw.often():
        k |= {
            "mask": draw.mask(*at.shape),
            "low": draw.r.choice([None, 0.5, 5e-324]),
            "high": draw.r.choice([1, 2.0, 1e30]),
        }
    return k | {"level": draw.r.choice(["token", "sequence", "geometric"]), "mode": draw.r.choice(["truncate", "mask"])}


def denominator(draw: Draw) -> dict[str, Any]:
    lengths = [draw.ids(draw.r.choice([0, 1, 3]), high=5) for _ in range(draw.r.choice([1, 2]))]
    one = lengths[0] if len(lengths) == 1 and draw.often(0.5) else lengths
    return {"lengths": one, "config": LossConfig(**config(draw))} | ({"averaged": draw.often()} if draw.often() else {})


def ratio_clip(draw: Draw) -> dict[str, Any]:
    return {"eps_low": draw.r.choice([0.2, 5e-324, 0.9999999999999999]), "eps_high": draw.r.choice([0.2, 1, 10**300])}


GOOD: dict[str, Callable[[Draw], dict[str, Any]]] = {
    f.__name__: f
    for f in (token_logp, pmpo_loss, pmpo_loss_from_logp, linear_pmpo_loss, solve_power, holder_power, apmpo_power,
              apmpo_clip, group_advantages, rollout_weights, denominator, ratio_clip)
} | {"LossConfig": config}  # fmt: skip
