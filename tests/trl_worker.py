"""One of two ranks: the gradients of its half of a batch in `PMPOTrainer`, under DDP or FSDP2; run by tests/test_trl.py.

python -m torch.distributed.run ... tests/trl_worker.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from test_trl import B, batch, ours
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

WRAPPINGS = ("ddp", "fsdp", "fsdp_head", "fsdp_bf16")
CASES = [(wrapping, preset) for wrapping in WRAPPINGS for preset in ("pmpo", "dapo")]


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def gradients(wrapping: str, preset: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the gradients, averaged over the ranks, and the metrics."""
    made = ours(folder, preset=preset, per_device_train_batch_size=B // 2)
    rank = int(os.environ["RANK"])
    inputs = batch(made)
    inputs = {n: x if x.dim() == 0 else x[rank * B // 2 : (rank + 1) * B // 2] for n, x in inputs.items()}
    if wrapping == "ddp":
        model = made.accelerator.prepare_model(made.model)
    else:
        model = made.model
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if wrapping == "fsdp_bf16" else None)
        for layer in [*model.model.layers, *([model.lm_head] if wrapping == "fsdp_head" else [])]:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    made._compute_loss(model, inputs).backward()
    found = {name: whole(p.grad) for name, p in made.model.named_parameters()}
    return found, {name: values[-1] for name, values in made._metrics["train"].items()}


def main(folder: Path) -> None:
    """Run the worker. Rank 0 saves its results."""
    torch.set_num_threads(1)
    results = {f"{wrapping}, {preset}": gradients(wrapping, preset, folder) for wrapping, preset in CASES}
    if int(os.environ["RANK"]) == 0:
        torch.save(results, folder / "gradients.pt")
    torch.distributed.barrier()  # a connection must not close under another
    sys.stdout.flush()
    os._exit(0)  # all is saved; now and then a process aborts while PyTorch and the interpreter take their threads down


if __name__ == "__main__":
    main(Path(sys.argv[1]))
