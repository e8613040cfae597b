"""The error messages of the package, the demo and the cases of benchmarks, read from their sources. GAP stands for what varies."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ("pmpo_kernels/**/*.py", "examples/demo/*.py", "benchmarks/head_inputs.py")
GAP = "…"
REASONS = (
    "_problem",
    "files_problem",
    "memory_problem",
    "load",
)  # what they return is told as the reason why something cannot run
Scopes = tuple[ast.AST, ...]  # from the module to the innermost function


@lru_cache
def modules() -> list[ast.Module]:
    files = [file for pattern in SOURCES for file in sorted(ROOT.glob(pattern))]
    return [ast.parse(file.read_text(encoding="utf-8")) for file in files]


def walk(node: ast.AST, scopes: Scopes) -> Iterator[tuple[ast.AST, Scopes]]:
    for child in ast.iter_child_nodes(node):
        yield child, scopes
        yield from walk(child, (*scopes, child) if isinstance(child, (ast.FunctionDef, ast.For)) else scopes)


@lru_cache
def nodes() -> list[tuple[ast.AST, Scopes]]:
    return [found for module in modules() for found in walk(module, (module,))]


def parameters(function: ast.FunctionDef) -> list[str]:
    return [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]


def function_of(scopes: Scopes) -> ast.FunctionDef | None:
    return next((scope for scope in reversed(scopes) if isinstance(scope, ast.FunctionDef)), None)


def assigned(name: str, scopes: Scopes) -> list[ast.expr]:
    """Return what a variable may be, as far as the source says so: values that it is given, or that a loop goes through."""
    for scope in reversed(scopes):
        if isinstance(scope, ast.For) and isinstance(scope.iter, (ast.Tuple, ast.List)):
            targets = scope.target.elts if isinstance(scope.target, ast.Tuple) else [scope.target]
            at = next((i for i, t in enumerate(targets) if isinstance(t, ast.Name) and t.id == name), None)
            if at is not None:
                rows = scope.iter.elts
                return [row.elts[at] if isinstance(row, ast.Tuple) and len(targets) > 1 else row for row in rows]
        if isinstance(scope, (ast.FunctionDef, ast.Module)):
            inside = ast.walk(scope) if isinstance(scope, ast.FunctionDef) else scope.body
            values = [
                node.value
                for node in inside
                if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
            ]
            if values or (isinstance(scope, ast.FunctionDef) and name in parameters(scope)):
                return values
    imported = [
        m for m in modules() for n in m.body if isinstance(n, ast.Assign) and name in map(ast.unparse, n.targets)
    ]
    return assigned(name, (imported[0],)) if imported and name.isupper() else []


def texts(node: ast.expr, scopes: Scopes, known: dict[str, str]) -> set[str]:
    """Return all strings that an expression may be."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value}
    if isinstance(node, ast.JoinedStr):
        return {"".join(parts) for parts in product(*(texts(value, scopes, known) for value in node.values))}
    if isinstance(node, ast.FormattedValue) and node.conversion == -1:
        return texts(node.value, scopes, known)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return {a + b for a in texts(node.left, scopes, known) for b in texts(node.right, scopes, known)}
    if isinstance(node, ast.IfExp):
        return texts(node.body, scopes, known) | texts(node.orelse, scopes, known)
    if isinstance(node, ast.Name):
        if node.id in known:
            return {known[node.id]}
        values = assigned(node.id, scopes)
        return set().union(*(texts(value, scopes, known) for value in values)) if values else {GAP}
    return {GAP}


def contexts(function: ast.FunctionDef | None) -> list[dict[str, str]]:
    """Return `name` and `expected` of a function that checks what its callers expect, at each of its calls."""
    if function is None or "expected" not in parameters(function):
        return [{}]
    found = []
    for call, scopes in nodes():
        if not isinstance(call, ast.Call) or ast.unparse(call.func).rpartition(".")[2] != function.name:
            continue
        if function.name.startswith("_") and not any(function in ast.walk(scope) for scope in scopes[:1]):
            continue  # another module's function of this name
        names = [name for name in parameters(function) if name != "self"]
        given = dict(zip(names, call.args, strict=False)) | {k.arg: k.value for k in call.keywords}
        for known in contexts(function_of(scopes)):
            values = {name: texts(given[name], scopes, known) for name in ("name", "expected")}
            found += [dict(zip(values, pair, strict=True)) for pair in product(*values.values())]
    return found


def messages() -> set[str]:
    found = set()
    for node, scopes in nodes():
        function = function_of(scopes)
        text = None
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            text = node.exc.args[0]
        if isinstance(node, ast.Return) and function is not None and function.name in REASONS:
            text = node.value.elts[1] if isinstance(node.value, ast.Tuple) else node.value
        if text is not None:
            for known in contexts(function):
                found |= texts(text, scopes, known)
    return {" ".join(re.sub(f"{GAP}+", GAP, message).split()) for message in found if message.strip(GAP)}


if __name__ == "__main__":
    print("\n".join(sorted(messages())))
