"""The constants of a call of the loss: checked once, brought to one flat form, and passed on as one object."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pmpo_kernels import checks
from pmpo_kernels.config import POWER_LIMIT, LossConfig
from pmpo_kernels.contract import AggregateOptions, TrajectoryOptions
from pmpo_kernels.impls import resolve_impl
from pmpo_kernels.scalars import expect, is_number, shown

DENOMINATOR = "a finite number > 0 whose inverse is finite"


class Batch(NamedTuple):
    """The tensors of a batch through which no gradient flows, in the order of the operator `trajectory`.

    Tensors of tokens are flat (N,); trajectory i owns tokens cu_seqlens[i] to cu_seqlens[i + 1].
    """

    advantages: Tensor  # (B,)
    cu_seqlens: Tensor  # (B + 1,)
    old_logp: Tensor | None = None  # (N,)
    mask: Tensor | None = None  # (N,) bool
    ref_logp: Tensor | None = None  # (N,)
    rollout_weights: Tensor | None = None  # (N,)
    policy_mask: Tensor | None = None  # (N,) bool
    power: Tensor | None = None  # (B,)
    target_ess: Tensor | None = None  # (B,)

    def count_tokens(self) -> Tensor:
        """Response tokens of each trajectory, (B,) int64."""
        offsets = self.cu_seqlens.long()
        if self.mask is None:
            return offsets.diff()
        before = torch.nn.functional.pad(self.mask.cumsum(0), (1, 0))
        return before[offsets.clamp(0, self.mask.numel())].diff()

    def take(self, rows: Tensor, trajectories: Tensor, cu_seqlens: Tensor) -> Batch:
        """The batch of some trajectories (B',), of which only the response tokens `rows` (N',) are there, so without a mask."""

        def some(index: Tensor, *names: str) -> dict[str, Tensor | None]:
            return {name: None if (x := getattr(self, name)) is None else x[index] for name in names}

        of_tokens = some(rows, "old_logp", "ref_logp", "rollout_weights", "policy_mask")
        of_trajectories = some(trajectories, "power", "target_ess")
        return Batch(self.advantages[trajectories], cu_seqlens, **of_tokens, **of_trajectories)


class Call(NamedTuple):
    """Everything that is constant in one call of the loss, checked: its batch, its options as numbers, and what runs it."""

    batch: Batch
    trajectory_options: TrajectoryOptions
    aggregate_options: AggregateOptions
    denominator: Tensor | None  # 0-d float64; None for the default of the aggregation
    impl: str


def check_config(config: LossConfig | None) -> LossConfig:
    """`config`, or the default one for None."""
    if config is not None and not isinstance(config, LossConfig):
        raise TypeError(f"config: expected a LossConfig or None, got {type(config).__name__}")
    return LossConfig.pmpo() if config is None else config


def as_bool(mask: Tensor | None) -> Tensor | None:
    """A mask of any integer dtype as bool."""
    return mask if mask is None or mask.dtype == torch.bool else mask != 0


def check_call(
    name: str,
    tokens: Tensor,
    config: LossConfig,
    aggregate_options: AggregateOptions,
    *,
    advantages: Tensor,
    cu_seqlens: Tensor | None,
    old_logp: Tensor | None,
    mask: Tensor | None,
    ref_logp: Tensor | None,
    rollout_weights: Tensor | None,
    policy_mask: Tensor | None,
    power: Tensor | float | None,
    target_ess: Tensor | None,
    denominator: Tensor | float | None,
    impl: str | None,
) -> Call:
    """The arguments that every call of the loss has in common, checked and in flat form.

    `tokens`, which the caller has checked, has the shape and the device of the batch; `name` is the argument it came from.

    Raises:
        TypeError, ValueError, RuntimeError: as `pmpo_loss`.
    """
    device, shape = tokens.device, tokens.shape
    offsets = checks.check_offsets(name, tokens, cu_seqlens)
    B = offsets.numel() - 1

    def per_token(name: str, value: object, dtypes: tuple[torch.dtype, ...] = checks.FLOATS) -> Tensor | None:
        tensor = checks.check_constant(name, value, dtypes=dtypes, device=device, shape=shape)
        return None if tensor is None else tensor.reshape(-1)

    def per_either(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> Tensor | None:
        """One value a token, or one a trajectory for all of its tokens; what has the tokens' shape is the former."""
        if value is None or checks.check_dense(name, value).shape == shape:
            return per_token(name, value, dtypes)
        assert isinstance(value, Tensor)
        if tuple(value.shape) != (B,):
            expected = f"expected shape {tuple(shape)}, or ({B},) for all tokens of a trajectory"
            raise ValueError(f"{name}: {expected}, got {tuple(value.shape)}")
        checks.check_constant(name, value, dtypes=dtypes, device=device, shape=(B,))
        position = torch.arange(tokens.numel(), device=device)
        owner = torch.searchsorted(offsets[1:].contiguous(), position, right=True)
        return value[owner.clamp(max=B - 1)] if B else value.new_zeros(tokens.numel())

    def per_trajectory(name: str, value: object) -> Tensor | None:
        return checks.check_constant(name, value, dtypes=checks.FLOATS, device=device, shape=(B,))

    if advantages is not None and checks.check_dense("advantages", advantages).dim() == 2:
        raise ValueError(
            f"advantages: expected shape ({B},), one number a trajectory, got {tuple(advantages.shape)}; "
            "if they are constant along each trajectory, pass one column"
        )
    A = per_trajectory("advantages", advantages)
    if A is None:
        raise TypeError("advantages: expected a tensor, got None")
    if power is not None and target_ess is not None:
        raise ValueError("target_ess: expected None when power is given, got both")
    if target_ess is not None and config.power != "ess":
        raise ValueError(f'target_ess: expected None unless config.power is "ess", got it with power {config.power}')
    if config.power == "ess" and power is None and target_ess is None and config.clip != "token":
        raise ValueError(f'config.power: "ess" needs clip="token" or an explicit target_ess, got clip="{config.clip}"')
    if config.beta and ref_logp is None:
        raise ValueError(f"ref_logp: expected a tensor because config.beta is {config.beta}, got None")
    if isinstance(power, (int, float)):
        if not is_number(power):  # the message is written here: that of a symbolic B would fix its value
            raise ValueError(f"power: expected a finite number or a tensor of shape ({B},), got {shown(power)}")
        number = float(power)
        expect("power", abs(number) <= POWER_LIMIT, "a number from -1e30 to 1e30", power)
        # a sum, not torch.full, which torch.compile would compile anew for each number
        power = torch.zeros(B, dtype=torch.float64, device=device) + number
    if isinstance(denominator, Tensor):
        checks.check_constant(
            "denominator", denominator, dtypes=(*checks.FLOATS, *checks.INTEGERS), device=device, shape=()
        )
        denominator = denominator.double()
    elif denominator is not None:
        number = checks.check_number("denominator", denominator)
        expect("denominator", is_number(1 / number), DENOMINATOR, denominator)
        denominator = torch.zeros((), dtype=torch.float64, device=device) + number
    batch = Batch(
        A,
        offsets,
        mask=as_bool(per_token("mask", mask, checks.MASKS)),
        rollout_weights=per_either("rollout_weights", rollout_weights, checks.FLOATS),
        power=per_trajectory("power", power),
        target_ess=per_trajectory("target_ess", target_ess),
        policy_mask=as_bool(per_either("policy_mask", policy_mask, checks.MASKS)),
        old_logp=per_token("old_logp", old_logp),
        ref_logp=per_token("ref_logp", ref_logp),
    )
    _check_values(batch, denominator)
    options = config.trajectory_options(has_power=power is not None, has_target_ess=target_ess is not None)
    return Call(batch, options, aggregate_options, denominator, resolve_impl(impl, device))


def _check_values(batch: Batch, denominator: Tensor | None) -> None:
    """Check the ranges of tensors whose bad values would only show in the loss, or not at all."""

    def good_weights(v: Tensor) -> Tensor:
        good = (v >= 0) & v.isfinite()
        for read in (batch.mask, batch.policy_mask):
            good = good if read is None else good | ~read
        return good

    checks.check_all("rollout_weights", batch.rollout_weights, good_weights, "finite weights >= 0 where mask is true")
    # in float64, because float16 has no 1e30 but infinity; 1e30 as bfloat16 and float32 round it, too
    largest = POWER_LIMIT * (1 + torch.finfo(torch.bfloat16).eps / 2)
    checks.check_all("power", batch.power, lambda p: p.double().abs() <= largest, "numbers from -1e30 to 1e30")
    checks.check_all("target_ess", batch.target_ess, lambda ess: ess >= 0, "numbers >= 0")
    checks.check_all("denominator", denominator, lambda d: (d > 0) & d.isfinite() & (1 / d).isfinite(), DENOMINATOR)
