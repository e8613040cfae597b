"""What is particular to the C++ kernels: instruction sets, threads, alignment, conversions, and how they are built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import CONFIGURATIONS
from helpers import run, same_bits
from torch import Tensor

from pmpo_kernels import LossConfig, available_impls, contract, cpp, pmpo_loss, solve_power
from pmpo_kernels.impls import default_impls
from pmpo_kernels.ops import stage
from pmpo_kernels.verification import make_case, verify

ROOT = Path(__file__).parent.parent
extension = cpp.extension
ISAS = [] if extension is None else extension.isas()  # without it test_available_impls fails
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn."""
    extension.use_isa(request.param)
    assert extension.isa() == request.param
    yield request.param
    extension.use_isa(ISAS[-1])


def exponentials(x: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(x) (N,) as the kernels compute it: the softmax part of the gradient of a row with maximum 0 and sum 1."""
    z = torch.cat([x, x.new_zeros(1)]).to(dtype)[None, None]
    ids, one = torch.tensor([[x.numel()]]), torch.ones(1, 1, dtype=torch.float64 if dtype == torch.float64 else None)
    return stage("dlogits", "cpp")(z, ids, None, 0 * one, one, 0 * one, -one, None, 1.0)[0, 0, :-1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_exp_is_right_to_2_ulp(dtype: torch.dtype, isa: str) -> None:
    """In units of the last place of the right value; float64 against the C library's, itself right to 1 ulp."""
    lowest = {torch.float32: -87.0, torch.float64: -708.0}[dtype]
    random = torch.Generator().manual_seed(0)
    x = torch.cat(
        [torch.linspace(lowest, 0, 100_003), -torch.rand(50_000, generator=random), torch.tensor([0.0, -0.0])]
    )
    x = x.to(dtype).double()
    want = x.exp()
    got = exponentials(x, dtype).double()
    ulp = torch.finfo(dtype).eps * torch.exp2((torch.frexp(want).exponent - 1).double())
    assert ((got - want).abs() <= (2 if dtype == torch.float32 else 3) * ulp).all()
    assert got[x == 0].tolist() == [1.0] * int((x == 0).sum())
    beyond = exponentials(torch.tensor([-torch.inf, torch.finfo(dtype).min, 1.1 * lowest]).to(dtype), dtype)
    assert beyond.tolist() == [0.0, 0.0, 0.0]
    assert bool(exponentials(torch.tensor([torch.nan]), dtype).isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["pmpo", "pmpo, all terms"])
def test_every_instruction_set_agrees_with_float64(isa: str, dtype: torch.dtype, name: str) -> None:
    for V in (67, 5000):
        verdict = verify(make_case(dtype, T=6, V=V), CONFIGURATIONS[name], "cpp")
        assert verdict.ok, verdict


@pytest.mark.parametrize(
    ("dtype", "temperature"),
    [(torch.bfloat16, t) for t in (1e-30, 1e-5, 1.0, 1e5, 1e34)] + [(torch.float16, t) for t in (1e-6, 1e-3, 1.0, 1e3)],
    ids=str,
)
def test_every_16_bit_number_is_read_and_rounded_like_torch(isa: str, dtype: torch.dtype, temperature: float) -> None:
    """All 65,536 bit patterns as logits, and gradients from overflow to subnormal: the float32 kernels' result, rounded."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    z = patterns.repeat(5, 1)[None]
    ids = torch.zeros(1, 5, dtype=torch.long)
    ones = torch.ones(1, 5)
    g = torch.tensor([[1e4, 1.0, 3e-3, 1e-5, 3e-38]]) * (
        0.5 + torch.rand(1, 5, generator=torch.Generator().manual_seed(0))
    )
    rest = (ids, None, 0 * ones, ones, ones, g, None, temperature)
    got, exact = stage("dlogits", "cpp")(z, *rest), stage("dlogits", "cpp")(z.float(), *rest)
    want = exact.to(dtype)
    both_nan = got.isnan() & want.isnan()
    assert torch.equal(
        torch.where(both_nan, 0, got.view(torch.int16)), torch.where(both_nan, 0, want.view(torch.int16))
    )
    assert torch.unique(want[~want.isnan()]).numel() > 5
    sums, exact_sums = (stage("token_logp", "cpp")(x[:, :1, : 2**15], ids[:, :1], None, 1.0) for x in (z, z.float()))
    assert all(torch.equal(a, b) or bool((a.isnan() & b.isnan()).all()) for a, b in zip(sums, exact_sums, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    """Masked, clipped and A = 0 rows make the shares uneven; 20,000 columns are enough for a thread a row."""
    case, config = make_case(dtype, B=7, T=13, V=20_000), CONFIGURATIONS["pmpo, all terms"]
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            results.append(run(case, config, "cpp"))
    finally:
        torch.set_num_threads(threads)
    for out, grad in results[1:]:
        same_bits(results[0][0], out)
        assert torch.equal(results[0][1], grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 31, 2049])
def test_alignment_changes_no_bit(isa: str, dtype: torch.dtype, V: int) -> None:
    """Stricter than for the other implementations: sums have one order, wherever a row starts."""
    case = make_case(dtype, B=2, T=3, V=V)
    z = case.logits
    want = stage("token_logp", "cpp")(z, case.token_ids, case.mask, 0.7)
    g = torch.randn(2, 3, dtype=want[0].dtype, generator=torch.Generator().manual_seed(0))
    gradient = stage("dlogits", "cpp")(z, case.token_ids, case.mask, *want[1:], g, g, 0.7)
    for offset in (1, 3, 5):
        wide = z.new_full((2, 3, V + 11), torch.nan)
        moved = wide[..., offset : offset + V]
        moved.copy_(z)
        got = stage("token_logp", "cpp")(moved, case.token_ids, case.mask, 0.7)
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
        out = stage("dlogits", "cpp")(moved, case.token_ids, case.mask, *want[1:], g, g, 0.7)
        assert torch.equal(gradient, out)
        stage("dlogits_", "cpp")(moved, case.token_ids, case.mask, *want[1:], g, g, 0.7)
        assert torch.equal(gradient, moved)
        moved.fill_(torch.nan)
        assert bool(wide.isnan().all()), "written beyond the row"


def test_unknown_ids_give_nan_in_the_gradient() -> None:
    """`dlogits` alone does not check ids: nothing is read or written out of bounds."""
    z, one = torch.randn(1, 2, 8), torch.ones(1, 2)
    got = stage("dlogits", "cpp")(z, torch.tensor([[8, -1]]), None, one, one, one, one, None, 1.0)
    assert bool(got.isnan().all())


def test_the_contract_is_that_of_python() -> None:
    """Options, statistics and metrics by the same names in the same order, limits by the same numbers: C++ cannot import them."""
    assert extension is not None
    found = extension.contract()
    assert {name: value.lower().split() for name, value in found.items() if isinstance(value, str)} == {
        "RULES": [name.lower() for name in contract.RULES],
        "TrajectoryOptions": list(contract.TrajectoryOptions._fields),
        "AggregateOptions": list(contract.AggregateOptions._fields),
        "STATS": list(contract.STATS),
        "METRICS": list(contract.METRICS),
    }
    numbers = {name: value for name, value in found.items() if not isinstance(value, str)}
    assert numbers == {
        name: getattr(contract, name) for name in ("MAX_NEWTON_ITERATIONS", "NEWTON_TOLERANCE", "ELSEWHERE")
    }


def test_reasons_why_it_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    note = tmp_path / "note.txt"
    assert cpp.load("no_such_extension", note) == (
        None,
        "the C++ kernels are not built: this installation has no compiled extension",
    )
    note.write_text("no compiler\n")
    assert cpp.load("no_such_extension", note) == (None, "the C++ kernels are not built: no compiler")
    (tmp_path / "broken_extension.abi3.so").write_bytes(b"not a library")
    found, problem = cpp.load("broken_extension", note)
    assert found is None
    assert problem.startswith("the C++ kernels cannot be loaded: ")


def test_without_it_the_reference_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(torch.float64, B=2, T=3, V=5)
    want = run(case, LossConfig.pmpo(), "reference")
    assert default_impls()["CPU tensors"] == "cpp, the fastest"
    monkeypatch.setattr(cpp, "problem", "the C++ kernels are not built: no compiler")
    assert available_impls()["cpp"] == "the C++ kernels are not built: no compiler"
    assert default_impls()["CPU tensors"] == "reference, slower, because the C++ kernels are not built: no compiler"
    got = run(case, LossConfig.pmpo(), None)
    same_bits(want[0], got[0])
    assert torch.equal(want[1], got[1])
    for call in (
        lambda: pmpo_loss(case.logits, case.token_ids, None, case.advantages, impl="cpp"),
        lambda: solve_power(case.old_logp, torch.ones(2), impl="cpp"),
    ):
        with pytest.raises(
            RuntimeError, match="impl='cpp' cannot run on cpu tensors: the C\\+\\+ kernels are not built"
        ):
            call()


@pytest.mark.parametrize("missing", ["compiler", "PyTorch", "nothing"])
def test_build(missing: str, tmp_path: Path) -> None:
    """`setup.py` succeeds in any case; what it could not build it says in a file beside the package."""
    source, built = tmp_path / "source", tmp_path / "built"
    names = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "pmpo_kernels")
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "cpp_not_built.txt")
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    env = dict(os.environ)
    if missing == "compiler":
        env |= {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    if missing == "PyTorch":
        (tmp_path / "hidden").mkdir()
        (tmp_path / "hidden" / "torch.py").write_text("raise ImportError('No module named torch')\n")
        env["PYTHONPATH"] = str(tmp_path / "hidden")
    command = [sys.executable, "setup.py", "build", "--build-lib", str(built), "--build-temp", str(tmp_path / "temp")]
    done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    note, libraries = built / "pmpo_kernels" / "cpp_not_built.txt", list(built.glob("pmpo_kernels/_C.abi3.so"))
    if missing == "nothing":
        assert len(libraries) == 1
        assert not note.exists()
        return
    assert not libraries
    expected = {"compiler": "no-such-compiler", "PyTorch": "with --no-build-isolation"}[missing]
    assert expected in note.read_text()
    assert expected in done.stdout + done.stderr
    code = (
        "import pmpo_kernels, torch; print(pmpo_kernels.available_impls()['cpp']);"
        "z = torch.zeros(1, 2, 3, requires_grad=True);"
        "pmpo_kernels.pmpo_loss(z, torch.zeros(1, 2, dtype=int), None, torch.ones(1)).loss.backward();"
        "print(z.grad.abs().sum() > 0, pmpo_kernels.__file__)"
    )
    # -S: an editable installation would answer for the package's modules wherever it is imported from
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(built), sysconfig.get_path("purelib")]))
    used = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert used.returncode == 0, used.stderr
    assert used.stdout.startswith("the C++ kernels are not built: ")
    assert expected in used.stdout
    assert "tensor(True)" in used.stdout
    assert str(built) in used.stdout
