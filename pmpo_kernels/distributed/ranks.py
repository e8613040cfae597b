"""The ranks that share a call: their groups, the collectives, and the check that they all pass the same arguments.

The check comes before any other collective, so that a wrong call raises on all ranks instead of leaving some to wait.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from pmpo_kernels import checks
from pmpo_kernels.sharing import Split

MESSAGE_BYTES = 1024
_HOST_GROUPS: WeakKeyDictionary[ProcessGroup, ProcessGroup] = WeakKeyDictionary()


class Ranks(NamedTuple):
    """The groups that this rank is in, None or empty where it is in none. The ranks of `vocabulary` share their tokens, those of
    `sequence` their trajectories, those of `data` groups the batch."""

    vocabulary: ProcessGroup | None = None
    sequence: ProcessGroup | None = None
    data: tuple[ProcessGroup, ...] = ()
    split: Split = "contiguous"

    def groups(self) -> list[ProcessGroup]:
        return [group for group in (self.vocabulary, self.sequence, *self.data) if group is not None]


ALONE = Ranks()


def find_ranks(group: ProcessGroup | None, mesh: DeviceMesh | None, sequence_split: Split) -> Ranks:
    """Return the groups that the arguments of a call name. An error here is not told to the other ranks, which are not known yet.

    Raises:
        TypeError, ValueError: group and mesh are both given, or a wrong one; a dimension of the mesh without a meaning.
    """
    if group is not None and mesh is not None:
        raise ValueError("mesh: expected None when group is given, got both")
    if group is None and mesh is None:
        return ALONE
    if group is not None:
        if not isinstance(group, ProcessGroup):
            raise TypeError(f"group: expected a torch.distributed.ProcessGroup, got {type(group).__name__}")
        return Ranks(vocabulary=group, split=sequence_split)
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: expected a torch.distributed.device_mesh.DeviceMesh, got {type(mesh).__name__}")
    names = mesh.mesh_dim_names or ()
    several = {"tp", "cp"}  # a flattened dimension such as "dp_cp" is more than one
    meant = [n for n in names if n in ("tp", "cp", "dp") or (n.startswith("dp_") and not several & set(n.split("_")))]
    if not names or len(meant) < len(names):
        raise ValueError(f'mesh: expected dimensions "tp", "cp", "dp" or "dp_...", got {names or None}')
    found = {name: mesh.get_group(name) for name in names}
    data = tuple(group for name, group in found.items() if name.startswith("dp"))
    return Ranks(found.get("tp"), found.get("cp"), data, sequence_split)


def size(group: ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


@contextlib.contextmanager
def taking_part(what: str, group: ProcessGroup) -> Iterator[None]:
    """Run a collective as the block; where it fails, raise an error that says that another rank has ended or is late."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        ranks = dist.get_process_group_ranks(group)
        raise RuntimeError(
            f"pmpo_kernels: expected all of ranks {ranks} in {what}, got a failure on rank {dist.get_rank()}; another rank has "
            f"ended, or did not come within the group's timeout: {error}"
        ) from error


def all_gather(x: Tensor, group: ProcessGroup, what: str) -> Tensor:
    """Return x of all R ranks in their order, (R, *x.shape). `what` names the collective in an error."""
    out = x.new_empty(size(group), *x.shape)
    with taking_part(what, group):
        dist.all_gather(list(out.unbind()), x.contiguous(), group=group)
    return out


def all_reduce(x: Tensor, group: ProcessGroup, what: str, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce x in place over the ranks and return it."""
    with taking_part(what, group):
        dist.all_reduce(x, op=op, group=group)
    return x


def host_group(group: ProcessGroup) -> ProcessGroup:
    """Return a gloo group of the same ranks with the same timeout. What they exchange there waits for no GPU."""
    if "gloo" in dist.get_backend(group):
        return group
    if group not in _HOST_GROUPS:
        ranks, timeout = dist.get_process_group_ranks(group), timeout_of(group)
        with taking_part("the making of a group of hosts", group):
            _HOST_GROUPS[group] = dist.new_group(ranks, backend="gloo", timeout=timeout, use_local_synchronization=True)
    return _HOST_GROUPS[group]


def timeout_of(group: ProcessGroup) -> timedelta | None:
    """Timeout of a group's collectives, or None (PyTorch's default) where the group does not tell."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if options is not None:
            return options._timeout  # type: ignore[no-any-return]
    return None


def fingerprint(*tensors: Tensor | None, mask: Tensor | None = None) -> int:
    """A checksum of the tensors' values, by which ranks compare them; 0 where values are not checked (`checks_values`). Where a
    tensor has as many elements as the mask, those outside it do not count."""
    crc = 0
    for x in tensors:
        if x is not None and checks.checks_values(x):
            x = x.detach().reshape(-1)
            x = x if mask is None or mask.numel() != x.numel() else torch.where(mask.reshape(-1), x, 0)
            # a copy, because contiguous() of one element may keep any stride
            in_a_row = x.cpu().clone(memory_format=torch.contiguous_format)
            crc = zlib.crc32(in_a_row.view(torch.uint8).numpy().tobytes(), crc)
    return crc


def mark(*settings: object) -> int:
    """A checksum of plain values, by which ranks compare them."""
    return zlib.crc32(repr(settings).encode())


@dataclass
class Agreement:
    """What this rank tells the others about its call, as numbers by name, and what it learns from them in the exchange."""

    same_tokens: dict[str, int] = field(default_factory=dict)  # equal on the ranks that split a vocabulary
    same_trajectories: dict[str, int] = field(default_factory=dict)  # equal on those that split trajectories
    same_batch: dict[str, int] = field(default_factory=dict)  # equal on those that split the batch
    V: int = 0  # columns of this rank's part of the vocabulary
    N: int = 0  # tokens of this rank's part, masked ones too
    vocabularies: list[int] = field(default_factory=list)  # V of all ranks of `vocabulary`, once exchanged
    tokens: list[int] = field(default_factory=list)  # N of all ranks of `sequence`, once exchanged


@contextlib.contextmanager
def agreement(ranks: Ranks) -> Iterator[Agreement]:
    """Run the checks of a call as the block. An error on one rank is raised on all of them at its end, instead of a hang later.

    Raises:
        RuntimeError: another rank's check failed, with its number and message; or ranks that must hold the same hold different
            things.
    """
    mine = Agreement()
    error: Exception | None = None
    try:
        yield mine
    except Exception as raised:  # told to the others, then raised
        error = raised
    told = "" if error is None else f"rank {dist.get_rank() if ranks.groups() else 0}: {type(error).__name__}: {error}"
    for group in ranks.groups():
        same = mine.same_batch
        if group is ranks.vocabulary:
            same = mine.same_tokens
        elif group is ranks.sequence:
            same = mine.same_trajectories
        numbers, messages = exchange([mine.V, mine.N, *same.values()], told, group)
        failed = [message for message in messages if message]
        if failed and not told:
            told = failed[0]
        elif not failed:
            for i, name in enumerate(same):
                values = [row[2 + i] for row in numbers]
                if len(set(values)) > 1:
                    told = f"{name}: expected the same on ranks {dist.get_process_group_ranks(group)}, got {values}"
                    break
            if group is ranks.vocabulary:
                mine.vocabularies = [row[0] for row in numbers]
            if group is ranks.sequence:
                mine.tokens = [row[1] for row in numbers]
    if error is not None:
        raise error
    if told:
        raise RuntimeError(told)


def exchange(numbers: Sequence[int], message: str, group: ProcessGroup) -> tuple[list[list[int]], list[str]]:
    """Return numbers and message of every rank of the group, in their order. A rank with a message, whose checks failed, may pass
    fewer numbers; the missing ones are 0."""
    text = message.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
    room = [*numbers, *[0] * (16 - len(numbers))]
    words = struct.unpack(f"<{MESSAGE_BYTES // 8}q", text)
    parts = torch.tensor([*room, *words], dtype=torch.int64, device="cpu")
    every = all_gather(parts, host_group(group), "the agreement on the arguments")
    texts = [
        struct.pack(f"<{MESSAGE_BYTES // 8}q", *row[16:].tolist()).rstrip(b"\0").decode(errors="replace")
        for row in every
    ]
    return every[:, :16].tolist(), texts
