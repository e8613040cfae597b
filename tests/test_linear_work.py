"""The fused LM head: which products it makes, in which chunks, and what it keeps in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from head_cases import CLIPPING, call, head_case, leaves_of, materialised, run_head
from hypothesis import given
from hypothesis import strategies as st
from time_and_memory import peak_memory
from torch.profiler import ProfilerActivity, profile

import pmpo_kernels.linear.chunks
import pmpo_kernels.linear.projection
from pmpo_kernels import LossConfig, linear_pmpo_loss
from pmpo_kernels.linear.chunks import FEWEST_TOKENS, default_chunk_tokens, even, pack
from pmpo_kernels.linear.projection import BLOCK_BYTES, HeadOptions, row_bytes

# --- work ------------------------------------------------------------------------------------------------------------


def products_of(run: Callable[[], object]) -> list[tuple[int, int, int]]:
    """(rows, inner, columns) of every matrix product in a call."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        run()
    found = []
    for event in trace.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = event.input_shapes[0 if event.name == "aten::mm" else 1 :][:2]
            found.append((a[0], a[1], b[1]))
    return found


@pytest.mark.parametrize(("chunk", "passes"), [(None, 1), (3, 2)])
def test_rows_without_work_enter_no_product(chunk: int | None, passes: int) -> None:
    """Forward: response tokens of trajectories with A != 0, twice where they are longer than a chunk and have a gradient.
    Backward: of these, tokens with a gradient."""
    head = head_case(torch.float32)
    V, H = head.weight.shape
    want = materialised(
        head._replace(case=head.case._replace(rollout_weights=torch.ones_like(head.case.old_logp))), CLIPPING, None
    )
    entering = head.case.mask & (head.case.advantages != 0)[:, None]
    has_gradient = want.terms[0].amax(-1) > 0
    assert 0 < has_gradient.sum() < entering.sum() < head.case.mask.sum() < head.case.mask.numel()
    leaves = leaves_of(head, True, True)
    found = products_of(lambda: call(head, leaves, max_chunk_tokens=chunk).backward())
    long = entering.sum(1) > (chunk or 99)
    again = int((has_gradient & long[:, None]).sum())
    assert (again > 0) == (passes == 2)
    assert sum(m for m, k, n in found if (k, n) == (H, V)) == entering.sum() + again
    assert sum(m for m, k, n in found if (k, n) == (V, H)) == has_gradient.sum()
    assert sum(k for m, k, n in found if (m, n) == (V, H)) == has_gradient.sum()
    limit, forward, backward = chunk or 99, 0, 0
    lengths, kept = entering.sum(1).tolist(), has_gradient.sum(1).tolist()
    for part in pack(lengths, limit):
        total, gradients = sum(lengths[part]), sum(kept[part])
        forward += 1 if 0 < total <= limit else math.ceil(total / limit) + math.ceil(gradients / limit)
        backward += math.ceil(gradients / limit)
    assert sum((k, n) == (H, V) for m, k, n in found) == forward
    assert sum((k, n) == (V, H) for m, k, n in found) == backward


@pytest.mark.parametrize("trained", [(True, False), (False, True), (False, False)])
def test_what_is_frozen_costs_nothing(trained: tuple[bool, bool]) -> None:
    head = head_case(torch.float32)
    V, H = head.weight.shape
    leaves = leaves_of(head, *trained)
    both = leaves_of(head, True, True)
    call(head, both).backward()
    found = products_of(lambda: call(head, leaves).backward() if any(trained) else call(head, leaves))
    assert any((k, n) == (V, H) for m, k, n in found) == trained[0]
    assert any((m, n) == (V, H) for m, k, n in found) == trained[1]
    for x, y in zip(leaves, both, strict=True):
        assert x.grad is None or torch.equal(x.grad, y.grad)
    with torch.no_grad():
        found = products_of(lambda: call(head, both))
    assert all((k, n) == (H, V) for m, k, n in found)
    assert found


def test_kl_and_entropy_terms_keep_zero_advantages() -> None:
    """Trajectories with A = 0 have a gradient then; without these terms, only on request are they looked at."""
    head = head_case(torch.float64)
    zero = head.case.advantages == 0
    seen = head.case.mask & zero[:, None]
    for config in (replace(CLIPPING, beta=0.1), replace(CLIPPING, entropy_coef=0.1)):
        out, _ = run_head(head, config, None)
        assert out.power.isfinite().all()
        assert (out.logp[seen] < 0).all()
    full, _ = run_head(head, CLIPPING, None, skip_zero_advantage=False)
    out, _ = run_head(head, CLIPPING, None)
    assert out.power.isnan().tolist() == out.ess.isnan().tolist() == zero.tolist()
    assert torch.equal(out.logp.isnan(), seen)
    assert torch.equal(out.entropy.isnan(), seen)
    assert torch.equal(out.logp[~seen], full.logp[~seen])
    assert torch.equal(out.clip_fraction, full.clip_fraction)
    same = {"policy_loss", "tokens", "trajectories", "clip_fraction", "clip_fraction_low", "clip_fraction_high"}
    for name in same:
        assert torch.equal(out.metrics[name], full.metrics[name]), name
    others = head._replace(case=head.case._replace(mask=head.case.mask & ~zero[:, None]))
    rest, _ = run_head(others, CLIPPING, None)
    for name in rest.metrics.keys() - same:
        assert torch.equal(out.metrics[name], rest.metrics[name]), name


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "half clipped", "softcap"])
def test_one_chunk_of_logits_at_a_time(kind: str) -> None:
    """Peak memory is one chunk's logits (two with a softcap) and the gradients, and what is of the size of a block of temporaries or
    of a chunk's hidden states, ids and logp. The backward pass scales in place."""
    N, V, H, chunk, dtype = 512, 65_536, 8, 128, torch.bfloat16 if kind == "bfloat16" else torch.float32
    hidden, weight = torch.randn(N, H).to(dtype).requires_grad_(), torch.randn(V, H).to(dtype).requires_grad_()
    ids, offsets = torch.randint(V, (N,)), torch.arange(0, N + 1, 64)
    options = {"cu_seqlens": offsets, "config": CLIPPING, "logit_softcap": 30.0 if kind == "softcap" else None}
    old_logp = linear_pmpo_loss(hidden, weight, ids, None, torch.ones(N // 64), **options).logp
    if kind == "half clipped":
        old_logp = old_logp - torch.rand(N).round()
        clipped = linear_pmpo_loss(hidden, weight, ids, old_logp, torch.ones(N // 64), **options).clip_fraction.mean()
        assert 0.4 < clipped < 0.6

    def peak(tokens: int) -> int:
        def run() -> None:
            out = linear_pmpo_loss(
                hidden, weight, ids, old_logp, torch.ones(N // 64), max_chunk_tokens=tokens, **options
            )
            (3 * out.loss).backward()

        hidden.grad = weight.grad = None
        return peak_memory(run, torch.device("cpu"))

    gradients = 4 * (N + V) * H
    block = BLOCK_BYTES["cpu"]
    temporaries = {"float32": 0, "bfloat16": 6 * V * H, "half clipped": block, "softcap": 2 * block}[kind]
    small = 64 * 8 * N + 4 * 4 * chunk * H
    buffers = 2 if kind == "softcap" else 1
    size = chunk * V * dtype.itemsize
    assert size > 2 * temporaries
    assert peak(chunk) <= buffers * size + gradients + temporaries + small
    assert peak(N) > buffers * N * V * dtype.itemsize  # the measurement sees logits
    if (
        kind == "bfloat16"
    ):  # of one chunk no float32 sum; on one thread, because each one has memory of its own in a product
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            assert peak(N) < N * V * 2 + 4 * V * H
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk", [None, 7])
def test_one_chunk_gives_the_weights_gradient_at_once(
    chunk: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one product, rounded once. Several are summed up in float32, here from blocks; so is float16, which is divided first."""
    monkeypatch.setattr(pmpo_kernels.linear.projection, "PRODUCT_BYTES", 1)
    head, config = head_case(dtype), LossConfig.grpo(clip="none")
    V, H = head.weight.shape
    gradients: list[torch.Tensor] = []
    found = products_of(lambda: gradients.extend(run_head(head, config, None, max_chunk_tokens=chunk)[1]))
    rows = [m for m, k, n in found if n == H and k not in (H, V)]
    if chunk or dtype == torch.float16:
        assert set(rows) == {1}
        return
    assert rows == [V]
    want = materialised(head, config, None)
    n, u = head.case.mask.numel(), 2.0**-24
    bound = want.terms[1] * (n + 2) * u + want.gradients[1].abs() * 2.0**-8
    assert ((gradients[1].double() - want.gradients[1]).abs() <= bound).all()


# --- chunks ----------------------------------------------------------------------------------------------------------


def ways(lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Tokens of the chunks of every way to cut the row of trajectories into chunks that fit, or are one too long with tokens."""
    for cuts in product((False, True), repeat=max(len(lengths) - 1, 0)):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(lengths)]
        parts = [lengths[a:b] for a, b in pairwise(edges) if a < b]
        if all(sum(part) <= max_tokens or sum(n > 0 for n in part) == 1 for part in parts):
            yield [sum(part) for part in parts]


def largest(sizes: list[int], max_tokens: int) -> int:
    return max((n for n in sizes if n <= max_tokens), default=0)


@given(st.lists(st.integers(0, 40), max_size=9), st.integers(1, 60))
def test_pack(lengths: list[int], max_tokens: int) -> None:
    """Every trajectory once, in order; of all ways with the fewest chunks one whose largest that fits is smallest."""
    chunks = pack(lengths, max_tokens)
    assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(len(lengths)))
    sizes, every = [sum(lengths[chunk]) for chunk in chunks], list(ways(lengths, max_tokens))
    assert sizes in every
    fewest = min(len(way) for way in every)
    assert len(sizes) == fewest
    assert largest(sizes, max_tokens) == min(largest(way, max_tokens) for way in every if len(way) == fewest)


def test_chunks_are_balanced() -> None:
    """Not full ones and a rest."""
    assert [500 * (c.stop - c.start) for c in pack([500] * 34, 16_384)] == [8500, 8500]
    assert [256 * (c.stop - c.start) for c in pack([256] * 60, 4096)] == [3840] * 4


@given(st.integers(1, 10**6), st.integers(1, 10**5))
def test_pieces_of_a_long_trajectory_are_even(tokens: int, max_tokens: int) -> None:
    size = even(tokens, max_tokens)
    pieces = -(-tokens // size)
    assert 1 <= size <= max_tokens
    assert pieces == -(-tokens // max_tokens)
    assert (size - 1) * pieces < tokens


def test_long_trajectories_are_projected_in_even_pieces() -> None:
    """7 tokens in chunks of 5: 4 and 3, and once more for the gradient of all of them."""
    head = head_case(torch.float32)
    V, H = head.weight.shape
    config = LossConfig.grpo(clip="none")
    leaves = leaves_of(head, True, True)
    found = products_of(lambda: call(head, leaves, config, max_chunk_tokens=5, mask=None).backward())
    trajectories = int((head.case.advantages != 0).sum())
    assert [m for m, k, n in found if (k, n) == (H, V)] == [4, 3] * 2 * trajectories


def test_default_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,024 tokens on a CPU, 16,384 elsewhere, within an eighth of the free memory; or the longest trajectory within a quarter; a
    power of two where memory decides."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(pmpo_kernels.linear.chunks, "available_memory", lambda device: 8 << 30)
    for device, enough in ((cpu, 1024), (gpu, 16_384)):
        assert default_chunk_tokens(100, 1000, device) == enough
        assert default_chunk_tokens(20_000, 1000, device) == 20_000
        assert default_chunk_tokens(5000, 1 << 40, device) == FEWEST_TOKENS
    assert default_chunk_tokens(5000, 1 << 20, cpu) == 2048
    assert default_chunk_tokens(5000, 3 << 19, cpu) == 1024
    assert default_chunk_tokens(100, 1 << 16, gpu) == 16_384
    assert default_chunk_tokens(100, (1 << 16) + 1, gpu) == 8192
    assert default_chunk_tokens(10_000, (1 << 16) + 1, gpu) == 10_000
    assert default_chunk_tokens(100, 1 << 20, gpu) == 1024
    assert default_chunk_tokens(1500, 1 << 20, gpu) == 1500
    assert default_chunk_tokens(5000, 1 << 20, gpu) == 2048
    monkeypatch.setattr(pmpo_kernels.linear.chunks, "available_memory", lambda device: None)
    assert default_chunk_tokens(5000, 1 << 40, cpu) == 5000
    assert default_chunk_tokens(5000, 1 << 40, gpu) == 16_384
    head = HeadOptions(1.0, None, 1.0, torch.bfloat16, [True, True, True], None, True)
    assert row_bytes(50_257, head) == 2 * 50_304
    assert row_bytes(50_257, head._replace(logit_softcap=30.0)) == 4 * 50_304
