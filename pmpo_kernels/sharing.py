"""What a call does before and after its kernels because several devices may share it. Here one device has everything."""

from __future__ import annotations

import contextlib
from typing import Literal, NamedTuple

from torch import Tensor

from pmpo_kernels.autograd import Parts
from pmpo_kernels.batch import Batch, Call

Split = Literal["contiguous", "zigzag"]


class Whole(NamedTuple):
    """Tokens of whole trajectories, flat. This rank has those at the positions `own`; None means all of them."""

    logp: Tensor
    entropy: Tensor | None
    batch: Batch
    own: Tensor | None


class Sharing:
    """A call on one device. `distributed.shared.Shared` is one on several and overrides every method."""

    parts: Parts | None = None  # of a vocabulary that is split
    splits_trajectories = False  # other ranks have other tokens of each trajectory
    sums_over_data = False  # other ranks have other trajectories of the batch

    def agreement(self) -> contextlib.AbstractContextManager[object]:
        """The context in which a call checks its arguments: what one rank raises in it is raised on all."""
        return contextlib.nullcontext()

    def describe(
        self,
        vocabulary: int,
        tokens: Tensor,
        call: Call,
        everywhere: tuple[object, ...],
        of_tokens: tuple[object, ...] = (),
    ) -> None:
        """Tell the others, within the agreement, the sizes of this rank's part and what they must have alike.

        Ranks that share the trajectories must have the same `everywhere`, plain values; those that share the tokens must have the
        same `of_tokens` too.
        """

    def check_token_ids(self, token_ids: Tensor, mask: Tensor | None) -> None:
        """Check on all ranks that ids lie in the whole vocabulary. On one device the stages do that."""

    def gather(self, logp: Tensor, entropy: Tensor | None, batch: Batch) -> Whole:
        """The tokens of whole trajectories, from logp and entropy (N,) and the batch of this rank's tokens."""
        return Whole(logp, entropy, batch, None)

    def whole_lengths(self, tokens: Tensor) -> Tensor:
        """Response tokens of whole trajectories (B,) from those of this rank's part."""
        return tokens

    def sum_over_data(self, count: Tensor) -> Tensor:
        """The sum of a count () over the ranks that have other trajectories of the batch."""
        return count

    def smallest(self, number: int) -> int:
        """The smallest such number on the ranks that share the tokens."""
        return number

    def sum_over_vocabulary(self, gradient: Tensor) -> None:
        """Add up, in place, the gradient of something that every part of the vocabulary has read."""

    def everywhere(self, finite: Tensor) -> Tensor:
        """A bool (), true where it is true on all ranks that share the tokens or the trajectories."""
        return finite

    def whole_vocabulary(self, own: int) -> int:
        """The size of the vocabulary of which this rank has `own`."""
        return own


ALONE = Sharing()
