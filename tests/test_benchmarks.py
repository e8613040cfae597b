"""The harness: its check is the oracle's, a wrong result gets no times, the command writes what it measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import other_packages
import pytest
import readme_table
import run
import torch
from host_overhead import host_overhead
from run_report import RunReport, summary_table
from stage_calls import stage_calls
from torch import Tensor
from traffic import model_bytes
from typer.testing import CliRunner

from pmpo_kernels import LossConfig, verification
from pmpo_kernels.benchmarking import accuracy, inputs, measure
from pmpo_kernels.benchmarking.cases import Case, Dtype, Preset
from pmpo_kernels.benchmarking.comparison import Comparison, Spread, compare, steps
from pmpo_kernels.benchmarking.inputs import Inputs, build_inputs
from pmpo_kernels.benchmarking.measure import Bench, rotating
from pmpo_kernels.benchmarking.report import Report, write_json
from pmpo_kernels.benchmarking.variants import (
    COMPILED,
    EAGER,
    PEER,
    LossFunction,
    Variant,
    build_eager,
    fused_variants,
    variants,
)
from pmpo_kernels.verification import ThreePartError
from pmpo_kernels.verification.baseline import eager_pmpo_loss

runner = CliRunner(env={"COLUMNS": "200"})
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Case(vocab=60, batch=8, tokens=12, device=DEVICE)


def compared(case: Case, *chosen: Variant) -> Comparison:
    """One round; every announced step happens."""
    taken: list[str] = []
    settings = [run.allocators(case.device)[-1]]
    found = compare(case, list(chosen), 1, taken.append, settings, memory=False, stages=stage_calls)
    assert len(taken) <= steps(list(chosen), 1, run.allocators(case.device)[-1:])
    return found


# --- the check -------------------------------------------------------------------------------------------------------


def test_a_comparison_counts_the_rows_itself() -> None:
    case = Case(vocab=60, batch=4, tokens=10, preset=Preset.grpo, padded=0.0, clipped=0.5, device=DEVICE)
    case = replace(case, zero_advantage=0.5)
    found = compared(case, EAGER)
    assert found.gradient_rows == 10  # of 40 rows 20 have advantage 0, and half of the others are clipped
    assert found.unmasked_rows == 40
    assert model_bytes(case, 40, 10) == (40 * 60 * 4, (10 + 40) * 60 * 4)
    assert compared(replace(case, padded=0.25), EAGER).unmasked_rows == 30


def oracle_of(i: Inputs, config: LossConfig) -> verification.Oracle:
    """The autograd oracle of the same batch."""
    ones = torch.ones_like(i.old_logp)
    case = verification.Case(i.logits, i.token_ids, i.old_logp, i.advantages, i.mask, ones, ones)
    return verification.oracle(case, config, i.power)


@pytest.mark.parametrize("preset", [Preset.grpo, Preset.gspo, Preset.pmpo, Preset.dapo])
@pytest.mark.parametrize("dtype", list(Dtype))
def test_the_chunked_check_is_the_oracles(preset: Preset, dtype: Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(SMALL, preset=preset, dtype=dtype)
    i, config = build_inputs(case), case.config
    want = oracle_of(i, config)
    monkeypatch.setattr(inputs, "CHUNK_ELEMENTS", 7 * case.vocab)  # 96 rows in 13 full chunks and one of 5
    exact = accuracy.exact(i, config)
    assert exact.loss == pytest.approx(float(want.loss), rel=1e-12)
    assert exact.loss_scale == pytest.approx(want.loss_scale, rel=1e-12)
    assert exact.gradient_rows == int((want.scale != 0).sum()) > 0
    noise = torch.randn(want.grad.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    off = want.grad * (1 + 1e-4 * noise.to(DEVICE))
    found = accuracy.errors(want.loss + 1e-3 * want.loss_scale, off, i, exact, config)
    assert found.gradient == pytest.approx(verification.three_part_error(off, want, i.token_ids), rel=1e-6)
    assert found.gradient.off_target > 1e-5
    assert found.loss == pytest.approx(1e-3)
    right = accuracy.errors(want.loss, want.grad, i, exact, config)
    assert max(*right.gradient, right.loss) < 1e-10
    assert accuracy.errors(want.loss * torch.nan, want.grad, i, exact, config).loss == torch.inf


def wrong_gradients(want: verification.Oracle, i: Inputs) -> dict[str, Tensor]:
    at_target = torch.zeros_like(want.grad).scatter(2, i.token_ids[..., None], 1)
    touched = want.grad.clone()
    touched[-1, -1, 0] = 1e-30  # advantage 0 or padding: must be exactly 0
    nan = want.grad.clone()
    nan[0, 0, 0] = torch.nan
    return {
        "zero": torch.zeros_like(want.grad),
        "target column only": want.grad * at_target,
        "softmax part 5 % too large": torch.where(at_target == 1, want.grad, 1.05 * want.grad),
        "shifted by one token": want.grad.roll(1, 1),
        "a row that must be 0": touched,
        "not a number": nan,
    }


@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("fused", [True, False])
def test_the_check_rejects_wrong_gradients(dtype: Dtype, fused: bool) -> None:
    case = replace(SMALL, vocab=2000, dtype=dtype)
    i, config = build_inputs(case), case.config
    want, exact = oracle_of(i, config), accuracy.exact(i, config)
    bound, _ = accuracy.bounds(i.logits.dtype, 151936, exact, config, fused=fused)
    assert bound < 0.03
    for name, gradient in wrong_gradients(want, i).items():
        assert max(accuracy.errors(want.loss, gradient, i, exact, config).gradient) > bound, name


def scaled(factor: float, where: str) -> Callable[[LossConfig], LossFunction]:
    """The baseline with only its loss, or only its gradient, off by a factor."""

    def build(config: LossConfig) -> LossFunction:
        def loss(z: Tensor, i: Inputs) -> Tensor:
            right = build_eager(config)(z, i)
            more = right.detach() if where == "loss" else right - right.detach()
            return right + (factor - 1) * more

        return loss

    return build


def test_a_wrong_row_has_no_times() -> None:
    wrong = [Variant(f"wrong {where}", "naive", scaled(1.05, where)) for where in ("loss", "gradient")]
    found = compared(SMALL, EAGER, *wrong)
    assert [row.wrong for row in found.rows] == [False, True, True]
    assert [bool(row.timings) for row in found.rows] == [True, False, False]
    exact = accuracy.exact(build_inputs(SMALL), SMALL.config)
    assert found.rows[1].loss_error == pytest.approx(0.05 * abs(exact.loss) / exact.loss_scale, rel=1e-3)
    assert found.rows[1].gradient_error == pytest.approx(found.rows[0].gradient_error)
    assert found.rows[2].gradient_error == pytest.approx(0.05, rel=1e-3)
    assert found.wrong


def test_a_peer_that_fails_is_reported_and_ours_is_raised() -> None:
    def fails(config: LossConfig) -> LossFunction:
        def loss(z: Tensor, i: Inputs) -> Tensor:
            raise RuntimeError("no such kernel\nmore")

        return loss

    (row,) = compared(SMALL, Variant("theirs", PEER, fails)).rows
    assert (row.problem, row.wrong, row.timings) == ("theirs failed: RuntimeError: no such kernel", False, {})
    with pytest.raises(RuntimeError, match="no such kernel"):
        compared(SMALL, Variant("ours", "fused", fails))


def test_a_peer_that_cannot_be_imported_is_reported() -> None:
    def build(config: LossConfig) -> LossFunction:
        raise ImportError("no module named accelerate")

    broken, eager = compared(SMALL, Variant("theirs", PEER, build), EAGER).rows
    assert broken.problem == "theirs failed: ImportError: no module named accelerate"
    assert eager.timings


def test_a_variant_can_have_logits_with_one_more_position() -> None:
    T, shapes = SMALL.tokens, []

    def build(config: LossConfig) -> LossFunction:
        def loss(z: Tensor, i: Inputs) -> Tensor:
            shapes.append((tuple(z.shape), z.is_contiguous()))
            return eager_pmpo_loss(z[:, :T], i.token_ids, i.old_logp, i.advantages, i.mask, config, i.power)

        return loss

    found = compared(SMALL, EAGER, Variant("one more", PEER, build, one_more=True))
    assert not any(row.problem for row in found.rows)
    assert set(shapes) == {((SMALL.batch, T + 1, SMALL.vocab), True)}


# --- measuring -------------------------------------------------------------------------------------------------------


def test_rounds_rotate() -> None:
    assert list(rotating(["a", "b", "c"], 4)) == [list("abc"), list("bca"), list("cab"), list("abc")]


def test_every_run_starts_from_the_same_logits() -> None:
    i = build_inputs(SMALL)
    bench, seen = Bench(i), []

    def destructive(z: Tensor, _: Inputs) -> Tensor:
        seen.append(z.detach().clone())
        loss = z.sum()
        z.detach().zero_()
        return loss

    bench.time(destructive)
    bench.run(destructive)
    assert len(seen) >= 2
    assert all(torch.equal(z, i.logits) for z in seen)


def test_on_a_gpu_each_region_starts_after_a_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward apart, then both without a flush between them; the times are those between the events."""
    bench, happened = Bench(build_inputs(replace(SMALL, device="cpu"))), []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = -1

        def record(self) -> None:
            self.at = len(happened)
            happened.append("event")

        def elapsed_time(self, other: Event) -> float:
            return float(other.at - self.at)

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            happened.append("forward")
            return z.sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            happened.append("backward")
            return grad.expand(bench.logits.shape)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(measure, "settle", lambda cuda: happened.append("flush") if cuda else None)
    bench.cuda = True
    times = bench.time(lambda z, i: Step.apply(z))
    apart = ["flush", "event", "forward", "event", "flush", "event", "backward", "event"]
    assert happened == [*apart, "flush", "event", "forward", "backward", "event"]
    assert times[:3] == (2.0, 2.0, 3.0)


def test_host_overhead_is_that_of_rows_that_can_be_timed() -> None:
    untimed = replace(EAGER, name="untimed", untimed="interpreter")
    assert list(host_overhead(SMALL, [EAGER, COMPILED, untimed], 2)) == [EAGER.name]


# --- peers -----------------------------------------------------------------------------------------------------------


def test_a_missing_peer_is_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_packages.importlib.util, "find_spec", lambda name: None)
    chosen, skipped = other_packages.peers(replace(SMALL, preset=Preset.grpo))
    assert chosen == []
    assert skipped == {
        "Liger, token level": "not installed (pip install liger-kernel packaging)",
        "TRL": "not installed (pip install trl)",
    }
    _, skipped = other_packages.peers(replace(SMALL, preset=Preset.pmpo))
    assert skipped["Liger"] == "computes no pmpo; compared on grpo and gspo"


@pytest.mark.parametrize(("preset", "name"), [(Preset.grpo, "token"), (Preset.gspo, "sequence"), (Preset.pmpo, None)])
@pytest.mark.parametrize("dtype", list(Dtype))
def test_installed_peers_compute_the_same_loss(preset: Preset, name: str | None, dtype: Dtype) -> None:
    pytest.importorskip("liger_kernel")
    pytest.importorskip("trl")
    case = replace(SMALL, preset=preset, dtype=dtype)
    chosen, _ = other_packages.peers(case)
    assert [v.name for v in chosen] == [*([f"Liger, {name} level"] if name else []), "TRL"]
    found = compared(case, *chosen)
    assert not found.wrong, found.rows
    assert all(row.gradient_error is not None for row in found.rows), found.rows


# --- the command -----------------------------------------------------------------------------------------------------

ARGUMENTS = [
    "--model",
    "smollm2",
    "--batch",
    "3",
    "--dtype",
    "float32",
    "--repeats",
    "2",
    "--no-compile",
    "--no-memory",
]


def test_run_writes_its_files_and_overwrites_none(tmp_path: Path) -> None:
    arguments = [*ARGUMENTS, "--tokens", "2", "--tokens", "4", "--clipped", "0.5", "--out", str(tmp_path)]
    result = runner.invoke(run.app, arguments)
    assert result.exit_code == 0, result.output
    stems = [f"run-smollm2-3x{T}-float32-grpo-p0.1-c0.5-z0.125" for T in (2, 4)]
    wanted = sorted([f"{stem}.{kind}" for stem in stems for kind in ("json", "png")] + ["run-tokens.png"])
    assert sorted(path.name for path in tmp_path.iterdir()) == wanted
    content = json.loads((tmp_path / f"{stems[1]}.json").read_text())
    fused = "triton" if DEVICE == "cuda" else "cpp"
    rows = {row["name"]: row for row in content["results"]}
    assert {EAGER.name, fused, f"{fused}, in place"} <= set(rows)
    for row in rows.values():
        assert max(row["parts"].values()) == row["gradient_error"] <= row["gradient_bound"]
        untimed = not row["timings"]
        assert untimed == (DEVICE == "cpu" and row["name"].startswith(("triton", "Liger")))
        assert untimed == bool(row["problem"])
    check_figures(content, rows[fused])
    assert (content["complete"], content["ours"], rows[fused]["both_over_ours"]) == (True, fused, 1.0)
    check_table(content)
    assert set(content["host_microseconds"]) >= {EAGER.name, fused}
    assert "backward of full" in result.output
    again = runner.invoke(run.app, arguments)
    assert again.exit_code == 2
    assert "--overwrite" in again.output
    assert json.loads((tmp_path / f"{stems[1]}.json").read_text()) == content


def check_figures(content: dict[str, Any], row: dict[str, Any]) -> None:
    """The shares and the trajectory's part follow from the times that are written beside them."""
    (timing,) = row["timings"].values()
    copy = content["floor"]["copy"]["median"]
    assert content["copy_bytes_a_second"] == pytest.approx(2 * content["case"]["logits_bytes"] / (copy / 1e3))
    for name, moved in content["model_bytes"].items():
        seconds = timing[name]["median"] / 1e3
        assert row["call_share_of_copy"][name] == pytest.approx(moved / seconds / content["copy_bytes_a_second"])
    for stage, passes in (("token_logp", "forward"), ("dlogits", "backward"), ("dlogits_", "backward")):
        found, moved = content["stages"][stage], content["model_bytes"][passes]
        assert found["bytes"] == moved
        assert found["gigabytes_a_second"] == pytest.approx(moved / found["median"] / 1e6)
        assert found["share_of_copy"] == pytest.approx(
            1e9 * found["gigabytes_a_second"] / content["copy_bytes_a_second"]
        )
        assert stage == "dlogits_" or content["stage_share_of_copy"][passes] == found["share_of_copy"]
    part = content["stages"]["trajectory"]["median"] / timing["both"]["median"]
    assert content["trajectory_share"] == pytest.approx(part)
    assert content["settings"]["repeats"] == len(timing["samples"]) == 2


def check_table(content: dict[str, Any]) -> None:
    """Of the README: a stage's share beside that of the call, and a row that has no times yet."""
    row = next(row for row in content["results"] if row["name"] == content["ours"])
    unfinished = {**row, "name": "later", "timings": {}, "call_share_of_copy": None}
    page = readme_table.ROOT / "benchmarks" / "results" / "x" / "run-x.json"
    *_, ours, later, token_logp, dlogits, dlogits_ = readme_table.shares(
        {page: {**content, "results": [row, unfinished]}}
    )
    assert f"({row['call_share_of_copy']['forward']:.0%})" in ours
    assert "| later | stopped before its times |" in later
    forward, backward = (f"{content['stage_share_of_copy'][name]:.0%}" for name in ("forward", "backward"))
    assert "stage `token_logp` alone" in token_logp
    assert f"({forward})" in token_logp.split("|")[3]
    assert f"({backward})" in dlogits.split("|")[4]
    assert "stage `dlogits_` alone" in dlogits_


def test_run_shows_a_wrong_row_and_exits_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, skipped = variants(DEVICE)
    wrong = replace(ours[-1], name="changed", build=scaled(1.02, "gradient"))
    monkeypatch.setattr(run, "variants", lambda *args, **kwargs: ([EAGER, wrong], skipped))
    monkeypatch.setattr(run, "peers", lambda case: ([], {"someone": "not installed"}))
    result = runner.invoke(run.app, [*ARGUMENTS, "--tokens", "4", "--out", str(tmp_path)])
    assert result.exit_code == 1, result.output
    assert "WRONG" in result.output
    assert "no times: changed (wrong result" in result.output
    assert "not measured: someone (not installed)" in result.output
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    row = content["results"][1]
    assert (row["wrong"], row["timings"], row["call_share_of_copy"]) == (True, {}, None)
    assert "changed" not in content["host_microseconds"]
    assert content["not_measured"]["someone"] == "not installed"


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--model", "gpt5", "'gpt2'"),
        ("--preset", "ppo", "'grpo'"),
        ("--padded", "0.6", "padded: expected a fraction from 0 to 0.5, got 0.6"),
        ("--clipped", "-0.1", "clipped: expected a fraction from 0 to 1.0, got -0.1"),
        ("--zero-advantage", "nan", "zero_advantage: expected a fraction from 0 to 1.0, got nan"),
        ("--tokens", "0", "1"),
        ("--tokens", "100000000", "GiB available"),
        ("--suite", "long", "'more'"),
    ],
)
def test_run_names_a_bad_option(option: str, value: str, expected: str, tmp_path: Path) -> None:
    result = runner.invoke(run.app, [option, value, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert option in result.output
    assert expected in result.output
    assert list(tmp_path.iterdir()) == []


def test_the_summary_has_the_backward_over_that_of_the_full_case() -> None:
    fused = fused_variants("triton" if DEVICE == "cuda" else "cpp")[0]
    full = replace(SMALL, padded=0.0, clipped=0.0, zero_advantage=0.0, preset=Preset.grpo)
    reports = []
    for case, backward in ((full, 4.0), (replace(full, clipped=0.5), 3.0), (replace(full, preset=Preset.dapo), 1.0)):
        found = compared(case, fused)
        (timing,) = found.rows[0].timings.values()
        timing.backward, timing.both = Spread.of([backward]), Spread.of([8.0])
        found.stages["trajectory"] = Spread.of([0.25])
        reports.append(RunReport(Report(case, 1, found, {}), run.allocators(DEVICE)[-1], {}))
    table = summary_table(reports)
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["backward of full"] == ["1.00x", "0.75x", "1.00x"]
    assert cells["rows without gradient"] == ["0%", "50%", "0%"]
    assert cells["trajectory"] == ["3.1%"] * 3
    assert cells["backward ms"] == ["4", "3", "1"]


def plan_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[tuple[Case, str | None]]:
    """What would be measured: each case, and why torch.compile is left out of it."""
    planned: list[tuple[Case, str | None]] = []

    def plan(case: Case, repeats: int, left_out: str | None, *rest: object) -> SimpleNamespace:
        planned.append((case, left_out))
        return SimpleNamespace(base=SimpleNamespace(comparison=SimpleNamespace(wrong=False)))

    monkeypatch.setattr(run, "run_case", plan)
    monkeypatch.setattr(run, "summary_table", lambda reports: "")
    monkeypatch.setattr(run, "write_tokens", lambda reports, path: False)
    result = runner.invoke(run.app, arguments)
    assert result.exit_code == 0, result.output
    return planned


def test_torch_compile_is_in_the_first_case_unless_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ("--suite", "more", "--tiny", "--out", str(tmp_path))
    reasons = {flag: [why for _, why in plan_of(monkeypatch, *arguments, *flag)] for flag in ((), ("--compile",))}
    assert reasons[()] == [None, *["in the first case only, unless --compile"] * 4]
    assert reasons["--compile",] == [None] * 5
    assert {why for _, why in plan_of(monkeypatch, *arguments, "--no-compile")} == {"left out by --no-compile"}


def test_a_case_of_a_suite_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        run, "memory_problem", lambda *cases: "too large" if [case.batch for case in cases] == [1] else None
    )
    cases = [case for case, _ in plan_of(monkeypatch, "--suite", "more", "--tiny", "--out", str(tmp_path))]
    assert [case.batch for case in cases] == [8, 2, 2, 2]
    assert {case.vocab for case in cases} == {320}


def test_an_error_that_is_not_finite_is_null_in_the_file(tmp_path: Path) -> None:
    write_json({"parts": ThreePartError(float("inf"), 0.0, 1.0)._asdict()}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "parts": {"target": None, "off_target": 0.0, "row_sum": 1.0}
    }
