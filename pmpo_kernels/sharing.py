"""What a call does before and after its kernels where several devices may share it; here one device has everything."""

from __future__ import annotations

import contextlib
from typing import Literal, NamedTuple

from torch import Tensor

from pmpo_kernels.autograd import Parts
from pmpo_kernels.batch import Batch, Call

Split = Literal["contiguous", "zigzag"]


class Whole(NamedTuple):
    """Whole trajectories, of whose tokens this rank has those at `own`; None for all of them."""

    logp: Tensor
    entropy: Tensor | None
    batch: Batch
    own: Tensor | None


class Sharing:
    """One device; `distributed.shared.Shared` is several."""

    parts: Parts | None = None  # of the vocabulary
    splits_trajectories = False
    sums_over_data = False  # other ranks have other trajectories of the batch

    def agreement(self) -> contextlib.AbstractContextManager[object]:
        """Around checks: what one rank raises there is raised on all."""
        return contextlib.nullcontext()

    def describe(
        self,
        vocabulary: int,
        tokens: Tensor,
        call: Call,
        everywhere: tuple[object, ...],
        of_tokens: tuple[object, ...] = (),
    ) -> None:
        """Within the agreement: the sizes of this rank's part, and what others must have alike, plain values: those that share its
        trajectories `everywhere`, those that share its tokens `of_tokens` too."""

    def check_token_ids(self, token_ids: Tensor, mask: Tensor | None) -> None:
        """Of the whole vocabulary, on all ranks; on one device the stages check them."""

    def gather(self, logp: Tensor, entropy: Tensor | None, batch: Batch) -> Whole:
        """Whole trajectories from this rank's tokens (N,)."""
        return Whole(logp, entropy, batch, None)

    def whole_lengths(self, tokens: Tensor) -> Tensor:
        """Response tokens of whole trajectories (B,) from those of this rank's part."""
        return tokens

    def sum_over_data(self, count: Tensor) -> Tensor:
        """The sum of a count (), on all ranks that have other trajectories of the batch."""
        return count

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
