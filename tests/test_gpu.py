"""What only a GPU can show: no synchronisation, no further compiles, sizes beyond 32 bits."""

from __future__ import annotations

import pytest
import torch

from pmpo_kernels import LossConfig, pmpo_loss, token_logp
from pmpo_kernels.verification import make_case

pytestmark = pytest.mark.gpu


def step(B: int, T: int, V: int = 1024, **options: object) -> torch.Tensor:
    case = make_case(torch.bfloat16, B=B, T=T, V=V, device="cuda")
    z = case.logits.requires_grad_()
    pmpo_loss(z, case.token_ids, case.old_logp, case.advantages, mask=case.mask, **options).loss.backward()
    return z.grad


def test_no_synchronisation() -> None:
    case = make_case(torch.bfloat16, B=4, T=8, V=1024, device="cuda")
    config = LossConfig.pmpo(full_clip_fraction=0.5, beta=0.1, entropy_coef=0.01)
    z = case.logits.requires_grad_()
    for warm in (True, False):
        torch.cuda.set_sync_debug_mode("default" if warm else "error")
        try:
            out = pmpo_loss(
                z, case.token_ids, case.old_logp, case.advantages, mask=case.mask, ref_logp=case.ref_logp, config=config
            )
            out.loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_no_further_compiles_over_lengths() -> None:
    from pmpo_kernels.triton.dlogits import _dlogits_bwd_kernel
    from pmpo_kernels.triton.token_logp import _token_logp_fwd_kernel
    from pmpo_kernels.triton.trajectory import _trajectory_fwd_kernel

    def compiled() -> list[int]:
        kernels = (_token_logp_fwd_kernel, _trajectory_fwd_kernel, _dlogits_bwd_kernel)
        return [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]

    step(4, 8)
    before = compiled()
    for i in range(50):
        step(4 + i % 7, 5 + i)
    for config in (LossConfig.grpo(), LossConfig.gspo(), LossConfig.holder(-2.0), LossConfig.pmpo(temperature=0.7)):
        step(4, 8, config=config)
    assert compiled() == before


def test_more_than_65535_tokens_a_row() -> None:
    T, V = 70_000, 64
    z = torch.randn(1, T, V, device="cuda", requires_grad=True)
    ids = torch.randint(V, (1, T), device="cuda")
    logp = token_logp(z, ids).logp
    want = torch.log_softmax(z.detach().double(), -1).gather(-1, ids[..., None])[..., 0]
    assert (logp - want).abs().max() < 64 * torch.finfo(torch.float32).eps
    pmpo_loss(z, ids, want.float() + 0.1, torch.ones(1, device="cuda")).loss.backward()
    assert (z.grad.abs().sum(-1) > 0).all()


def test_more_than_2_31_elements() -> None:
    T, V = 16_400, 131_072
    z = torch.zeros(1, T, V, device="cuda", dtype=torch.bfloat16)
    z[0, -1, 5] = 3.0
    ids = torch.full((1, T), 5, device="cuda")
    z.requires_grad_()
    logp = token_logp(z, ids, inplace=True).logp
    assert logp[0, -1].item() == pytest.approx(3.0 - (V - 1 + torch.tensor(3.0).exp()).log().item(), rel=1e-5)
    logp[0, -1].backward()
    assert z.grad[0, -1, 5].item() == pytest.approx(1.0, rel=1e-2)
    assert (z.grad[0, -2] == 0).all()
