"""What the tests of the loss share."""

from __future__ import annotations

import torch
from torch import Tensor

from pmpo_kernels import LossConfig, PMPOOutput, pmpo_loss
from pmpo_kernels.verification import Case, make_case

FEW = ["dapo", "pmpo, severity in between", "pmpo, all terms", "sequence clip, dual, k2"]


def run(case: Case, config: LossConfig, impl: str, scale: float = 1.0, **kwargs: object) -> tuple[PMPOOutput, Tensor]:
    """Return output and gradient of the logits of one call with every optional argument in use, for a loss `scale` times as
    large."""
    z = case.logits.detach().clone().requires_grad_()
    options = {"mask": case.mask, "ref_logp": case.ref_logp, "rollout_weights": case.rollout_weights} | kwargs
    out = pmpo_loss(z, case.token_ids, case.old_logp, case.advantages, config=config, impl=impl, **options)
    (scale * out.loss).backward()
    return out, z.grad


def small_case(device: str, dtype: torch.dtype = torch.float32) -> Case:
    """Make a case of few and short rows, because the interpreter takes milliseconds a row."""
    return make_case(dtype, B=6, T=6, V=40, device=device)


def same_bits(a: PMPOOutput, b: PMPOOutput) -> None:
    assert torch.equal(a.loss, b.loss)
    assert a.metrics.keys() == b.metrics.keys()
    for name in a.metrics:
        assert torch.equal(a.metrics[name], b.metrics[name]), name
    for x, y in zip(a[4:], b[4:], strict=True):
        assert torch.equal(x, y)
