"""The kernels touch what belongs to their arguments and nothing else: `guards.py` around every launch, for every kind of tail.

The results have the same bits whatever stands around the tensors: NaN (bytes 0xFF: as an id -1, as a mask true), large numbers
(0x7B: 1e36, as an id far too large), zeros (as a mask false).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace

import compute_sanitizer
import pytest
import torch
import triton
import triton.language as tl
from conftest import CONFIGURATIONS, device_of
from guards import WRITES, Guard, guarded, same_bytes
from helpers import run
from torch import Tensor

from pmpo_kernels import (
    LossConfig,
    PMPOOutput,
    linear_pmpo_loss,
    pmpo_loss,
    pmpo_loss_from_logp,
    reference,
    solve_power,
    token_logp,
)
from pmpo_kernels.batch import Batch
from pmpo_kernels.contract import ELSEWHERE, compute_dtype
from pmpo_kernels.impls import interpreted
from pmpo_kernels.ops import stage
from pmpo_kernels.triton.launch import BLOCK_TOKENS, STEP_TOKENS
from pmpo_kernels.verification import Case, make_case

pytestmark = pytest.mark.skipif(
    not interpreted(), reason="on a GPU compute-sanitizer watches: tools/compute_sanitizer.py"
)
PATTERNS = (0xFF, 0x7B, 0x00)
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
MODULES = [
    importlib.import_module(f"pmpo_kernels.triton.{name}")
    for name in ("token_logp", "trajectory", "dlogits", "aggregate", "scale")
]
KERNELS = {name: kernel for module in MODULES for name, kernel in vars(module).items() if name.endswith("_kernel")}
(LAUNCHER,) = {type(kernel) for kernel in KERNELS.values()}
STAGES = ("token_logp", "trajectory", "aggregate", "dlogits")
ALL_TERMS = CONFIGURATIONS["pmpo, all terms"]
DEVICE = device_of("triton")


@pytest.fixture(params=["triton", "cpp"])
def impl(request: pytest.FixtureRequest) -> str:
    """The implementations with kernels of their own."""
    return str(request.param)


def kernels_of(stage_name: str, impl: str) -> set[str]:
    if impl == "cpp":
        return {f"{stage_name}.cpp"}
    if stage_name == "trajectory":
        return {f"_trajectory_{part}_kernel" for part in ("sums", "power", "gradient")}
    direction = "bwd" if stage_name.startswith(("dlogits", "scale")) else "fwd"
    return {f"_{stage_name.removesuffix('_')}_{direction}_kernel"}


def check(impl: str, stages: tuple[str, ...], call: Callable[[], list[Tensor]], *more: str) -> None:
    """The call runs these stages, and returns the same bits without guards and with each pattern."""
    results = []
    for pattern in PATTERNS:
        with guarded(pattern, LAUNCHER) as guard:
            results.append(call())
        assert guard.kernels == set().union(*(kernels_of(name, impl) for name in stages), more)
        assert guard.elements > 0 or impl == "cpp"
    want = call()  # last: a kernel that is wrong is stopped before
    for pattern, got in zip(PATTERNS, results, strict=True):
        for i, (a, b) in enumerate(zip(want, got, strict=True)):
            assert same_bytes(a, b), f"result {i} depends on what stands around the tensors (0x{pattern:02X})"


def loss(case: Case, config: LossConfig, impl: str, **options: object) -> list[Tensor]:
    """Everything that a call returns, and the gradient of its logits."""
    out, grad = run(case, config, impl, **options)
    return [out.loss.detach(), *out.metrics.values(), *(x.detach() for x in out[2:]), grad]


@pytest.mark.parametrize(
    ("V", "dtype"),
    [(1, torch.float32), (40, torch.bfloat16), (64, torch.float16), (67, torch.float64), (1003, torch.float32)],
    ids=str,
)
def test_vocabularies(impl: str, dtype: torch.dtype, V: int) -> None:
    """A vocabulary of one, partial blocks, a whole one; masked rows, an empty trajectory, one of a token, one with A = 0."""
    case = make_case(dtype, B=4, T=3, V=V, device=device_of(impl))
    policy = case.ref_logp < case.old_logp
    check(impl, STAGES, lambda: loss(case, ALL_TERMS, impl, policy_mask=policy))


@pytest.mark.parametrize("rows", [1, 2])
def test_rows_shared_by_programs(rows: int) -> None:
    """A last block of one column; the partial results of each program in scratch of their own, none of the second row, which is
    masked."""
    V = 8193  # 1 more than two blocks of float32
    case = make_case(torch.float32, B=rows, T=1, V=V, device=DEVICE)
    check("triton", STAGES, lambda: loss(case, ALL_TERMS, "triton"), "_token_logp_merge_kernel")


SHAPES = {
    "one token": (1, 1),
    "one trajectory": (1, 5),
    "a token each": (3, 1),
}


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("config", ["dapo", "sequence clip, dual, k2"])
def test_few_tokens(impl: str, name: str, config: str) -> None:
    B, T = SHAPES[name]
    case = make_case(torch.float32, B=B, T=T, V=19, device=device_of(impl))
    check(impl, STAGES, lambda: loss(case, CONFIGURATIONS[config], impl))


def test_inputs_that_are_not_there(impl: str) -> None:
    """On-policy, without any optional tensor: what stands in for them is not read."""
    case = make_case(torch.float32, B=3, T=4, V=19, device=device_of(impl))

    def call() -> list[Tensor]:
        z = case.logits.clone().requires_grad_()
        out = pmpo_loss(z, case.token_ids, None, case.advantages, config=LossConfig.grpo(), impl=impl)
        return [out.loss.detach(), *torch.autograd.grad(out.loss, z)]

    check(impl, STAGES, call)


@pytest.mark.parametrize("given", ["power", "target_ess"])
def test_numbers_a_trajectory(impl: str, given: str) -> None:
    case = make_case(torch.float32, B=4, T=3, V=19, device=device_of(impl))
    values = torch.linspace(1.0, 2.0, 4, device=device_of(impl))
    check(impl, STAGES, lambda: loss(case, LossConfig.pmpo(), impl, **{given: values}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_strided_rows(impl: str, dtype: torch.dtype, offset: int) -> None:
    """T + 1 positions of wider rows, which begin anywhere: the rest of them is a band too."""
    case = make_case(dtype, B=3, T=4, V=37, device=device_of(impl))
    wide = case.logits.new_zeros(3, 5, 37 + 8)
    rows = wide[..., offset : offset + 37]
    rows[:, :4] = case.logits
    noise = case.ref_logp - case.old_logp

    def call() -> list[Tensor]:
        saved = stage("token_logp", impl)(rows, case.token_ids, case.mask, 0.7)
        gradient = stage("dlogits", impl)(rows, case.token_ids, case.mask, *saved[1:], noise, 0.1 * noise, 0.7)
        return [*saved, gradient]

    check(impl, ("token_logp", "dlogits"), call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [*range(1, 10), 37, 1003])
def test_gradients_in_place(impl: str, dtype: torch.dtype, V: int) -> None:
    """Between other rows, at every distance from a 16-byte boundary; a row with a gradient beside one without."""
    case = make_case(dtype, B=1, T=3, V=V, device=device_of(impl))
    g = torch.tensor([[0.7, 0.0, -0.3]], dtype=case.old_logp.dtype, device=device_of(impl))
    saved = reference.token_logp(case.logits, case.token_ids, None, 1.0)[1:]
    for offset in range(1, 16 // dtype.itemsize) if V in (3, 37) else (1,):

        def call(offset: int = offset) -> list[Tensor]:
            wide = case.logits.new_full((1, 3, V + 16), 7.0)
            rows = wide[..., offset : offset + V]
            rows.copy_(case.logits)
            stage("dlogits_", impl)(rows, case.token_ids, None, *saved, g, 0.1 * g, 1.0)
            return [wide]

        check(impl, ("dlogits_",), call)


@pytest.mark.parametrize("inplace", [False, True])
def test_packed_rows(impl: str, inplace: bool) -> None:
    """The whole call, also where the gradient replaces the logits."""
    case = make_case(torch.bfloat16, B=4, T=4, V=37, device=device_of(impl))
    keep, lengths = case.mask, case.mask.sum(1)
    packed = Case(*(t[keep] if t.dim() > 1 else t for t in case))
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
    last = "dlogits_" if inplace else "dlogits"

    def call() -> list[Tensor]:
        return loss(packed, ALL_TERMS, impl, mask=None, cu_seqlens=offsets, inplace=inplace)

    check(impl, ("token_logp", "trajectory", "aggregate", last), call)


@pytest.mark.parametrize("length", [BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1, STEP_TOKENS + 1])
def test_long_trajectories(impl: str, length: int) -> None:
    """A block of tokens less one, whole, and one more, several, with a short trajectory on either side."""
    device, N = device_of(impl), length + 4
    random = torch.Generator().manual_seed(0)
    logp, old_logp, ref_logp, entropy = (torch.randn(4, N, generator=random) / 4).to(device)
    weights, mask = (0.1 * entropy).exp(), ref_logp > -0.3
    offsets = torch.tensor([0, 3, N - 1, N], device=device)
    advantages = torch.tensor([1.0, -1.0, 0.5], device=device)

    def call() -> list[Tensor]:
        leaf, leaf_entropy = logp.clone().requires_grad_(), entropy.clone().requires_grad_()
        out = pmpo_loss_from_logp(
            leaf, old_logp, advantages, mask=mask, cu_seqlens=offsets, ref_logp=ref_logp, rollout_weights=weights,
            entropy=leaf_entropy, config=replace(ALL_TERMS, temperature=1.0), impl=impl,
        )  # fmt: skip
        return [out.loss.detach(), out.power, out.ess, *torch.autograd.grad(out.loss, (leaf, leaf_entropy))]

    check(impl, ("trajectory", "aggregate"), call)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_linear_loss(impl: str, softcap: float | None) -> None:
    """The buffer's rows are wider than the vocabulary; chunks smaller than a trajectory."""
    case = make_case(torch.float32, B=3, T=4, V=67, device=device_of(impl))
    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 4, 8, generator=random), torch.randn(67, 8, generator=random)

    def call() -> list[Tensor]:
        leaves = [x.to(device_of(impl), copy=True).requires_grad_() for x in (hidden, weight)]
        out = linear_pmpo_loss(
            *leaves, case.token_ids, case.old_logp, case.advantages, mask=case.mask, ref_logp=case.ref_logp,
            config=ALL_TERMS, logit_softcap=softcap, max_chunk_tokens=3, impl=impl,
        )  # fmt: skip
        return [out.loss.detach(), *torch.autograd.grad(out.loss, leaves)]

    of_triton = ("scale_",) if impl == "triton" else ()
    check(impl, ("token_logp", "trajectory", "aggregate", "dlogits_", *of_triton), call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 4096, 4099, 2 * 4096 - 1])
def test_scale(size: int, dtype: torch.dtype) -> None:
    """A part of a block, whole ones, one with a rest."""
    factor = torch.tensor(0.3, dtype=compute_dtype(dtype), device=DEVICE)

    def call() -> list[Tensor]:
        gradient = torch.linspace(-1, 1, size, device=DEVICE).to(dtype)
        stage("scale_", "triton")(gradient, factor)
        return [gradient]

    check("triton", ("scale_",), call)


def test_scale_by_1_touches_nothing() -> None:
    gradient, one = torch.randn(9999, device=DEVICE), torch.ones((), device=DEVICE)
    with guarded(0xFF, LAUNCHER) as guard:
        stage("scale_", "triton")(gradient, one)
    programs = -(-9999 // 4096)
    assert guard.elements == programs  # each reads the factor


def test_log_probs_alone(impl: str) -> None:
    case = make_case(torch.float32, B=2, T=3, V=37, device=device_of(impl))

    def call() -> list[Tensor]:
        z = case.logits.clone().requires_grad_()
        out = token_logp(z, case.token_ids, mask=case.mask, temperature=0.7, impl=impl)
        return [out.logp.detach(), *torch.autograd.grad(out.logp.sum() + out.entropy.sum(), z)]

    check(impl, ("token_logp", "dlogits"), call)


def test_solve_power() -> None:
    log_weights = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    offsets, target, mask = torch.tensor([0, 4, 4, 9]), torch.tensor([3.0, 1.0, 4.0]), log_weights < 1

    def call() -> list[Tensor]:
        return [solve_power(log_weights, target, mask=mask, cu_seqlens=offsets, impl="cpp")]

    check("cpp", ("solve_power",), call)


@pytest.mark.parametrize("V", [37, 8193])
def test_ids_that_nobody_checked(V: int) -> None:
    """On a GPU ids are not checked, called directly neither: nothing is read at them, and their token gets NaN."""
    token_logp_kernels, _, dlogits_kernels, *_ = MODULES
    case = make_case(torch.float32, B=1, T=4, V=V, device=DEVICE)
    ids = torch.tensor([[V, -1, 2**40, 0]], device=DEVICE)
    g = torch.ones(1, 4, device=DEVICE)

    def call() -> list[Tensor]:
        saved = token_logp_kernels.token_logp(case.logits, ids, None, 1.0)
        assert saved[0].isnan().tolist() == [[True] * 3 + [False]]
        gradient = dlogits_kernels.dlogits(case.logits, ids, None, *saved[1:], g, None, 1.0)
        elsewhere = dlogits_kernels.dlogits(case.logits, ids * 0 + ELSEWHERE, None, *saved[1:], g, None, 1.0)
        assert bool(gradient[0, :3].isnan().all())
        return [*saved, gradient, elsewhere]

    merge = () if V == 37 else ("_token_logp_merge_kernel",)
    check("triton", ("token_logp", "dlogits"), call, *merge)


@pytest.mark.parametrize(
    ("N", "offsets"),
    [
        (6, [0, 9, 6]), (6, [-5, 3, 99]), (6, [2**40, -(2**40), 6]), (6, [4, 2, 1]), (6, [-9, -8, -7]),
        (3 * BLOCK_TOKENS + 5, [2 * BLOCK_TOKENS, 2**40, 7]), (3 * BLOCK_TOKENS + 5, [-1, BLOCK_TOKENS + 9, -1]),
        (3 * BLOCK_TOKENS + 5, [700, 0, 900]),
    ],
    ids=str,
)  # fmt: skip
def test_offsets_that_nobody_checked(N: int, offsets: list[int]) -> None:
    """On a GPU offsets are not checked, called directly neither: nothing is read or written outside of the tokens."""
    logp = torch.linspace(-1, 1, N, device=DEVICE)
    options = LossConfig.pmpo().trajectory_options(has_power=False, has_target_ess=False)
    for pattern in PATTERNS:
        with guarded(pattern, LAUNCHER) as guard:
            batch = Batch(torch.ones(2, device=DEVICE), torch.tensor(offsets, device=DEVICE), old_logp=-logp)
            MODULES[1].trajectory(logp, None, batch, options)
        assert guard.kernels == kernels_of("trajectory", "triton")


def test_what_compute_sanitizer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """tools/compute_sanitizer.py runs every kernel, and the loss with every option that reaches one; here on smaller batches."""
    assert set(KERNELS) == {name for name in WRITES if not name.endswith(".cpp")}
    given: set[str] = set()

    def recorded(*args: Tensor, **kwargs: object) -> PMPOOutput:
        given.update(name for name, value in kwargs.items() if value is not None and value is not False)
        return pmpo_loss(*args, **kwargs)

    monkeypatch.setattr(compute_sanitizer, "pmpo_loss", recorded)
    with guarded(0xFF, LAUNCHER) as guard:
        for call in compute_sanitizer.FURTHER.values():
            call(compute_sanitizer.make_batch(40, 3, torch.bfloat16, DEVICE))
        compute_sanitizer.run(8193, 1, torch.float32, True, True, compute_sanitizer.CONFIGS["pmpo"], DEVICE)
    assert guard.kernels == set(KERNELS)
    on_the_host = {"denominator", "group", "mesh", "sequence_split"}
    options = {p.name for p in inspect.signature(pmpo_loss).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert given == options - on_the_host


@triton.jit
def _copy_kernel(x_ptr, out_ptr, scratch_ptr, n, more_reads, more_writes, in_place, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n + more_reads, other=0.0)
    tl.store(out_ptr + offs, x + tl.sum(x, axis=0), mask=offs < n + more_writes)
    tl.store(x_ptr + offs, x + 1, mask=offs < in_place)


def copy(n: int = 5, reads: int = 0, writes: int = 0, in_place: int = 0) -> list[Tensor]:
    """A kernel that reads and writes so many elements more than there are, and so many of its input's."""
    wide = torch.ones(n, 2, device=DEVICE)
    out = torch.empty(n, device=DEVICE)
    _copy_kernel[(1,)](wide.flatten()[:n], out, out, n, reads, writes, in_place, BLOCK=16)
    return [out]


WRONG = {
    "reads": ({"reads": 1}, "loads outside of the elements of x_ptr, at byte 20", "depends on what stands around"),
    "writes": ({"writes": 1}, "stores outside of the elements of out_ptr", "has changed out_ptr/scratch_ptr: outside"),
    "in_place": ({"in_place": 1}, "stores outside of the elements of x_ptr, at byte 0", "has changed x_ptr: an input"),
}


@pytest.mark.parametrize("name", list(WRONG))
@pytest.mark.parametrize("watched", [True, False])
def test_errors_are_found(monkeypatch: pytest.MonkeyPatch, name: str, watched: bool) -> None:
    """By the watch, and without it by bands and bits."""
    monkeypatch.setitem(WRITES, "_copy_kernel", ("out_ptr", "scratch_ptr"))
    monkeypatch.setattr("test_guard_bands.kernels_of", lambda *_: {"_copy_kernel"})
    if not watched:
        monkeypatch.setattr(Guard, "watch", lambda guard, *_: setattr(guard, "elements", 1))
    check("triton", ("copy",), copy)
    options, by_watch, by_bands = WRONG[name]
    with pytest.raises(Exception, match=by_watch if watched else by_bands):
        check("triton", ("copy",), lambda: copy(**options))
