"""The same losses by TRL, verl and Liger, called as installed: do they agree with ours, in loss and gradient?

`trl`, `verl` and `liger` list the cases of the package they are named after and import it; only `find_peers` imports them.
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
