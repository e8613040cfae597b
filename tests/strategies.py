"""Generators: configurations, batches with signal, and the layouts in which a call may get them.

Hypothesis draws structure (sizes, lengths, options) and one seed; the numbers come from a torch generator of that seed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from conftest import CONFIGURATIONS
from definition import Trajectory
from hypothesis import strategies as st
from torch import Tensor

from pmpo_kernels import LossConfig, PMPOOutput, pmpo_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KEEP_AWAY = 0.02  # least distance of a log-ratio from the bounds of a token clip, so that rounding decides no clip


@st.composite
def random_configs(draw: st.DrawFn) -> LossConfig:
    """Draw any options that combine."""
    fields: dict[str, Any] = {
        "power": draw(
            st.sampled_from(["ess", "ess", "ess", "ess", 1.0, 0.0, -1.0, 0.5, -2.5, 1e-3]) | st.floats(0.1, 3)
        ),
        "clip": draw(st.sampled_from(["token", "token", "sequence", "none"])),
        "clip_low": draw(st.floats(0.1, 0.6)),
        "clip_high": draw(st.floats(0.1, 0.6)),
        "beta": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "entropy_coef": draw(st.sampled_from([0.0, 0.01, -0.02])),
        "temperature": draw(st.sampled_from([1.0, 0.7, 2.0])),
        "loss_agg_mode": draw(st.sampled_from(["seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"])),
    }
    if fields["clip"] != "none":
        fields |= draw(st.sampled_from([{}, {"clip_sides": "two"}, {"dual_clip": 2.5}]))
    if fields["power"] == "ess":
        fields["power_min"], fields["power_max"] = draw(st.sampled_from([(0.0, 1.0), (0.2, 1.0), (0.0, 3.0)]))
        fields["ess_rule"] = draw(st.sampled_from(["relative", "absolute"]))
        fields["full_clip_fraction"] = draw(st.floats(0.05, 1))
        fields["ess_sharpness"] = draw(st.sampled_from([0.5, 1.0, 3.0]))
        fields["ess_floor"] = draw(st.floats(0.3, 1))
    if fields["beta"]:
        fields["kl_estimator"] = draw(st.sampled_from(["k1", "k2", "k3"]))
        variants: list[dict[str, Any]] = [{}, {"kl_bias_correction": True}]
        if fields["kl_estimator"] != "k2":
            variants.append({"kl_straight_through": True})
        fields |= draw(st.sampled_from(variants))
    if fields["loss_agg_mode"] == "seq-mean-token-sum-norm":
        fields["max_length"] = draw(st.integers(1, 20))
    return LossConfig(**fields)


def configs() -> st.SearchStrategy[LossConfig]:
    """Return a strategy for the presets and whatever else combines."""
    return st.sampled_from(list(CONFIGURATIONS.values())) | random_configs()


class Batch(NamedTuple):
    """Packed tokens (N,) of trajectories of these lengths; everything a call takes, None where it is not given."""

    logits: Tensor  # (N, V)
    token_ids: Tensor
    lengths: list[int]
    old_logp: Tensor | None
    advantages: Tensor  # (B,)
    ref_logp: Tensor | None
    rollout_weights: Tensor | None  # (N,), or (B,) if not every trajectory has one token
    policy_mask: Tensor | None  # (N,) or (B,)
    power: Tensor | None  # (B,)
    target_ess: Tensor | None  # (B,)

    def spread(self, x: Tensor | None) -> Tensor | None:
        """Turn one value a trajectory into one a token."""
        by_trajectory = x is not None and len(x) != len(self.token_ids)
        return x.repeat_interleave(torch.tensor(self.lengths)) if by_trajectory else x

    def trajectories(self) -> list[Trajectory]:
        """Return what the definition reads, in float64. The logits are leaves."""

        def parts(x: Tensor | None) -> list[Any]:
            x = self.spread(x)
            return [None] * len(self.lengths) if x is None else list(x.split(self.lengths))

        def doubles(x: Tensor | None) -> list[Any]:
            return parts(None if x is None else x.double())

        rows = zip(
            [z.detach().clone().requires_grad_() for z in doubles(self.logits)],
            parts(self.token_ids),
            doubles(self.old_logp),
            self.advantages.tolist(),
            doubles(self.ref_logp),
            doubles(self.rollout_weights),
            parts(self.policy_mask),
            [None] * len(self.lengths) if self.target_ess is None else self.target_ess.tolist(),
            strict=True,
        )
        return [Trajectory(*row) for row in rows]

    def select(self, order: list[int]) -> Batch:
        """Return these trajectories, in this order."""
        starts = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
        tokens = [t for i in order for t in range(starts[i], starts[i] + self.lengths[i])]

        def per_token(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[tokens]

        def either(x: Tensor | None) -> Tensor | None:
            if x is None or len(x) == len(self.token_ids) or len(order) == len(tokens):
                return per_token(self.spread(x))  # as many tokens as trajectories: read as one a token
            return x[order]

        def per_trajectory(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[order]

        return Batch(
            self.logits[tokens], self.token_ids[tokens], [self.lengths[i] for i in order], per_token(self.old_logp),
            self.advantages[order], per_token(self.ref_logp), either(self.rollout_weights), either(self.policy_mask),
            per_trajectory(self.power), per_trajectory(self.target_ess),
        )  # fmt: skip


class Sizes(NamedTuple):
    """Largest sizes of a batch; the interpreter takes milliseconds a row."""

    trajectories: int = 5
    length: int = 7
    vocabulary: int = 80


SMALL = Sizes(3, 4, 40)


@st.composite
def batches(draw: st.DrawFn, config: LossConfig, dtype: torch.dtype, sizes: Sizes = Sizes()) -> Batch:  # noqa: B008
    """Draw a batch with log-ratios of standard deviation 0.02 to 1.5, some of them clipped, with trajectories without tokens, and
    with A = 0."""
    lengths = draw(st.lists(st.integers(0, sizes.length), min_size=1, max_size=sizes.trajectories))
    B, N, V = len(lengths), sum(lengths), draw(st.integers(2, sizes.vocabulary))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=random)

    small = torch.float64 if dtype == torch.float64 else torch.float32
    logits = (draw(st.sampled_from([0.5, 2.0, 8.0])) * normal(N, V)).to(dtype)
    log_q = torch.log_softmax(logits.double() / config.temperature, -1)
    token_ids = torch.multinomial(log_q.exp(), 1, generator=random)[:, 0] if N else torch.zeros(0, dtype=torch.long)
    logp = log_q[torch.arange(N), token_ids]
    d = draw(st.sampled_from([0.02, 0.3, 1.5])) * normal(N)
    for bound in (-config.clip_low, config.clip_high, math.log(config.dual_clip or 1e9)) * 3:
        d = torch.where((d - bound).abs() < KEEP_AWAY, d + 2.5 * KEEP_AWAY, d)
    per_token = B == N  # what has the tokens' shape is read as one a token

    def either(make: Any) -> Tensor | None:
        kind = draw(st.sampled_from(["none", "none", "token", "trajectory"]))
        return None if kind == "none" else make(B if kind == "trajectory" and not per_token else N)

    zeros = draw(st.booleans())
    weights = either(lambda n: (0.3 * normal(n)).exp() * (normal(n) > (-1 if zeros else -99)))
    advantages = normal(B).to(small)
    advantages[normal(B) > 1.2] = 0
    target = None
    if config.power == "ess" and (config.clip != "token" or draw(st.integers(0, 3)) == 0):
        target = torch.tensor(lengths, dtype=torch.float64).clamp(min=1) * (
            0.3 + 0.7 * torch.rand(B, generator=random).double()
        )
    power = None
    if target is None and draw(st.integers(0, 4)) == 0:
        power = 2 * normal(B)
    return Batch(
        logits, token_ids, lengths, None if draw(st.integers(0, 5)) == 0 else (logp - d).to(small), advantages,
        (logp + 0.3 * normal(N)).to(small) if config.beta or draw(st.booleans()) else None,
        None if weights is None else weights.to(small), either(lambda n: normal(n) < 0.7), power, target,
    )  # fmt: skip


class Layout(NamedTuple):
    """How a batch is passed to a call."""

    packed: bool
    pad: int  # more positions than the longest trajectory has
    holes: bool  # masked slots before and inside the response, not only after it
    extra: bool  # logits of one more position
    ids: torch.dtype
    poison: float  # in masked slots
    strides: str


STRIDES = ["contiguous", "wide", "offset", "time first", "every other"]
PACKED = Layout(True, 0, False, False, torch.int64, 0.0, "contiguous")
PADDED = PACKED._replace(packed=False)


def layouts() -> st.SearchStrategy[Layout]:
    return st.builds(
        Layout,
        st.booleans(),
        st.integers(0, 3),
        st.booleans(),
        st.booleans(),
        st.sampled_from([torch.int64, torch.int32]),
        st.sampled_from([0.0, math.nan, math.inf, -math.inf]),
        st.sampled_from(STRIDES),
    )


def strided(z: Tensor, how: str) -> Tensor:
    """Return the same numbers in other memory, with rows in one piece."""
    if how == "wide":
        return torch.cat([z, torch.full_like(z[..., :3], math.nan)], -1)[..., : z.shape[-1]]
    if how == "offset":
        return torch.cat([z.new_full((3,), math.nan), z.flatten()])[3:].view(z.shape)
    if how == "time first" and z.dim() == 3:
        return z.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "every other":
        return z.repeat_interleave(2, -2)[..., ::2, :]
    return z.clone()


def slots(batch: Batch, layout: Layout) -> tuple[Tensor, int]:
    """Return where each token (N,) goes in the flat (B T) slots, and T."""
    T = max([*batch.lengths, 1]) + layout.pad
    where = []
    for i, n in enumerate(batch.lengths):
        free = T - n
        gaps = sorted((7 * i + 3 * k) % (free + 1) for k in range(n)) if layout.holes else [0] * n
        where += [i * T + t + gap for t, gap in enumerate(gaps)]
    return torch.tensor(where, dtype=torch.long), T


class Call(NamedTuple):
    """The results of a call: the output, its gradient for each token (N, V) in the logits' dtype, and whether all other rows are
    exactly 0."""

    out: PMPOOutput
    grad: Tensor
    logp: Tensor  # (N,)
    others_are_zero: bool


def call(
    batch: Batch, layout: Layout, config: LossConfig, impl: str, device: str = "cpu", scale: float = 1.0, **kwargs: Any
) -> Call:
    """Call `pmpo_loss` with this layout. The gradient is that of `scale` times the loss, and the results are on the CPU."""
    B, N, V = len(batch.lengths), len(batch.token_ids), batch.logits.shape[-1]
    arguments = {"power": batch.power, "target_ess": batch.target_ess}
    tokens = {
        "token_ids": batch.token_ids.to(layout.ids),
        "old_logp": batch.old_logp,
        "ref_logp": batch.ref_logp,
        "rollout_weights": batch.rollout_weights,
        "policy_mask": batch.policy_mask,
    }
    if layout.packed:
        where, z = torch.arange(N), batch.logits
        arguments |= tokens
        arguments["cu_seqlens"] = torch.tensor([0, *torch.tensor(batch.lengths).cumsum(0)], dtype=layout.ids)
    else:
        where, T = slots(batch, layout)

        def pad(x: Tensor | None, fill: float) -> Tensor | None:
            if x is None:
                return None
            if len(x) != N:
                return x
            out = x.new_full((B * T, *x.shape[1:]), fill if x.is_floating_point() else 0)
            out[where] = x
            return out.view(B, T, *x.shape[1:])

        z = pad(batch.logits, layout.poison)
        if layout.extra:
            z = torch.cat([z, torch.full_like(z[:, :1], layout.poison)], 1)
        for name, x in tokens.items():
            arguments[name] = pad(x, layout.poison)
        mask = torch.zeros(B * T, dtype=torch.bool)
        mask[where] = True
        arguments["mask"] = mask.view(B, T)
    arguments = {name: None if x is None else x.to(device) for name, x in arguments.items()}
    z = strided(z.to(device), layout.strides).requires_grad_()
    out = pmpo_loss(
        z, arguments.pop("token_ids"), arguments.pop("old_logp"), batch.advantages.to(device), config=config, impl=impl,
        **arguments, **kwargs,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(scale * out.loss, z)
    grad, logp = grad.cpu(), out.logp.cpu().flatten()
    rows, others = grad.reshape(-1, V), True
    if not layout.packed:
        used = torch.zeros(grad.shape[:2], dtype=torch.bool)
        used[:, :T] = arguments["mask"].cpu()
        others = bool((grad[~used] == 0).all())
        rows = grad[:, :T].reshape(-1, V)
    return Call(out, rows[where], logp[where], others)


def plain(config: LossConfig, **changes: Any) -> LossConfig:
    """Return the configuration without KL and entropy terms."""
    return replace(
        config,
        **{"beta": 0.0, "entropy_coef": 0.0, "kl_straight_through": False, "kl_bias_correction": False} | changes,
    )
