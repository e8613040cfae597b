"""One of several processes over gloo: `ranks_worker.py RANK WORLD STORE SCENARIO...`. Each compares its part with one process.

The expected values are computed in every process, from the whole case.
"""

from __future__ import annotations

import datetime
import math
import os
import re
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import counts
import network
import pytest
import torch
import torch.distributed as dist
from processes import take_part
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from pmpo_kernels import LossConfig, PMPOOutput, linear_pmpo_loss, pmpo_loss, pmpo_loss_from_logp
from pmpo_kernels.distributed import denominator
from pmpo_kernels.distributed import ranks as ranks_module
from pmpo_kernels.impls import IMPLS
from pmpo_kernels.linear.projection import Projection
from pmpo_kernels.verification import configurations, make_case

V, H = 37, 8
SIZES = {2: [30, 7], 4: [1, 20, 11, 5]}  # of the vocabulary's parts
DTYPES = (torch.float32, torch.float64)
PER_TOKEN = ("token_ids", "old_logp", "mask", "ref_logp", "rollout_weights")


class Call(NamedTuple):
    """A case, as one process has it or a rank its part; `power` and `target_ess` are None."""

    logits: Tensor
    token_ids: Tensor
    old_logp: Tensor
    advantages: Tensor
    mask: Tensor
    ref_logp: Tensor
    rollout_weights: Tensor
    cu_seqlens: Tensor | None = None

    def loss(self, config: LossConfig, **options: Any) -> tuple[PMPOOutput, Tensor]:
        """Return the result and the gradient of the logits."""
        z = self.logits.detach().clone().requires_grad_()
        given = {name: getattr(self, name) for name in ("mask", "ref_logp", "rollout_weights", "cu_seqlens")}
        out = pmpo_loss(z, self.token_ids, self.old_logp, self.advantages, config=config, **given, **options)
        out.loss.backward()
        assert z.grad is not None
        return out, z.grad

    def linear(
        self, hidden: Tensor, weight: Tensor, config: LossConfig, **options: Any
    ) -> tuple[PMPOOutput, Tensor, Tensor]:
        """Return the result and the gradients of hidden states and weight."""
        h, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
        given = {name: getattr(self, name) for name in ("mask", "ref_logp", "rollout_weights", "cu_seqlens")}
        out = linear_pmpo_loss(h, w, self.token_ids, self.old_logp, self.advantages, config=config, **given, **options)
        out.loss.backward()
        assert h.grad is not None
        assert w.grad is not None
        return out, h.grad, w.grad


def whole(dtype: torch.dtype, B: int = 6, T: int = 8) -> Call:
    return Call(*make_case(dtype, B=B, T=T, V=V))


def close(got: Tensor, want: Tensor, terms: int, dtype: torch.dtype) -> None:
    """Assert that numbers are close that come from sums of at most `terms` terms in another order, relative to the size of the
    largest, with NaN where NaN is wanted."""
    assert got.shape == want.shape
    got, want = got.detach().double(), want.detach().double()
    assert torch.equal(got.isnan(), want.isnan())
    if want.numel():
        got, want = got.nan_to_num(), want.nan_to_num()
        assert (got - want).abs().max() <= 4 * terms * torch.finfo(dtype).eps * max(float(want.abs().max()), 1e-3)


def same_result(got: PMPOOutput, want: PMPOOutput, terms: int, dtype: torch.dtype) -> None:
    """Assert that two results are the same. p and ESS follow from how log-ratios spread, by a quarter, where log-probs are some
    ten: their relative errors are 40 times as large. p goes with the root of what it is solved from: 100."""
    for name in ("loss", "power", "ess", "clip_fraction"):
        close(getattr(got, name), getattr(want, name), terms * (100 if name in ("power", "ess") else 1), dtype)


def on_all_ranks(x: Tensor, group: Any = None) -> None:
    """Assert that x has the same bits on all ranks."""
    every = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, x.contiguous(), group=group)
    assert all(torch.equal(other.nan_to_num(7), x.nan_to_num(7)) for other in every)


def vocabulary_part(x: Tensor, dim: int, rank: int, sizes: list[int]) -> Tensor:
    return x.split(sizes, dim)[rank]


# --- the vocabulary ---------------------------------------------------------------------------------------------------


def vocabulary() -> None:
    """Split the vocabulary: every configuration, uneven parts, targets anywhere."""
    rank, sizes = dist.get_rank(), SIZES[dist.get_world_size()]
    for dtype in DTYPES:
        case = whole(dtype)
        mine = case._replace(logits=vocabulary_part(case.logits, -1, rank, sizes))
        for config in configurations().values():
            want, gradient = case.loss(config)
            got, part = mine.loss(config, group=dist.group.WORLD)
            same_result(got, want, V, dtype)
            close(got.logp, want.logp, V, dtype)
            close(got.entropy, want.entropy, V, dtype)
            close(part, vocabulary_part(gradient, -1, rank, sizes), V * 10, dtype)
            assert (part[~case.mask] == 0).all()
            for x in (got.loss, got.power, got.logp, got.entropy):
                on_all_ranks(x)
            again, part_again = mine.loss(config, group=dist.group.WORLD)
            assert torch.equal(again.loss, got.loss)
            assert torch.equal(part_again, part)


def vocabulary_of_minus_infinity() -> None:
    """Have a part of nothing but -inf, as where a vocabulary is padded; -inf at a target; NaN where masked."""
    rank, sizes = dist.get_rank(), SIZES[dist.get_world_size()]
    case = whole(torch.float64)
    logits = case.logits.clone()
    start = sum(sizes[:-1])
    logits[..., start:] = -math.inf
    ids = case.token_ids.clamp(max=start - 1)
    logits[0, 0, ids[0, 0]] = -math.inf
    logits[~case.mask] = math.nan
    case = case._replace(logits=logits, token_ids=ids)
    mine = case._replace(logits=vocabulary_part(logits, -1, rank, sizes))
    target = case.logits[..., start:].amax(-1) == -math.inf
    ids = torch.where(case.mask & (torch.arange(8) == 3), start, case.token_ids)  # in that part: of probability 0
    assert target[case.mask].all()
    elsewhere = case._replace(token_ids=ids), mine._replace(token_ids=ids)
    configs = (LossConfig.grpo(), LossConfig.pmpo(entropy_coef=0.1))
    for (whole_case, its_part), config, impl in product(((case, mine), elsewhere), configs, IMPLS):
        want, gradient = whole_case.loss(config, impl="reference")
        got, part = its_part.loss(config, group=dist.group.WORLD, impl=impl)
        assert want.loss.isfinite()
        same_result(got, want, V, torch.float64)
        close(part, vocabulary_part(gradient, -1, rank, sizes), V * 10, torch.float64)


def vocabulary_options() -> None:
    """Split the vocabulary in place, with a position more than tokens, packed, with ids in 32 bits, 16-bit logits, by every
    implementation."""
    rank, sizes = dist.get_rank(), SIZES[dist.get_world_size()]
    config = LossConfig.pmpo(temperature=0.7, entropy_coef=0.01)
    case = whole(torch.float32)

    def compare(case: Call, terms: int = V * 10, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        mine = case._replace(logits=vocabulary_part(case.logits, -1, rank, sizes))
        want, gradient = case.loss(config)
        got, part = mine.loss(config, group=dist.group.WORLD, **options)
        same_result(got, want, V, dtype)
        close(part, vocabulary_part(gradient, -1, rank, sizes), terms, dtype)

    for impl in IMPLS:
        compare(case, impl=impl)
    compare(case._replace(token_ids=case.token_ids.int()))
    compare(case._replace(logits=torch.cat([case.logits, case.logits[:, :1]], 1)))
    keep, lengths = case.mask, case.mask.sum(1)
    packed = {name: getattr(case, name)[keep] for name in (*PER_TOKEN, "logits")}
    compare(case._replace(**packed, cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0))))
    half = case._replace(logits=case.logits.bfloat16())
    compare(half, terms=4, dtype=torch.bfloat16)  # the gradient is rounded once

    mine = case._replace(logits=vocabulary_part(case.logits, -1, rank, sizes))
    z = mine.logits.clone().requires_grad_()
    x = z * 1.0
    out = pmpo_loss(x, case.token_ids, case.old_logp, case.advantages, mask=case.mask, config=config,
                    group=dist.group.WORLD, inplace=True)  # fmt: skip
    out.loss.backward()
    close(
        z.grad,
        case._replace(ref_logp=None, rollout_weights=None).loss(config)[1].split(sizes, -1)[rank],
        V * 10,
        torch.float32,
    )


def dtensors() -> None:
    """Pass logits as a column-parallel head produces them, and a sharded weight with the group that shards it."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    case, config = whole(torch.float64), LossConfig.pmpo(entropy_coef=0.01)
    want, gradient = case.loss(config)
    z = distribute_tensor(case.logits, mesh, [Shard(2)]).requires_grad_()
    given = {"mask": case.mask, "ref_logp": case.ref_logp, "rollout_weights": case.rollout_weights, "config": config}
    tokens = (case.token_ids, case.old_logp, case.advantages)
    for options in ({}, {"mesh": mesh}, {"group": mesh.get_group("tp")}):
        z.grad = None
        out = pmpo_loss(z, *tokens, **given, **options)
        out.loss.backward()
        same_result(out, want, V, torch.float64)
        assert isinstance(z.grad, DTensor)
        close(z.grad.full_tensor(), gradient, V * 10, torch.float64)
    replicated = distribute_tensor(case.logits, mesh, [Replicate()]).requires_grad_()
    assert pmpo_loss(replicated, *tokens, **given).loss == want.loss
    with pytest.raises(ValueError, match="logits: expected a DTensor sharded along its dimension 2"):
        pmpo_loss(distribute_tensor(case.logits, mesh, [Shard(0)]), *tokens, **given)

    hidden, weight = head(torch.float64)
    want, dhidden, dweight = case.linear(hidden, weight, config)
    h, w = hidden.clone().requires_grad_(), distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    out = linear_pmpo_loss(h, w, *tokens, **given, mesh=mesh)
    out.loss.backward()
    same_result(out, want, V, torch.float64)
    close(h.grad, dhidden, V * 10, torch.float64)
    close(w.grad.full_tensor(), dweight, V * 10, torch.float64)
    with pytest.raises(TypeError, match="weight: expected a plain tensor, got a DTensor"):  # perhaps FSDP's
        linear_pmpo_loss(h, w, *tokens, **given)
    dp = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    with pytest.raises(ValueError, match='weight: expected group= or a mesh with "tp" beside a sharded DTensor'):
        linear_pmpo_loss(h, w, *tokens, **given, mesh=dp)
    if world == 4:
        two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        with pytest.raises(ValueError, match="logits: expected to be sharded over ranks"):
            pmpo_loss(z, *tokens, **given, mesh=two)
    assert rank < world


def head(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Make hidden states (B, T, H) and a weight (V, H)."""
    random = torch.Generator().manual_seed(3)
    return torch.randn(6, 8, H, generator=random, dtype=dtype), torch.randn(V, H, generator=random, dtype=dtype)


def near(case: Call, hidden: Tensor, weight: Tensor) -> Call:
    """Return the case with old and reference log-probs some tenths from those of the head."""
    logp = (hidden @ weight.T).log_softmax(-1).gather(-1, case.token_ids[..., None])[..., 0]
    shift = 0.25 * torch.randn(2, *logp.shape, generator=torch.Generator().manual_seed(4), dtype=logp.dtype)
    return case._replace(old_logp=logp + shift[0], ref_logp=logp + shift[1])


def vocabulary_of_a_head() -> None:
    rank, sizes = dist.get_rank(), SIZES[dist.get_world_size()]
    for dtype in DTYPES:
        hidden, weight = head(dtype)
        case = near(whole(dtype), hidden, weight)
        for config in configurations().values():
            for options in ({}, {"max_chunk_tokens": 8}, {"max_chunk_tokens": 3}):
                want, dhidden, dweight = case.linear(hidden, weight, config, **options)
                mine = vocabulary_part(weight, 0, rank, sizes)
                got, dh, dw = case.linear(hidden, mine, config, group=dist.group.WORLD, **options)
                same_result(got, want, V * H, dtype)
                close(dh, dhidden, V * 10, dtype)
                close(dw, vocabulary_part(dweight, 0, rank, sizes), V * 10, dtype)
                on_all_ranks(dh)
                on_all_ranks(got.power)


# --- the sequence -----------------------------------------------------------------------------------------------------


def pieces(T: int, rank: int, world: int, split: str) -> Tensor:
    """Return the positions of a rank's tokens among T."""
    if split == "contiguous":
        return torch.arange(T).chunk(world)[rank]
    chunks = torch.arange(T).chunk(2 * world)
    return torch.cat([chunks[rank], chunks[2 * world - 1 - rank]])


def columns(case: Call, at: Tensor) -> Call:
    parts = {name: getattr(case, name)[:, at] for name in (*PER_TOKEN, "logits")}
    return case._replace(**parts)


def sequence() -> None:
    """Split trajectories: every configuration in both ways gives what one process has, to the bit, because it is computed from the
    same numbers."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
    for dtype in DTYPES:
        case = whole(dtype, T=16)
        for split in ("contiguous", "zigzag"):
            at = pieces(16, rank, world, split)
            mine = columns(case, at)
            for config in configurations().values():
                want, gradient = case.loss(config)
                got, part = mine.loss(config, mesh=mesh, sequence_split=split)
                for name in ("loss", "power", "ess", "clip_fraction"):
                    assert torch.equal(getattr(got, name), getattr(want, name)), (name, config)
                assert torch.equal(got.logp, want.logp[:, at])
                assert torch.equal(part, gradient[:, at])
                assert got.metrics.keys() == want.metrics.keys()
                assert all(torch.equal(got.metrics[name], want.metrics[name]) for name in want.metrics)


def sequence_packed() -> None:
    """Split packed trajectories into pieces of any length, also of none."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
    case, config = whole(torch.float32), LossConfig.pmpo(beta=0.1, entropy_coef=0.01)
    want, gradient = case.loss(config)
    keep = case.mask & ((torch.arange(8) * (3 + torch.arange(6)[:, None])) % world == rank)  # scattered: any assignment
    owned = torch.arange(8) * world // 8 == rank  # in one piece
    for mine in (keep, case.mask & owned):
        lengths = mine.sum(1)
        packed = {name: getattr(case, name)[mine] for name in (*PER_TOKEN, "logits")}
        part = case._replace(**packed, cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))
        got, part_gradient = part.loss(config, mesh=mesh)
        same_result(got, want, V, torch.float32)
        close(part_gradient, gradient[mine], 64, torch.float32)
        on_all_ranks(got.power)


def sequence_of_a_head() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
    hidden, weight = head(torch.float64)
    case = near(whole(torch.float64), hidden, weight)
    for split in ("contiguous", "zigzag"):
        at = pieces(8, rank, world, split)
        mine = columns(case, at)
        for config in configurations().values():
            for options in ({"max_chunk_tokens": 100}, {"max_chunk_tokens": 4}):
                want, dhidden, dweight = case.linear(hidden, weight, config, **options)
                got, dh, dw = mine.linear(hidden[:, at], weight, config, mesh=mesh, sequence_split=split, **options)
                same_result(got, want, V * H, torch.float64)
                close(dh, dhidden[:, at], V * 10, torch.float64)
                dist.all_reduce(dw)
                close(dw, dweight, V * 10, torch.float64)
                assert torch.equal(got.power.isnan(), want.power.isnan())


def sequence_options() -> None:
    """Split trajectories with a policy mask of tokens, with metrics where those without an advantage are skipped, and with a given
    denominator."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
    hidden, weight = head(torch.float64)
    case = near(whole(torch.float64), hidden, weight)
    at, kept = pieces(8, rank, world, "contiguous"), torch.arange(48).view(6, 8) % 3 > 0
    config = LossConfig.pmpo(full_clip_fraction=0.5)
    want, gradient = case.loss(config, policy_mask=kept, denominator=7.0)
    got, part = columns(case, at).loss(config, policy_mask=kept[:, at], denominator=7.0, mesh=mesh)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(part, gradient[:, at])
    assert want.loss != case.loss(config, denominator=7.0)[0].loss
    want, dhidden, _ = case.linear(hidden, weight, config)
    got, dh, _ = columns(case, at).linear(hidden[:, at], weight, config, mesh=mesh)
    close(dh, dhidden[:, at], V * 10, torch.float64)
    for name, value in want.metrics.items():
        close(got.metrics[name], value, V * 100, torch.float64)


def sequence_from_logp() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
    case = whole(torch.float64)
    at = pieces(8, rank, world, "contiguous")
    logp = case.old_logp + 0.2 * torch.randn(6, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    a, b = logp.clone().requires_grad_(), logp[:, at].clone().requires_grad_()
    want = pmpo_loss_from_logp(a, case.old_logp, case.advantages, mask=case.mask)
    got = pmpo_loss_from_logp(b, case.old_logp[:, at], case.advantages, mask=case.mask[:, at], mesh=mesh)
    want.loss.backward()
    got.loss.backward()
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(b.grad, a.grad[:, at])


# --- the batch --------------------------------------------------------------------------------------------------------


def rows(case: Call, at: slice) -> Call:
    return Call(*(None if x is None else x[at] for x in case))


def data() -> None:
    """Split the batch: the ranks' losses and gradients add up to those of the whole. One rank has no trajectory, one only an empty
    one."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    bounds = [0, 0, 6] if world == 2 else [0, 1, 2, 2, 6]
    for dtype in DTYPES:
        case = whole(dtype)
        for config in configurations().values():
            want, gradient = case.loss(config)
            at = slice(bounds[rank], bounds[rank + 1])
            got, part = rows(case, at).loss(config, mesh=mesh)
            total = got.loss.clone()
            dist.all_reduce(total)
            close(total, want.loss, 16, dtype)
            close(part, gradient[at], 16, dtype)
            halved, _ = rows(case, at).loss(config, mesh=mesh, denominator=3.0)
            alone, _ = rows(case, at).loss(config, denominator=3.0)
            assert torch.equal(halved.loss, alone.loss)
            hidden, weight = head(dtype)
            near_case = near(case, hidden, weight)
            want, dhidden, dweight = near_case.linear(hidden, weight, config)
            got, dh, dw = rows(near_case, at).linear(hidden[at], weight, config, mesh=mesh)
            close(dh, dhidden[at], V * 10, dtype)
            dist.all_reduce(dw)
            close(dw, dweight, V * 10, dtype)


def denominators() -> None:
    """Use `denominator` with micro-batches on each rank, added up or averaged."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    case = whole(torch.float64, B=8)
    for config in (LossConfig.pmpo(), LossConfig.dapo(), LossConfig.dr_grpo(10)):
        _, gradient = case.loss(config)
        size = 8 // world
        micro = [slice(rank * size, rank * size + 1), slice(rank * size + 1, (rank + 1) * size), slice(0, 0)]
        lengths = [case.mask[part].sum(1) for part in micro]
        for averaged in (False, True):
            D = denominator(lengths, config, mesh=mesh, averaged=averaged)
            on_all_ranks(D)
            for part in micro:
                _, got = rows(case, part).loss(config, denominator=D)
                close(got / (world if averaged else 1), gradient[part], 16, torch.float64)
    assert denominator(case.mask.sum(1), LossConfig.dapo()) == case.mask.sum()
    split = case.mask[:, pieces(8, rank, world, "contiguous")].sum(1)
    cp = init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
    assert denominator(split, LossConfig.pmpo(), mesh=cp) == case.mask.any(1).sum()
    assert denominator(split, LossConfig.pmpo(), mesh=cp, averaged=True) == case.mask.any(1).sum() / world
    both = init_device_mesh("cpu", (1, world), mesh_dim_names=("dp_replicate", "dp_shard"))
    mine = case.mask[rank * size : (rank + 1) * size].sum(1)
    assert denominator(mine, LossConfig.dapo(), mesh=both, averaged=True) == case.mask.sum() / world


# --- together ---------------------------------------------------------------------------------------------------------


def combinations() -> None:
    """Split by two dimensions of two ranks: every pair of schemes, from logits and from hidden states."""
    rank = dist.get_rank()
    config = LossConfig.pmpo(beta=0.1, entropy_coef=0.01)
    hidden, weight = head(torch.float64)
    for names in (("dp", "tp"), ("cp", "tp"), ("dp", "cp"), ("dp_replicate", "dp_shard")):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        where = dict(zip(names, (rank // 2, rank % 2), strict=True))
        case = whole(torch.float64)
        h, w, sizes = hidden, weight, SIZES[2]
        case = near(case._replace(logits=hidden @ weight.T), hidden, weight)
        want, gradient = case.loss(config)
        want_linear = case.linear(hidden, weight, config)
        mine, dh = case, want_linear[1]
        dw = want_linear[2]
        if "dp" in names or "dp_shard" in names:
            place = where["dp"] if "dp" in names else rank
            at = slice(0, 4) if place == 0 else slice(4, 6) if place == 1 else slice(6, 6)
            mine, h, gradient, dh = rows(mine, at), h[at], gradient[at], dh[at]
        if "cp" in names:
            at = pieces(8, where["cp"], 2, "zigzag")
            mine, h, gradient, dh = columns(mine, at), h[:, at], gradient[:, at], dh[:, at]
        if "tp" in names:
            mine = mine._replace(logits=vocabulary_part(mine.logits, -1, where["tp"], sizes))
            gradient = vocabulary_part(gradient, -1, where["tp"], sizes)
            w, dw = (vocabulary_part(x, 0, where["tp"], sizes) for x in (w, dw))
        split = {"sequence_split": "zigzag"} if "cp" in names else {}
        got, part = mine.loss(config, mesh=mesh, **split)
        close(part, gradient, V * 10, torch.float64)
        total = got.loss.clone()
        for name in names:
            if name.startswith("dp"):
                dist.all_reduce(total, group=mesh.get_group(name))
        close(total, want.loss, V, torch.float64)
        _, part_h, part_w = mine.linear(h, w, config, mesh=mesh, max_chunk_tokens=5, **split)
        close(part_h, dh, V * 10, torch.float64)
        for name in names:
            if name != "tp":
                dist.all_reduce(part_w, group=mesh.get_group(name))
        close(part_w, dw, V * 10, torch.float64)


def three_dimensions() -> None:
    """Split by dp x cp x tp of 1 x 2 x 2, where one dimension has one rank."""
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("dp", "cp", "tp"))
    rank, case, config = dist.get_rank(), whole(torch.float64), LossConfig.pmpo()
    want, gradient = case.loss(config)
    at = pieces(8, rank // 2, 2, "contiguous")
    mine = columns(case, at)
    mine = mine._replace(logits=vocabulary_part(mine.logits, -1, rank % 2, SIZES[2]))
    got, part = mine.loss(config, mesh=mesh)
    same_result(got, want, V, torch.float64)
    close(part, vocabulary_part(gradient[:, at], -1, rank % 2, SIZES[2]), V * 10, torch.float64)


# --- errors -----------------------------------------------------------------------------------------------------------


def errors() -> None:
    """Pass a wrong argument on one rank. It raises on all, and afterwards all go on."""
    rank, world = dist.get_rank(), dist.get_world_size()
    case, config, last = whole(torch.float32), LossConfig.pmpo(), dist.get_world_size() - 1
    mine = case._replace(logits=vocabulary_part(case.logits, -1, rank, SIZES[world]))
    bad: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
        "dtype": (TypeError, "old_logp: expected dtype", {"old_logp": case.old_logp.long()}),
        "shape": (ValueError, "mask: expected shape", {"mask": case.mask[:, :-1]}),
        "device": (ValueError, "ref_logp: expected a tensor on cpu", {"ref_logp": case.ref_logp.to("meta")}),
        "id": (ValueError, f"token_ids: expected ids in \\[0, {V}\\)", {"token_ids": case.token_ids + V * case.mask}),
    }

    def raises(call: Callable[..., object], made: Call, kind: type[Exception], message: str, **options: Any) -> None:
        if rank == last:
            with pytest.raises(kind, match=message):
                call(made, config, **options)
        else:
            with pytest.raises(RuntimeError, match=f"^rank {last}: {kind.__name__}: {message}"):
                call(made, config, **options)

    for scheme in ("cp", "dp"):
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=(scheme,))
        for kind, message, change in bad.values():
            raises(Call.loss, case._replace(**change) if rank == last else case, kind, message, mesh=mesh)
            raises_head(raises, case._replace(**change) if rank == last else case, kind, message, mesh=mesh)
    for name, (kind, message, change) in bad.items():
        if name != "id":  # those of all ranks must be the same
            raises(Call.loss, mine._replace(**change) if rank == last else mine, kind, message, group=dist.group.WORLD)
    different = {
        "number of tokens": {name: getattr(mine, name)[:, :-1] for name in (*PER_TOKEN, "logits")},
        "number of trajectories": {name: x[:-1] for name, x in mine._asdict().items() if x is not None},
        "advantages, power, target_ess or denominator": {"advantages": mine.advantages + 1},
        "token_ids or another tensor of the tokens": {"token_ids": (mine.token_ids + 1) % V},
        "mask": {"mask": ~mine.mask},
        "optional arguments": {"ref_logp": None},
    }
    for name, change in different.items():
        made = mine._replace(**change) if rank == last else mine
        with pytest.raises(RuntimeError, match=f"{name}: expected the same on ranks"):
            made.loss(config, group=dist.group.WORLD)
    cp = init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
    with pytest.raises(RuntimeError, match="sequence_split: expected the same on ranks"):
        case.loss(config, mesh=cp, sequence_split="zigzag" if rank == last else "contiguous")
    with pytest.raises(ValueError if rank == last else RuntimeError, match="sequence_split: expected one of"):
        case.loss(config, mesh=cp, sequence_split="stripes" if rank == last else "contiguous")
    with pytest.raises(RuntimeError, match="options: expected the same on ranks"):
        mine.loss(LossConfig.gmpo() if rank == last else config, group=dist.group.WORLD)
    everywhere = mine._replace(token_ids=mine.token_ids + V * mine.mask)
    with pytest.raises(ValueError, match="token_ids: expected ids in"):
        everywhere.loss(config, group=dist.group.WORLD)
    same_result(mine.loss(config, group=dist.group.WORLD)[0], case.loss(config)[0], V, torch.float32)


def disagreements() -> None:
    """Pass on one rank something else than on the others that decides which collectives follow, or what comes of them. It is an
    error on all, no hang."""
    rank, world = dist.get_rank(), dist.get_world_size()
    last = rank == world - 1
    case, config, group = whole(torch.float32), LossConfig.pmpo(), dist.group.WORLD
    mine = case._replace(logits=vocabulary_part(case.logits, -1, rank, SIZES[world]))
    cp, dp = (init_device_mesh("cpu", (world,), mesh_dim_names=(name,)) for name in ("cp", "dp"))
    hidden, weight = head(torch.float32)
    part = vocabulary_part(weight, 0, rank, SIZES[world])
    policy = torch.ones(6, dtype=torch.bool)

    def frozen(h: Tensor) -> None:
        w = part.clone().requires_grad_()
        given = {"mask": mine.mask, "config": config, "group": group}
        linear_pmpo_loss(h.requires_grad_(not last), w, mine.token_ids, mine.old_logp, mine.advantages, **given)

    def ungraded() -> None:
        w = part.clone().requires_grad_()
        with torch.set_grad_enabled(not last):
            linear_pmpo_loss(hidden, w, mine.token_ids, mine.old_logp, mine.advantages, config=config, group=group)

    def entropies() -> None:
        given = {"mask": case.mask, "mesh": cp, "entropy": case.old_logp if last else None}
        pmpo_loss_from_logp(case.old_logp, case.old_logp, case.advantages, **given)

    D = {"denominator": 3.0} if last else {}
    calls: dict[str, Callable[[], object]] = {
        "denominator, given or not": lambda: case.loss(config, mesh=dp, **D),
        "denominator, given or not:": lambda: case.linear(hidden, weight, config, mesh=cp, **D),
        "advantages, power, target_ess or denominator": lambda: mine.loss(config, group=group, denominator=3.0 + last),
        "options": lambda: mine.loss(LossConfig.pmpo(temperature=1.0 + 0.1 * last), group=group),
        "options:": lambda: mine.linear(hidden, part, config, group=group, skip_zero_advantage=last),
        "options: ": lambda: mine.linear(hidden, part, config, group=group, logit_scale=1.0 + last),
        "options: e": lambda: entropies(),
        "options: ex": lambda: (mine._replace(logits=mine.logits.double()) if last else mine).loss(config, group=group),
        "token_ids or another": lambda: mine.loss(config, group=group, policy_mask=policy ^ last),
        "gradients that are wanted": lambda: frozen(hidden.clone()),
        "gradients that are wanted,": ungraded,
        "gradients that are wanted, impl": lambda: mine.loss(config, group=group, impl="reference" if last else "cpp"),
        "config.loss_agg_mode": lambda: denominator(case.mask.sum(1), LossConfig.dapo() if last else config, mesh=dp),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=name):
            call()
    same_result(mine.loss(config, group=group)[0], case.loss(config)[0], V, torch.float32)

    # what stands in masked slots may differ, and how a mask and ids are stored
    if last:
        slots = {
            name: torch.where(mine.mask, getattr(mine, name), 5 * rank)
            for name in ("old_logp", "token_ids", "ref_logp")
        }
        mine = mine._replace(**slots, mask=mine.mask.int())._replace(token_ids=slots["token_ids"].int())
    same_result(mine.loss(config, group=group)[0], case.loss(config)[0], V, torch.float32)


def raises_head(raises: Callable[..., None], case: Call, kind: type[Exception], message: str, **options: Any) -> None:
    hidden, weight = head(torch.float32)
    raises(lambda made, config, **given: made.linear(hidden, weight, config, **given), case, kind, message, **options)


def wrong_arguments() -> None:
    """Pass wrong groups. It raises before anything is exchanged."""
    world = dist.get_world_size()
    case = whole(torch.float32)
    cp, dp = (init_device_mesh("cpu", (world,), mesh_dim_names=(name,)) for name in ("cp", "dp"))
    config = LossConfig.pmpo()
    for message, options in (
        ("mesh: expected None when group is given", {"mesh": cp, "group": dist.group.WORLD}),
        ("group: expected a torch.distributed.ProcessGroup", {"group": "tp"}),
        ("mesh: expected a torch.distributed.device_mesh.DeviceMesh", {"mesh": dist.group.WORLD}),
        ('mesh: expected dimensions "tp", "cp", "dp"', {"mesh": init_device_mesh("cpu", (world,))}),
        ("mesh: expected dimensions", {"mesh": init_device_mesh("cpu", (world,), mesh_dim_names=("pp",))}),
        ("mesh: expected dimensions", {"mesh": init_device_mesh("cpu", (world,), mesh_dim_names=("dp_cp",))}),
        ('sequence_split: expected "contiguous" without a dim', {"mesh": dp, "sequence_split": "zigzag"}),
        ("sequence_split: expected 'contiguous' without", {"sequence_split": "zigzag"}),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            case.loss(config, **options)


def killed() -> None:
    """End a rank. The others get an error that says so, and do not wait."""
    case = whole(torch.float32)
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    with pytest.raises(RuntimeError, match="another rank has ended, or did not come within the group's timeout"):
        case.loss(LossConfig.pmpo(), mesh=mesh)
    os._exit(0)  # the group cannot be left in order any more


def collectives() -> None:
    """Count the collectives and what they send: it is what `network.collectives` says."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sent: list[tuple[str, int]] = []
    gather, reduce = dist.all_gather, dist.all_reduce

    def counted(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            x = args[1] if name == "all_gather" else args[0]
            sent.append((name, x.numel() * x.element_size()))
            return f(*args, **kwargs)

        return call

    ranks_module.dist.all_gather = counted("all_gather", gather)
    ranks_module.dist.all_reduce = counted("all_reduce", reduce)

    def compare(call: counts.Call, **dims: Any) -> None:
        """Compare calls and bytes of each operation since the last comparison."""
        found: dict[str, list[float]] = {}
        for c in network.collectives(counts.Head(H, V, element=4), counts.Scheme(**dims), call):
            of_operation = found.setdefault(c.operation, [0, 0])
            of_operation[0], of_operation[1] = of_operation[0] + c.count, of_operation[1] + c.count * c.payload
        assert {
            name: [sum(n == name for n, _ in sent), sum(size for n, size in sent if n == name)] for name, _ in sent
        } == found
        sent.clear()

    try:
        case, config = whole(torch.float32), LossConfig.pmpo()
        N, B = case.token_ids.numel(), len(case.advantages)
        agreed = ("all_gather", 16 * 8 + ranks_module.MESSAGE_BYTES)
        of_call = {"constants": 3, "checked": True}
        mine = case._replace(logits=vocabulary_part(case.logits, -1, rank, SIZES[world]))
        mine.loss(config, group=dist.group.WORLD)
        assert sent == [agreed, agreed, ("all_gather", 4 * 4 * N)]
        compare(counts.Call(N, B, **of_call), tp=world, path="logits")
        cp = init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
        at = pieces(8, rank, world, "contiguous")
        columns(case, at).loss(config, mesh=cp)
        assert sent == [agreed, agreed, ("all_gather", 8 * 7 * N // world)]
        compare(counts.Call(N // world, B, **of_call), cp=world, path="logits")
        dp = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
        case.loss(config, mesh=dp)
        assert sent == [agreed, agreed, ("all_reduce", 8)]
        compare(counts.Call(N, B, **of_call), dp=world, path="logits")

        hidden, weight = head(torch.float32)
        case, config = near(case, hidden, weight), LossConfig.pmpo(beta=0.1)  # even ones, and all have a gradient
        case = case._replace(mask=torch.ones_like(case.mask))
        for chunk in (16, 5):  # two trajectories in a chunk; each in two pieces, projected twice
            options = {"config": config, "max_chunk_tokens": chunk}
            case.linear(hidden, vocabulary_part(weight, 0, rank, SIZES[world]), group=dist.group.WORLD, **options)
            assert sum(size == 4 * N * H for _, size in sent) == 1
            compare(counts.Call(N, B, **of_call), tp=world, chunk=chunk)
            columns(case, at).linear(hidden[:, at], weight, mesh=cp, **options)
            compare(counts.Call(N // world, B, **of_call), cp=world, chunk=chunk)
            case.linear(hidden, weight, mesh=dp, **options)
            compare(counts.Call(N, B, **of_call), dp=world, chunk=chunk)
    finally:
        ranks_module.dist.all_gather, ranks_module.dist.all_reduce = gather, reduce


def docs() -> None:
    """Run the blocks of docs/scaling.md on how to call, in order."""
    text = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text()
    blocks = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "from prediction" not in b]
    assert len(blocks) == 4
    exec(compile("\n".join(blocks), "docs/scaling.md", "exec"), {})


def default_chunk() -> None:
    """Check the default chunk: where trajectories are split it is all of the rank's tokens, and each is projected once."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
    hidden, weight = head(torch.float64)
    mine = columns(near(whole(torch.float64), hidden, weight), pieces(8, rank, world, "contiguous"))
    at = pieces(8, rank, world, "contiguous")
    seen: list[int] = []
    project = Projection.project

    def counted(self: Projection, rows: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(rows))
        return project(self, rows)

    Projection.project = counted  # type: ignore[method-assign]
    try:
        mine.linear(hidden[:, at], weight, LossConfig.pmpo(), mesh=mesh)
    finally:
        Projection.project = project  # type: ignore[method-assign]
    assert seen == ([int(mine.mask[mine.advantages != 0].sum())] if mine.mask[mine.advantages != 0].any() else [])


def hosts() -> None:
    """Use a group whose network is the GPUs'. Arguments are agreed on over another one, which is made once."""
    world = dist.group.WORLD
    assert ranks_module.host_group(world) is world
    asked = dist.get_backend
    ranks_module.dist.get_backend = lambda group: "nccl"
    try:
        other = ranks_module.host_group(world)
        assert ranks_module.timeout_of(other) == ranks_module.timeout_of(world) == datetime.timedelta(seconds=55)
        assert other is not world
        assert ranks_module.host_group(world) is other
        case = whole(torch.float32)
        mine = case._replace(logits=vocabulary_part(case.logits, -1, dist.get_rank(), SIZES[dist.get_world_size()]))
        config = LossConfig.pmpo()
        same_result(mine.loss(config, group=world)[0], case.loss(config)[0], V, torch.float32)
    finally:
        ranks_module.dist.get_backend = asked


SCENARIOS = {
    f.__name__: f
    for f in (
        vocabulary, vocabulary_of_minus_infinity, vocabulary_options, dtensors, vocabulary_of_a_head, sequence, sequence_packed,
        sequence_of_a_head, sequence_options, sequence_from_logp, data, denominators, combinations, three_dimensions, errors, wrong_arguments,
        disagreements, collectives, docs, default_chunk, hosts, killed,
    )
}  # fmt: skip

if __name__ == "__main__":
    take_part(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], SCENARIOS, tuple(sys.argv[4:]), limit=110)
