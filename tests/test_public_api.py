"""The public names and signatures are those of tests/public_api.txt; a change of them is one that a reader of the diff sees."""

from __future__ import annotations

import difflib
import importlib
import inspect
from dataclasses import fields
from pathlib import Path

import public_api
import pytest
import torch

from pmpo_kernels import LossConfig

RECORDED = Path(__file__).with_name("public_api.txt")
RENEW = "if the change is meant: python tools/public_api.py > tests/public_api.txt, and a line in CHANGELOG.md"


def test_the_public_api_is_the_recorded_one() -> None:
    recorded, found = RECORDED.read_text(encoding="utf-8").splitlines(), public_api.snapshot().splitlines()
    difference = list(difflib.unified_diff(recorded, found, "recorded", "found", n=2, lineterm=""))
    assert not difference, "\n".join([*difference, RENEW])


def test_what_is_recorded_is_there_when_imported() -> None:
    """The snapshot is read from the sources: the same names and arguments must be found at run time."""
    section, checked = "", 0
    lines = RECORDED.read_text(encoding="utf-8").splitlines()
    for at, line in enumerate(lines):
        section = line[2:] if line.startswith("# ") else section
        name = line.partition("(")[0]
        if not section.startswith("pmpo_kernels") or "integrations" in section or not name.isidentifier():
            continue
        found = getattr(importlib.import_module(section), name)
        if not line.startswith(f"{name}()"):
            continue
        end = next(i for i in range(at + 1, len(lines) + 1) if i == len(lines) or not lines[i].startswith("    "))
        arguments = [text.strip().removeprefix("keyword ").lstrip("*") for text in lines[at + 1 : end]]
        assert [text.split(":")[0] for text in arguments] == list(inspect.signature(found).parameters)
        checked += 1
    assert checked > 30  # the functions of modules that need no trainer
    assert {f"    {f.name}: float = {f.default!r}" for f in fields(LossConfig) if f.type == "float"} <= set(lines)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("beta: float = 0.0", "beta: float = 0.1", "    beta: float = 0.1"),
        ("temperature: float = 1.0,", "temp: float = 1.0,", "    keyword temp: float = 1.0"),
        ('ClipMode = Literal["token", ', "ClipMode = Literal[", "    clip: Literal['sequence', 'none'] = 'token'"),
    ],
)
def test_a_change_is_one_line(old: str, new: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, read = public_api.snapshot().splitlines(), Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda file, **options: read(file, **options).replace(old, new))
    public_api.tree.cache_clear()
    changed = [added for added in public_api.snapshot().splitlines() if added not in before]
    public_api.tree.cache_clear()
    assert changed == [line]


def test_the_typed_calls_run(capsys: pytest.CaptureFixture[str]) -> None:
    """mypy checks their types (pyproject.toml, files); what they return at run time is checked by all other tests."""
    import public_calls

    with torch.random.fork_rng():
        public_calls.main()
    assert len(capsys.readouterr().out.split()) == 2
