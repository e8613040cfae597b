"""Both ends of the supported versions: `make versions` installs each into an environment of its own and runs tests there.

lowest: the oldest Python of pyproject.toml with the lower bound of every requirement. highest: the newest Python that is
here with the newest of everything. gpu: what a GPU machine had lately, a PyTorch for CUDA with the Triton that it requires, for
this Python. beside: the lowest of every requirement that installs for this Python beside this PyTorch, in two minutes, so that
`make test` has it (as it has the newest, in its own environment). What cannot be installed is reported as NOT TESTED; the exit
code is 1 only for tests that failed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from email import message_from_string
from importlib.metadata import requires
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".versions"
OLDEST, NEWEST = (3, 10), (3, 14)  # of Python: requires-python, and the newest that is looked for
# Each stage, the losses, what depends most on PyTorch (compile, operators), on Triton and on typer; the head on all.
CORE = [
    "config",
    "reference",
    "stages",
    "cpp",
    "loss",
    "ops",
    "solver",
    "schedules",
    "compile",
    "triton",
    "linear",
    "cli",
]
CORE += ["imports", "errors", "public_api", "security", "aot"]
BESIDE = [
    "config",
    "stages",
    "solver",
    "schedules",
    "cli",
    "triton",
    "public_api",
    "aot",
]  # what uses numpy, Triton and typer most
GPU = [
    "torch==2.11.0",
    "triton==3.6.0",
    "numpy<2.4",
]  # what that Triton's interpreter works with; compiled kernels need none
SLOW = "bench_ or test_build or sweep or gradcheck"  # left out: minutes each
REPORT = """
import json, platform, sys
from importlib.metadata import version
names = ["torch", "triton", "numpy", "typer", "rich", "matplotlib", "pytest", "hypothesis"]
print(json.dumps({"Python": platform.python_version(), **{name: version(name) for name in names}}))
"""


@dataclass
class End:
    name: str
    found: dict[str, str] = field(default_factory=dict)  # versions that were installed
    result: str = ""
    failed: bool = False


def lower_bounds(requirements: Iterable[str]) -> list[str]:
    """Return `name==x` for each `name>=x`, without those of extras other than `cli` and `test`."""
    found = {}
    for line in requirements:
        requirement, _, marker = line.partition(";")
        bound = re.match(r"\s*([\w.-]+)\s*>=\s*([\w.]+)", requirement)
        if bound and ("extra" not in marker or re.search(r"extra == .(cli|test).", marker)):
            found[bound[1]] = f"{bound[1]}=={bound[2]}"
    return list(found.values())


def runs(python: str, version: tuple[int, int]) -> bool:
    code = "import ensurepip, sys, venv; print(sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and done.stdout.strip() == str(version)


def interpreter(version: tuple[int, int]) -> str | None:
    """Find a Python of this version: on the path, of pyenv, or of uv."""
    name = ".".join(map(str, version))
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [sys.executable, f"python{name}", *map(str, sorted(pyenv.glob(f"{name}.*/bin/python")))]
    if shutil.which("uv"):
        done = subprocess.run(["uv", "python", "find", "--no-project", name], capture_output=True, text=True)
        candidates += done.stdout.split()
    return next((python for python in candidates if runs(python, version)), None)


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> None:
    words = [str(word) for word in command]
    print("+", *words, flush=True)
    subprocess.run(words, cwd=cwd, check=True, env={**os.environ, **(env or {})})


def unpack_sdist(to: Path) -> Path:
    """Unpack the sources as they are distributed. What the tests need must be in there."""
    build = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, to)
    (archive,) = to.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(to, filter="data")
    return to / archive.name.removesuffix(".tar.gz")


def install(end: End, python: str, folder: Path) -> Path:
    """Make an environment with the package, editable, so that its C++ kernels are built against that PyTorch."""
    source = unpack_sdist(folder)
    required = message_from_string((source / "PKG-INFO").read_text()).get_all("Requires-Dist", [])
    wanted = {"lowest": lower_bounds(required), "highest": ["torch", "triton", "numpy"], "gpu": GPU}[end.name]
    run(python, "-m", "venv", folder / "venv")
    own = folder / "venv" / "bin" / "python"
    run(own, "-m", "pip", "install", "--quiet", "--upgrade", "pip")
    run(own, "-m", "pip", "install", "--quiet", *wanted, "setuptools>=77", "wheel")
    pins = folder / "pins.txt"
    pins.write_text("\n".join(wanted) + "\n")
    with_tests = [own, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--constraint", pins]
    run(*with_tests, "--editable", f"{source}[test]")
    done = subprocess.run([own, "-c", REPORT], capture_output=True, text=True, check=True)
    end.found = json.loads(done.stdout)
    return source


def lowest_wheels() -> list[str]:
    """Return `name==x` of the lowest x with a wheel for this Python, for each requirement but PyTorch and the test tools."""
    found = []
    for bound in lower_bounds(requires("pmpo-kernels") or []):
        name, _, lowest = bound.partition("==")
        if name in ("torch", "pytest", "pytest-benchmark", "hypothesis"):
            continue
        command = [sys.executable, "-m", "pip", "index", "versions", "--only-binary", ":all:", "--json", name]
        listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["versions"]
        found.append(f"{name}=={min((v for v in listed if key(v) >= key(lowest)), key=key)}")
    return found


def key(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def check_beside(end: End) -> None:
    """Install into a folder that comes before the environment's own packages on the path, so that nothing of the environment
    changes, and run the tests."""
    folder = FOLDER / end.name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        wanted = lowest_wheels()
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", "--target", folder]
        run(*pip, "--no-deps", *wanted)
    except (subprocess.CalledProcessError, OSError, ValueError) as error:  # ValueError: no wheel at all
        end.result = f"NOT TESTED: could not be installed ({error})"
        return
    env = {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", REPORT], capture_output=True, text=True, check=True, env={**os.environ, **env}
    )
    end.found = json.loads(done.stdout)
    assert all(
        end.found[name] == version for name, _, version in (w.partition("==") for w in wanted) if name in end.found
    )
    run_tests(end, sys.executable, BESIDE, ROOT, folder / "tests.xml", env)


def check(end: End, python: str | None) -> None:
    if end.name == "beside":
        check_beside(end)
        return
    folder = FOLDER / end.name
    if python is None:
        end.result = "NOT TESTED: no interpreter"
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        source = install(end, python, folder)
    except (subprocess.CalledProcessError, OSError) as error:
        end.result = f"NOT TESTED: could not be installed ({error})"
        return
    run_tests(end, folder / "venv" / "bin" / "python", CORE, source, folder / "tests.xml")


def run_tests(
    end: End, python: str | Path, names: list[str], cwd: Path, report: Path, env: dict[str, str] | None = None
) -> None:
    """Run tests and count them."""
    command = [python, "-m", "pytest", "-q", "-k", f"not ({SLOW})", f"--junitxml={report}"]
    try:
        run(*command, *(f"tests/test_{name}.py" for name in names), cwd=cwd, env=env)
    except subprocess.CalledProcessError as error:
        end.failed = True
        end.result = f"FAILED (exit code {error.returncode}): "
    counts = re.search(r'errors="(\d+)" failures="(\d+)" skipped="(\d+)" tests="(\d+)"', report.read_text())
    assert counts is not None
    errors, failures, skipped, tests = map(int, counts.groups())
    end.result += f"{tests - errors - failures - skipped} passed, {failures + errors} failed, {skipped} skipped"


def newest() -> str | None:
    for minor in range(NEWEST[1], OLDEST[1], -1):
        python = interpreter((3, minor))
        if python is not None:
            return python
        print(f"NOT TESTED: Python 3.{minor} is not here")
    return None


def main(arguments: list[str]) -> int:
    """`versions.py [lowest] [highest] [gpu] [beside]`, the first three where none is named."""
    here = sys.executable
    find = {"lowest": lambda: interpreter(OLDEST), "highest": newest, "gpu": lambda: here, "beside": lambda: here}
    ends = [End(name) for name in arguments or ("lowest", "highest", "gpu")]
    for end in ends:
        check(end, find[end.name]())
    print()
    for end in ends:
        print(f"{end.name}: {end.result}\n  {', '.join(f'{name} {version}' for name, version in end.found.items())}")
    return int(any(end.failed for end in ends))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
