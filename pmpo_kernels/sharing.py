"""What a call does before and after its kernels where several devices may share it; here one device has everything."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from pmpo_kernels.aggregate import Aggregation
from pmpo_kernels.autograd import Parts, TrajectoryInputs

Split = Literal["contiguous", "zigzag"]


class Whole(NamedTuple):
    """Whole trajectories, of whose tokens this rank has those at `own`; None for all of them."""

    logp: Tensor
    entropy: Tensor | None
    inputs: TrajectoryInputs
    own: Tensor | None


class Sharing:
    """One device; `distributed.shared.Shared` is several."""

    parts: Parts | None = None  # of the vocabulary
    splits_trajectories = False

    def agreement(self) -> contextlib.AbstractContextManager[object]:
        """Around checks: what one rank raises there is raised on all."""
        return contextlib.nullcontext()

    def describe(
        self,
        vocabulary: int,
        tokens: Tensor,
        inputs: TrajectoryInputs,
        denominator: Tensor | None,
        everywhere: tuple[object, ...],
        of_tokens: tuple[object, ...] = (),
    ) -> None:
        """Within the agreement: the sizes of this rank's part, and what others must have alike, plain values: those that share its
        trajectories `everywhere`, those that share its tokens `of_tokens` too."""

    def check_token_ids(self, token_ids: Tensor, mask: Tensor | None) -> None:
        """Of the whole vocabulary, on all ranks; on one device the stages check them."""

    def gather(self, logp: Tensor, entropy: Tensor | None, inputs: TrajectoryInputs) -> Whole:
        """Whole trajectories from this rank's tokens (N,)."""
        return Whole(logp, entropy, inputs, None)

    def whole_lengths(self, tokens: Tensor) -> Tensor:
        """Response tokens of whole trajectories (B,) from those of this rank's part."""
        return tokens

    def denominator(self, given: Tensor | None, tokens: Callable[[], Tensor], options: Aggregation) -> Tensor | None:
        """D of the trajectories of all ranks, from the tokens (B,) of this one's whole ones; None for those at hand."""
        return given

    def smallest(self, number: int) -> int:
        """On the ranks that share the tokens."""
        return number

    def sum_over_vocabulary(self, gradient: Tensor) -> None:
        """The gradient of what all parts of the vocabulary read, in place."""

    def everywhere(self, finite: Tensor) -> Tensor:
        """Whether (0-d bool) it holds on all ranks that share the tokens or the trajectories."""
        return finite

    def whole_vocabulary(self, own: int) -> int:
        """The size of the vocabulary of which this rank has `own`."""
        return own


ALONE = Sharing()
