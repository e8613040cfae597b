"""No download, no unpickling, no shell: read from the package's sources, and listened for while its losses run."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pmpo_kernels"
DEMO = ROOT / "examples" / "demo"
# Modules that fetch, listen, unpickle, or start programs; functions that do, or that run text.
MODULES = {
    "urllib", "urllib3", "http", "ftplib", "smtplib", "socket", "socketserver", "ssl", "requests", "httpx", "aiohttp", "huggingface_hub",
    "pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "subprocess", "multiprocessing", "concurrent", "pty", "ctypes",
    "webbrowser", "pip", "ensurepip", "torch.hub", "torch.utils.cpp_extension", "torch.multiprocessing",
}  # fmt: skip
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.startfile", "os.fork", "torch.load", "torch.compile", "np.load",
    "numpy.load", "load_dataset", "snapshot_download", "hf_hub_download", "load_inline", "cpp_extension.load", "load_state_dict_from_url",
}  # fmt: skip
PATTERNS = (
    r"os\.(exec|spawn|posix_spawn)\w*|.*\.hub\..*|.*_object(_list|s)?"  # the last: torch.distributed's, which unpickle
)
# What there is, each with its reason; docs/security.md says the same.
ALLOWED = {
    ("benchmarking/machine.py", "import subprocess"): "git, for the commit in a file of results",
    ("benchmarking/machine.py", "subprocess.run"): "the same: a list of arguments, no shell",
    ("benchmarking/memory.py", "import multiprocessing"): "a fresh process of this program, for its peak memory",
    ("benchmarking/memory.py", "import concurrent"): "the same",
    ("cli/bench.py", "import multiprocessing"): "one fresh process of this program for each measurement",
    ("cli/bench.py", "import concurrent"): "the same",
    ("benchmarking/allocator.py", "import ctypes"): "glibc's mallopt, so that memory is measured without its pools",
    ("benchmarking/variants.py", "torch.compile"): "what the benchmark compares with",
    (
        "examples/demo/smollm2.py",
        "from_pretrained",
    ): "a file of an installed package; local_files_only, and HF_HUB_OFFLINE is set before",
}


def banned(name: str) -> bool:
    last = name.rpartition(".")[2]
    return name in CALLS or last in CALLS - {"compile", "eval", "load"} or re.fullmatch(PATTERNS, name) is not None


def found_in(source: str) -> Iterator[str]:
    """Each import and call of the source that is among those above."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            names = [f"{module}.{a.name}" if module else a.name for a in node.names]
            for name in names:
                parts = name.split(".")
                yield from (
                    f"import {m}" for m in MODULES if m in (".".join(parts[:n]) for n in range(1, len(parts) + 1))
                )
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func) if isinstance(node.func, (ast.Name, ast.Attribute)) else ""
            name = re.sub(r"^.*\)", "value", name, flags=re.S)  # a method of what a call returns
            if banned(name) or name.startswith("subprocess."):
                yield name
            if name.endswith("from_pretrained"):
                yield "from_pretrained"
            if any(
                k.arg == "shell" and not (isinstance(k.value, ast.Constant) and k.value.value is False)
                for k in node.keywords
            ):
                yield f"{name}(shell=...)"
            if any(k.arg == "trust_remote_code" for k in node.keywords):
                yield f"{name}(trust_remote_code=...)"


def test_the_sources_fetch_nothing_unpickle_nothing_and_start_no_shell() -> None:
    found = {
        (path.relative_to(root).as_posix(), what)
        for folder, root in ((PACKAGE, PACKAGE), (DEMO, ROOT))
        for path in folder.rglob("*.py")
        for what in found_in(path.read_text(encoding="utf-8"))
    }
    assert found - set(ALLOWED) == set()
    assert set(ALLOWED) - found == set()  # a reason for what is not there any more
    model = (DEMO / "smollm2.py").read_text()
    assert '"local_files_only": True' in model
    assert model.index('os.environ["HF_HUB_OFFLINE"] = "1"') < model.index("from_pretrained(")


@pytest.mark.parametrize(
    "bad",
    [
        "import urllib.request", "from urllib import request", "import socket", "import pickle", "from torch import hub", "import requests",
        "torch.load(p)", "torch.load(p, weights_only=False)", "torch.hub.load(a, b)", "os.system('x')", "eval('x')", "exec(x)",
        "subprocess.run('x', shell=True)", "f(x, shell=flag)", "os.execv(a, b)", "dist.all_gather_object(a, b)", "np.load(p)",
        "AutoModel.from_pretrained(x)", "load(x, trust_remote_code=True)", "dist.broadcast_object_list(a)", "__import__(x)",
    ],
)  # fmt: skip
def test_what_is_looked_for_is_found(bad: str) -> None:
    assert list(found_in(bad))


def test_the_kernels_open_nothing_and_start_nothing() -> None:
    """csrc/ includes no header of files, sockets or processes (sys/mman.h is for madvise), and calls none of their functions."""
    sources = "\n".join(path.read_text() for path in sorted((ROOT / "csrc").iterdir()))
    assert len(sources) > 10_000
    assert not re.search(
        r"#include <(fstream|cstdio|stdio\.h|filesystem|unistd\.h|sys/(?!mman)\w+\.h|dlfcn\.h|netdb\.h|spawn\.h)>",
        sources,
    )
    assert not re.search(r"\b(system|popen|mmap|shm_open|fopen|execv?p?e?|fork|dlopen|socket|getenv)\s*\(", sources)


# A program that records what Python's audit hooks report; `phase` names what runs, the last line is a table of the events.
LISTEN = """
import json, os, sys
WATCHED = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pickle.", "urllib.", "ftplib.",
           "http.", "smtplib.", "webbrowser.", "pty.", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "shutil.", "tempfile.")
phase, events = "start", []
def hook(event, arguments):
    writes = event == "open" and (set("wax+") & set(arguments[1] or "") if isinstance(arguments[1], str) else arguments[2] & 3)
    if event.startswith(WATCHED) or writes:
        program = os.path.basename(str(arguments[0])) if event == "subprocess.Popen" else str(arguments[0])
        events.append((phase, "write" if writes else event, program))
sys.addaudithook(hook)
"""


def events(program: str, folder: Path, **environment: str) -> list[tuple[str, str, str]]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "TORCHINDUCTOR_"))}
    env = {**clean, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1", **environment}
    code = LISTEN + program + "\nprint(json.dumps(events))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(event) for event in json.loads(done.stdout.splitlines()[-1])]


LOSSES = """
phase = "PyTorch"
import torch
phase = "import"
import public_calls, pmpo_kernels
from pmpo_kernels import pmpo_loss, token_logp, solve_power, linear_pmpo_loss
from pmpo_kernels.impls import IMPLS
phase = "public calls"
public_calls.main()
for impl in IMPLS:
    if impl == "cpp" and not pmpo_kernels.available_impls()["cpp"].startswith("usable"):
        continue
    phase = impl
    z, ids = torch.randn(2, 3, 11, requires_grad=True), torch.randint(11, (2, 3))
    pmpo_loss(z, ids, torch.full((2, 3), -2.0), torch.tensor([1.0, -1.0]), impl=impl).loss.backward()
    token_logp(z, ids, impl=impl).logp.sum().backward()
    h, w = torch.randn(2, 3, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    linear_pmpo_loss(h, w, ids, None, torch.tensor([1.0, -1.0]), impl=impl).loss.backward()
phase = "info"
from typer.testing import CliRunner
from pmpo_kernels.cli import app
assert CliRunner().invoke(app, ["info"]).exit_code == 0
"""


def test_the_losses_connect_start_unpickle_and_write_nothing(tmp_path: Path) -> None:
    """Triton's kernels under its interpreter; on a GPU Triton compiles them, which docs/security.md describes."""
    found = [event for event in events(LOSSES, tmp_path, TRITON_INTERPRET="1") if event[0] != "start"]
    assert [event for event in found if event[0] != "PyTorch"] == []
    # importing a PyTorch for CUDA, from 2.15 on, asks ldconfig for its libraries
    allowed = {("subprocess.Popen", "ldconfig"), ("os.posix_spawn", "/sbin/ldconfig"), ("write", "/dev/null")}
    assert {event[1:] for event in map(tuple, found)} <= allowed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("act", "event"),
    [
        ("import socket; s = socket.socket(); s.close()", "socket.__new__"),
        ("import subprocess; subprocess.run(['true'])", "subprocess.Popen"),
        ("import pickle, fractions; pickle.loads(pickle.dumps(fractions.Fraction(1, 2)))", "pickle.find_class"),
        ("import os; os.system('true')", "os.system"),
        ("open('x', 'w').close()", "write"),
        ("import os; os.close(os.open('x', os.O_WRONLY | os.O_CREAT))", "write"),
    ],
)
def test_what_is_listened_for_is_heard(act: str, event: str, tmp_path: Path) -> None:
    assert event in [found[1] for found in events(act, tmp_path)]


@pytest.mark.isolated  # its programs take a minute
def test_torch_compile_starts_compilers_only(tmp_path: Path) -> None:
    """What PyTorch does, not the package: docs/security.md lists these programs."""
    program = """
import torch
from pmpo_kernels import pmpo_loss
ids = torch.randint(11, (2, 3))
z = torch.randn(2, 3, 11, requires_grad=True)
phase = "compile"
torch.compile(lambda z: pmpo_loss(2 * z, ids, None, torch.ones(2)).loss)(z).backward()
"""
    found = events(
        program, tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"), TORCHINDUCTOR_COMPILE_THREADS="1"
    )
    assert [event for event in found if event[1].startswith(("socket.connect", "urllib", "http"))] == []
    programs = {event[2] for event in found if event[1] == "subprocess.Popen"}
    listed = set(re.findall(r"`([\w+./]+)`", (ROOT / "docs" / "security.md").read_text()))
    python = {Path(sys.executable).name, os.path.basename(os.path.realpath(sys.executable))}
    assert programs  # else nothing was compiled
    assert programs - python <= listed


# --- requirements ----------------------------------------------------------------------------------------------------


def test_every_requirement_is_in_the_audit() -> None:
    """docs/security.md has a row for each, with its licence, for what it is there and what it may do."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:requires|dependencies|cli|demo|test|trl|peers|dev|docs) = (\[.*\])$", pyproject, re.M)
    assert len(lists) == 9
    required = {name.lower() for text in lists for name in re.findall(r'"(?!pmpo-kernels)([\w-]+)', text)}
    required |= set(re.findall(r"--no-deps ([\w-]+)==", (ROOT / "Makefile").read_text()))
    rows = re.findall(
        r"^\| ([\w-]+) \| (.+) \| (.+) \| (.+) \| (.+) \|$", (ROOT / "docs" / "security.md").read_text(), re.M
    )
    assert {name for name, *_ in rows if name not in ("package", "---")} == required
    assert all(cell.strip() for row in rows for cell in row)
