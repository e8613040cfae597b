"""benchmarks/gpu.sh without a GPU: a rehearsal from its first step to its last, then calls that fail, hang and are killed, and the
commands of a call on a GPU, with a stand-in for the interpreter."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import targets
import typer

from pmpo_kernels.impls import USABLE, available_impls

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
STEPS = re.findall(r"^  step ([a-z-]+) (\d+) ", SCRIPT.read_text(), re.M)
GRACE = int(re.findall(r"^GRACE=(\d+) ", SCRIPT.read_text(), re.M)[0])
NAMES = [name for name, _ in STEPS]
SECOND_CALL = ["racecheck", "soak"]
FILES = {
    "prepare": ["info.json"],
    "stages": ["stages-triton.json"],
    "run": ["run-tiny-*-grpo-p0-c0-z0.json"],
    "head": ["head-tiny-*-grpo-*-c0-z0-*.json"],
    "sweep": ["sweep.json"],
    "cases": ["run-tiny-*-gspo-*.json", "run-tiny-*-c0.5-z0.json", "run-tiny-*-z0.5.json", "run-tiny-*-pmpo-*.json"],
    "head-more": ["head-tiny-*-z0.5-*.json", "head-tiny-*-c0.5-z0-*.json", "head-tiny-*-pmpo-*.json"],
    "soak": ["soak.json"],
}
"""What a step writes besides its log."""

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not all(map(shutil.which, ("bash", "timeout", "tar"))),
    reason="benchmarks/gpu.sh needs bash, timeout and tar of Linux",
)


class Call(NamedTuple):
    """What a call left behind."""

    status: int
    output: str
    results: Path
    archive: Path

    @property
    def steps(self) -> dict[str, str]:
        """How each step ended, in their order."""
        lines = (self.results / "steps.tsv").read_text().splitlines()
        return {name: how for name, how, _ in (line.split("\t") for line in lines)}

    def packed(self) -> dict[str, bytes]:
        """Files of the archive; reading all of them is what shows that it is whole."""
        with tarfile.open(self.archive) as tar:
            members = [m for m in tar.getmembers() if m.isfile()]
            return {Path(m.name).name: tar.extractfile(m).read() for m in members}  # type: ignore[union-attr]


def environment(folder: Path, python: Path | str, **variables: str) -> dict[str, str]:
    """Of a call that writes into `folder`, without what the test run itself has set."""
    ours = ("TRITON_INTERPRET", "PYTHONPATH", "STEPS", "LIMITS", "TOTAL", "DRY", "WHEELS", "COMMIT", "KEEP_GOING")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    where = {"RESULTS": str(folder / "results"), "ARCHIVE": str(folder / "results.tgz"), "PYTHON": str(python)}
    return kept | where | variables


def run(folder: Path, python: Path | str, *options: str, **variables: str) -> Call:
    done = subprocess.run(
        [str(SCRIPT), *options], cwd=folder, env=environment(folder, python, **variables), timeout=900,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return Call(done.returncode, done.stdout, folder / "results", folder / "results.tgz")


# --- a rehearsal -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Call:
    """Every step, with the limits of a machine that does other things at the same time; and a wheel that is given."""
    folder = tmp_path_factory.mktemp("rehearsal")
    (folder / "wheels").mkdir()
    with zipfile.ZipFile(folder / "wheels" / "given_peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("given_peer.py", "")
        wheel.writestr("given_peer-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: given-peer\nVersion: 1.0\n")
        wheel.writestr(
            "given_peer-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("given_peer-1.0.dist-info/RECORD", "given_peer.py,,\n")
    slow = {"TOTAL": "800", "LIMITS": " ".join(f"{name}=300" for name in NAMES), "OMP_NUM_THREADS": "1"}
    return run(folder, sys.executable, DRY="1", WHEELS="wheels", COMMIT="abc", **slow)


def test_a_rehearsal_runs_every_step_in_order(rehearsal: Call) -> None:
    assert rehearsal.status == 0, rehearsal.output
    assert rehearsal.steps == dict.fromkeys(NAMES, "passed")
    assert list(rehearsal.steps) == NAMES
    started = re.findall(r"^== ([a-z-]+): at most", rehearsal.output, re.M)
    assert started == NAMES
    assert "Successfully installed given-peer-1.0" in (rehearsal.results / "prepare.log").read_text()


def test_a_rehearsal_writes_what_a_call_writes(rehearsal: Call) -> None:
    for name in NAMES:
        assert (rehearsal.results / f"{name}.log").stat().st_size > 0
        for pattern in FILES.get(name, []):
            found = list(rehearsal.results.glob(pattern))
            assert found, pattern
            for content in (json.loads(path.read_text()) for path in found):
                assert content.get("complete", True) is True
    assert (rehearsal.results / "commit.txt").read_text() == "abc\n"
    assert " passed" in (rehearsal.results / "smoke.log").read_text()
    for name in ("memcheck", "racecheck"):
        assert f"stand-in for compute-sanitizer --tool {name}" in (rehearsal.results / f"{name}.log").read_text()


def test_the_archive_has_all_files_and_no_others_are_left(rehearsal: Call) -> None:
    packed = rehearsal.packed()
    assert packed == {path.name: path.read_bytes() for path in rehearsal.results.iterdir()}
    assert sorted(path.name for path in rehearsal.archive.parent.iterdir()) == ["results", "results.tgz", "wheels"]


def test_a_rehearsal_has_a_line_a_target_and_no_result(rehearsal: Call) -> None:
    lines = (rehearsal.results / "targets.txt").read_text().splitlines()[1:]
    assert [line.partition(":")[0] for line in lines] == [target.name.partition(":")[0] for target in targets.TARGETS]
    assert all(line in rehearsal.output for line in lines)
    states = [line.rpartition(": ")[2] for line in lines]
    assert set(states) == {"rehearsal, no result", "not measured"}
    # what needs no peer, no torch.compile and no memory; without the C++ kernels the LM head alone is timed
    assert states.count("rehearsal, no result") >= (9 if available_impls()["cpp"].startswith(USABLE) else 2)
    assert "nothing in this folder is a result" in (rehearsal.results / "REHEARSAL.txt").read_text()


# --- with a stand-in for the interpreter -------------------------------------------------------------------------------

STAND_IN = """#!/usr/bin/env bash
# Notes its arguments; hangs, or fails, where they contain the word of HANGS or FAILS.
printf '%s\\n' "$(printf '%q ' "$@")" >>"$CALLS"
case "$*" in
  *get_device_name*) echo stand-in; exit ;;
  *find_spec*) exit "$WITHOUT_XDIST" ;;
  *targets.py*) exec "$REAL" "$@" ;;
esac
echo "ran $*"
if [[ -n $HANGS && "$*" == *$HANGS* ]]; then
  [ -z "$DEAF" ] || trap '' INT
  echo '{}' >"$RESULTS/written-before.json"
  echo $$ >"$CALLS.hanging"
  exec sleep 60
fi
if [[ -n $FAILS && "$*" == *$FAILS* ]]; then
  echo "$WORD"
  exit 3
fi
"""


class StandIn(NamedTuple):
    folder: Path
    python: Path

    def run(self, *options: str, **variables: str) -> Call:
        return run(self.folder, self.python, *options, **self.variables(**variables))

    def variables(self, **variables: str) -> dict[str, str]:
        usual = {
            "CALLS": str(self.folder / "calls"),
            "REAL": sys.executable,
            "WORD": "it went wrong",
            "WITHOUT_XDIST": "0",
        }
        return usual | {"HANGS": "", "FAILS": "", "DEAF": ""} | variables

    def calls(self) -> list[list[str]]:
        return [shlex.split(line) for line in (self.folder / "calls").read_text().splitlines()]


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[StandIn]:
    python = tmp_path / "stand-in"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    yield StandIn(tmp_path, python)
    hanging = tmp_path / "calls.hanging"
    if hanging.exists():
        with contextlib.suppress(
            ProcessLookupError
        ):  # of a killed call it is there still, in a process group of its own
            os.kill(int(hanging.read_text()), signal.SIGKILL)


def test_a_failed_step_is_named_and_the_others_run(stand_in: StandIn) -> None:
    call = stand_in.run(FAILS="sweep.py")
    assert call.status == 1
    assert call.steps == dict.fromkeys(NAMES[:-2], "passed") | {
        "sweep": "FAILED with 3",
        "memcheck": call.steps["memcheck"],
    }
    assert "== sweep: FAILED with 3" in call.output[call.output.index("NOT PASSED") :]
    assert call.output.index("it went wrong") < call.output.index("NOT PASSED")
    assert b"it went wrong" in call.packed()["sweep.log"]


def test_without_compute_sanitizer_the_check_fails(stand_in: StandIn) -> None:
    if shutil.which("compute-sanitizer"):
        pytest.skip("compute-sanitizer is on PATH")
    call = stand_in.run(STEPS="memcheck")
    assert (call.status, call.steps) == (1, {"memcheck": "FAILED with 127"})
    assert b"compute-sanitizer: command not found" in call.packed()["memcheck.log"]


@pytest.mark.parametrize("deaf", ["", "1"])
def test_a_step_is_cut_at_its_limit_and_the_others_run(stand_in: StandIn, deaf: str) -> None:
    """With an interrupt, or killed if that changes nothing."""
    call = stand_in.run(HANGS="stages.py", DEAF=deaf, LIMITS="stages=1", STEPS="prepare stages run")
    assert call.status == 1
    assert call.steps == {"prepare": "passed", "stages": "CUT after 1 s", "run": "passed"}
    assert "== stages: CUT after 1 s" in call.output[call.output.index("NOT PASSED") :]
    packed = call.packed()
    assert b"ran benchmarks/stages.py" in packed["stages.log"]
    assert packed["written-before.json"] == b"{}\n"
    assert b"not measured" in packed["targets.txt"]


def test_the_call_ends_in_time_and_names_what_it_has_not_reached(stand_in: StandIn) -> None:
    began = time.monotonic()
    call = stand_in.run(HANGS="stages.py", TOTAL="13", STEPS="prepare stages run head")
    assert time.monotonic() - began < 30  # 60 if the call waited for the step
    assert call.status == 1
    steps = call.steps
    assert re.fullmatch(r"CUT after [123] s", steps.pop("stages"))
    assert steps == {"prepare": "passed", "run": "not reached", "head": "not reached"}
    assert call.output.count("not reached") == 4
    assert b"not reached" in call.packed()["steps.tsv"]


@pytest.mark.parametrize(
    ("variables", "goes_on"),
    [
        ({"FAILS": "cuda_graph"}, False),
        ({"FAILS": "cuda_graph", "KEEP_GOING": "1"}, True),
        ({"HANGS": "cuda_graph", "LIMITS": "smoke=1"}, True),
    ],
    ids=["failed", "keep going", "cut before a test failed"],
)
def test_a_failed_smoke_test_ends_the_call(stand_in: StandIn, variables: dict[str, str], goes_on: bool) -> None:
    call = stand_in.run(STEPS="prepare smoke stages", **variables)
    assert call.status == 1
    assert call.steps["smoke"] == ("CUT after 1 s" if "HANGS" in variables else "FAILED with 3")
    assert ("stages" in call.steps) == goes_on
    assert ("== stopped: the smoke tests failed" in call.output) != goes_on
    assert {"prepare.log", "smoke.log", "targets.txt"} <= set(call.packed())


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_killed_call_leaves_what_was_finished(stand_in: StandIn, name: str) -> None:
    variables = stand_in.variables(HANGS="head.py", STEPS="prepare stages run head sweep")
    process = subprocess.Popen(
        [str(SCRIPT)], env=environment(stand_in.folder, stand_in.python, **variables), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # a shell starts what is in its background without this signal, and a script cannot take it back
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    until = time.monotonic() + 60
    while not (stand_in.folder / "calls.hanging").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    if name == "SIGKILL":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=60)
    call = Call(process.returncode, output, stand_in.folder / "results", stand_in.folder / "results.tgz")
    packed = call.packed()
    assert {"prepare.log", "stages.log", "run.log", "steps.tsv"} <= set(packed)
    lines = [line.split("\t")[:2] for line in packed["steps.tsv"].decode().splitlines()]
    assert lines[:3] == [[step, "passed"] for step in ("prepare", "stages", "run")]
    if name == "SIGKILL":
        assert process.returncode == -signal.SIGKILL
        return
    assert process.returncode == 1
    assert f"call: stopped by {name[3:]}" in output
    assert {"head.log", "written-before.json", "targets.txt"} <= set(packed)
    assert "sweep" not in call.steps


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"STEPS": "prepare smok"}, "expected STEPS of prepare smoke stages"),
        ({"LIMITS": "smoke=1s"}, "expected LIMITS such as tests=300"),
        ({"LIMITS": "smok=10"}, "got smok=10"),
        ({"TOTAL": "10m"}, "expected TOTAL in seconds, got 10m"),
        ({"DRY": "yes"}, "expected DRY of 0 or 1, got yes"),
        ({"KEEP_GOING": "yes"}, "expected KEEP_GOING of 0 or 1, got yes"),
        ({"WHEELS": "nowhere"}, "expected WHEELS to be a folder with .whl files, got {folder}/nowhere"),
        ({"ARCHIVE": "results.zip"}, "expected ARCHIVE to be a .tgz file outside of RESULTS"),
        ({"ARCHIVE": "results/all.tgz"}, "expected ARCHIVE to be a .tgz file outside of RESULTS"),
        ({"ARCHIVE": "old.tgz"}, "expected a new file as ARCHIVE, got {folder}/old.tgz"),
        ({"RESULTS": "old"}, "expected RESULTS without run.log, got {folder}/old"),
        ({"DRY": "1", "RESULTS": "old"}, "expected RESULTS of a rehearsal without other files, got {folder}/old"),
        ({"DRY": "1", "RESULTS": f"{ROOT}/benchmarks/results/x"}, "outside of benchmarks/results"),
        ({"RESULTS": "rehearsed"}, "expected RESULTS without those of a rehearsal, got {folder}/rehearsed"),
        ({"PYTHON": "false"}, "expected a GPU visible to PyTorch, got none"),
    ],
    ids=lambda x: " ".join(f"{k}={v}".rpartition("/")[2] for k, v in x.items()) if isinstance(x, dict) else "",
)  # fmt: skip
def test_a_wrong_variable_is_named_before_anything_runs(
    stand_in: StandIn, variables: dict[str, str], expected: str
) -> None:
    folder = stand_in.folder
    for name, file in (("old", "run.log"), ("rehearsed", "REHEARSAL.txt")):
        (folder / name).mkdir()
        (folder / name / file).touch()
    (folder / "old.tgz").touch()
    before = sorted(folder.rglob("*"))
    call = stand_in.run(**variables)
    assert call.status == 2, call.output
    assert expected.format(folder=folder) in call.output
    assert sorted(path for path in folder.rglob("*") if path.name != "calls") == before
    assert not any(
        "benchmarks/" in word for words in (stand_in.calls() if (folder / "calls").exists() else []) for word in words
    )


def test_an_option_that_is_none(stand_in: StandIn) -> None:
    call = stand_in.run("--suite=full")
    assert (call.status, call.output) == (2, "gpu.sh: expected no option but --overwrite, got --suite=full\n")


# --- what a call runs ---------------------------------------------------------------------------------------------------


def test_the_limits_of_the_first_call_fit_into_it() -> None:
    """With the seconds at the end that a step gets between interrupt and kill, and targets and archive."""
    assert sum(int(limit) for name, limit in STEPS if name not in SECOND_CALL) + 2 * GRACE <= 585
    assert NAMES[-2:] == SECOND_CALL


def test_the_commands_of_a_call_are_accepted_by_their_programs(stand_in: StandIn) -> None:
    """Every option of every program; --overwrite reaches those that have it."""
    call = stand_in.run("--overwrite", STEPS=" ".join(name for name in NAMES if "check" not in name))
    assert call.status == 0, call.output
    programs = [
        words
        for words in stand_in.calls()
        if words[0].startswith(("benchmarks/", "tools/")) and "targets" not in words[0]
    ]
    names = [Path(words[0]).stem for words in programs]
    assert names == ["stages", "run", "head", "sweep", "run", "head", "soak"]
    for name, words in zip(names, programs, strict=True):
        app = typer.Typer(add_completion=False)
        app.command()(__import__(name).main)
        typer.main.get_command(app).make_context(name, words[1:], resilient_parsing=False)
        assert "--overwrite" in words
        assert "--tiny" not in words
    compiled = [words for words in programs if words[0] == "benchmarks/run.py" and "--no-compile" not in words]
    assert len(compiled) == 1


@pytest.mark.parametrize("missing", ["0", "1"])
def test_tests_run_on_several_processes_where_xdist_is_there(stand_in: StandIn, missing: str) -> None:
    assert stand_in.run(STEPS="smoke large tests properties", WITHOUT_XDIST=missing).status == 0
    found = [words for words in stand_in.calls() if words[:2] == ["-m", "pytest"]]
    several = ["-n" in words for words in found]
    assert several == ([True, True, False, True] if missing == "0" else [False] * 4)


def test_the_tests_that_are_chosen_by_name_are_there(stand_in: StandIn) -> None:
    """Every word of the selections is in a name of a file's tests: one that is named anew would be left out without a word."""
    stand_in.run(STEPS="smoke large")
    chosen = [words for words in stand_in.calls() if words[:2] == ["-m", "pytest"]]
    assert len(chosen) == 2
    for words in chosen:
        files = [ROOT / word for word in words if word.startswith("tests/")]
        names = re.findall(r"def (test_\w+)\(", "".join(path.read_text() for path in files))
        for word in re.findall(r"\w{7,}", words[words.index("-k") + 1]):
            assert any(word in name for name in names), word


def test_a_failure_is_shown_when_it_happens(tmp_path: Path) -> None:
    """As gpu.sh asks for: a run that is killed has no summary."""
    (tmp_path / "test_killed.py").write_text(
        "import os\n\ndef test_wrong():\n    assert 1 == 2\n\ndef test_killed():\n    os._exit(9)\n"
    )
    command = [sys.executable, "-m", "pytest", "--at-once", "-p", "conftest", "test_killed.py"]
    path = os.pathsep.join(map(str, (ROOT / "tests", ROOT)))
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 9, done.stderr
    assert "assert 1 == 2" in done.stdout
