"""Call the Triton stages on CPU tensors of many shapes with launching replaced by a count of what would be compiled.

Prints {kernel: number of compiled variants} as JSON after a first round of shapes and after all. It is a program of its own,
because kernels that were imported under the interpreter are not compiled at all. No GPU is needed.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from itertools import product
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from pmpo_kernels import LossConfig
from pmpo_kernels import triton as stages
from pmpo_kernels.batch import Batch

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
variants: dict[str, set[str]] = defaultdict(set)


def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Stand in for `JITFunction.run` and record the specialisation that it would look up in its cache."""
    assert all(0 < size < 2**31 for size in grid)
    _, specialization, options = create_function_from_signature(kernel.signature, kernel.params, BACKEND)(
        *args, **kwargs
    )
    variants[kernel.fn.__name__].add(str((specialization, options)))


def step(B: int, T: int, V: int, config: LossConfig, optional: bool) -> None:
    """Call the stages as a training step does, forward and backward."""
    N = B * T
    logits = torch.empty(B + 1, T + B % 2, V, dtype=torch.bfloat16)[T % 2 :][:B]  # slices, aligned or not if V is odd
    ids = torch.zeros(B, T, dtype=torch.int64)
    mask = torch.ones(B, T, dtype=torch.bool) if optional else None
    logp, row_max, row_sum, entropy = stages.token_logp(logits, ids, mask, config.temperature)
    # slices of a batch, whose storage is aligned or not
    flat = torch.zeros(2 * N + 1)[N % 4 :][:N]
    options = config.trajectory_options(has_power=optional, has_target_ess=False)
    batch = Batch(torch.zeros(B), torch.arange(B + 1) * T)
    if mask is not None:
        tokens = {"old_logp": flat, "ref_logp": flat, "rollout_weights": flat}
        tokens |= {"mask": mask.flatten(), "policy_mask": mask.flatten()}
        batch = batch._replace(**tokens, power=torch.zeros(B))
    _, _, stats = stages.trajectory(logp.flatten(), entropy.flatten(), batch, options)
    D, skipped = (stats.new_ones(()), flat[:B] == 0) if optional else (None, None)
    stages.aggregate(stats, D, D, skipped, config.aggregate_options(), torch.float32)
    stages.scale_(torch.zeros(N), flat[:1])  # a view of several factors begins anywhere
    stages.dlogits(logits, ids, mask, row_max, row_sum, entropy, flat.view(B, T), None, config.temperature)


def counts() -> dict[str, int]:
    return {name: len(found) for name, found in sorted(variants.items())}


def main() -> None:
    JITFunction.run = record  # type: ignore[method-assign]
    for V in (1024, 1001):  # rows that are aligned, and rows that are not
        step(4, 8, V, LossConfig.pmpo(), optional=True)
        step(300, 1, 9 * V, LossConfig.pmpo(), optional=False)
        step(1, 1, 9 * V, LossConfig.pmpo(), optional=False)
        for vocab, T in product(
            (V, 9 * V), (16, 17)
        ):  # T odd takes a slice: if V is odd the gradient does not lie like it
            step(2, T, vocab, LossConfig.pmpo(), optional=False)
    first = counts()
    configs = (
        LossConfig.grpo(),
        LossConfig.gspo(),
        LossConfig.holder(-2.0),
        LossConfig.pmpo(temperature=0.7, entropy_coef=0.1),
    )
    for i in range(50):
        B, T = 1 + i % 7, (1, 16, 17, 48, 5 + i)[i % 5]
        for V in (1024, 9 * 1024, 1001, 9 * 1001):
            step(B, T, V, configs[i % 4], optional=i % 3 > 0)
    print(json.dumps({"first": first, "all": counts()}))


if __name__ == "__main__":
    main()
