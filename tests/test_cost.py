"""The cost model beside what runs: products, bytes and memory here, collectives in `ranks_worker.py collectives`."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from counts import Call, Head, Scheme, eager_bytes, largest_chunk, memory, pass_bytes, product_bytes, products
from network import Collective, collectives, weight_collectives
from prediction import H100, H200, MODELS, predict
from time_and_memory import peak_memory
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pmpo_kernels import LossConfig, linear_pmpo_loss, pmpo_loss
from pmpo_kernels.verification.baseline import eager_pmpo_loss

ROOT = Path(__file__).parent.parent
B, T, V, H = 6, 8, 72, 16
HEAD = Head(H, V, element=4)
LARGE_PAGE = 2**21


class Batch:
    """Trajectories of T tokens, the last two with A = 0; of the others the first 3 tokens are clipped."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(B * T, H, generator=random).requires_grad_()
        self.weight = torch.randn(V, H, generator=random).requires_grad_()
        self.ids = torch.randint(V, (B * T,), generator=random)
        logp = (self.hidden @ self.weight.T).detach().log_softmax(-1).gather(-1, self.ids[:, None])[:, 0]
        self.old_logp = logp - (torch.arange(T) < 3).float().repeat(B)
        self.advantages = torch.tensor([1.0, 2.0, 3.0, 1.0, 0.0, 0.0])
        self.options: dict[str, Any] = {"cu_seqlens": torch.arange(0, B * T + 1, T), "config": LossConfig.grpo()}

    def fused(self, chunk: int) -> None:
        given = (self.hidden, self.weight, self.ids, self.old_logp, self.advantages)
        linear_pmpo_loss(*given, max_chunk_tokens=chunk, **self.options).loss.backward()

    def from_logits(self, inplace: bool = False) -> None:
        logits = torch.nn.functional.linear(self.hidden, self.weight)
        pmpo_loss(logits, self.ids, self.old_logp, self.advantages, inplace=inplace, **self.options).loss.backward()


def operators(run: Callable[[], object]) -> list[tuple[str, list[Any]]]:
    """Products and stages of a call, with the shapes of their arguments."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        run()
    names = ("aten::mm", "aten::addmm", "aten::addmm_", "pmpo_kernels::")
    return [(event.name, event.input_shapes) for event in trace.events() if event.name.startswith(names)]


def numel(shape: list[int]) -> int:
    return torch.Size(shape).numel()


def counted(found: list[tuple[str, list[Any]]]) -> tuple[int, int, int]:
    """FLOPs of the products, their bytes, and bytes of the stages' passes over logits; elements of 4 bytes."""
    flops = elements = passes = 0
    for name, shapes in found:
        if name.startswith("aten::"):
            a, b = shapes[0 if name == "aten::mm" else 1 :][:2]
            flops += 2 * a[0] * a[1] * b[1]
            # addmm_ reads what it adds to and writes it
            elements += numel(a) + numel(b) + a[0] * b[1] * (1 if name == "aten::mm" else 2)
        elif "token_logp" in name:
            passes += numel(shapes[0])
        elif "dlogits" in name:
            passes += 2 * numel(shapes[0])
    return flops, 4 * elements, 4 * passes


ENTERING = Call(B * T, 4, rows=4 * T, gradient_rows=4 * (T - 3))


@pytest.mark.parametrize("chunk", [100, 16, 12, 8, 5, 4, 1])
def test_fused_head(chunk: int) -> None:
    """One chunk of all, two trajectories or one of them in a chunk, and trajectories that are projected twice."""
    scheme = Scheme(chunk=chunk)
    found = counted(operators(lambda: Batch().fused(chunk)))
    batch_itself = 2 * B * T * H * V, 4 * (B * T * (H + V) + V * H), 0  # the product by which it makes its log-probs
    found = tuple(a - b for a, b in zip(found, batch_itself, strict=True))
    assert found == (
        products(HEAD, scheme, ENTERING),
        product_bytes(HEAD, scheme, ENTERING),
        pass_bytes(HEAD, scheme, ENTERING),
    )


@pytest.mark.parametrize("path", ["logits", "in place"])
def test_head_and_loss_from_logits(path: str) -> None:
    """That rows without a gradient are not read is tested in test_promises.py; here each has one."""
    batch, scheme, call = Batch(), Scheme(path=path), Call(B * T, B)
    batch.old_logp, batch.advantages = None, torch.ones(B)
    found = counted(operators(lambda: batch.from_logits(path == "in place")))
    assert found == (products(HEAD, scheme, call), product_bytes(HEAD, scheme, call), pass_bytes(HEAD, scheme, call))
    with FlopCounterMode(display=False) as flops:
        batch.from_logits(path == "in place")
    assert flops.get_total_flops() == products(HEAD, scheme, call)


class BytesOfLogits(TorchDispatchMode):
    """Bytes of all arguments and results of the size of the logits, of operators that read or write them whole."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.bytes = elements, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("gather", "scatter_add", "scatter_add_", "detach", "empty_like", "new_empty") or func.is_view:
            return out  # an element a row, or none
        for x in (*args, *(out if isinstance(out, tuple) else (out,))):
            if isinstance(x, Tensor) and x.numel() == self.elements:
                self.bytes += x.numel() * x.element_size()
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_eager_loss(dtype: torch.dtype) -> None:
    logits = torch.randn(B, T, V, dtype=dtype, requires_grad=True)
    ids, mask = torch.randint(V, (B, T)), torch.ones(B, T, dtype=torch.bool)
    with BytesOfLogits(B * T * V) as found:
        eager_pmpo_loss(logits, ids, torch.zeros(B, T) - 4, torch.ones(B), mask, LossConfig.grpo()).backward()
    head = Head(H, V, dtype.itemsize)
    assert found.bytes == pass_bytes(head, Scheme(path="eager"), Call(B * T, B)) == B * T * V * eager_bytes(head)


def measured(pattern: str) -> list[tuple[dict[str, Any], dict[str, int]]]:
    """Cases and peaks by variant of the files in benchmarks/results."""
    files = sorted((ROOT / "benchmarks" / "results").rglob(pattern))
    assert files
    found = [json.loads(file.read_text()) for file in files]
    return [(c["case"], {row["name"]: row["peak_bytes"] for row in c["results"]}) for c in found]


def test_memory_of_the_loss_as_measured() -> None:
    """Beyond the logits. Resident memory is counted in pages, and some are there before."""
    for case, peaks in measured("bench-*.json"):
        tokens, s = case["batch"] * case["tokens"], 2 if case["dtype"] == "bfloat16" else 4
        head = Head(0, case["vocab"], s)
        for name, path in (("eager PyTorch", "eager"), ("cpp", "logits"), ("cpp, in place", "in place")):
            want = memory(head, Scheme(path=path), Call(tokens, case["batch"])) - tokens * case["vocab"] * s
            assert peaks[name] == pytest.approx(want, abs=LARGE_PAGE), (case, name)


def test_memory_of_the_head_as_measured() -> None:
    """The largest chunk of trajectories of different lengths is told with the peak; a chunk's hidden states come on top."""
    files = [json.loads(file.read_text()) for file in (ROOT / "benchmarks" / "results").rglob("head-*.json")]
    cases = [file for file in files if not file["case"]["zero_advantage"]]
    assert cases
    for file in cases:
        case, rows = file["case"], {row["name"]: row for row in file["results"]}
        head, tokens = Head(case["hidden"], case["vocab"], 4), file["tokens"]["response"]
        call = Call(tokens, case["batch"])
        for name, path in (("eager PyTorch", "eager"), ("head + pmpo_loss", "in place")):
            if name in rows:
                assert rows[name]["peak_bytes"] == pytest.approx(memory(head, Scheme(path=path), call), abs=LARGE_PAGE)
        rows["linear_pmpo_loss"]["largest_chunk"] = file["tokens"]["largest_chunk"]
        for row in rows.values():
            if "largest_chunk" in row:
                largest, scheme = row["largest_chunk"], Scheme(chunk=row["chunk"] or 1024)
                want = memory(head, scheme, call) + (largest - largest_chunk(scheme, call)) * case["vocab"] * 4
                assert want - LARGE_PAGE < row["peak_bytes"] < want + 5 * largest * case["hidden"] * 4


def test_memory_of_the_head_in_this_process() -> None:
    """By the allocator's calls; beyond the model the numbers of tokens, and hidden states of a chunk."""
    N, wide, narrow = 256, 16_384, 32
    hidden, weight = torch.randn(N, narrow).requires_grad_(), torch.randn(wide, narrow).requires_grad_()
    ids, offsets = torch.randint(wide, (N,)), torch.arange(0, N + 1, 32)

    def run() -> None:
        hidden.grad = weight.grad = None
        given = (hidden, weight, ids, None, torch.ones(N // 32))
        linear_pmpo_loss(*given, cu_seqlens=offsets, max_chunk_tokens=64).loss.backward()

    run()
    want = memory(Head(narrow, wide, 4), Scheme(chunk=64), Call(N, N // 32))
    hidden.grad = weight.grad = None
    assert want <= peak_memory(run, torch.device("cpu")) < want + 64 * 8 * N + 5 * 4 * 64 * narrow


@pytest.mark.parametrize(("chunk", "largest"), [(64, 64), (100, 96), (200, 128), (256, 256)])
def test_memory_of_one_chunk_and_of_even_ones(chunk: int, largest: int) -> None:
    """bfloat16: of one chunk no float32 sum; 3 chunks of 96, 96 and 64 tokens; 2 of 128."""
    head, call = Head(32, 16_384), Call(256, 8)
    gradients = (256 + 16_384) * 32 * 2
    summed = 0 if chunk == 256 else 16_384 * 32 * 2
    assert memory(head, Scheme(chunk=chunk), call) == gradients + summed + max(largest * 16_384 * 2, summed)


# --- what has no run here: by hand ------------------------------------------------------------------------------------


def test_rings() -> None:
    """Of 4 ranks and 120 bytes: a gather of all sends the own part to 3, a reduction 3/4 of the tensor once or twice."""
    for operation, payload, sent in (("all_gather", 30, 90), ("reduce_scatter", 120, 90), ("all_reduce", 120, 180)):
        assert Collective("x", operation, 4, 1, payload).sent == sent
        assert Collective("x", operation, 4, 1, payload, count=3).sent == 3 * sent
        assert Collective("x", operation, 1, 1, payload).seconds(H100) == 0
    assert Collective("x", "all_gather", 4, 1, 1e9).seconds(H100) == pytest.approx(2 * 10e-6 + 3e9 / (0.8 * 450e9))
    assert Collective("x", "all_gather", 4, 1, 1, host=True).seconds(H100) == pytest.approx(3 * 50e-6)


def test_links() -> None:
    """8 GPUs a node: within it, through one card, through two, through all."""
    assert [H100.link(*group) / 0.8e9 for group in ((8, 1), (2, 4), (16, 8), (16, 4), (64, 1))] == [
        450,
        450,
        50,
        100,
        400,
    ]


def test_a_head_by_hand() -> None:
    """7B, a call of 1,000 tokens in one trajectory from logits on 2 x 4 ranks."""
    head, scheme, call = MODELS[0].head, Scheme(tp=2, dp=4, path="logits"), Call(1000, 1)
    assert products(head, scheme, call) == 3 * 2 * 1000 * 3584 * 76_032
    assert pass_bytes(head, scheme, call) == 3 * 1000 * 76_032 * 2
    sums = {c.what: c.sent for c in collectives(head, scheme, call) if not c.host}
    assert sums == {"log-sum-exp": 16_000, "denominator": 12}
    gather, scatter = weight_collectives(scheme, 3584 * 152_064, 2, rounds=1)
    assert gather.sent == 3 / 4 * 3584 * 76_032 * 2
    assert scatter.sent == 2 * gather.sent


def test_schemes_divide_the_same_work() -> None:
    """FLOPs a GPU are the batch's over the GPUs, whatever the scheme, but for what is projected twice."""
    for model, path, (tp, cp) in itertools.product(MODELS, ("logits", "fused"), ((1, 1), (8, 1), (1, 8), (2, 4))):
        scheme = Scheme(tp=tp, cp=cp, dp=64 // tp // cp, path=path, chunk=1 << 20)
        found = predict(model, scheme, H100, 64 * 2**20)
        assert found.flops == pytest.approx(6 * model.head.hidden * model.head.vocabulary * 2**20)
        twice = predict(model, replace(scheme, chunk=4096), H100, 64 * 2**20)
        assert twice.flops / found.flops == pytest.approx(4 / 3 if path == "fused" and cp > 1 else 1)


def test_more_bandwidth_shortens_the_passes_alone() -> None:
    slow, fast = (predict(MODELS[0], Scheme(dp=64, path="logits"), device, 1e7) for device in (H100, H200))
    assert slow.passes / fast.passes == pytest.approx(4.8 / 3.35)
    assert (slow.products, slow.weight, slow.below) == (fast.products, fast.weight, fast.below)


def test_the_predictions_of_the_docs_are_the_models() -> None:
    program = ROOT / "benchmarks" / "scaling" / "tables.py"
    done = subprocess.run([sys.executable, str(program), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_example_of_the_docs_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.S)
    (block,) = (block for block in blocks if "from prediction" in block)
    exec(compile(block, "docs/scaling.md", "exec"), {})
    assert "of the step" in capsys.readouterr().out
