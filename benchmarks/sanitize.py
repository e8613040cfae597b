"""Small forward and backward passes of the Triton kernels, for `compute-sanitizer python benchmarks/sanitize.py`.

Lengths and vocabularies that are no multiple of a block, rows that begin anywhere, rows shared by several programs and not,
so that every tail, edge and mask is exercised.
"""

from __future__ import annotations

from itertools import product

import torch

from pmpo_kernels import LossConfig, pmpo_loss
from pmpo_kernels.impls import interpreted

CONFIGS = {"pmpo": LossConfig.pmpo(entropy_coef=0.01, beta=0.1), "gspo": LossConfig.gspo()}


def run(V: int, T: int, dtype: torch.dtype, packed: bool, inplace: bool, config: LossConfig, device: str) -> None:
    """One loss and its gradient on four trajectories of up to T tokens."""
    B = 4
    generator = torch.Generator(device).manual_seed(0)
    logits = (2 * torch.randn(B, T, V, generator=generator, device=device)).to(dtype)
    token_ids = torch.randint(0, V, (B, T), generator=generator, device=device)
    logp = logits.float().log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]
    old_logp, ref_logp = (logp + 0.3 * torch.randn(B, T, generator=generator, device=device) for _ in range(2))
    advantages = torch.tensor([1.0, -1.0, 0.5, 0.0], device=device)
    mask = torch.rand(B, T, generator=generator, device=device) > 0.2
    cu_seqlens = None
    if packed:
        logits, token_ids, old_logp, ref_logp, mask = (
            x.flatten(0, 1) for x in (logits, token_ids, old_logp, ref_logp, mask)
        )
        cu_seqlens = torch.tensor([0, 5, 5, 90, B * T], device=device)
    logits.requires_grad_()
    out = pmpo_loss(
        logits,
        token_ids,
        old_logp,
        advantages,
        mask=mask,
        cu_seqlens=cu_seqlens,
        ref_logp=ref_logp,
        config=config,
        inplace=inplace,
        impl="triton",
    )
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert bool(out.loss.isfinite()), (V, T, dtype, packed, inplace, config)
    assert bool(gradient.isfinite().all()), (V, T, dtype, packed, inplace, config)


def main() -> None:
    """Every combination; on CPU tensors only under Triton's interpreter."""
    device = "cpu" if interpreted() else "cuda"
    for V, T in ((1000, 37), (17_003, 37), (17_003, 80)):  # 320 rows are enough for a program each
        for dtype in (torch.bfloat16, torch.float32):
            for packed in (False, True):
                for inplace, config in product((False, True), CONFIGS.values()):
                    run(V, T, dtype, packed, inplace, config, device)
                print(f"ran V={V} T={T} {dtype} {'packed' if packed else 'padded'} on {device}", flush=True)


if __name__ == "__main__":
    main()
