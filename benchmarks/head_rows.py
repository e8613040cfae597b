"""The ways of computing the loss from hidden states and an LM head that are compared, and the bare products."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from head_inputs import HeadCase, HeadInputs
from other_packages import LIGER, TRL
from torch import Tensor
from torch.nn.functional import linear

from pmpo_kernels import LossConfig, pmpo_loss
from pmpo_kernels.benchmarking.cases import Dtype, Preset
from pmpo_kernels.benchmarking.variants import COMPILED, EAGER, FUSED, PEER
from pmpo_kernels.verification.baseline import eager_loss_from_logp, eager_token_logp

OURS = "linear_pmpo_loss"
LIGER_NLL, TORCH_NLL = "Liger, scaled cross entropy", "PyTorch's linear_cross_entropy"
FLOOR = "floor"  # the products alone: not a loss, so not checked
CHUNKS = {"cpu": (512, 2048), "cuda": (4096, 8192)}
HeadLoss = Callable[[Tensor, Tensor, HeadInputs], Tensor]


@dataclass(frozen=True)
class HeadVariant:
    """One row: `build(config)` returns its function of (hidden, weight, inputs), with hidden packed (N, H) or `padded` (B, T,
    H)."""

    name: str
    group: str
    build: Callable[[LossConfig], HeadLoss]
    padded: bool = False
    chunk: int | None = None


class ThreeProducts(torch.autograd.Function):
    """The products z = h W^T, z W and z^T h, and nothing else, which is what any implementation computes at least. The z of all
    chunks share one buffer."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, chunk: int) -> Tensor:
        z = hidden.new_empty(min(chunk, len(hidden)), len(weight))
        dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)
        for i, (h, dh) in enumerate(zip(hidden.split(chunk), dhidden.split(chunk), strict=True)):
            part = z[: len(h)]
            torch.mm(h, weight.t(), out=part)
            torch.mm(part, weight, out=dh)
            torch.addmm(dweight, part.t(), h, beta=float(i > 0), out=dweight)
        ctx.save_for_backward(dhidden, dweight)
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        dhidden, dweight = ctx.saved_tensors
        return dhidden, dweight, None


def build_products(chunk: int, config: LossConfig) -> HeadLoss:
    """Build the products alone, over all response tokens in chunks of `chunk`."""
    return lambda hidden, weight, i: ThreeProducts.apply(hidden, weight, chunk)


def build_linear(chunk: int | None, padded: bool, config: LossConfig) -> HeadLoss:
    """Build `linear_pmpo_loss`. It solves p."""
    from pmpo_kernels import linear_pmpo_loss

    def loss(hidden: Tensor, weight: Tensor, i: HeadInputs) -> Tensor:
        ids, old_logp = (i.pad(i.token_ids), i.pad(i.old_logp)) if padded else (i.token_ids, i.old_logp)
        layout = {"mask": i.mask} if padded else {"cu_seqlens": i.cu_seqlens}
        return linear_pmpo_loss(
            hidden, weight, ids, old_logp, i.advantages, max_chunk_tokens=chunk, config=config, **layout
        ).loss

    return loss


def build_head_pmpo(config: LossConfig) -> HeadLoss:
    """Build `pmpo_loss` on all logits at once, whose gradient is written over them. It solves p."""

    def loss(hidden: Tensor, weight: Tensor, i: HeadInputs) -> Tensor:
        z = linear(hidden, weight)
        return pmpo_loss(
            z, i.token_ids, i.old_logp, i.advantages, cu_seqlens=i.cu_seqlens, config=config, inplace=True
        ).loss

    return loss


def eager_head_loss(hidden: Tensor, weight: Tensor, i: HeadInputs, config: LossConfig) -> Tensor:
    """Loss (0-d) by the baseline on the logits of all response tokens at once. It is given p."""
    logp, entropy = eager_token_logp(
        linear(hidden, weight)[None], i.token_ids[None], config.temperature, entropy_gradient=False
    )
    return padded_loss(logp[0], entropy[0], i, config)


def padded_loss(logp: Tensor, entropy: Tensor, i: HeadInputs, config: LossConfig) -> Tensor:
    """Loss (0-d) by the baseline from packed logp and entropy (N,)."""
    return eager_loss_from_logp(
        i.pad(logp.float()), i.pad(entropy.float()), i.pad(i.old_logp), i.advantages, i.mask, config, i.power
    )


def build_eager(config: LossConfig) -> HeadLoss:
    return lambda hidden, weight, i: eager_head_loss(hidden, weight, i, config)


def build_compiled(config: LossConfig) -> HeadLoss:
    """Build the eager row under torch.compile with static shapes, as `variants.build_compiled` does."""
    f = torch.compile(eager_head_loss, dynamic=False)
    return lambda hidden, weight, i: f(hidden, weight, i, config)


def build_liger(config: LossConfig) -> HeadLoss:
    """Build `LigerFusedLinearGRPOLoss` with a chunk a trajectory, its default. Other defaults are another loss, so all are given.

    Its loss from log-probs, which is O(tokens), stays eager, because compiling it costs seconds in each process.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    fused = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        chunk_size=1,
        epsilon_low=-math.expm1(-config.clip_low),
        epsilon_high=math.expm1(config.clip_high),
        loss_type="grpo",
        max_completion_length=None,
        importance_sampling_level="token",
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        temperature=config.temperature,
        delta=None,
        use_bias_correction_kl=False,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
    )

    def loss(hidden: Tensor, weight: Tensor, i: HeadInputs) -> Tensor:
        return fused(
            hidden,
            weight,
            i.pad(i.token_ids),
            i.mask,
            i.advantages,
            bias=None,
            ref_per_token_logps=None,
            old_per_token_logps=i.pad(i.old_logp),
            vllm_is_ratio=None,
            num_items_in_batch=None,
        )[0]

    return loss


def build_trl(config: LossConfig) -> HeadLoss:
    """Build what TRL's `add_fused_lm_head` calls: the response tokens alone (as TRL does on a GPU), in its tiles of the vocabulary,
    with the entropy as a metric; then the rest of the baseline. It is given p."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def loss(hidden: Tensor, weight: Tensor, i: HeadInputs) -> Tensor:
        options = (_CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs", "entropy"))
        logp, entropy, *_ = ChunkedLogProbFunction.apply(
            hidden, weight, None, i.token_ids, config.temperature, *options
        )
        return padded_loss(logp, entropy.detach(), i, config)

    return loss


def from_nll(nll: Callable[[Tensor, Tensor, Tensor, LossConfig], Tensor], config: LossConfig) -> HeadLoss:
    """Build a loss from a function that returns each token's cross entropy (N,), the negative of its log-prob, from hidden states;
    then the rest of the baseline, without an entropy, which neither package needs for it. It is given p."""

    def loss(hidden: Tensor, weight: Tensor, i: HeadInputs) -> Tensor:
        logp = -nll(hidden, weight, i.token_ids, config)
        return padded_loss(logp, logp.detach(), i, config)

    return loss


def liger_nll(hidden: Tensor, weight: Tensor, ids: Tensor, config: LossConfig) -> Tensor:
    """Cross entropy (N,) by `LigerFusedLinearScaledCrossEntropyFunction`: CuTe kernels on a Hopper GPU, elsewhere PyTorch in chunks
    of 512 tokens. Every argument is given."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden, weight, ids, config.temperature, -100, 1, False, None
    )


def torch_nll(hidden: Tensor, weight: Tensor, ids: Tensor, config: LossConfig) -> Tensor:
    """Cross entropy (N,) by PyTorch's `linear_cross_entropy`, in chunks of its choice, which are projected again in the backward
    pass."""
    assert config.temperature == 1
    return torch.nn.functional.linear_cross_entropy(
        hidden, weight, ids, reduction="none", options=torch.nn.LinearCrossEntropyOptions()
    )


def products(case: HeadCase) -> list[HeadVariant]:
    """Return the rows of the products alone, in a few chunk sizes, of which the fastest is the floor."""
    whole = case.batch * case.tokens
    sizes = [1024] if case.device == "cpu" else [4096, whole]
    return [
        HeadVariant(
            "three products" + (f", {size:,} a time" if size < whole else ""),
            FLOOR,
            partial(build_products, size),
            chunk=size,
        )
        for size in sizes
    ]


def ours(case: HeadCase, brief: bool) -> list[HeadVariant]:
    """Return `linear_pmpo_loss` on the packed batch; unless `brief` also on the padded one, with other chunks, and `pmpo_loss` on
    all logits."""
    found = [HeadVariant(OURS, FUSED, partial(build_linear, None, False))]
    if brief:
        return found
    found.append(HeadVariant(f"{OURS}, padded", FUSED, partial(build_linear, None, True), padded=True))
    found += [
        HeadVariant(f"{OURS}, {size:,} a chunk", FUSED, partial(build_linear, size, False), chunk=size)
        for size in CHUNKS[case.device]
    ]
    return [*found, HeadVariant("head + pmpo_loss", FUSED, build_head_pmpo)]


def others(case: HeadCase, compiled: bool) -> tuple[list[HeadVariant], dict[str, str]]:
    """Return the baseline and the packages that compute this case's loss, and for the others the reason why they are not
    measured."""
    found, skipped = [HeadVariant(EAGER.name, EAGER.group, build_eager)], {}
    if compiled:
        found.append(HeadVariant(COMPILED.name, COMPILED.group, build_compiled))
    else:
        skipped[COMPILED.name] = "left out by --no-compile"
    if case.preset is not Preset.grpo:
        skipped[LIGER] = f"computes no {case.preset.value}; compared on grpo"
    elif importlib.util.find_spec("liger_kernel") is None:
        skipped[LIGER] = "not installed (pip install liger-kernel packaging)"
    else:
        found.append(HeadVariant(LIGER, PEER, build_liger, padded=True))
    if importlib.util.find_spec("trl") is None:
        skipped[TRL] = "not installed (pip install trl)"
    else:
        found.append(HeadVariant(TRL, PEER, build_trl))
    no_torch = None if hasattr(torch.nn, "LinearCrossEntropyOptions") else f"not in PyTorch {torch.__version__}"
    for name, nll, missing in ((LIGER_NLL, liger_nll, no_liger_nll(case)), (TORCH_NLL, torch_nll, no_torch)):
        if missing:
            skipped[name] = missing
        else:
            found.append(HeadVariant(name, PEER, partial(from_nll, nll)))
    return found, skipped


def no_liger_nll(case: HeadCase) -> str | None:
    """Why Liger's scaled cross entropy cannot run on this case, or None if it can."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "not installed (pip install liger-kernel packaging)"
    if case.device == "cpu" or torch.cuda.get_device_capability() != (9, 0):
        return None
    if case.dtype is not Dtype.bfloat16:
        return f"its kernels for this GPU take bfloat16, not {case.dtype.value}"
    if importlib.util.find_spec("cutlass") is None:
        return "its kernels for this GPU need CuTe (pip install 'liger-kernel[cutedsl]')"
    return None


def head_rows(case: HeadCase, compiled: bool, brief: bool = False) -> tuple[list[HeadVariant], dict[str, str]]:
    """Return every row of a case, and why others are not measured. `brief` asks for the floor and `linear_pmpo_loss` alone."""
    if brief:
        return [*products(case), *ours(case, brief)], {}
    found, skipped = others(case, compiled)
    return [*products(case), *found, *ours(case, brief)], skipped
