"""Times of a variant: wall time on a CPU; events on a GPU, whose second-level cache is emptied before each timed region."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pmpo_kernels.benchmarking.allocator import page_faults
from pmpo_kernels.benchmarking.inputs import Inputs

FLUSH_FACTOR = 4  # so many times the size of the second-level cache is read to empty it
LEAD_CYCLES = 10_000_000  # about 5 ms in which the host queues the kernels of a region
TIME_METHOD = {
    "cpu": "wall time; both is forward and backward of one run",
    "cuda": f"CUDA events; before each region {FLUSH_FACTOR} times the L2 cache is read, which leaves nothing in it to be written "
    f"back later, then the GPU waits {LEAD_CYCLES} cycles so that the host runs ahead; forward and backward of one run, both of "
    "another without emptying the cache between them",
}


class Times(NamedTuple):
    """Milliseconds of a forward, of the backward that follows it, and of both; and the number of page faults in both."""

    forward: float
    backward: float
    both: float
    page_faults: int | None


class Steps(ABC):
    """Runs and times forward and backward of a function of (leaves..., inputs). A subclass has the leaves and restores them."""

    inputs: Any
    cuda: bool

    @abstractmethod
    def restore(self) -> tuple[Tensor, ...]:
        """Return the leaves as at the start. It is not timed, and leaves the caches in the same state for every variant."""

    def run(self, f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """Run forward and backward once. Returns the loss and the gradient of each leaf."""
        leaves = self.restore()
        loss = f(*leaves, self.inputs)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def time(self, f: Callable[..., Tensor]) -> Times:
        """Time one forward and one backward apart, and on a GPU another forward and backward together."""
        leaves = self.restore()
        mark, milliseconds = clock(self.cuda)
        faults = page_faults()
        mark()
        loss = f(*leaves, self.inputs)
        mark()
        settle(self.cuda)
        mark()
        gradient = torch.autograd.grad(loss, leaves)
        mark()
        forward, _, backward = milliseconds()
        after = page_faults()
        del gradient, loss
        both = self._together(f) if self.cuda else forward + backward
        return Times(forward, backward, both, None if faults is None or after is None else after - faults)

    def _together(self, f: Callable[..., Tensor]) -> float:
        leaves = self.restore()
        return lap(lambda: torch.autograd.grad(f(*leaves, self.inputs), leaves), self.cuda)


class Bench(Steps):
    """Runs with a working copy of the logits as the leaf, which is restored before each run, because `inplace` writes over it. With
    `one_more` the copy has T + 1 positions, of which the last is random, and the gradient is that of the first T."""

    def __init__(self, inputs: Inputs, one_more: bool = False) -> None:
        self.inputs, self.cuda = inputs, inputs.logits.is_cuda
        B, T, V = inputs.logits.shape
        self.logits = inputs.logits.new_empty(B, T + one_more, V)
        self.logits[:, T:].normal_()
        self.logits.requires_grad_()

    def restore(self) -> tuple[Tensor]:
        T = self.inputs.logits.shape[1]
        self.logits.detach()[:, :T].copy_(self.inputs.logits)
        return (self.logits,)

    def run(self, f: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """Run forward and backward once. Returns the loss and the gradient of the logits (B, T, V)."""
        loss, gradient = super().run(f)
        return loss, gradient[:, : self.inputs.logits.shape[1]]

    def floor(self) -> dict[str, float]:
        """Return the milliseconds of one read of the logits and of one copy of them into memory that is there already."""
        source, target = self.inputs.logits, self.logits.detach()
        words = source.flatten().view(torch.int32 if source.numel() % 2 == 0 else source.dtype)
        return {"read": lap(words.amax, self.cuda), "copy": lap(lambda: target.copy_(source), self.cuda)}


def lap(f: Callable[[], object], cuda: bool) -> float:
    """Return the milliseconds of one call. On a GPU the cache is emptied before it."""
    mark, milliseconds = clock(cuda)
    mark()
    f()
    mark()
    return milliseconds()[0]


@cache
def _scrap(device: int) -> Tensor:
    size = FLUSH_FACTOR * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.zeros(size // 4, dtype=torch.int32, device=torch.device("cuda", device))


def settle(cuda: bool) -> None:
    """Prepare a timed region on a GPU: empty the cache, and make the stream wait so that the host can queue the whole region."""
    if cuda:
        _scrap(torch.cuda.current_device()).amax()  # a read, because written lines would go to memory in the region
        torch.cuda._sleep(LEAD_CYCLES)


def clock(cuda: bool) -> tuple[Callable[[], None], Callable[[], list[float]]]:
    """Return two functions: one marks a moment, the other returns the milliseconds between the marks. On a GPU the marks are events
    in the stream, which are read when the device is done."""
    if not cuda:
        at: list[float] = []
        return lambda: at.append(time.perf_counter()), lambda: [1e3 * (b - a) for a, b in pairwise(at)]
    events: list[torch.cuda.Event] = []
    torch.cuda.synchronize()
    settle(cuda)

    def mark() -> None:
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()

    def milliseconds() -> list[float]:
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(events)]

    return mark, milliseconds


def rotating(names: list[str], repeats: int) -> Iterator[list[str]]:
    """Yield the names for each round, beginning with another one each time, so that a slow moment of the machine hits them all."""
    for r in range(repeats):
        shift = r % max(len(names), 1)
        yield names[shift:] + names[:shift]
