"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: build them, run tests with them.

    python tools/sanitizers.py [arguments of pytest]

builds out/sanitize/lib, a copy of the package beside the normal one, and runs the tests that use C++ with it. CONTRIBUTING.md says
what is watched.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "out" / "sanitize" / "lib"
ASAN = {
    "detect_leaks": "0",  # Python and PyTorch keep memory until the process ends
    "redzone": "512",  # bytes at least around an allocation, by default 16: also an error by some elements is seen
    "detect_stack_use_after_return": "1",
    "strict_string_checks": "1",
    "allocator_may_return_null": "1",  # tests ask for more memory than there is, and want PyTorch's error
}
UBSAN = {"print_stacktrace": "1"}
# Only the package of `LIBRARY` is imported: the folder that Python starts in would come before PYTHONPATH.
PROGRAM = """
import sys
sys.path.remove("")
import pmpo_kernels, pytest
assert pmpo_kernels.__file__.startswith(sys.argv[1]), pmpo_kernels.__file__
assert pmpo_kernels.cpp.extension is not None, pmpo_kernels.cpp.problem
sys.exit(pytest.main(sys.argv[2:]))
"""
# Those whose kernels are C++, alone or among others; builds of the extension and
# programs with a compiler of their own are none; several ranks have time limits, which the sanitizers may exceed.
NAMES = (
    "cpp", "stages", "loss", "errors", "extremes", "solver", "promises", "ops", "linear", "linear_backward", "linear_work",
    "pytorch_features", "combinations", "guard_bands",
)  # fmt: skip
TESTS = [
    *(f"tests/test_{name}.py" for name in NAMES),
    "--deselect=tests/test_cpp.py::test_build",
    "-knot triton and not reference",
]


def compiler() -> list[str]:
    """Return the C++ compiler that setup.py uses."""
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++")[:1]


def runtime(name: str) -> str:
    """Return the path of a shared library of the compiler's, "" where it has none."""
    try:
        found = subprocess.run([*compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
    return os.path.realpath(found) if os.path.isabs(found) else ""


def problem() -> str:
    """Why the sanitizers cannot run here, or "" if they can."""
    try:
        version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        return f"no C++ compiler: {error}"
    if not sys.platform.startswith("linux") or "clang" in version.lower():
        return f"expected GCC on Linux, got {version.splitlines()[0] if version else compiler()} on {sys.platform}"
    missing = [name for name in ("libasan.so", "libubsan.so", "libstdc++.so") if not runtime(name)]
    return f"{compiler()[0]} has no {', '.join(missing)}" if missing else ""


def build() -> None:
    """Build out/sanitize/lib. It is compiled anew where a source is newer."""
    for old in LIBRARY.glob("pmpo_kernels/**/*.py"):
        if not (ROOT / old.relative_to(LIBRARY)).exists():
            old.unlink()
    command = [sys.executable, "setup.py", "--quiet", "build"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PMPO_KERNELS_SANITIZE": "address,undefined"}, check=True)


def environment() -> dict[str, str]:
    """Return the environment of a process that imports the package of `LIBRARY`. The interpreter is not linked to the sanitizer,
    which has to be loaded before all else; so has libstdc++, or an exception of C++ finds no handler."""
    return os.environ | {
        "PYTHONPATH": str(LIBRARY),
        "LD_PRELOAD": f"{runtime('libasan.so')}:{runtime('libstdc++.so')}",
        "ASAN_OPTIONS": ":".join(f"{name}={value}" for name, value in ASAN.items()),
        "UBSAN_OPTIONS": ":".join(f"{name}={value}" for name, value in UBSAN.items()),
    }


def pytest_command(arguments: list[str]) -> list[str]:
    """Return the command that runs pytest without capturing file descriptors, because a report ends the process, and would be lost
    with what is captured."""
    return [sys.executable, "-c", PROGRAM, str(LIBRARY), "--capture=sys", *arguments]


def main() -> int:
    if problem():
        print(f"sanitizers: NOT RUN, {problem()}", file=sys.stderr)
        return 2
    build()
    return subprocess.run(pytest_command(sys.argv[1:] or TESTS), cwd=ROOT, env=environment()).returncode


if __name__ == "__main__":
    sys.exit(main())
