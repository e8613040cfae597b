"""Whether TRL, verl and Liger, called as installed, agree with the losses here, in loss and gradient.

`trl`, `verl` and `liger` import the package they are named after and list its cases. Only `find_peers` imports them.
"""

from __future__ import annotations

from pmpo_kernels.parity.batch import Batch, make_batch
from pmpo_kernels.parity.cases import TOLERANCE, Agreement, ParityCase, compare, evaluate
from pmpo_kernels.parity.peers import PEERS, Peer, find_peers

__all__ = [
    "PEERS",
    "TOLERANCE",
    "Agreement",
    "Batch",
    "ParityCase",
    "Peer",
    "compare",
    "evaluate",
    "find_peers",
    "make_batch",
]
