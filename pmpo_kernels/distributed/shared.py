"""`Shared`: what a call does before and after its kernels, where several ranks share it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, Shard

from pmpo_kernels.batch import Batch, Call
from pmpo_kernels.checks import check_choice, check_token_ids, checks_values
from pmpo_kernels.distributed.denominator import sum_over_data
from pmpo_kernels.distributed.ranks import (
    Agreement,
    Ranks,
    agreement,
    all_reduce,
    find_ranks,
    fingerprint,
    host_group,
    mark,
)
from pmpo_kernels.distributed.sequence import gather_tokens
from pmpo_kernels.distributed.vocabulary import Vocabulary
from pmpo_kernels.sharing import Sharing, Split, Whole

GIVEN = ("old_logp", "mask", "ref_logp", "rollout_weights", "power", "target_ess", "policy_mask")


def local_part(name: str, x: DTensor, dim: int) -> tuple[Tensor, ProcessGroup | None]:
    """Return this rank's part of a DTensor and the group that it is sharded over along `dim`, None for a DTensor that is whole."""
    dim %= x.dim()
    sharded = [i for i, placement in enumerate(x.placements) if placement == Shard(dim)]
    if len(sharded) > 1 or not all(p == Replicate() for i, p in enumerate(x.placements) if i not in sharded):
        raise ValueError(
            f"{name}: expected a DTensor sharded along its dimension {dim} over one dimension of its mesh and replicated over "
            f"others, got placements {x.placements}; of weights that FSDP shards, call the loss within their module's forward"
        )
    return x.to_local(), x.device_mesh.get_group(sharded[0]) if sharded else None


class Shared(Sharing):
    """`Sharing` by the groups of `ranks`."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.agreed = Agreement()

    @classmethod
    def find(cls, group: Any, mesh: Any, split: Any, tensors: dict[str, tuple[Any, int]]) -> tuple[Shared, list[Any]]:
        """Make one from the arguments of a call. Return it and this rank's part of each of `tensors`. `tensors` gives by name a
        tensor, which may be a DTensor, and its dimension of the vocabulary."""
        ranks = find_ranks(group, mesh, split)
        parts = []
        for name, (x, dim) in tensors.items():
            if isinstance(x, DTensor):
                x, of = local_part(name, x, dim)
                mine, other = (None if g is None else dist.get_process_group_ranks(g) for g in (of, ranks.vocabulary))
                if other is None and mine is not None and name != "logits":
                    raise ValueError(
                        f'{name}: expected group= or a mesh with "tp" beside a sharded DTensor, which may be FSDP\'s, got neither'
                    )
                if other is not None and mine != other:
                    raise ValueError(
                        f"{name}: expected to be sharded over ranks {other}, got one over {mine or 'none'}"
                    )
                ranks = ranks._replace(vocabulary=of)
            parts.append(x)
        return cls(ranks), parts

    @contextlib.contextmanager
    def agreement(self) -> Iterator[None]:
        """Do what `ranks.agreement` does, and learn in the first exchange how the vocabulary is split."""
        with agreement(self.ranks) as self.agreed:
            yield
        if self.ranks.vocabulary is not None and self.parts is None:
            self.parts = Vocabulary(self.ranks.vocabulary, self.agreed.vocabularies)

    def describe(
        self,
        vocabulary: int,
        tokens: Tensor,
        call: Call,
        everywhere: tuple[object, ...],
        of_tokens: tuple[object, ...] = (),
    ) -> None:
        check_choice("sequence_split", self.ranks.split, Split)
        if self.ranks.split != "contiguous" and self.ranks.sequence is None:
            raise ValueError(
                f'sequence_split: expected "contiguous" without a dimension "cp" of the mesh, got {self.ranks.split!r}'
            )
        batch, denominator = call.batch, call.denominator
        given = tuple(name for name in GIVEN if getattr(batch, name) is not None)
        whether = {"denominator, given or not": int(denominator is not None)}
        alike = {
            **whether,
            "number of trajectories": batch.cu_seqlens.numel() - 1,
            "options": mark(*call.trajectory_options, *everywhere),
            "optional arguments": mark(*given),
            "advantages, power, target_ess or denominator": fingerprint(
                batch.advantages, batch.power, batch.target_ess, denominator
            ),
        }
        self.agreed.V, self.agreed.N = vocabulary, tokens.numel()
        self.agreed.same_batch = whether
        self.agreed.same_trajectories = {
            **alike,
            "vocabulary": vocabulary,
            "sequence_split": get_args(Split).index(self.ranks.split),
        }
        ids = tokens if tokens.is_floating_point() else tokens.long()
        of_token = (ids, batch.old_logp, batch.ref_logp, batch.rollout_weights, batch.policy_mask)
        self.agreed.same_tokens = {
            **alike,
            "number of tokens": tokens.numel(),
            "mask": fingerprint(batch.mask),
            "token_ids or another tensor of the tokens": fingerprint(*of_token, mask=batch.mask),
            "gradients that are wanted, impl or dtype": mark(*of_tokens, call.impl),
        }

    def check_token_ids(self, token_ids: Tensor, mask: Tensor | None) -> None:
        if checks_values(token_ids):
            with agreement(self.ranks):
                mask = None if mask is None else mask.view(token_ids.shape)
                check_token_ids(token_ids, mask, self.whole_vocabulary(self.agreed.V))

    def gather(self, logp: Tensor, entropy: Tensor | None, batch: Batch) -> Whole:
        if self.ranks.sequence is None:
            return Whole(logp, entropy, batch, None)
        return gather_tokens(logp, entropy, batch, self.ranks.sequence, self.ranks.split, self.agreed.tokens)

    @property
    def splits_trajectories(self) -> bool:  # type: ignore[override]
        return self.ranks.sequence is not None

    def whole_lengths(self, tokens: Tensor) -> Tensor:
        if self.ranks.sequence is None:
            return tokens
        return all_reduce(tokens.clone(), self.ranks.sequence, "the sum of the trajectories' lengths")

    @property
    def sums_over_data(self) -> bool:  # type: ignore[override]
        return bool(self.ranks.data)

    def sum_over_data(self, count: Tensor) -> Tensor:
        return sum_over_data(count, self.ranks)

    def smallest(self, number: int) -> int:
        if self.ranks.vocabulary is None:
            return number
        found = torch.tensor([number], device="cpu")
        all_reduce(found, host_group(self.ranks.vocabulary), "the agreement on a chunk", dist.ReduceOp.MIN)
        return int(found)

    def sum_over_vocabulary(self, gradient: Tensor) -> None:
        if self.ranks.vocabulary is not None and gradient.numel():
            all_reduce(gradient, self.ranks.vocabulary, "the sum of the gradient of the hidden states")

    def everywhere(self, finite: Tensor) -> Tensor:
        for group in (self.ranks.vocabulary, self.ranks.sequence):
            if group is not None:
                finite = all_reduce(finite.int(), group, "the agreement on the loss", dist.ReduceOp.MIN) != 0
        return finite

    def whole_vocabulary(self, own: int) -> int:
        return own if self.ranks.vocabulary is None else sum(self.agreed.vocabularies)
