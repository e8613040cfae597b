"""The import law: what may import what, read from the sources and from what an import really loads; no circles among the programs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pmpo_kernels

PACKAGE = Path(pmpo_kernels.__file__).parent
PROGRAMS = [
    path for folder in ("benchmarks", "examples", "tools") for path in sorted((PACKAGE.parent / folder).rglob("*.py"))
]
# Below, a module may import only those to its left; one not listed here fails the test.
LAYERS = [
    ["version", "memory", "scalars", "contract"], ["config", "cpp", "aggregate"], ["checks", "impls"], ["batch"], ["reference", "triton"], ["ops"],
    ["autograd"], ["sharing"], ["distributed"], ["api", "solver", "schedules"], ["linear"], ["verification"], ["benchmarking"], ["cli", "integrations"], ["__main__"],
]  # fmt: skip
# What a backend may import beside its own; `aggregate` is the reference's.
SHARED = {"batch", "contract"}
BACKENDS = {"reference": {"aggregate"}, "triton": set(), "aggregate": set()}


def imports(path: Path) -> set[str]:
    """First-level modules of this package that a file names in an import, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pmpo_kernels":
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pmpo_kernels.")}
    return found


def modules() -> list[tuple[str, Path]]:
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in sorted(PACKAGE.rglob("*.py"))]


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: str(value))
def test_layers(module: str, path: Path) -> None:
    if module == "__init__":
        return
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    assert module in level, f"{module} has no place in the import law"
    for other in imports(path) - {module}:
        assert other in level, f"{path} imports {other}"
        assert level[other] < level[module], f"{path} imports {other}, which is not below it"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_imports_what_all_share_and_its_own(backend: str) -> None:
    its = [path for module, path in modules() if module == backend]
    assert its
    for path in its:
        assert imports(path) <= SHARED | BACKENDS[backend] | {backend}, path


def test_importing_the_package_loads_no_backend_and_no_trainer() -> None:
    code = "import sys, torch; before = set(sys.modules); import pmpo_kernels, pmpo_kernels.verification.peers; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    first = {name.split(".")[0] for name in loaded}
    assert not first & {"triton", "transformers", "trl", "verl", "liger_kernel", "typer", "rich", "matplotlib"}
    assert not [name for name in loaded if name.startswith(("pmpo_kernels.triton", "pmpo_kernels.cli"))]


def names(path: Path) -> set[str]:
    """Modules that a file names in an import, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_no_program_imports_the_command_line() -> None:
    """Of the package's modules: those of `cli/` are programs themselves."""
    assert PROGRAMS
    for path in PROGRAMS:
        assert not [name for name in names(path) if name.startswith("pmpo_kernels.cli")], path


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other, the first one again at the end; none: empty."""
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done or module not in imports:
            return []
        for other in sorted(imports[module]):
            if found := visit(other, [*way, module]):
                return found
        done.add(module)
        return []

    return next((found for module in imports if (found := visit(module, []))), [])


def test_the_modules_of_the_programs_import_each_other_in_no_circle() -> None:
    by_name: dict[str, list[Path]] = {}
    for path in PROGRAMS:
        by_name.setdefault(path.stem, []).append(path)
    assert [paths for paths in by_name.values() if len(paths) > 1] == []  # they are imported by their names alone
    assert circle({name: names(path) for name, (path,) in by_name.items()}) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c", "torch"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": {"torch"}}) == []
