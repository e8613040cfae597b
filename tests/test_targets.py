"""benchmarks/targets.py: what results say of each target, from files of known figures."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import readme_table
import targets

GPU = {"cuda:0": "NVIDIA H200"}
FIELDS = {
    "model": "qwen2.5",
    "vocab": 151936,
    "padded": 0.0,
    "clipped": 0.0,
    "zero_advantage": 0.0,
    "logits_bytes": 1000,
}
MET = (0.9, 0.88, 0.88, 0.03, 8, 2, 1.15, 1.5, 1.01, 0.01, 0.8, 0.8, 1.1, 2, 1.0, 0.6)


def timed(name: str, backward: float = 10.0, **more: Any) -> dict[str, Any]:
    return {"name": name, "timings": {"default": {"backward": {"median": backward}}}} | more


def results(figures: tuple[float, ...]) -> dict[str, Any]:
    """Files of a call that give these figures, in the order of the targets."""
    (forward, backward, call, trajectory, eager, compiled, token, sequence, memory, in_place, clipped, zero, *head) = (
        figures
    )
    products, liger, head_memory, half = head
    main = {"case": FIELDS | {"preset": "grpo", "batch": 2, "tokens": 4096}, "devices": GPU, "ours": "triton"}
    rows = [
        timed("triton", peak_bytes=1000 * memory, call_share_of_copy={"forward": call}),
        timed("triton, in place", peak_bytes=1000 * in_place),
        timed("eager PyTorch", both_over_ours=eager),
        timed("torch.compile", both_over_ours=compiled),
        timed("Liger, token level", both_over_ours=token),
    ]
    main |= {"results": rows, "stage_share_of_copy": {"forward": forward, "backward": backward}}

    def case(**fields: Any) -> dict[str, Any]:
        return {"case": FIELDS | {"preset": "grpo", "batch": 2} | fields, "devices": GPU, "ours": "triton"}

    def over_products(value: float) -> dict[str, Any]:
        return {"name": "time over three products, 16,384 a chunk", "value": value}

    peer = {"name": "Liger over ours, time", "value": liger}
    peak = {"name": "peak memory over logits of a chunk + gradients", "value": head_memory}
    gspo = [timed("Liger, sequence level", both_over_ours=sequence)]
    return {
        "run-main.json": main,
        "run-clipped.json": case(clipped=0.5) | {"results": [timed("triton", 10 * clipped)]},
        "run-zero.json": case(zero_advantage=0.5) | {"results": [timed("triton", 10 * zero)]},
        "run-gspo.json": case(preset="gspo", batch=8) | {"results": gspo},
        "stages-triton.json": {
            "devices": GPU,
            "cases": [
                {"case": FIELDS | {"preset": "pmpo", "batch": 1, "clipped": 0.05}, "trajectory_share": 1.0},
                {"case": FIELDS | {"preset": "pmpo", "batch": 2, "clipped": 0.05}, "trajectory_share": trajectory},
            ],
        },
        "head-main.json": case(padded=0.375) | {"ratios": [over_products(products), peer, peak]},
        "head-table.json": case(padded=0.0, model="ministral") | {"ratios": [over_products(99.0)]},
        "head-zero.json": case(padded=0.375, zero_advantage=0.5) | {"ratios": [over_products(half * products)]},
    }


def states(folder: Path, files: dict[str, Any]) -> list[tuple[str, str]]:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return [targets.state(target, targets.load(folder)) for target in targets.TARGETS]


def test_figures_at_their_targets_are_met(tmp_path: Path) -> None:
    assert [target.limit for target in targets.TARGETS] == list(MET)
    found = states(
        tmp_path, results(tuple(x + (1e-9 if t.at_least else -1e-9) for x, t in zip(MET, targets.TARGETS, strict=True)))
    )
    assert found == [(target.show(target.limit), "met") for target in targets.TARGETS]


@pytest.mark.parametrize("k", range(len(MET)), ids=[target.name for target in targets.TARGETS])
def test_a_figure_beside_its_target_is_not_met(k: int, tmp_path: Path) -> None:
    """That one alone, and it is shown."""
    better = [x * (1.02 if target.at_least else 0.98) for x, target in zip(MET, targets.TARGETS, strict=True)]
    worse = MET[k] * (0.9 if targets.TARGETS[k].at_least else 1.1)
    found = states(tmp_path, results((*better[:k], worse, *better[k + 1 :])))
    assert [met for _, met in found] == ["NOT MET" if i == k else "met" for i in range(len(MET))]
    assert found[k][0] == targets.TARGETS[k].show(worse)


def test_what_is_missing_is_not_measured(tmp_path: Path) -> None:
    assert states(tmp_path, {}) == [("-", "not measured")] * len(MET)
    cut = copy.deepcopy(results(MET))
    cut["run-main.json"] |= {
        "results": [{"name": "triton", "timings": {}, "call_share_of_copy": None}],
        "stage_share_of_copy": {},
    }
    del cut["head-main.json"]["ratios"], cut["run-gspo.json"], cut["stages-triton.json"]
    assert states(tmp_path, cut) == [("-", "not measured")] * len(MET)


def test_results_of_an_earlier_call_are_told_apart(tmp_path: Path) -> None:
    states(tmp_path, results(MET))
    os.utime(tmp_path / "head-main.json", (1000, 1000))
    found = [targets.state(target, targets.load(tmp_path, since=2000)) for target in targets.TARGETS]
    of_head = [target.name.startswith("LM head: ") for target in targets.TARGETS]
    assert [met for _, met in found] == ["met (of an earlier call)" if head else "met" for head in of_head]


def test_a_case_that_was_cut_hides_no_stage(tmp_path: Path) -> None:
    """`run.py` writes a case before it has figures; `stages.py` may have those of the same case."""
    cut = {"case": FIELDS | {"preset": "pmpo", "batch": 2, "clipped": 0.05}, "devices": GPU, "results": []}
    assert states(tmp_path, results(MET) | {"run-pmpo.json": cut})[3][1] == "met"


@pytest.mark.parametrize(
    "change", [{"devices": {"cuda": "no GPU visible to PyTorch"}}, {"model": "tiny"}], ids=["CPU", "tiny"]
)
def test_a_rehearsal_meets_nothing(change: dict[str, Any], tmp_path: Path) -> None:
    files = results(MET)
    del files["head-table.json"]
    for content in files.values():
        content["devices"] = change.get("devices", GPU)
        for case in content.get("cases", [content]):
            case["case"]["model"] = change.get("model", "qwen2.5")
    assert [met for _, met in states(tmp_path, files)] == ["rehearsal, no result"] * len(MET)


def test_a_line_a_target_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states(tmp_path, results(MET))
    targets.main(tmp_path)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "Targets, NVIDIA H200:"
    assert len(lines) == len(MET)
    assert lines[4] == "eager PyTorch over ours, time: target at least 8, measured 8: met"


def test_a_rehearsal_enters_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)
    (tmp_path / "run-x.json").write_text("{}")
    assert readme_table.load("run-*.json")
    (tmp_path / "REHEARSAL.txt").touch()
    with pytest.raises(SystemExit, match=r"got a rehearsal of gpu\.sh: .*run-x\.json"):
        readme_table.load("run-*.json")
