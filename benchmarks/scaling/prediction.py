"""Models, devices, and the time of a step as predicted from the counts. No time is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from counts import Call, Head, Scheme, memory, pass_bytes, product_bytes, products
from network import (
    Collective,
    Device,
    agreement,
    collectives,
    trainer_collectives,
    weight_collectives,
)


@dataclass(frozen=True)
class Model:
    """A head and what stands below it, in parameters without embedding and head.

    `active` parameters are those that a token passes through. `sharded` ones are those whose weights FSDP gathers; experts that
    stay where they are do not count.
    """

    name: str
    head: Head
    active: float
    sharded: float


H100 = Device("H100 SXM", 989e12, 3.35e12, 80e9)
H200 = Device("H200 SXM", 989e12, 4.8e12, 141e9)


def model(name: str, head: Head, total: float, active: float, experts: float = 0) -> Model:
    """Make a model from its card's numbers of parameters, in which embedding and head, H V each, are counted."""
    ends = 2 * head.hidden * head.vocabulary
    return Model(name, head, active - ends, total - experts - ends)


MODELS = (
    model("7B", Head(3584, 152_064), 7.62e9, 7.62e9),
    model("32B", Head(5120, 152_064), 32.5e9, 32.5e9),
    # 94 layers of 128 experts of three matrices 4,096 x 1,536
    model("235B-A22B", Head(4096, 151_936), 235e9, 22e9, 94 * 128 * 3 * 4096 * 1536),
)
"""Qwen2.5-7B, Qwen2.5-32B and Qwen3-235B-A22B, by their configurations and model cards."""


@dataclass(frozen=True)
class Prediction:
    """A step on one GPU: bytes, FLOPs and seconds of all its calls, and `peak`, the bytes of one call."""

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
        """Seconds of head and loss. Kernels and the loss's collectives wait for each other, so they add up. The weight's
        collectives run beside products, and every layer can hide about as much as its own products take, so the larger of the two
        counts."""
        return max(self.products + self.passes + self.exchange, self.weight)

    @property
    def weight_bound(self) -> bool:
        """Whether the weight's collectives take longer than what they run beside."""
        return self.head == self.weight

    @property
    def share(self) -> float:
        """Share of head and loss in a training step: forward and backward, without rollouts and optimizer."""
        return self.head / (self.head + self.below)

    @property
    def loss_share(self) -> float:
        """Share of the loss alone, its passes and its exchange."""
        return (self.passes + self.exchange) / (self.head + self.below)


def predict(
    model: Model, scheme: Scheme, device: Device, tokens: float, call_tokens: int = 16_384, length: int = 4096
) -> Prediction:
    """Predict a step of `tokens` response tokens with trajectories of `length`, in calls of at most `call_tokens` tokens a GPU (a
    group of "tp" shares a call of tp times as many).

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
