"""Builds the C++ kernels where a C++ compiler and PyTorch are there. All metadata is in pyproject.toml."""

import os
import re
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

TORCH = (2, 10)  # the first with the stable ABI used here; the binary runs on every later one too
PYTHON = (3, 10)
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")  # free-threaded Python has none
ROOT = Path(__file__).parent
# Names for -fsanitize=, such as "address,undefined": tools/sanitizers.py says what is built and how it runs.
SANITIZE = os.environ.get("PMPO_KERNELS_SANITIZE", "")


def files(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(f"csrc/{pattern}"))


class BuildCpp(build_ext):
    """Build the extension or go on without it, since the package works without. `cpp_not_built.txt` in it then says why."""

    def run(self) -> None:
        self.problem = ""
        if SANITIZE and self.inplace:
            raise RuntimeError(
                "PMPO_KERNELS_SANITIZE: expected `python setup.py build`, got a build in place of the normal extension"
            )
        super().run()
        package = Path(self.build_lib, "pmpo_kernels")
        if self.inplace:
            package = Path(self.get_finalized_command("build_py").get_package_dir("pmpo_kernels"))
        note = package / "cpp_not_built.txt"
        note.unlink(missing_ok=True)
        if self.problem:
            for stale in package.glob("_C.*"):
                stale.unlink()
            package.mkdir(parents=True, exist_ok=True)
            note.write_text(self.problem + "\n", encoding="utf-8")
            self.warn(f"C++ kernels not built, the slower reference takes their place: {self.problem}")

    def build_extension(self, extension: Extension) -> None:
        try:
            self._add_torch(extension)
            super().build_extension(extension)
        except Exception as error:  # whatever it is, it is reported, and the rest of the package is installed
            if SANITIZE:
                raise
            self.problem = f"{type(error).__name__}: {error}"

    def _add_torch(self, extension: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            raise RuntimeError(f"expected a GCC or Clang compiler, got {self.compiler.compiler_type}")
        try:
            import torch
            from torch.utils import cpp_extension
        except ImportError as error:
            # without these options pip would take the wheel that it kept from the build without PyTorch
            hint = "install PyTorch, then this package again, with --no-build-isolation --force-reinstall --no-deps --no-cache-dir"
            raise RuntimeError(f"PyTorch cannot be imported while building ({error}); {hint}") from None
        found = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
        if found < TORCH:
            raise RuntimeError(
                f"expected PyTorch {TORCH[0]}.{TORCH[1]} or newer while building, got {torch.__version__}"
            )
        extension.include_dirs += cpp_extension.include_paths()
        extension.library_dirs += cpp_extension.library_paths()


class Wheel(bdist_wheel):
    """Build the wheel. Without the extension it serves any machine and is named so, py3-none-any."""

    def run(self) -> None:
        self.run_command("build")
        if self.get_finalized_command("build_ext").problem:
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()


macros = [("TORCH_TARGET_VERSION", f"0x{TORCH[0]:02x}{TORCH[1]:02x}000000000000")]
if LIMITED_API:
    macros.append(("Py_LIMITED_API", f"0x{PYTHON[0]:02x}{PYTHON[1]:02x}0000"))

# no floating-point traps and no errno, so that loops are vectorised; NaN and inf keep their meaning
flags = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
if SANITIZE:
    # -O1 compiles in half the time of -O2. The rest is what a report needs: line numbers, whole call stacks, a stop at the first
    # error, and no fortified functions, which go past the sanitizer.
    flags += ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-U_FORTIFY_SOURCE"]
    flags += [f"-fsanitize={SANITIZE}"]

extension = Extension(
    "pmpo_kernels._C",
    files("*.cpp"),
    depends=[*files("*.h"), "setup.py"],
    libraries=["torch_cpu"],
    define_macros=macros,
    extra_compile_args=flags,
    extra_link_args=[f"-fsanitize={SANITIZE}"] if SANITIZE else [],
    py_limited_api=LIMITED_API,
    optional=not SANITIZE,
)

options = {"bdist_wheel": {"py_limited_api": f"cp{PYTHON[0]}{PYTHON[1]}"}} if LIMITED_API else {}
if SANITIZE:
    options["build"] = {"build_base": "out/sanitize", "build_lib": "out/sanitize/lib"}

setup(ext_modules=[extension], cmdclass={"build_ext": BuildCpp, "bdist_wheel": Wheel}, options=options)
