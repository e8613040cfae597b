"""The fused LM head: which products it makes, in which chunks, and what it keeps in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from head_cases import CLIPPING, call, head_case, leaves_of, materialised, run_head
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import pmpo_kernels.chunks
import pmpo_kernels.projection
from pmpo_kernels import linear_pmpo_loss
from pmpo_kernels.chunks import FEWEST_TOKENS, default_chunk_tokens, pack
from pmpo_kernels.demo.cost import peak_memory
from pmpo_kernels.projection import BLOCK_BYTES, HeadOptions, row_bytes

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
    of a chunk's hidden states, ids and logp."""
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
            out.loss.backward()

        hidden.grad = weight.grad = None
        return peak_memory(run, torch.device("cpu"))

    # given away by the backward pass, since there is nothing to scale; in bfloat16 made of the float32 sum and scaled
    gradients = 4 * (N + V) * H
    block = BLOCK_BYTES["cpu"]
    temporaries = {"float32": 0, "bfloat16": 6 * V * H, "half clipped": block, "softcap": 2 * block}[kind]
    small = 64 * 8 * N + 4 * 4 * chunk * H
    buffers = 2 if kind == "softcap" else 1
    size = chunk * V * dtype.itemsize
    assert size > 2 * temporaries
    assert peak(chunk) <= buffers * size + gradients + temporaries + small
    assert peak(N) > buffers * N * V * dtype.itemsize  # the measurement sees logits


# --- chunks ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40)), st.integers(1, 60))
def test_pack(lengths: list[int], max_tokens: int) -> None:
    """Every trajectory once, in order; no chunk too long unless one trajectory is; none that the next one fits into."""
    chunks = list(pack(lengths, max_tokens))
    assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(len(lengths)))
    for chunk in chunks:
        assert sum(lengths[chunk]) <= max_tokens or sum(n > 0 for n in lengths[chunk]) == 1
    for a, b in pairwise(chunks):
        assert sum(lengths[a]) + lengths[b.start] > max_tokens


def test_default_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest trajectory or 1,024 tokens on a CPU, but at most a quarter of the free memory; a power of two then."""
    cpu, free = torch.device("cpu"), 8 << 30
    monkeypatch.setattr(pmpo_kernels.chunks, "available_memory", lambda device: free)
    assert default_chunk_tokens(100, 1000, cpu) == 1024
    assert default_chunk_tokens(5000, 1000, cpu) == 5000
    assert default_chunk_tokens(5000, 1 << 20, cpu) == 2048
    assert default_chunk_tokens(5000, 3 << 19, cpu) == 1024
    assert default_chunk_tokens(5000, 1 << 40, cpu) == FEWEST_TOKENS
    monkeypatch.setattr(pmpo_kernels.chunks, "available_memory", lambda device: None)
    assert default_chunk_tokens(5000, 1 << 40, cpu) == 5000
    head = HeadOptions(1.0, None, 1.0, torch.bfloat16, [True, True, True], None, True)
    assert row_bytes(50_257, head) == 2 * 50_304
    assert row_bytes(50_257, head._replace(logit_softcap=30.0)) == 4 * 50_304
