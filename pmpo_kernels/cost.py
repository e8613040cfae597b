"""What the loss and its LM head cost: FLOPs, bytes of memory, bytes sent, and from them predicted times. No time is measured.

Symbols of the formulas: H hidden size, V vocabulary, M tokens of a call on a rank, R ranks of a group, s bytes of an element of
logits, weight and hidden states. A rank of "tp" has V/tp of the vocabulary. Sizes are in elements, tokens, bytes, FLOPs (a
multiply-add is 2) and seconds. Batches are taken as even: trajectories of one length, the same on every rank.

Counts (`products`, `product_bytes`, `pass_bytes`, `memory`, `collectives`) are compared with what runs in tests/test_cost.py; rates
and efficiencies are data sheets' and assumptions. docs/scaling.md has the predictions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Path = Literal["eager", "logits", "in place", "fused"]
Operation = Literal["all_gather", "all_reduce", "reduce_scatter"]

FLOAT32, FLOAT64 = 4, 8  # bytes
AGREEMENT_BYTES = 16 * 8 + 1024  # what a rank says of its arguments: 16 numbers and a message
ROW_MULTIPLE = 64  # elements to which the fused head rounds its buffer's rows up


@dataclass(frozen=True)
class Head:
    """hidden and vocabulary in elements; `element` in bytes (2: bfloat16)."""

    hidden: int
    vocabulary: int
    element: int = 2


@dataclass(frozen=True)
class Model:
    """A head and what stands below it, in parameters without embedding and head.

    `active`: that a token passes through. `sharded`: whose weights FSDP gathers; experts that stay where they are do not count.
    """

    name: str
    head: Head
    active: float
    sharded: float


@dataclass(frozen=True)
class Scheme:
    """How `tp * cp * dp` GPUs share a step, ranks of "tp" next to each other, then those of "cp".

    path: "eager" the loss as people write it (`baseline`), "logits" `pmpo_loss`, "in place" the same with inplace=True, "fused"
        `linear_pmpo_loss` with chunks of `chunk` tokens.
    fsdp: the head's weight is gathered for every call and its gradient reduce-scattered after it, over cp and dp; otherwise every
        rank keeps its part of the vocabulary, and an optimizer sharded over cp and dp does both once a step.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    path: Path = "fused"
    fsdp: bool = True
    chunk: int = 4096

    @property
    def gpus(self) -> int:
        return self.tp * self.cp * self.dp


@dataclass(frozen=True)
class Call:
    """A call of the loss on one rank: tokens of its part (masked ones too) and trajectories (those left out for A = 0 not).

    rows: tokens that enter a product and a read, default all; gradient_rows: tokens with a gradient, default `rows`; constants:
    of old_logp, ref_logp, rollout_weights, policy_mask, how many are given; masked: whether mask is; checked: values of arguments
    are checked (on a CPU always).
    """

    tokens: int
    trajectories: int
    rows: int | None = None
    gradient_rows: int | None = None
    constants: int = 1
    masked: bool = True
    checked: bool = False

    @property
    def entering(self) -> int:
        return self.tokens if self.rows is None else self.rows

    @property
    def returning(self) -> int:
        return self.entering if self.gradient_rows is None else self.gradient_rows


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


H100 = Device("H100 SXM", 989e12, 3.35e12, 80e9)
H200 = Device("H200 SXM", 989e12, 4.8e12, 141e9)


def model(name: str, head: Head, total: float, active: float, experts: float = 0) -> Model:
    """From a model card's numbers of parameters, in which embedding and head, H V each, are counted."""
    ends = 2 * head.hidden * head.vocabulary
    return Model(name, head, active - ends, total - experts - ends)


MODELS = (
    model("7B", Head(3584, 152_064), 7.62e9, 7.62e9),
    model("32B", Head(5120, 152_064), 32.5e9, 32.5e9),
    # 94 layers of 128 experts of three matrices 4,096 x 1,536
    model("235B-A22B", Head(4096, 151_936), 235e9, 22e9, 94 * 128 * 3 * 4096 * 1536),
)
"""Qwen2.5-7B, Qwen2.5-32B and Qwen3-235B-A22B, by their configurations and model cards."""


# --- counts of a call ------------------------------------------------------------------------------------------------


def part(head: Head, scheme: Scheme) -> float:
    """V/tp, columns of logits on a rank."""
    return head.vocabulary / scheme.tp


def twice(scheme: Scheme, call: Call) -> bool:
    """Whether the fused head projects again for the gradient: a trajectory's tokens, or with cp > 1 all of the rank's, are more
    than a chunk."""
    whole = call.entering / (1 if scheme.cp > 1 else max(call.trajectories, 1))
    return scheme.path == "fused" and whole > scheme.chunk


def again(scheme: Scheme, call: Call) -> int:
    """Tokens that are projected a second time: those with a gradient."""
    return call.returning if twice(scheme, call) else 0


def pieces(scheme: Scheme, call: Call) -> tuple[int, int]:
    """Chunks of the fused head that are projected, and those that give a gradient; 1 and 1 for a head with all logits."""
    if scheme.path != "fused" or not call.entering:
        return 1, 1
    n = 1 if scheme.cp > 1 else call.trajectories
    if twice(scheme, call):
        back = n * math.ceil(call.returning / n / scheme.chunk)
        return n * math.ceil(call.entering / n / scheme.chunk) + back, back
    chunks = math.ceil(n / (scheme.chunk * n // call.entering))  # of whole trajectories
    return chunks, chunks


def products(head: Head, scheme: Scheme, call: Call) -> float:
    """FLOPs of the head: 2 H V/tp for a token and product, one forward and two backward; with `again` one more.

    The fused head multiplies rows that enter, and back those with a gradient; a head with all logits every token.
    """
    fused = call.entering + again(scheme, call) + 2 * call.returning
    count = fused if scheme.path == "fused" else 3 * call.tokens
    return 2 * head.hidden * part(head, scheme) * count


def product_bytes(head: Head, scheme: Scheme, call: Call) -> float:
    """Bytes of the head's products, each operand read and each result written once.

    Forward: H s and V s a token, V H s a chunk. Backward: 2 V s and 2 H s a token, V H s a chunk, and the weight's gradient:
    read and written in float32 for each chunk of the fused head, written in s once by a head with all logits.
    """
    V, H, s = part(head, scheme), head.hidden, head.element
    forward, back = pieces(scheme, call)
    fused = scheme.path == "fused"
    projected = call.entering + again(scheme, call) if fused else call.tokens
    returned = call.returning if fused else call.tokens
    gradient = back * V * H * 2 * max(s, FLOAT32) if fused else V * H * s
    return s * (projected * (H + V) + returned * 2 * (H + V) + (forward + back) * V * H) + gradient


def eager_bytes(head: Head) -> int:
    """Bytes an element of the logits that eager PyTorch reads and writes (`baseline.eager_token_logp`), of tensors of their size.

    In units of 4: log_softmax 2, exp 2, product 3, sum 1; gather's gradient written 1, log_softmax's gradient 3. Logits of 2
    bytes are copied to float32 (s + 4) and the gradient back (4 + s).
    """
    s = head.element
    return 12 * FLOAT32 + (0 if s >= FLOAT32 else 2 * (s + FLOAT32))


def pass_bytes(head: Head, scheme: Scheme, call: Call) -> float:
    """Bytes of the loss's passes over the logits: V s for each row read forward, read backward, and written backward.

    From logits all rows are written; the fused head reads and writes those with a gradient, and reads rows twice that are
    projected twice. Eager: `eager_bytes` for every element.
    """
    V = part(head, scheme)
    if scheme.path == "eager":
        return call.tokens * V * eager_bytes(head)
    if scheme.path == "fused":
        return V * head.element * (call.entering + again(scheme, call) + 2 * call.returning)
    return V * head.element * (call.entering + call.returning + call.tokens)


def memory(head: Head, scheme: Scheme, call: Call) -> float:
    """Bytes at the peak: logits and what is of their size, and gradients of weight and hidden states; not the weight itself.

    Of a head with all logits the larger of the loss's peak and the head's backward pass, which holds the logits' gradient beside
    s (V H + M H). The loss's, in units of M V: eager, the logits (s) and four float32 tensors (three from 4-byte logits); logits,
    2 s; in place, s. fused, M H s and the largest of: a chunk's logits and the float32 sum of the weight's gradient; that sum
    and its copy in s; while the backward pass scales them, both gradients once more.
    """
    V, H, s, M = part(head, scheme), head.hidden, head.element, call.tokens
    if scheme.path == "fused":
        stride = math.ceil(V / ROW_MULTIPLE) * ROW_MULTIPLE
        summed = max(s, FLOAT32)
        copy = 0 if summed == s else s
        chunk = min(scheme.chunk, call.entering) * stride * s
        return M * H * s + max(chunk + V * H * summed, V * H * (summed + copy), 2 * V * H * s + M * H * s)
    units = {"eager": s + (3 if s >= FLOAT32 else 4) * FLOAT32, "logits": 2 * s, "in place": s}[scheme.path]
    return max(M * V * units, s * (M * V + V * H + M * H))


# --- collectives -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collective:
    """`count` of an operation among `ranks` that are `stride` GPUs apart.

    payload: bytes of what this rank passes to one: its part of a gather, the whole tensor of a reduction. host: over the hosts'
    network.
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
    """What the ranks of a group say of their arguments, before anything else; once more where token ids are checked."""
    return Collective(
        "agreement", "all_gather", ranks, stride, AGREEMENT_BYTES, 1 + call.checked * (ranks > 1), host=True
    )


def collectives(head: Head, scheme: Scheme, call: Call) -> list[Collective]:
    """Of one call, those of groups of one rank left out.

    tp: 4 float32 numbers a projected token, one gather a chunk; backward from the fused head the sum of dhidden, M H s. cp: a key,
    logp, entropy and the constants, float64, of every token. dp: one number. The fused head besides: for tp the smallest chunk
    (between hosts) and whether the gradient is finite, for cp twice the lengths of the trajectories. From logits the sum of dhidden
    over tp is the trainer's: `trainer_collectives`.
    """
    fused, forward = scheme.path == "fused", pieces(scheme, call)[0]
    tp, cp, dp = ((scheme.tp, 1), (scheme.cp, scheme.tp), (scheme.dp, scheme.tp * scheme.cp))
    found = [agreement(*group, call) for group in (tp, cp, dp)]
    projected = call.entering + again(scheme, call) if fused else call.tokens
    found.append(Collective("log-sum-exp", "all_gather", *tp, 4 * FLOAT32 * projected / forward, forward))
    if fused:
        found.append(Collective("dhidden", "all_reduce", *tp, call.tokens * head.hidden * head.element))
        found.append(Collective("chunk", "all_reduce", *tp, 8, host=True))
        found.append(Collective("finite", "all_reduce", *tp, 4))
        found.append(Collective("lengths", "all_reduce", *cp, 8 * call.trajectories, 2))
    numbers = 3 + call.constants + (call.masked or fused)  # the fused head always has a mask
    found.append(Collective("tokens", "all_gather", *cp, FLOAT64 * numbers * call.tokens))
    found.append(Collective("denominator", "all_reduce", *dp, FLOAT64))
    return [c for c in found if c.ranks > 1]


def weight_collectives(
    scheme: Scheme, parameters: float, element: int, rounds: int, gathers: int = 1
) -> list[Collective]:
    """The trainer's, of weights of so many parameters: over cp and dp, `rounds` times a step.

    `gathers` of the weight in s bytes (of the head one: it is kept until its gradient is there; of the layers below two), one
    reduce-scatter of its gradient in float32.
    """
    R, n = scheme.cp * scheme.dp, parameters / scheme.tp
    if R == 1:
        return []
    return [
        Collective("weight", "all_gather", R, scheme.tp, n * element / R, gathers * rounds),
        Collective("dweight", "reduce_scatter", R, scheme.tp, n * FLOAT32, rounds),
    ]


def trainer_collectives(head: Head, scheme: Scheme, call: Call) -> list[Collective]:
    """From logits of a column-parallel head: the sum of dhidden over tp, M H s a call."""
    if scheme.path == "fused" or scheme.tp == 1:
        return []
    return [Collective("dhidden", "all_reduce", scheme.tp, 1, call.tokens * head.hidden * head.element)]


# --- times of a step -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """A step on one GPU. Bytes, FLOPs and seconds of all its calls; `peak` bytes of one."""

    tokens: float  # of the batch, over GPUs
    calls: int
    flops: float
    moved: float  # bytes of memory, products and passes
    sent: float  # by the loss's collectives, bytes between GPUs
    weight_sent: float  # by those of the head's weight
    peak: float
    products: float  # seconds, and so the rest
    passes: float
    exchange: float
    weight: float
    below: float  # of the layers below
    agreement: float  # of the "dp" ranks, once a step by `distributed.denominator`: not in `head`

    @property
    def head(self) -> float:
        """Seconds of head and loss. Kernels and the loss's collectives wait for each other: a sum. The weight's collectives run
        beside products; every layer can hide about as much as its own products take, hence the larger of the two."""
        return max(self.products + self.passes + self.exchange, self.weight)

    @property
    def weight_bound(self) -> bool:
        """Whether the weight's collectives are the larger."""
        return self.head == self.weight

    @property
    def share(self) -> float:
        """Of a training step: forward and backward, without rollouts and optimizer."""
        return self.head / (self.head + self.below)

    @property
    def loss_share(self) -> float:
        """Of the loss alone: passes and exchange."""
        return (self.passes + self.exchange) / (self.head + self.below)


def predict(
    model: Model, scheme: Scheme, device: Device, tokens: float, call_tokens: int = 16_384, length: int = 4096
) -> Prediction:
    """A step of `tokens` response tokens with trajectories of `length`, in calls of at most `call_tokens` tokens a GPU (a group of
    "tp" shares a call of tp times as many).

    A product takes the longer of its FLOPs and its bytes, because they overlap within a kernel. The layers below: 6 FLOPs
    (2 forward, 4 backward) a token and active parameter, without attention's and recomputed ones, or the collectives of their
    weights if these take longer; so the head's share is an upper bound. D of the batch is taken once a step
    (`distributed.denominator`), and the calls know nothing of "dp".
    """
    head, a_group = model.head, tokens / (scheme.cp * scheme.dp)
    calls = math.ceil(a_group / (call_tokens * scheme.tp))
    M = math.ceil(a_group / calls)
    call = Call(M, math.ceil(M * scheme.cp / length))
    of_call = [c for c in collectives(head, scheme, call) if c.stride < scheme.tp * scheme.cp]
    of_call += trainer_collectives(head, scheme, call)
    rounds = calls if scheme.fsdp else 1
    weight = weight_collectives(scheme, head.hidden * head.vocabulary, head.element, rounds)
    below = weight_collectives(scheme, model.sharded, head.element, rounds, gathers=2 if scheme.fsdp else 1)
    flops, moved = products(head, scheme, call), product_bytes(head, scheme, call)
    passes, bandwidth = pass_bytes(head, scheme, call), device.bandwidth * device.of_bandwidth

    def seconds(found: list[Collective]) -> float:
        return sum(c.seconds(device) for c in found)

    return Prediction(
        tokens / scheme.gpus,
        calls,
        calls * flops,
        calls * (moved + passes),
        calls * sum(c.sent for c in of_call if not c.host),
        sum(c.sent for c in weight),
        memory(head, scheme, call),
        calls * max(flops / (device.flops * device.of_flops), moved / bandwidth),
        calls * passes / bandwidth,
        calls * seconds(of_call),
        seconds(weight),
        max(6 * model.active * tokens / scheme.gpus / (device.flops * device.of_flops_below), seconds(below)),
        agreement(scheme.dp, scheme.tp * scheme.cp, call).seconds(device),
    )
