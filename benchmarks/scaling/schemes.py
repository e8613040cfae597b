"""What the predictions are made for: tokens, calls and schemes; a step under one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from counts import Head, Scheme
from network import Device
from prediction import H100, Model, Prediction, predict

ROOT = Path(__file__).parents[2]

TOKENS, GPUS = (10**6, 10**7, 10**8), (8, 64, 512, 4096)
CALL, LENGTH = 16_384, 4_096  # tokens a GPU and call, and of a trajectory
SMALLER_CHUNK = 4_096  # tokens, where less memory is free
QUARTER = H100.memory / 4
# Qwen2.5-0.5B, 1.5B and 3B, parameters without embeddings by their model cards
SMALLER = [
    Model(name, Head(hidden, 151_936), below, below)
    for name, hidden, below in (("0.5B", 896, 0.36e9), ("1.5B", 1536, 1.31e9), ("3B", 2048, 2.77e9))
]
SCHEMES: dict[str, Callable[[int], Scheme]] = {
    "eager, FSDP": lambda n: Scheme(dp=n, path="eager"),
    "`pmpo_loss`, FSDP": lambda n: Scheme(dp=n, path="logits"),
    "fused, FSDP": lambda n: Scheme(dp=n),
    "`pmpo_loss`, tp 8": lambda n: Scheme(tp=8, dp=n // 8, path="logits", fsdp=False),
    "fused, tp 8": lambda n: Scheme(tp=8, dp=n // 8, fsdp=False),
    "fused, cp 8, FSDP": lambda n: Scheme(cp=8, dp=n // 8),
    "the same, 4,096 a chunk": lambda n: Scheme(cp=8, dp=n // 8, chunk=SMALLER_CHUNK),
}
MEMORY_OF = {
    "eager": Scheme(path="eager"),
    "`pmpo_loss`": Scheme(path="logits"),
    "in place": Scheme(path="in place"),
    "in place, tp 8": Scheme(tp=8, path="in place"),
    "fused": Scheme(),
    "fused, 4,096 a chunk": Scheme(chunk=SMALLER_CHUNK),
    "fused, tp 8": Scheme(tp=8),
}


def step(model: Model, name: str, tokens: float, gpus: int, device: Device = H100) -> Prediction:
    return predict(model, SCHEMES[name](gpus), device, tokens, CALL, LENGTH)


def break_even(model: Model, scheme: Scheme, device: Device = H100) -> int:
    """Tokens a GPU and call below which the weight's collectives take longer than head and loss."""
    low, high = 1, 1 << 24
    while high - low > 1:
        middle = (low + high) // 2
        found = predict(model, scheme, device, middle * scheme.gpus, call_tokens=1 << 25, length=LENGTH)
        low, high = (middle, high) if found.weight_bound else (low, middle)
    return high
