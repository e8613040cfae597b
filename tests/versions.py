"""Both ends of the supported versions: `make versions` installs each into an environment of its own and runs tests there.

lowest: the oldest Python of pyproject.toml with the lower bound of every requirement. highest: the newest Python that is
here with the newest of everything. What cannot be installed is reported as NOT TESTED; the exit code is 1 only for tests
that failed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from email import message_from_string
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
CORE += ["imports", "errors", "public_api", "security"]
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


def lower_bounds(source: Path) -> list[str]:
    """`name==x` of each `name>=x`, without those of extras other than `test`."""
    found = {}
    for line in message_from_string((source / "PKG-INFO").read_text()).get_all("Requires-Dist", []):
        requirement, _, marker = line.partition(";")
        bound = re.match(r"\s*([\w.-]+)\s*>=\s*([\w.]+)", requirement)
        if bound and ("extra" not in marker or re.search(r"extra == .test.", marker)):
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
    """A Python of this version: on the path, of pyenv, or of uv."""
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
    """The sources as they are distributed: what the tests need must be in there."""
    build = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, to)
    (archive,) = to.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(to, filter="data")
    return to / archive.name.removesuffix(".tar.gz")


def install(end: End, python: str, folder: Path) -> Path:
    """An environment with the package, editable, so that its C++ kernels are built against that PyTorch."""
    source = unpack_sdist(folder)
    wanted = lower_bounds(source) if end.name == "lowest" else ["torch", "triton", "numpy"]
    run(python, "-m", "venv", folder / "venv")
    own = folder / "venv" / "bin" / "python"
    run(own, "-m", "pip", "install", "--quiet", "--upgrade", "pip")
    run(own, "-m", "pip", "install", "--quiet", *wanted, "setuptools>=77", "wheel")
    pins = folder / "pins.txt"
    pins.write_text("\n".join(wanted) + "\n")
    with_tests = [own, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--constraint", pins]
    run(*with_tests, "--editable", f"{source}[test,triton]")
    done = subprocess.run([own, "-c", REPORT], capture_output=True, text=True, check=True)
    end.found = json.loads(done.stdout)
    return source


def check(end: End, python: str | None) -> None:
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
    files = [f"tests/test_{name}.py" for name in CORE]
    report = folder / "tests.xml"
    command = [
        folder / "venv" / "bin" / "python",
        "-m",
        "pytest",
        "-q",
        "-k",
        f"not ({SLOW})",
        f"--junitxml={report}",
        *files,
    ]
    try:
        run(*command, cwd=source)
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
    """`versions.py [lowest] [highest]`, both where none is named."""
    find = {"lowest": lambda: interpreter(OLDEST), "highest": newest}
    ends = [End(name) for name in arguments or find]
    for end in ends:
        check(end, find[end.name]())
    print()
    for end in ends:
        print(f"{end.name}: {end.result}\n  {', '.join(f'{name} {version}' for name, version in end.found.items())}")
    return int(any(end.failed for end in ends))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
