"""A model of some hundred parameters, and a batch near its policy, for what surrounds a loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pmpo_kernels import LossConfig
from pmpo_kernels.verification import Case, make_case

V, H = 24, 8
CONFIG = LossConfig.pmpo(full_clip_fraction=0.5, beta=0.1, entropy_coef=0.01)


class Model(nn.Module):
    """A model of an embedding, one layer and an LM head, which makes hidden states and logits (B, T, V) of token ids (B, T)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer, self.head = nn.Embedding(V, H), nn.Linear(H, H), nn.Linear(H, V, bias=False)

    def hidden(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.embedding(ids)))

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(ids))
        return logits


def batch(B: int = 6, T: int = 5) -> Case:
    """Make a batch with log-ratios of some tenths: old and reference log-probs are near those of the model."""
    case = make_case(torch.float32, B=B, T=T, V=V)
    with torch.no_grad():
        logp = Model()(case.token_ids.roll(1, 1)).log_softmax(-1).gather(-1, case.token_ids[..., None])[..., 0]
    noise = 0.25 * torch.randn(2, *logp.shape, generator=torch.Generator().manual_seed(0))
    return case._replace(old_logp=logp + noise[0], ref_logp=logp + noise[1])
