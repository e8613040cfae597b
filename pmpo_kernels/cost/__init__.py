"""What the loss and its LM head cost: FLOPs, bytes of memory, bytes sent, and from them predicted times. No time is measured.

Symbols of the formulas: H hidden size, V vocabulary, M tokens of a call on a rank, R ranks of a group, s bytes of an element of
logits, weight and hidden states. A rank of "tp" has V/tp of the vocabulary. Sizes are in elements, tokens, bytes, FLOPs (a
multiply-add is 2) and seconds. Batches are taken as even: trajectories of one length, the same on every rank.

Counts (`products`, `product_bytes`, `pass_bytes`, `memory`, `collectives`) are compared with what runs in tests/test_cost.py; rates
and efficiencies are data sheets' and assumptions. docs/scaling.md has the predictions.
"""

from pmpo_kernels.cost.counts import Call, Head, Scheme, eager_bytes, memory, pass_bytes, product_bytes, products
from pmpo_kernels.cost.network import Collective, Device, collectives, trainer_collectives, weight_collectives
from pmpo_kernels.cost.prediction import H100, H200, MODELS, Model, Prediction, predict

__all__ = [
    "H100",
    "H200",
    "MODELS",
    "Call",
    "Collective",
    "Device",
    "Head",
    "Model",
    "Prediction",
    "Scheme",
    "collectives",
    "eager_bytes",
    "memory",
    "pass_bytes",
    "predict",
    "product_bytes",
    "products",
    "trainer_collectives",
    "weight_collectives",
]
