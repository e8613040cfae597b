"""The collectives of a call and of its trainer: their number, their bytes, and their time on a network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from counts import FLOAT32, FLOAT64, Call, Head, Scheme, again, pieces

Operation = Literal["all_gather", "all_reduce", "reduce_scatter"]

AGREEMENT_BYTES = 16 * 8 + 1024  # what a rank says of its arguments: 16 numbers and a message


@dataclass(frozen=True)
class Device:
    """A GPU and its network by their data sheets, and the assumed shares of them that are reached.

    flops: dense FLOP/s in bfloat16; bandwidth: bytes/s of memory; memory: bytes; intra, inter: bytes/s a GPU sends within a node of
    `node` GPUs and beyond it; latency: seconds a step of a collective of log2(R) steps; host_latency: seconds a step of an
    exchange of R - 1 steps between hosts.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    intra: float = 450e9
    inter: float = 50e9
    node: int = 8
    of_flops: float = 0.6
    of_flops_below: float = 0.4
    of_bandwidth: float = 0.83
    of_link: float = 0.8
    latency: float = 10e-6
    host_latency: float = 50e-6

    def link(self, ranks: int, stride: int) -> float:
        """Bytes/s of a ring through ranks that are `stride` GPUs apart: within a node `intra`; over several, each of the node's
        members brings its own card, and the ring uses all of them, at most `intra`."""
        members = max(1, self.node // stride)
        return self.of_link * (self.intra if ranks <= members else min(self.intra, members * self.inter))


@dataclass(frozen=True)
class Collective:
    """An operation that runs `count` times among `ranks` that are `stride` GPUs apart.

    payload is the bytes that this rank passes to one such operation: its part of a gather, the whole tensor of a reduction. host
    says that it runs over the hosts' network.
    """

    what: str
    operation: Operation
    ranks: int
    stride: int
    payload: float
    count: int = 1
    host: bool = False

    @property
    def sent(self) -> float:
        """Bytes a rank sends in a ring: a gather R - 1 times its part; a reduction to parts (R - 1)/R of the tensor; a
        reduction for all twice that."""
        R = self.ranks
        factor = {"all_gather": R - 1, "reduce_scatter": (R - 1) / R, "all_reduce": 2 * (R - 1) / R}
        return self.count * self.payload * factor[self.operation]

    def seconds(self, device: Device) -> float:
        """Latency and bytes, one after the other. Between hosts: latency alone, R - 1 steps of a ring."""
        if self.ranks == 1:
            return 0.0
        if self.host:
            return self.count * (self.ranks - 1) * device.host_latency
        steps = self.count * math.ceil(math.log2(self.ranks))
        return steps * device.latency + self.sent / device.link(self.ranks, self.stride)


def agreement(ranks: int, stride: int, call: Call) -> Collective:
    """Return the exchange in which the ranks of a group agree on their arguments, before anything else, and once more where token
    ids are checked."""
    return Collective(
        "agreement", "all_gather", ranks, stride, AGREEMENT_BYTES, 1 + call.checked * (ranks > 1), host=True
    )


def collectives(head: Head, scheme: Scheme, call: Call) -> list[Collective]:
    """Return the collectives of one call, without those of groups of one rank.

    tp: 4 float32 numbers a projected token, one gather a chunk; backward from the fused head the sum of dhidden, M H s. cp: a key,
    logp, entropy and the constants, float64, of every token. dp: one number. The fused head besides: for tp the smallest chunk
    (between hosts), for cp twice the lengths of the trajectories, for both whether the gradient is finite. From logits the sum of
    dhidden over tp is the trainer's: `trainer_collectives`.
    """
    fused, forward = scheme.path == "fused", pieces(scheme, call)[0]
    tp, cp, dp = ((scheme.tp, 1), (scheme.cp, scheme.tp), (scheme.dp, scheme.tp * scheme.cp))
    found = [agreement(*group, call) for group in (tp, cp, dp)]
    projected = call.entering + again(scheme, call) if fused else call.tokens
    found.append(Collective("log-sum-exp", "all_gather", *tp, 4 * FLOAT32 * projected / forward, forward))
    if fused:
        found.append(Collective("dhidden", "all_reduce", *tp, call.tokens * head.hidden * head.element))
        found.append(Collective("chunk", "all_reduce", *tp, 8, host=True))
        found += [Collective("finite", "all_reduce", *group, 4) for group in (tp, cp)]
        found.append(Collective("lengths", "all_reduce", *cp, 8 * call.trajectories, 2))
    numbers = 3 + call.constants + (call.masked or fused)  # the fused head always has a mask
    found.append(Collective("tokens", "all_gather", *cp, FLOAT64 * numbers * call.tokens))
    found.append(Collective("denominator", "all_reduce", *dp, FLOAT64))
    return [c for c in found if c.ranks > 1]


def weight_collectives(
    scheme: Scheme, parameters: float, element: int, rounds: int, gathers: int = 1
) -> list[Collective]:
    """Return the trainer's collectives for weights of so many parameters, over cp and dp, `rounds` times a step.

    They are `gathers` of the weight in s bytes, and one reduce-scatter of its gradient in float32. The head needs one gather,
    because its weight is kept until its gradient is there; the layers below need two.
    """
    R, n = scheme.cp * scheme.dp, parameters / scheme.tp
    if R == 1:
        return []
    return [
        Collective("weight", "all_gather", R, scheme.tp, n * element / R, gathers * rounds),
        Collective("dweight", "reduce_scatter", R, scheme.tp, n * FLOAT32, rounds),
    ]


def trainer_collectives(head: Head, scheme: Scheme, call: Call) -> list[Collective]:
    """Return the trainer's collective for logits of a column-parallel head: the sum of dhidden over tp, M H s a call."""
    if scheme.path == "fused" or scheme.tp == 1:
        return []
    return [Collective("dhidden", "all_reduce", scheme.tp, 1, call.tokens * head.hidden * head.element)]
