"""Guard bands around every buffer that a kernel gets, and under Triton's interpreter a watch over every address that it uses.

While `guarded(pattern)` is open, each launch of a Triton kernel and each call of a C++ operator gets copies of its tensors between
two bands. The pattern, a byte, fills the bands and all bytes of a tensor's storage that do not belong to it (the rest of strided
rows), the tensor of an optional input that is not there, and what the kernel writes without reading it. Afterwards bands and gaps
must hold the pattern still, and what the kernel only reads its values.

The watch looks at each load and store, whether its value reaches a result or not: where it is not masked, it must lie in an
argument, and a store in one that the kernel writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from pmpo_kernels.linear.operator import linear_loss

BAND = 4096  # bytes: the widest block of a row
ROW_RESULTS = ("logp_ptr", "row_max_ptr", "row_sum_ptr", "entropy_ptr")
WRITES = {
    "_token_logp_fwd_kernel": (*ROW_RESULTS, "lanes_ptr"),
    "_token_logp_merge_kernel": ROW_RESULTS,
    "_dlogits_bwd_kernel": ("out_ptr",),
    "_trajectory_sums_kernel": ("l_ptr", "sums_ptr"),
    "_trajectory_power_kernel": ("scales_ptr", "stats_ptr"),
    "_trajectory_gradient_kernel": ("dlogp_ptr", "dentropy_ptr"),
    "_aggregate_fwd_kernel": ("loss_ptr", "divisor_ptr", "metrics_ptr", "clip_fraction_ptr"),
    "_scale_bwd_kernel": ("gradient_ptr",),
    "token_logp.cpp": (),
    "trajectory.cpp": (),
    "aggregate.cpp": (),
    "dlogits.cpp": (),
    "dlogits_.cpp": ("logits",),
    "solve_power.cpp": (),
}
"""Arguments that each kernel writes; C++ operators allocate their results themselves. All else is only read."""
UPDATES = {
    "dlogits_.cpp": ("logits",),
    "_trajectory_gradient_kernel": ("dlogp_ptr",),
    "_scale_bwd_kernel": ("gradient_ptr",),
}
"""Those among them that it reads too, of one argument."""


class Argument(NamedTuple):
    name: str
    tensor: Tensor
    read: bool  # an input that is there
    written: bool


def mark(flags: np.ndarray, tensor: Tensor) -> None:
    """Set the flags (one for each byte of its storage) of the bytes that a tensor's elements take."""
    if tensor.numel():
        size = tensor.element_size()
        start = flags[tensor.storage_offset() * size :]
        strides = (*(stride * size for stride in tensor.stride()), 1)
        np.lib.stride_tricks.as_strided(start, (*tensor.shape, size), strides)[...] = True


class Guarded:
    """One storage between two bands, with the arguments that lie in it."""

    def __init__(self, arguments: list[Argument], pattern: int) -> None:
        self.arguments, self.pattern = arguments, pattern
        self.names = "/".join(argument.name for argument in arguments)
        storage = arguments[0].tensor.untyped_storage()
        size = storage.nbytes()
        self.source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        self.room = self.source.new_empty(2 * BAND + size + 64)
        # as far from a 64-byte boundary as the original: alignment decides how rows are accessed
        self.start = BAND + (self.source.data_ptr() - self.room.data_ptr() - BAND) % 64
        self.inside = slice(self.start, self.start + size)
        # of each byte of `room`: whether it belongs to an argument, and to one that is read, written
        self.covered, reads, self.written = (np.zeros(len(self.room), dtype=bool) for _ in range(3))
        for argument in arguments:
            for used, flags in ((argument.read, reads), (argument.written, self.written)):
                if used:
                    mark(self.covered[self.inside], argument.tensor)
                    mark(flags[self.inside], argument.tensor)
        before = np.full(len(self.room), pattern, dtype=np.uint8)
        content = self.source.cpu().numpy()
        before[self.inside] = np.where(reads[self.inside], content, pattern)
        self.before = before
        self.room.copy_(torch.from_numpy(before))

    def moved(self, argument: Argument) -> Tensor:
        """Return the argument as it lies in `room`."""
        tensor, size = argument.tensor, argument.tensor.element_size()
        assert self.start % size == 0
        offset = self.start // size + tensor.storage_offset()
        return tensor.new_empty(0).set_(self.room.untyped_storage(), offset, tensor.size(), tensor.stride())

    def finish(self, kernel: str) -> None:
        """Compare what shall not have changed, and give back what was written."""
        after = self.room.cpu().numpy()
        wrong = np.flatnonzero((after != self.before) & ~self.written)
        if len(wrong):
            at = int(wrong[0])
            where = "an input" if self.covered[at] else f"outside of its elements, at byte {at - self.start}"
            raise AssertionError(f"{kernel} has changed {self.names}: {where}")
        written = torch.from_numpy(self.written[self.inside]).to(self.source.device)
        self.source[written] = self.room[self.inside][written]


class Guard:
    """What `guarded` yields: the kernels that ran, and how many elements the watch has seen them load and store."""

    def __init__(self, pattern: int) -> None:
        self.pattern = pattern
        self.kernels: set[str] = set()
        self.elements = 0
        self._kernel = ""
        self._buffers: list[Guarded] = []

    def call(self, kernel: str, values: dict[str, Any], run: Callable[[dict[str, Any]], Any]) -> Any:
        """Call `run` with the tensors among `values` moved between bands."""
        arguments = []
        for name, value in values.items():
            if isinstance(value, Tensor):
                written = name in WRITES[kernel]
                missing = values.get("has_" + name.removesuffix("_ptr")) == 0
                read = not missing and (not written or name in UPDATES.get(kernel, ()))
                arguments.append(Argument(name, value, read, written))
        # one buffer for each argument, but for those that share the storage of one that is written
        shared = {a.tensor.untyped_storage().data_ptr() for a in arguments if a.written}
        groups: dict[object, list[Argument]] = {}
        for argument in arguments:
            pointer = argument.tensor.untyped_storage().data_ptr()
            key = pointer if (argument.read or argument.written) and pointer in shared else argument.name
            groups.setdefault(key, []).append(argument)
        buffers = [Guarded(group, self.pattern) for group in groups.values()]
        moved = {a.name: buffer.moved(a) for buffer in buffers for a in buffer.arguments}
        self.kernels.add(kernel)
        self._kernel, self._buffers = kernel, buffers
        try:
            result = run(values | moved)
        finally:
            self._buffers = []
        for buffer in buffers:
            buffer.finish(kernel)
        return result

    def watch(self, access: str, pointers: Any, mask: Any) -> None:
        """Check every unmasked element of one load or store of the interpreter."""
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.atleast_1d(pointers.data)[np.atleast_1d(mask.data).astype(bool)].astype(np.int64)
        self.elements += len(addresses)
        for buffer in self._buffers:
            allowed = buffer.written if access == "stores" else buffer.covered
            offsets = addresses - buffer.room.data_ptr()
            here = (offsets >= 0) & (offsets < len(allowed))
            outside = ~allowed[offsets[here]] | ~allowed[offsets[here] + size - 1]
            if outside.any():
                at = int(offsets[here][outside][0]) - buffer.start
                raise AssertionError(f"{self._kernel} {access} outside of the elements of {buffer.names}, at byte {at}")
            addresses = addresses[~here]
        if len(addresses):
            raise AssertionError(f"{self._kernel} {access} outside of all arguments")


class _CppOperators(TorchDispatchMode):
    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self.guard = guard

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.pmpo_kernels.linear_loss.default:
            with self:  # which calls the operators
                return linear_loss(*args)
        if func.namespace != "pmpo_kernels" or func._overloadname != "cpp":
            return func(*args, **(kwargs or {}))
        names = [argument.name for argument in func._schema.arguments]
        name = func._schema.name.partition("::")[2] + ".cpp"
        return self.guard.call(name, dict(zip(names, args, strict=True)), lambda values: func(*values.values()))


@contextmanager
def guarded(pattern: int, launcher: type) -> Iterator[Guard]:
    """Guard the kernels that start with `launcher.run`, and the C++ operators. Raises AssertionError where one is wrong."""
    guard = Guard(pattern)
    builder = interpreter.InterpreterBuilder
    run, load, store = launcher.run, builder.create_masked_load, builder.create_masked_store

    def guarded_run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        return guard.call(kernel.fn.__name__, values, lambda moved: run(kernel, **moved, grid=grid, warmup=warmup))

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        guard.watch("loads", pointers, mask)
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        guard.watch("stores", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    launcher.run = guarded_run
    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    try:
        with _CppOperators(guard):
            yield guard
    finally:
        launcher.run = run
        builder.create_masked_load, builder.create_masked_store = load, store


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*(x.flatten().view(torch.uint8) for x in (a, b)))
