"""The benchmark of the fused LM head: its float64 gradients, what its check rejects, its rows, and its command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import head
import head_accuracy
import head_rows
import pytest
import torch
from head_inputs import HeadBench, HeadCase, HeadInputs, build_head_inputs
from head_report import HeadReport, full_case
from other_packages import LIGER, TRL
from torch import Tensor
from typer.testing import CliRunner

from pmpo_kernels import LossConfig
from pmpo_kernels.benchmarking import inputs
from pmpo_kernels.benchmarking.allocator import allocators
from pmpo_kernels.benchmarking.cases import Dtype, Preset
from pmpo_kernels.benchmarking.comparison import Comparison, Timing
from pmpo_kernels.benchmarking.measure import Times
from pmpo_kernels.benchmarking.report import Report
from pmpo_kernels.benchmarking.variants import PEER
from pmpo_kernels.linear.projection import adds_to_float32
from pmpo_kernels.verification.baseline import eager_loss_from_logp

runner = CliRunner(env={"COLUMNS": "200"})
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = HeadCase(vocab=200, hidden=32, batch=8, tokens=16, device=DEVICE)
LEAST = {"dtype": torch.float64, "device": DEVICE}


def compared(case: HeadCase, *chosen: head_rows.HeadVariant) -> Comparison:
    return head.compare(case, list(chosen), 1, lambda what: None, allocators(DEVICE)[-1], memory=False)[0]


# --- inputs and float64 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [Preset.grpo, Preset.pmpo])
@pytest.mark.parametrize("dtype", list(Dtype))
def test_inputs_have_the_fractions_of_the_case(preset: Preset, dtype: Dtype) -> None:
    case = replace(SMALL, preset=preset, dtype=dtype, clipped=0.5, zero_advantage=0.5)
    i, config = build_head_inputs(case), case.config
    lengths = i.mask.sum(1)
    assert len(i.hidden) == int(lengths.sum()) == round(0.625 * case.batch * case.tokens)
    assert int(lengths.min()) < case.tokens / 2
    assert (i.advantages == 0).double().mean() == 0.5
    acting = i.mask[i.advantages != 0].sum()
    exact = head_accuracy.exact(i, config)
    assert exact.gradient_rows == pytest.approx(float(acting) / 2, abs=1)
    d = (i.logp - i.old_logp)[(i.advantages != 0).repeat_interleave(lengths)]
    bounds = torch.tensor([-config.clip_low, config.clip_high], **LEAST)
    # rounding of the logits does not decide what is clipped
    off = (i.hidden @ i.weight.t()).double() - i.hidden.double() @ i.weight.double().t()
    assert (d[:, None] - bounds).abs().min() > max(1e-3, 2 * float(off.abs().max()))


def test_the_logits_look_like_a_models() -> None:
    i = build_head_inputs(replace(SMALL, vocab=4000, hidden=256, batch=16))
    log_q = (i.hidden.double() @ i.weight.double().t()).log_softmax(-1)
    assert 0.5 < -(log_q.exp() * log_q).sum(-1).mean() < 4
    assert -4 < i.logp.mean() < -0.5


@pytest.mark.parametrize("preset", [Preset.grpo, Preset.dapo, Preset.pmpo])
def test_the_chunked_gradients_are_autograds(preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(SMALL, preset=preset, zero_advantage=0.25)
    i, config = build_head_inputs(case), case.config
    monkeypatch.setattr(inputs, "CHUNK_ELEMENTS", 7 * case.vocab)
    exact = head_accuracy.exact(i, config)
    loss, dhidden, dweight = autograd(i, config)
    assert exact.loss == pytest.approx(float(loss), rel=1e-12)
    for found, want in ((exact.hidden, dhidden), (exact.weight, dweight)):
        assert torch.allclose(found, want, rtol=1e-9, atol=1e-15)
    assert 0 < int(exact.is_target.sum()) < case.vocab
    right, loss_error = head_accuracy.errors(loss, dhidden, dweight, i, exact)
    assert max(*right, loss_error) < 1e-12


def autograd(i: HeadInputs, config: LossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The baseline in float64, all logits at once."""
    hidden, weight = (x.double().requires_grad_() for x in (i.hidden, i.weight))
    logp = (hidden @ weight.t()).log_softmax(-1).gather(-1, i.token_ids[:, None])[:, 0]
    loss = eager_loss_from_logp(
        i.pad(logp), i.pad(logp), i.pad(i.old_logp.double()), i.advantages, i.mask, config, i.power
    )
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


# --- the check -------------------------------------------------------------------------------------------------------


def gradients(
    i: HeadInputs, exact: head_accuracy.HeadExact, change: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """dhidden, dweight of changed gradients of the logits: change(target part, softmax part), both (N, V)."""
    hidden, weight = i.hidden.double(), i.weight.double()
    q = (hidden @ weight.t()).softmax(-1)
    at = torch.nn.functional.one_hot(i.token_ids, len(weight)).double()
    g = (exact.hidden / (at - q).matmul(weight)).nanmean(1)  # each row is its coefficient times that
    grad = change(g[:, None] * at, -g[:, None] * q)
    return grad @ weight, grad.t() @ hidden


@pytest.mark.parametrize("preset", [Preset.grpo, Preset.pmpo])
def test_the_check_rejects_wrong_gradients(preset: Preset) -> None:
    """In float32 each gradient alone must be seen, dhidden and both kinds of rows of dweight."""
    case = replace(SMALL, preset=preset, vocab=2000, hidden=128)
    i, config = build_head_inputs(case), case.config
    exact = head_accuracy.exact(i, config)
    bound, _ = head_accuracy.bounds(i, exact, config)
    first = i.mask.nonzero()[:, 0] == int(i.advantages.abs().argmax())
    wrong: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "zero": lambda target, softmax: 0 * target,
        "target alone": lambda target, softmax: target,
        "softmax part 5 % too large": lambda target, softmax: target + 1.05 * softmax,
        "one trajectory missing": lambda target, softmax: (target + softmax).masked_fill(first[:, None], 0),
        "a part of the vocabulary missing": lambda target, softmax: (target + softmax).index_fill(
            1, i.token_ids[:1], 0
        ),
    }
    loss = torch.tensor(exact.loss)
    right, _ = head_accuracy.errors(loss, *gradients(i, exact, lambda a, b: a + b), i, exact)
    assert max(right) < 1e-9
    for name, change in wrong.items():
        dhidden, dweight = gradients(i, exact, change)
        hidden_alone, _ = head_accuracy.errors(loss, dhidden, exact.weight, i, exact)
        weight_alone, _ = head_accuracy.errors(loss, exact.hidden, dweight, i, exact)
        assert hidden_alone.hidden > bound, name
        assert max(weight_alone) > bound, name
        if "vocabulary" not in name:
            assert min(weight_alone[1:]) > bound, name


def test_the_check_rejects_what_is_not_finite_or_must_be_zero() -> None:
    i, config = build_head_inputs(replace(SMALL, zero_advantage=0.25)), SMALL.config
    exact = head_accuracy.exact(i, config)
    loss = torch.tensor(exact.loss)
    skipped = exact.hidden.clone()
    skipped[exact.hidden_scale == 0] = 1e-30
    padding = i.pad(exact.hidden)
    assert head_accuracy.errors(loss, padding, exact.weight, i, exact)[0].hidden == 0
    padding[~i.mask] = 1e-30
    for dhidden in (skipped, padding, exact.hidden * torch.nan):
        assert head_accuracy.errors(loss, dhidden, exact.weight, i, exact)[0].hidden == torch.inf
    assert head_accuracy.errors(loss * torch.nan, exact.hidden, exact.weight, i, exact)[1] == torch.inf


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [Preset.grpo, Preset.pmpo])
@pytest.mark.parametrize("dtype", list(Dtype))
def test_every_row_is_right_and_timed(preset: Preset, dtype: Dtype) -> None:
    """Liger's, TRL's and PyTorch's own rows among them, where they are installed."""
    case = replace(SMALL, preset=preset, dtype=dtype, zero_advantage=0.25)
    chosen, skipped = head_rows.head_rows(case, compiled=False)
    found = compared(case, *chosen)
    assert not [row for row in found.rows if row.problem], found.rows
    assert all(row.timings for row in found.rows)
    assert all((row.gradient_error is None) == (row.group == head_rows.FLOOR) for row in found.rows)
    assert skipped["torch.compile"] == "left out by --no-compile"
    if preset is Preset.pmpo:
        assert skipped[LIGER] == "computes no pmpo; compared on grpo"


def test_missing_peers_are_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_rows.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    chosen, skipped = head_rows.head_rows(replace(SMALL, preset=Preset.grpo), compiled=True)
    assert not [variant for variant in chosen if variant.group == PEER]
    assert skipped == {
        LIGER: "not installed (pip install liger-kernel packaging)",
        TRL: "not installed (pip install trl)",
        head_rows.LIGER_NLL: "not installed (pip install liger-kernel packaging)",
        head_rows.TORCH_NLL: f"not in PyTorch {torch.__version__}",
    }


def test_ligers_scaled_cross_entropy_on_a_hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels are asked for before they run; elsewhere PyTorch runs, in any dtype."""
    case = replace(SMALL, device="cuda", dtype=Dtype.bfloat16)
    monkeypatch.setattr(head_rows.importlib.util, "find_spec", lambda name: name == "liger_kernel" or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert head_rows.no_liger_nll(case) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert "liger-kernel[cutedsl]" in str(head_rows.no_liger_nll(case))
    assert "take bfloat16, not float32" in str(head_rows.no_liger_nll(replace(case, dtype=Dtype.float32)))
    assert head_rows.no_liger_nll(replace(case, device="cpu")) is None
    monkeypatch.setattr(head_rows.importlib.util, "find_spec", lambda name: name)
    assert head_rows.no_liger_nll(case) is None


@pytest.mark.parametrize("preset", [Preset.grpo, Preset.pmpo])
def test_installed_peers_are_among_the_rows(preset: Preset) -> None:
    pytest.importorskip("liger_kernel")
    pytest.importorskip("trl")
    chosen, skipped = head_rows.head_rows(replace(SMALL, preset=preset), compiled=False)
    peers = [variant.name for variant in chosen if variant.group == PEER]
    nll = [name for name in (head_rows.LIGER_NLL, head_rows.TORCH_NLL) if name not in skipped]
    assert peers == ([LIGER, TRL, *nll] if preset is Preset.grpo else [TRL, *nll])


@pytest.mark.parametrize("chunk", [5, 1000])
def test_the_floor_is_the_three_products(chunk: int) -> None:
    bench = HeadBench(build_head_inputs(SMALL))
    _, dhidden, dweight = bench.run(head_rows.build_products(chunk, SMALL.config))
    h, weight = bench.hidden.detach().double(), bench.weight.detach().double()
    z, terms = h @ weight.t(), h.abs() @ weight.abs().t()
    for found, a, b, size in ((dhidden, z, weight, terms @ weight.abs()), (dweight, z.t(), h, terms.t() @ h.abs())):
        # float32 sums of H terms, and of as many as the second product adds up
        bound = (h.shape[1] + b.shape[0] + 2) * torch.finfo(torch.float32).eps / 2 * size
        assert ((found.double() - a @ b).abs() <= bound).all()


def scaled(factor: float, where: str, config: LossConfig) -> head_rows.HeadLoss:
    """The baseline with only its loss, or only one gradient, off by a factor."""

    def loss(hidden: Tensor, weight: Tensor, i: HeadInputs) -> Tensor:
        if where == "dhidden":
            hidden = factor * hidden + (1 - factor) * hidden.detach()
        if where == "dweight":
            weight = factor * weight + (1 - factor) * weight.detach()
        right = head_rows.eager_head_loss(hidden, weight, i, config)
        return right + (factor - 1) * right.detach() if where == "loss" else right

    return loss


class Scaled:
    """`build` of a wrong row."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __call__(self, config: LossConfig) -> head_rows.HeadLoss:
        return scaled(1.05, self.where, config)


def test_a_wrong_row_has_no_times_and_a_peers_failure_is_reported() -> None:
    def fails(config: LossConfig) -> head_rows.HeadLoss:
        def loss(hidden: Tensor, weight: Tensor, i: HeadInputs) -> Tensor:
            raise RuntimeError("no such kernel")

        return loss

    wrong = [head_rows.HeadVariant(where, "naive", Scaled(where)) for where in ("loss", "dhidden", "dweight")]
    found = compared(SMALL, *wrong, head_rows.HeadVariant("theirs", PEER, fails))
    assert [(row.wrong, bool(row.timings)) for row in found.rows] == [(True, False)] * 3 + [(False, False)]
    assert found.rows[3].problem == "theirs failed: RuntimeError: no such kernel"
    with pytest.raises(RuntimeError, match="no such kernel"):
        compared(SMALL, head_rows.HeadVariant("ours", "fused", fails))


# --- the command -----------------------------------------------------------------------------------------------------

ARGUMENTS = ["--model", "smollm2", "--hidden", "16", "--batch", "3", "--tokens", "8", "--dtype", "float32"]
ARGUMENTS += ["--repeats", "2", "--no-compile"]


def few_rows(case: HeadCase, compiled: bool, brief: bool) -> tuple[list[head_rows.HeadVariant], dict[str, str]]:
    """Each one's memory is measured in a process of its own."""
    chosen, skipped = head_rows.head_rows(case, compiled, brief)
    return [v for v in chosen if v.group == "floor" or v.name in ("eager PyTorch", head_rows.OURS)], skipped


def test_head_writes_its_files_and_overwrites_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "head_rows", few_rows)
    arguments = [*ARGUMENTS, "--clipped", "0.5", "--out", str(tmp_path)]
    result = runner.invoke(head.app, arguments)
    assert result.exit_code == 0, result.output
    stem = "head-smollm2-3x8-float32-grpo-p0.375-c0.5-z0-h16"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{stem}.json", f"{stem}.png"]
    content = json.loads((tmp_path / f"{stem}.json").read_text())
    rows = {row["name"]: row for row in content["results"]}
    for row in rows.values():
        (timing,) = row["timings"].values()
        assert len(timing["samples"]) == 2
        assert row["peak_bytes"] is not None
        if row["group"] != "floor":
            assert max(row["parts"].values()) == row["gradient_error"] <= row["gradient_bound"]
    assert {"commit", "date", "devices", "versions"} <= set(content)
    assert content["tokens"]["response"] == content["tokens"]["with_advantage"] == 15
    assert rows[head_rows.OURS]["largest_chunk"] == content["tokens"]["largest_chunk"] == 15
    assert content["products_add_to_float32"] is None
    check_ratios(content, rows)
    again = runner.invoke(head.app, arguments)
    assert again.exit_code == 2
    assert "--overwrite" in again.output
    assert json.loads((tmp_path / f"{stem}.json").read_text()) == content


def test_head_keeps_what_it_has_measured_when_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt in the second round: every row is checked and has the times of the first."""
    monkeypatch.setattr(head, "head_rows", few_rows)
    timed, time = [], HeadBench.time

    def interrupted(bench: HeadBench, f: Callable[..., Tensor]) -> Times:
        timed.append(f)
        if timed.count(timed[0]) == (2 if DEVICE == "cpu" else 3):  # a GPU has a round more to warm up
            raise KeyboardInterrupt
        return time(bench, f)

    monkeypatch.setattr(HeadBench, "time", interrupted)
    result = runner.invoke(head.app, [*ARGUMENTS, "--out", str(tmp_path)])
    assert result.exit_code != 0
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    assert content["complete"] is False
    assert [len(next(iter(row["timings"].values()))["samples"]) for row in content["results"]] == [1] * len(set(timed))
    assert content["ratios"]


@pytest.mark.parametrize(("suite", "cases"), [("main", 1), ("more", len(head.suite(DEVICE)) - 1)])
def test_head_rehearses_a_part_of_its_cases(
    suite: str, cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "head_rows", few_rows)
    arguments = ["--suite", suite, "--tiny", "--repeats", "1", "--no-compile", "--no-memory", "--out", str(tmp_path)]
    result = runner.invoke(head.app, arguments)
    assert result.exit_code == 0, result.output
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(found) == cases
    assert {(c["case"]["model"], c["case"]["vocab"], c["complete"]) for c in found} == {("tiny", 320, True)}


def check_ratios(content: dict[str, Any], rows: dict[str, Any]) -> None:
    """They follow from the times and sizes that are written beside them."""
    found = {ratio["name"]: ratio for ratio in content["ratios"]}
    times = {name: next(iter(row["timings"].values()))["both"]["median"] for name, row in rows.items()}
    eager = found["time over eager PyTorch"]
    assert eager["value"] == pytest.approx(times[head_rows.OURS] / times["eager PyTorch"])
    assert found[f"time over {content['products']}"]["value"] == pytest.approx(
        times[head_rows.OURS] / min(time for name, time in times.items() if name.startswith("three products"))
    )
    memory = found["peak memory over logits of a chunk + gradients"]["value"]
    least = content["tokens"]["largest_chunk"] * 49152 * 4 + content["case"]["gradient_bytes"]
    assert memory == pytest.approx(rows[head_rows.OURS]["peak_bytes"] / least)
    if DEVICE == "cpu":
        assert eager["target"] == 1
        assert eager["met"] == (eager["value"] <= 1)


def test_head_shows_a_wrong_row_and_exits_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = head_rows.HeadVariant("changed", "naive", Scaled("dweight"))
    monkeypatch.setattr(head, "head_rows", lambda *args: ([wrong], {"someone": "not installed"}))
    result = runner.invoke(head.app, [*ARGUMENTS, "--no-memory", "--out", str(tmp_path)])
    assert result.exit_code == 1, result.output
    assert "WRONG" in result.output
    assert "no times: changed (wrong result" in result.output
    assert "not measured: someone (not installed)" in result.output
    (path,) = tmp_path.glob("*.json")
    (row,) = json.loads(path.read_text())["results"]
    assert (row["wrong"], row["timings"]) == (True, {})


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--model", "gpt5", "'gpt2'"),
        ("--preset", "gspo", "preset: expected one that clips tokens, got gspo"),
        ("--padded", "0.6", "padded: expected a fraction from 0 to 0.5, got 0.6"),
        ("--hidden", "0", "1"),
        ("--tokens", "100000000", "GiB available"),
    ],
)
def test_head_names_a_bad_option(option: str, value: str, expected: str, tmp_path: Path) -> None:
    result = runner.invoke(head.app, [option, value, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert option in result.output
    assert expected in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("dtype", "said"), [(Dtype.bfloat16, "Products "), (Dtype.float32, "")])
def test_the_report_says_how_products_are_summed_up(
    dtype: Dtype, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded first or not: it decides what several chunks cost."""
    monkeypatch.setattr(head, "head_rows", few_rows)
    arguments = [*ARGUMENTS, "--hidden", "576", "--dtype", dtype.value, "--no-memory", "--out", str(tmp_path)]
    result = runner.invoke(head.app, arguments)
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*.json")
    adds = json.loads(path.read_text())["products_add_to_float32"]
    assert adds == (adds_to_float32(torch.device(DEVICE), torch.bfloat16) if said else None)
    how = {True: "Products add to the float32 sum.", False: "Products are rounded before they are added."}
    assert [text in " ".join(result.output.split()) for text in how.values()] == [adds is True, adds is False]


def test_suites_fit_their_devices() -> None:
    for device, tokens, most in (("cpu", [2560] * 4, 8e9), ("cuda", [15360] * 4 + [8192], 40e9)):
        plan = head.suite(device)
        assert len({planned.case.name for planned in plan}) == len(plan)
        assert not plan[0].brief
        assert [round((1 - case.padded) * case.batch * case.tokens) for case, _ in plan] == tokens
        assert all(case.needed_bytes < most for case, _ in plan)


def test_the_shape_of_ligers_table() -> None:
    """M = 8,192, H = 4,096, V = 131,072 in bfloat16, every row; on a CPU too large for most machines."""
    case, brief = head.suite("cuda")[-1]
    assert (case.batch * case.tokens, case.padded, case.hidden, case.vocab) == (8192, 0.0, 4096, 131_072)
    assert case.dtype is Dtype.bfloat16
    assert not brief
    assert replace(case, device="cpu").needed_bytes > 40e9


def test_a_case_that_saves_work_is_compared_with_the_full_one() -> None:
    reports = []
    for fractions, both in (
        ({"clipped": 0.0}, 8.0),
        ({"clipped": 0.0, "zero_advantage": 0.5}, 4.0),
        ({"clipped": 0.5}, 6.0),
    ):
        case = replace(SMALL, preset=Preset.grpo, zero_advantage=0.0)
        case = replace(case, **fractions)
        rows = [head_rows.products(case)[0], *head_rows.ours(case, brief=True)]
        found = compared(case, *rows)
        # the second case on a machine that is half as fast
        slow = 2.0 if case.zero_advantage else 1.0
        for row, ms in zip(found.rows, (7.0, both), strict=True):
            row.timings = {allocators(DEVICE)[-1]: Timing.of([Times(slow * ms, 0.0, slow * ms, None)])}
        variants = {row.name: row for row in rows}
        reports.append(HeadReport(Report(case, 1, found, {}), case, allocators(DEVICE)[-1], variants, 1, 1, {}, False))
    assert [full_case(report, reports) for report in reports] == [reports[0]] * 3
    over = [{r.name: r for r in report.ratios(reports[0])}.get("time over the full case") for report in reports]
    assert over[0] is None
    assert [(r.value, r.target, r.met) for r in over[1:] if r] == [
        (pytest.approx(0.5), 0.6, True),
        (pytest.approx(0.75), None, None),
    ]
