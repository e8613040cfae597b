"""The documentation: its Python runs, its commands exist, its pictures can be drawn, and every error message has an entry.

That its links, references and formulas are right is checked by `make docs`.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import typer
from messages import messages
from typer.testing import CliRunner

from pmpo_kernels.cli import app
from pmpo_kernels.triton import dlogits, token_logp, trajectory  # noqa: F401  before a program switches the interpreter off

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    str(file.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md")
    for file in ROOT.glob(pattern)
)
PROGRAMS = {"pmpo-kernels", "python", "python3", "make", "pytest", "bash", "pip"}

# What is not run here: the page, what such a block holds, and where it is run. The first line that fits counts.
RUN_ELSEWHERE = [
    ("README.md", "integrations.trl", "test_trl.py", "test_the_lines_of_the_documentation_run"),
    ("README.md", "loss_of", "test_readme.py", "test_the_training_step_in_plain_pytorch_runs"),
    ("README.md", "", "test_readme.py", "test_every_python_block_runs_in_order"),
    ("docs/pytorch.md", "dist.", "test_distributed.py", "test_the_documentation_runs"),
    ("docs/pytorch.md", "", "test_readme.py", "test_every_block_about_pytorch_runs_in_order"),
    ("docs/scaling.md", "from prediction", "test_cost.py", "test_the_example_of_the_docs_runs"),
    ("docs/scaling.md", "", "ranks_worker.py", "docs"),
    ("docs/trl.md", "", "test_trl.py", "test_the_lines_of_the_documentation_run"),
    ("docs/verl.md", "", "test_verl.py", "test_the_lines_of_the_documentation_register_a_loss"),
]
# Code that is not run anywhere: the page, and the reason that stands in the block.
NOT_RUN = {("docs/usage.md", "# 16 GPUs")}


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)


def elsewhere(page: str, block: str) -> tuple[str, str] | None:
    """File and function that run a block, if it is not this file."""
    found = [(file, test) for where, part, file, test in RUN_ELSEWHERE if where == page and part in block]
    return found[0] if found else None


def a_transformers_model() -> dict[str, Any]:
    """What docs/fused_head.md takes as given."""
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, **size))
    B, T, prompt_length = 2, 5, 3
    input_ids = torch.randint(50, (B, prompt_length + T))
    return {
        "linear_pmpo_loss": importlib.import_module("pmpo_kernels").linear_pmpo_loss,
        "model": model,
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "prompt_length": prompt_length,
        "token_ids": input_ids[:, prompt_length:],
        "old_logp": None,
        "advantages": torch.ones(B),
        "mask": torch.ones(B, T, dtype=torch.bool),
    }


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {"docs/fused_head.md": a_transformers_model}
RUN_HERE = {
    page: [text for language, text in blocks(page) if language == "python" and not elsewhere(page, text)]
    for page in PAGES
}


@pytest.mark.parametrize("page", [page for page, found in RUN_HERE.items() if found])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = GIVEN.get(page, dict)()
    exec(compile("\n".join(RUN_HERE[page]), page, "exec"), names)
    if page == "docs/fused_head.md":
        assert names["out"].loss.isfinite()


def test_the_python_that_runs_elsewhere_does() -> None:
    """By a test that names the page; what needs more than this environment is named on the page."""
    used = {elsewhere(page, text) for page in PAGES for language, text in blocks(page) if language == "python"}
    for page, _, file, test in RUN_ELSEWHERE:
        source = (ROOT / "tests" / file).read_text()
        functions = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
        assert test in functions
        assert (file, test) in used
        workers = (ROOT / "tests" / "distributed_worker.py").read_text() if file == "test_distributed.py" else ""
        assert Path(page).name in source + workers
        assert file == "test_readme.py" or file in (ROOT / page).read_text(), f"{page} does not name {file}"


@pytest.mark.parametrize("page", PAGES)
def test_the_tests_that_a_page_names_exist(page: str) -> None:
    """After a file the functions without one are of that file, to the end of the line."""
    for line in (ROOT / page).read_text().splitlines():
        file = None
        for name, function in re.findall(r"`(?:tests/)?(test_\w+\.py)?(?:::)?(test_\w+)?`", line):
            file = name or file
            where = [ROOT / "tests" / file] if file else (ROOT / "tests").glob("test_*.py")
            sources = [path.read_text() for path in where]
            assert sources
            assert not function or any(f"def {function}(" in source for source in sources), f"{file}::{function}"


def is_python(text: str) -> bool:
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return False
    return any(isinstance(node, (ast.Assign, ast.Import, ast.ImportFrom)) for node in body)


@pytest.mark.parametrize("page", PAGES)
def test_python_is_marked_as_such(page: str) -> None:
    """Unmarked code would not be run."""
    unmarked = [text for language, text in blocks(page) if language == "" and is_python(text)]
    allowed = [text for text in unmarked if any(where == page and reason in text for where, reason in NOT_RUN)]
    assert unmarked == allowed


# --- commands --------------------------------------------------------------------------------------------------------


def commands(page: str) -> Iterator[list[str]]:
    """Words of each command on a page that begins with one of PROGRAMS, in blocks and in the text."""
    text = (ROOT / page).read_text()
    lines = [
        line for language, block in blocks(page) if language == "" for line in block.replace("\\\n", " ").splitlines()
    ]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    for line in lines:
        line = re.sub(r"<\w+>", "reference", line).replace(".venv/bin/", "")
        try:
            words = shlex.split(line.partition(" | ")[0], comments=True)
        except ValueError:  # an apostrophe: prose
            continue
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words and words[0] in PROGRAMS and "..." not in words:
            yield words


def functions_of(script: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, Callable[..., None]]]:
    """What Typer calls in a script; empty for one that parses its arguments otherwise."""
    if "typer" not in script.read_text():
        return []
    monkeypatch.syspath_prepend(str(script.parent))
    return [(None, load(script).main)]


def load(script: Path) -> ModuleType:
    """Imported, without what it does to the environment for its own process."""
    spec = importlib.util.spec_from_file_location(f"loaded_{script.stem}", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it
    with mock.patch.dict(os.environ):
        spec.loader.exec_module(module)
    return module


def parse(functions: list[tuple[str | None, Callable[..., None]]], arguments: list[str]) -> None:
    """Names, options and values are understood; the functions are not called."""
    known = typer.Typer(add_completion=False)
    for name, function in functions:
        known.command(name)(functools.wraps(function)(lambda **options: None))
    for word in arguments:
        if "/" in word and not Path(word).suffix:
            Path(word).mkdir(parents=True, exist_ok=True)
    done = CliRunner().invoke(known, arguments)
    assert done.exit_code == 0, done.output


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(rest) <= set(targets)
    elif program == "pytest" or rest[:2] == ["-m", "pytest"]:
        assert all((ROOT / word.partition("::")[0]).exists() for word in rest if "/" in word)
    elif program == "pip":
        extras = re.findall(
            r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().partition("optional-dependencies]")[2], re.M
        )
        asked = re.findall(r"(?:^\.|pmpo-kernels)\[([\w,]+)\]", "\n".join(rest), re.M)
        assert {extra for group in asked for extra in group.split(",")} <= set(extras)
    elif program == "pmpo-kernels" or rest[:2] == ["-m", "pmpo_kernels"]:
        arguments = rest if program == "pmpo-kernels" else rest[2:]
        if "--help" not in arguments and arguments:
            parse([(command.name, command.callback) for command in app.registered_commands], arguments)
    elif rest and re.search(r"\.(py|sh)$", rest[0]):
        script = ROOT / rest[0]
        assert script.exists()
        functions = functions_of(script, monkeypatch) if script.suffix == ".py" else []
        if functions:
            parse(functions, rest[1:])


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))])
def test_the_commands_of_a_page_are_understood(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in commands(page):
        try:
            check_command(words, monkeypatch)
        except Exception as error:
            raise AssertionError(f"{page}: {shlex.join(words)}: {error}") from error


# --- messages, pictures ----------------------------------------------------------------------------------------------


def test_every_message_has_an_entry_and_every_entry_a_message() -> None:
    span = r"(?:``.+?``|`[^`\n]+`)"
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    entries = {
        text.strip("`") if not text.startswith("``") else text[2:-2]
        for item in re.findall(rf"^- ({span}(?:,\s+{span})*):\s", page, re.M)
        for text in re.findall(span, item)
    }
    assert messages() - entries == set()
    assert entries - messages() == set()


def test_the_picture_of_the_mathematics_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(ROOT / "docs" / "images" / "mathematics.py")
    monkeypatch.setattr(module, "OUT", tmp_path / "mathematics.png")
    module.main()
    assert module.OUT.read_bytes().startswith(b"\x89PNG")
