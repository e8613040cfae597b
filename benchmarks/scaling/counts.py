"""What the loss and its LM head cost: FLOPs, bytes of memory traffic and peak memory of one call on one rank. `network.py` has the
bytes sent, `prediction.py` the times that follow. No time is measured.

Symbols of the formulas: H hidden size, V vocabulary, M tokens of a call on a rank, R ranks of a group, s bytes of an element of
logits, weight and hidden states. A rank of "tp" has V/tp of the vocabulary. Sizes are in elements, tokens, bytes, FLOPs (a
multiply-add is 2) and seconds. Batches are taken as even: trajectories of one length, the same on every rank.

Counts (`products`, `product_bytes`, `pass_bytes`, `memory`, `collectives`) are compared with what runs in tests/test_cost.py; rates
and efficiencies are data sheets' and assumptions. `tables.py` writes the predictions into docs/scaling.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Path = Literal["eager", "logits", "in place", "fused"]

FLOAT32, FLOAT64 = 4, 8  # bytes
ROW_MULTIPLE = 64  # elements to which the fused head rounds its buffer's rows up


@dataclass(frozen=True)
class Head:
    """An LM head: `hidden` size and `vocabulary` in elements, and the bytes of an `element` (2: bfloat16)."""

    hidden: int
    vocabulary: int
    element: int = 2


@dataclass(frozen=True)
class Scheme:
    """How `tp * cp * dp` GPUs share a step, ranks of "tp" next to each other, then those of "cp".

    path: "eager" the loss as people write it (`baseline`), "logits" `pmpo_loss`, "in place" the same with inplace=True, "fused"
        `linear_pmpo_loss` with chunks of at most `chunk` tokens.
    fsdp: the head's weight is gathered for every call and its gradient reduce-scattered after it, over cp and dp; otherwise every
        rank keeps its part of the vocabulary, and an optimizer sharded over cp and dp does both once a step.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    path: Path = "fused"
    fsdp: bool = True
    chunk: int = 16_384

    @property
    def gpus(self) -> int:
        return self.tp * self.cp * self.dp


@dataclass(frozen=True)
class Call:
    """A call of the loss on one rank: the tokens of its part, masked ones too, and the trajectories that are not left out for A =
    0.

    rows are the tokens that enter a product and a read, by default all; gradient_rows those with a gradient, by default `rows`.
    constants tells how many of old_logp, ref_logp, rollout_weights, policy_mask are given, masked whether mask is given, checked
    whether values of arguments are checked (on a CPU always).
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


def part(head: Head, scheme: Scheme) -> float:
    """Number of columns of the logits on a rank, V/tp."""
    return head.vocabulary / scheme.tp


def twice(scheme: Scheme, call: Call) -> bool:
    """Whether the fused head projects again for the gradient, because a trajectory's tokens, or with cp > 1 all of the rank's, are
    more than a chunk."""
    whole = call.entering / (1 if scheme.cp > 1 else max(call.trajectories, 1))
    return scheme.path == "fused" and whole > scheme.chunk


def again(scheme: Scheme, call: Call) -> int:
    """Number of tokens that are projected a second time, which are those with a gradient."""
    return call.returning if twice(scheme, call) else 0


def pieces(scheme: Scheme, call: Call) -> tuple[int, int]:
    """Return how many chunks the fused head projects, and how many of them give a gradient. It is 1 and 1 for a head with all
    logits."""
    if scheme.path != "fused" or not call.entering:
        return 1, 1
    n = 1 if scheme.cp > 1 else call.trajectories
    if twice(scheme, call):
        back = n * math.ceil(call.returning / n / scheme.chunk)
        return n * math.ceil(call.entering / n / scheme.chunk) + back, back
    chunks = math.ceil(n / (scheme.chunk * n // call.entering))  # of whole trajectories
    return chunks, chunks


def largest_chunk(scheme: Scheme, call: Call) -> float:
    """Number of tokens of the fused head's largest chunk. Chunks are as few as possible, of whole trajectories, as even as
    possible."""
    if twice(scheme, call):
        return scheme.chunk
    n = 1 if scheme.cp > 1 else max(call.trajectories, 1)
    return math.ceil(n / pieces(scheme, call)[0]) * call.entering / n


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
    written in float32 by the first chunk of the fused head, read and written by each further one; written in s once by a head with
    all logits, or by the only chunk.
    """
    V, H, s = part(head, scheme), head.hidden, head.element
    forward, back = pieces(scheme, call)
    fused = scheme.path == "fused"
    projected = call.entering + again(scheme, call) if fused else call.tokens
    returned = call.returning if fused else call.tokens
    gradient = V * H * (s if not fused or call.entering <= scheme.chunk else max(2 * back - 1, 0) * max(s, FLOAT32))
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
    2 s; in place, s. fused, M H s, the weight's gradient, summed up in float32 but for a single chunk's, and the larger of a
    chunk's logits and that gradient's copy in s. The backward pass scales in place, where it frees the graph.
    """
    V, H, s, M = part(head, scheme), head.hidden, head.element, call.tokens
    if scheme.path == "fused":
        stride = math.ceil(V / ROW_MULTIPLE) * ROW_MULTIPLE
        summed = s if call.entering <= scheme.chunk else max(s, FLOAT32)
        copy = 0 if summed == s else s
        return M * H * s + V * H * summed + max(largest_chunk(scheme, call) * stride * s, V * H * copy)
    units = {"eager": s + (3 if s >= FLOAT32 else 4) * FLOAT32, "logits": 2 * s, "in place": s}[scheme.path]
    return max(M * V * units, s * (M * V + V * H + M * H))
