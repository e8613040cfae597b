"""The public names and their signatures, read from the sources.

python tools/public_api.py > tests/public_api.txt  renews the snapshot

Sources, not imports, so that the integrations need no trainer and the text is the same on every Python.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A module with `__all__` has the names in it, another one its functions and classes without an underscore, and what it passes on.
MODULES = [
    "pmpo_kernels", "pmpo_kernels.schedules", "pmpo_kernels.reference", "pmpo_kernels.solver", "pmpo_kernels.distributed",
    "pmpo_kernels.verification", "pmpo_kernels.verification.peers", "pmpo_kernels.integrations.trl",
    "pmpo_kernels.integrations.verl",
]  # fmt: skip
COMMANDS = ["info", "verify", "bench"]
Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


def file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(file_of(module).read_text(encoding="utf-8"))


def names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def definitions(module: str, name: str) -> list[tuple[str, Definition]]:
    """Find where a name is defined, through the modules that pass it on. There are several definitions for overloads, none for a
    module."""
    found = [(module, node) for node in tree(module).body if name in names_of(node)]
    for node in tree(module).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pmpo_kernels"):
            for alias in node.names:
                if (alias.asname or alias.name) == name and not file_of(f"{node.module}.{alias.name}").exists():
                    found += definitions(node.module, alias.name)
    return found  # type: ignore[return-value]


def public_names(module: str) -> list[str]:
    body = tree(module).body
    listed = [node for node in body if "__all__" in names_of(node)]
    if listed:
        assert isinstance(listed[0], ast.Assign)
        return sorted(ast.literal_eval(listed[0].value))
    defined = [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    imported = [alias for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
    defined += [alias.name for alias in imported if alias.asname == alias.name]  # `x as x`: passed on
    return sorted({name for name in defined if not name.startswith("_")})


class Written(ast.NodeTransformer):
    """Writes definitions as a user reads them, with choices in full and without the texts of help, which are no promise."""

    def __init__(self, module: str) -> None:
        self.module = module

    def visit_Name(self, node: ast.Name) -> ast.AST:
        found = [n for _, n in definitions(self.module, node.id) if isinstance(n, ast.Assign)]
        literal = found and isinstance(found[0].value, ast.Subscript) and ast.unparse(found[0].value.value) == "Literal"
        return found[0].value if literal else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if ast.unparse(node.func) == "_option":  # integrations/trl/config.py: default and help
            return node.args[0]
        node.keywords = [keyword for keyword in node.keywords if keyword.arg != "help"]
        return self.generic_visit(node)

    def typed(self, name: str, annotation: ast.expr | None, default: ast.expr | None) -> str:
        parts = [
            name,
            f": {self.text(annotation)}" if annotation else "",
            f" = {self.text(default)}" if default else "",
        ]
        return "".join(parts)

    def text(self, node: ast.AST | None) -> str:
        return "" if node is None else ast.unparse(self.visit(node))

    def function(self, node: ast.FunctionDef, name: str) -> list[str]:
        """Write one line an argument, so that a change is one line of a diff."""
        a, positional = node.args, [*node.args.posonlyargs, *node.args.args]
        defaults = [None] * (len(positional) - len(a.defaults)) + list(a.defaults)
        rows = [("", argument, default) for argument, default in zip(positional, defaults, strict=True)]
        rows += [("*", a.vararg, None)] if a.vararg else []
        rows += [("keyword ", argument, default) for argument, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
        rows += [("**", a.kwarg, None)] if a.kwarg else []
        decorators = "".join(f"@{self.text(d)} " for d in node.decorator_list)
        return [f"{decorators}{name}()" + (f" -> {self.text(node.returns)}" if node.returns else "")] + [
            f"    {mark}{self.typed(argument.arg, argument.annotation, default)}"
            for mark, argument, default in rows
            if argument.arg not in ("self", "cls")
        ]

    def described(self, node: Definition, name: str) -> list[str]:
        if isinstance(node, ast.FunctionDef):
            return self.function(node, name)
        if not isinstance(node, ast.ClassDef):
            return [name]
        decorators = "".join(f"@{self.text(d)} " for d in node.decorator_list)
        lines = [f"{decorators}class {name}({', '.join(map(self.text, node.bases))})"]
        for member in node.body:
            for inner in names_of(member):
                if inner.startswith("_") and inner != "__init__":
                    continue
                if isinstance(member, ast.FunctionDef):
                    lines += self.function(member, f"{name}.{inner}")
                elif isinstance(member, ast.AnnAssign):
                    lines.append("    " + self.typed(inner, member.annotation, member.value))
        return lines


def snapshot() -> str:
    lines = []
    for module in MODULES:
        lines += ["", f"# {module}"]
        for name in public_names(module):
            found = definitions(module, name)
            lines += [line for where, node in found for line in Written(where).described(node, name)] or [
                f"{name} (module)"
            ]
    lines += ["", "# pmpo-kernels"]
    for name in COMMANDS:
        ((where, node),) = definitions(f"pmpo_kernels.cli.{name}", "command")
        lines += Written(where).described(node, f"pmpo-kernels {name}")
    return "\n".join(lines).lstrip("\n") + "\n"


if __name__ == "__main__":
    print(snapshot(), end="")
