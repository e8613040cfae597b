"""What is distributed: the sdist builds, the wheels hold what they should, and one installs and works without a compiler.

`make package` (--isolated) does the same as pip does it, with build isolation and the requirements from the index.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_SOURCES = (
    ".*", "__pycache__", "*.pyc", "*.so", "*.egg-info", "build", "dist", "out", "cpp_not_built.txt", "node_modules"
)  # fmt: skip
JUNK = ("pmpo_kernels/_C.abi3.so", "pmpo_kernels/__pycache__/x.pyc", "pmpo_kernels/cpp_not_built.txt", "tests/__pycache__/x.pyc", "out/x.py", "csrc/x.o")  # fmt: skip
HERE = [sys.executable, "-I"]
TORCH = "torch==2.13.0"  # as in the Makefile: any other may be one for CUDA, of gigabytes


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def build(what: str, source: Path, to: Path, **environment: str) -> Path:
    """The file that `build_sdist` or `build_wheel` of the build backend makes, without isolation."""
    code = f"import setuptools.build_meta as b, sys; b.build_{what}(sys.argv[1])"
    run(*HERE, "-c", code, to, cwd=source, **environment)
    (found,) = to.iterdir()
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git tracks; of an unpacked sdist, everything."""
    copy = tmp_path_factory.mktemp("sources") / "copy"
    if not (ROOT / ".git").exists():
        return shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    for name in run("git", "ls-files", "-z", cwd=ROOT).split("\0"):
        if name and name[0] != "." and (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def sdist(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpacked; built where there is also what a build and tests leave behind."""
    folder = tmp_path_factory.mktemp("sdist")
    dirty = folder / "dirty"
    shutil.copytree(sources, dirty)
    for name in JUNK:
        (dirty / name).parent.mkdir(exist_ok=True)
        (dirty / name).write_text("x")
    with tarfile.open(build("sdist", dirty, folder / "dist")) as file:
        file.extractall(folder, filter="data")
    (unpacked,) = folder.glob("pmpo_kernels-*")
    return unpacked


@pytest.fixture(scope="module")
def pure_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pure")
    copy = shutil.copytree(sdist, folder / "source")
    return build("wheel", copy, folder / "dist", PATH=str(folder))  # no compiler, nor anything else


@pytest.fixture(scope="module")
def compiled_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    return build("wheel", shutil.copytree(sdist, folder / "source"), folder / "dist")


def installed(wheel: Path, folder: Path, others: str | None = None) -> Path:
    """The Python of an environment with this wheel, which sees the packages in `others`, by default those of this one."""
    run(*HERE, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(*HERE, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--no-compile", wheel, cwd=folder)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    # a path in a .pth file: without the .pth files in there, such as an editable installation's
    (site / "others.pth").write_text((others or sysconfig.get_path("purelib")) + "\n")
    return python


def required_by(name: str) -> set[str]:
    """Distributions that are installed for this one, itself included."""
    found, waiting = set(), [name]
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            lines = importlib.metadata.requires(name) or []
            matches = [re.match(r"[\w.-]+", line) for line in lines if "extra ==" not in line]
            waiting += [match[0] for match in matches if match and is_installed(match[0])]
    return found


def is_installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def only(names: set[str], folder: Path) -> str:
    """A folder that holds these distributions and no other."""
    folder.mkdir()
    for name in names:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            (folder / top).symlink_to(str(distribution.locate_file(top)))
    return str(folder)


def test_the_sdist_has_every_source_and_nothing_built(sources: Path, sdist: Path) -> None:
    found = files(sdist)
    assert files(sources) - found == set()
    assert found & set(JUNK) == set()
    made = {name for name in found if not name.startswith("pmpo_kernels.egg-info/")} - files(sources)
    assert made == {"PKG-INFO", "setup.cfg"}
    assert {
        "csrc/token_logp.cpp",
        "csrc/isa.h",
        "pmpo_kernels/py.typed",
        "LICENSE",
        "Makefile",
        "constraints.txt",
    } < found


def wheel_files(wheel: Path) -> tuple[set[str], str]:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (tags,) = (name for name in names if name.endswith(".dist-info/WHEEL"))
        return names, archive.read(tags).decode()


@pytest.mark.parametrize("kind", ["pure_wheel", "compiled_wheel"])
def test_a_wheel_holds_the_package_and_its_name_says_for_which_machine(
    kind: str, sdist: Path, request: pytest.FixtureRequest
) -> None:
    wheel: Path = request.getfixturevalue(kind)
    names, tags = wheel_files(wheel)
    package = {name for name in names if not re.match(r"pmpo_kernels-[\w.]+\.dist-info/", name)}
    expected = {f"pmpo_kernels/{name}" for name in files(sdist / "pmpo_kernels")}
    assert package - expected == {
        "pmpo_kernels/cpp_not_built.txt" if kind == "pure_wheel" else "pmpo_kernels/_C.abi3.so"
    }
    assert expected - package == set()
    assert "pmpo_kernels/py.typed" in package
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert any(name.endswith(".dist-info/entry_points.txt") for name in names)
    tag = "py3-none-any" if kind == "pure_wheel" else f"cp310-abi3-{sysconfig.get_platform().replace('-', '_')}"
    assert wheel.stem.endswith(tag)
    assert f"Tag: {tag}" in tags
    assert f"Root-Is-Purelib: {str(kind == 'pure_wheel').lower()}" in tags


def test_the_pure_wheel_installs_and_works_without_a_compiler(pure_wheel: Path, tmp_path: Path) -> None:
    python = installed(pure_wheel, tmp_path)
    path = str(python.parent)  # holds no compiler
    assert shutil.which("cc", path=path) is shutil.which("gcc", path=path) is None
    shutil.copy(ROOT / "tests" / "public_calls.py", tmp_path)
    where = "import pmpo_kernels; print(pmpo_kernels.__file__)"
    assert str(tmp_path) in run(python, "-c", where, cwd=tmp_path, PATH=path)
    loss, gradient = map(float, run(python, "public_calls.py", cwd=tmp_path, PATH=path).split())
    here = run(sys.executable, "tests/public_calls.py", cwd=ROOT, PYTHONPATH=str(ROOT))
    # a dozen losses and gradients of float32 whose terms are of order 1: 1e-5 is a hundred eps for each
    assert [loss, gradient] == pytest.approx([float(x) for x in here.split()], rel=1e-5, abs=1e-5)
    told = " ".join(
        re.sub("[│\\s]+", " ", run(python.parent / "pmpo-kernels", "info", cwd=tmp_path, PATH=path)).split()
    )
    assert "CPU tensors reference, slower, because the C++ kernels are not built:" in told


def test_the_package_requires_torch_and_numpy_alone(pure_wheel: Path) -> None:
    with zipfile.ZipFile(pure_wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    required = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.M)
    assert set(required) == {"torch>=2.10", "numpy>=1.22"}
    cli = re.findall(r'^Requires-Dist: ([\w-]+)[^;\n]*; extra == "cli"$', metadata, re.M)
    assert set(cli) == {"typer", "rich", "matplotlib"}


def test_the_losses_need_torch_and_numpy_alone(pure_wheel: Path, tmp_path: Path) -> None:
    """And without the extra a command is one line."""
    names = required_by("torch") | required_by("numpy")
    python = installed(pure_wheel, tmp_path, only(names, tmp_path / "others"))
    shutil.copy(ROOT / "tests" / "public_calls.py", tmp_path)
    assert len(run(python, "public_calls.py", cwd=tmp_path).split()) == 2
    absent = {"typer", "rich", "matplotlib", "triton"} - names
    assert absent >= {"typer", "rich", "matplotlib"}
    code = f"from importlib.util import find_spec; print(*filter(find_spec, {sorted(absent)}))"
    assert run(python, "-c", code, cwd=tmp_path).split() == []
    done = subprocess.run([python.parent / "pmpo-kernels", "info"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"pmpo-kernels: .+ needs .+: pip install 'pmpo-kernels\[cli\]'\n", done.stderr)


def test_the_installed_package_is_typed(pure_wheel: Path, tmp_path: Path) -> None:
    """mypy --strict reads the annotations of the installed package (py.typed), not of these sources."""
    pytest.importorskip("mypy")
    python = installed(pure_wheel, tmp_path)
    shutil.copy(ROOT / "tests" / "public_calls.py", tmp_path)
    checker = [sys.executable, "-m", "mypy", "--strict", "--untyped-calls-exclude=torch", "--python-executable", python]
    found = run(*checker, "public_calls.py", cwd=tmp_path)
    assert "Success: no issues found in 1 source file" in found


def requirements(pyproject: str) -> dict[str, str]:
    """Name and bounds of each requirement of the package and of what .venv installs beside it."""
    tables = re.findall(r"^(dependencies|cli|demo|test|dev|docs) = (\[.*\])$", pyproject, re.M)
    assert len(tables) == 6
    listed = " ".join(text for _, text in tables)
    return dict(re.findall(r'"(?!pmpo-kernels)([\w-]+)([^";]*)"', listed))


def test_the_constraints_fit_the_requirements() -> None:
    from packaging.specifiers import SpecifierSet

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+) ; python_version", "\n".join(lines), re.M))
    makefile = (ROOT / "Makefile").read_text()
    pinned |= dict(re.findall(r"^(?:TORCH|TRITON) \?= (\w+)==(\S+)$", makefile, re.M))
    assert f"torch=={pinned['torch']}" == TORCH
    pinned = {name.lower(): version for name, version in pinned.items()}
    for name, bounds in requirements((ROOT / "pyproject.toml").read_text()).items():
        assert pinned[name] in SpecifierSet(bounds), name


# --- with downloads --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh one with the pip that is newest."""
    folder = tmp_path_factory.mktemp("isolated")
    run(*HERE, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--upgrade", "pip", "build", cwd=folder)
    return python


@pytest.mark.isolated
def test_sdist_and_wheel_build_in_isolation(sources: Path, environment: Path, tmp_path: Path) -> None:
    run(environment, "-m", "build", "--outdir", tmp_path / "dist", sources, cwd=tmp_path)
    assert {path.name.partition("-0")[0] for path in (tmp_path / "dist").iterdir()} == {"pmpo_kernels"}
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.stem.endswith("py3-none-any")  # no PyTorch in isolation: the note says how to build with it
    with zipfile.ZipFile(wheel) as archive:
        assert "--no-build-isolation" in archive.read("pmpo_kernels/cpp_not_built.txt").decode()


@pytest.mark.isolated
@pytest.mark.parametrize("extra", ["cli", "demo", "test", "trl", "peers", "dev", "docs"])
def test_an_extra_resolves(extra: str, pure_wheel: Path, environment: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.txt").write_text(TORCH + "\n")
    dry = [environment, "-m", "pip", "install", "--dry-run", "--constraint", tmp_path / "torch.txt"]
    resolved = run(*dry, f"{pure_wheel}[{extra}]", TORCH, cwd=tmp_path)
    would = resolved.rpartition("Would install ")[2]
    for name in re.findall(
        r'"([\w-]+)', re.search(rf"^{extra} = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    ):
        assert (
            re.search(rf"\b{name.replace('-', '[-_]')}-\d", would, re.I) or f"already satisfied: {name}" in resolved
        ), name


@pytest.mark.isolated
def test_the_wheel_with_its_requirements_installs_and_works(
    compiled_wheel: Path, environment: Path, tmp_path: Path
) -> None:
    run(environment, "-m", "pip", "install", TORCH, compiled_wheel, cwd=tmp_path)
    shutil.copy(ROOT / "tests" / "public_calls.py", tmp_path)
    run(environment, "public_calls.py", cwd=tmp_path)
    told = " ".join(run(environment.parent / "pmpo-kernels", "info", cwd=tmp_path).split())
    assert "cpp, the fastest" in told
