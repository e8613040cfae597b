"""`find_peers`: which peers can be called here, and why the others cannot."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import NamedTuple

import torch

from pmpo_kernels.impls import interpreted
from pmpo_kernels.parity.cases import ParityCase

PEERS = {"trl": "trl", "verl": "verl", "liger": "liger-kernel"}  # module of this package: distribution


class Peer(NamedTuple):
    """A peer as installed: its distribution, version, cases, the device they run on, and the problem if it cannot be called. Then
    version and device are "", and there are no cases; otherwise `problem` is ""."""

    distribution: str
    version: str
    cases: list[ParityCase]
    device: str
    problem: str


def find_peers() -> dict[str, Peer]:
    """Return a `Peer` for every name in `PEERS`. Importing the installed ones takes seconds; a failure becomes the `problem`."""
    found = {}
    for name, distribution in PEERS.items():
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = Peer(distribution, "", [], "", f"not installed (pip install {distribution})")
            continue
        try:
            cases = importlib.import_module(f"pmpo_kernels.parity.{name}").cases()
        except Exception as error:  # of another package; told, with the reason
            found[name] = Peer(distribution, "", [], "", f"{distribution} {version}: {type(error).__name__}: {error}")
            continue
        on_gpu = name == "liger" and torch.cuda.is_available() and not interpreted()
        found[name] = Peer(distribution, version, cases, "cuda" if on_gpu else "cpu", "")
    return found
