"""What a call does before and after its kernels where several devices may share it; here one device has everything."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

from torch import Tensor

from pmpo_kernels.autograd import Parts, TrajectoryInputs
from pmpo_kernels.config import LossConfig


class Whole(NamedTuple):
    """Whole trajectories, of whose tokens this rank has those at `own`; None for all of them."""

    logp: Tensor
    entropy: Tensor | None
    inputs: TrajectoryInputs
    own: Tensor | None


class Sharing:
    """One device; `distributed.shared.Shared` is several."""

    parts: Parts | None = None  # of the vocabulary

    def agreement(self) -> contextlib.AbstractContextManager[object]:
        """Around checks: what one rank raises there is raised on all."""
        return contextlib.nullcontext()

    def describe(self, vocabulary: int, tokens: Tensor, inputs: TrajectoryInputs) -> None:
        """Within the agreement: the sizes of this rank's part, and what others must have alike."""

    def check_token_ids(self, token_ids: Tensor, mask: Tensor | None) -> None:
        """Of the whole vocabulary, on all ranks; on one device the stages check them."""

    def gather(self, logp: Tensor, entropy: Tensor | None, inputs: TrajectoryInputs) -> Whole:
        """Whole trajectories from this rank's tokens (N,)."""
        return Whole(logp, entropy, inputs, None)

    def denominator(self, given: Tensor | None, inputs: TrajectoryInputs, config: LossConfig) -> Tensor | None:
        """D of the trajectories of all ranks, from this one's whole ones; None for those at hand."""
        return given

    def sum_over_vocabulary(self, gradient: Tensor) -> None:
        """The gradient of what all parts of the vocabulary read, in place."""

    def everywhere(self, finite: Tensor) -> Tensor:
        """Whether (0-d bool) it holds on all ranks that share the tokens."""
        return finite


ALONE = Sharing()


def find_sharing(group: Any, mesh: Any, sequence_split: Any, **tensors: tuple[Any, int]) -> tuple[Sharing, list[Any]]:
    """Who shares a call, from its arguments, and this rank's part of `tensors`: each with its dimension of the vocabulary, along
    which a DTensor may be sharded."""
    sharded = any(hasattr(x, "device_mesh") for x, _ in tensors.values())
    if group is None and mesh is None and not sharded:
        if sequence_split != "contiguous":
            raise ValueError(f"sequence_split: expected 'contiguous' without a mesh, got {sequence_split!r}")
        return ALONE, [x for x, _ in tensors.values()]
    from pmpo_kernels.distributed.shared import Shared  # torch.distributed is not part of every PyTorch

    return Shared.find(group, mesh, sequence_split, tensors)
