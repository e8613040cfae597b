"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: a selection that finds nothing, errors that are found.

`make sanitize` runs every test that uses them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sanitizers

from pmpo_kernels import cpp

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(bool(sanitizers.problem()), reason=f"no sanitizers: {sanitizers.problem()}")

# What each stage reads and writes: every dtype, instruction set and alignment, odd lengths, optional inputs there or not.
SELECTION = [
    "tests/test_cpp.py",
    "tests/test_stages.py",
    "tests/test_solver.py",
    "tests/test_promises.py",
    "--deselect=tests/test_cpp.py::test_build",
    "-knot triton and not reference",
]

# One wrong call each of the kernels as they are, on tensors that PyTorch allocated: `short` gives a tensor's last element back.
PROGRAM = """
import json, os, sys, tempfile
import torch
from pmpo_kernels import LossConfig, cpp
from pmpo_kernels.batch import Batch
from pmpo_kernels.ops import stage

def short(x):
    x.untyped_storage().resize_(x.untyped_storage().nbytes() - x.element_size())
    return x

def token_logp(logits, mask=None, ids=None):
    ids = torch.zeros(logits.shape[:2], dtype=torch.int64) if ids is None else ids
    return stage("token_logp", "cpp")(logits, ids, mask, 1.0)

def dlogits_(logits, g):
    ids, one = torch.zeros(logits.shape[:2], dtype=torch.int64), torch.ones(logits.shape[:2])
    stage("dlogits_", "cpp")(logits, ids, None, one, one, one, g * one, None, 1.0)

def trajectory(logp):
    options = list(LossConfig.pmpo().trajectory_options(has_power=False, has_target_ess=False))
    N = logp.numel()
    stage("trajectory", "cpp")(logp, None, *Batch(torch.ones(1), torch.tensor([0, N])), options)

def solve_power(l):
    stage("solve_power", "cpp")(l, None, torch.tensor([0, l.numel()]), 2 * torch.ones(1, dtype=torch.float64), 1.0)

torch.set_num_threads(1)
found = {}
for name, call in json.loads(sys.argv[1]).items():  # in a process of its own, which the error ends
    with tempfile.TemporaryFile() as report:
        child = os.fork()
        if not child:
            os.dup2(report.fileno(), 2)
            exec(call)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        report.seek(0)
        found[name] = (status, report.read().decode())
print(json.dumps(found))
"""
HEAP_READ = ("heap-buffer-overflow", "READ of size")
ERRORS = {
    "logits, bfloat16": ("token_logp(short(torch.zeros(2, 3, 67, dtype=torch.bfloat16)))", HEAP_READ),
    "logits, float32": ("token_logp(short(torch.zeros(2, 3, 4100)))", HEAP_READ),
    "logits, SSE2": (
        "cpp.extension.use_isa(cpp.extension.isas()[0]); token_logp(short(torch.zeros(1, 1, 4096)))",
        HEAP_READ,
    ),
    "mask": ("token_logp(torch.zeros(2, 3, 5), short(torch.ones(2, 3, dtype=torch.bool)))", HEAP_READ),
    "token ids": ("token_logp(torch.zeros(2, 3, 5), ids=short(torch.zeros(2, 3, dtype=torch.int64)))", HEAP_READ),
    "gradient's logits": ("dlogits_(short(torch.zeros(1, 2, 67)), 1.0)", HEAP_READ),
    "gradient of zeros": ("dlogits_(short(torch.zeros(1, 2, 67)), 0.0)", ("heap-buffer-overflow", "WRITE of size")),
    "log-probs": ("trajectory(short(torch.zeros(9, dtype=torch.float64)))", HEAP_READ),
    "log weights": ("solve_power(short(torch.zeros(9, dtype=torch.float64)))", HEAP_READ),
    "a byte that is no bool": (
        "token_logp(torch.zeros(2, 3, 5), torch.full((2, 3), 2, dtype=torch.uint8).view(torch.bool))",
        ("runtime error: load of value 2, which is not a valid value for type 'bool'",),
    ),
}


@pytest.fixture(scope="module")
def built() -> None:
    sanitizers.build()


def test_no_error_is_found(built: None) -> None:
    command = sanitizers.pytest_command(["-q", "-x", *SELECTION])
    done = subprocess.run(command, cwd=ROOT, env=sanitizers.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[:8000]
    assert int(done.stdout.rpartition(" passed")[0].split()[-1]) > 100


def test_errors_are_found(built: None) -> None:
    """Each ends its process with a report that names a line of csrc/; the right call beside it does not."""
    calls = {name: call for name, (call, _) in ERRORS.items()}
    calls |= {f"right: {name}": call.replace("short(", "(") for name, call in calls.items() if "short(" in call}
    command = [sys.executable, "-c", PROGRAM, json.dumps(calls)]
    environment = sanitizers.environment()
    done = subprocess.run(command, cwd=sanitizers.LIBRARY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-8000:]
    for name, (status, text) in json.loads(done.stdout).items():
        if name in ERRORS:
            assert status != 0, name
            assert all(part in text for part in (*ERRORS[name][1], "csrc/")), (name, text[-4000:])
        else:
            assert status == 0, (name, text[-4000:])


def test_the_normal_extension_stays(built: None, tmp_path: Path) -> None:
    """The build with sanitizers is a folder of its own, and refuses to be one in place."""
    assert cpp.extension is None or not Path(cpp.extension.__file__).is_relative_to(ROOT / "out")
    environment = os.environ | {"PMPO_KERNELS_SANITIZE": "address"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "PMPO_KERNELS_SANITIZE: expected `python setup.py build`" in done.stderr
