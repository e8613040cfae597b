"""The experiment's parts by hand, and a small one from the first step to the pictures."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("transformers")

import methods
import run_all
from document import chosen
from figures import means
from logs import Settings, finished, path_of, read_log
from methods import ABLATION, FAMILY, Method
from policy import FILE, decode_characters, encode_characters, sample, small_policy
from report import write_report
from summary import panels
from tasks import LEVELS, SIDES, Problem, draw_problem, draw_problems, noisy_solution, reward, solution
from train import backward, eager_loss, roll_out, train

from pmpo_kernels import LossConfig
from pmpo_kernels.schedules import apmpo_clip, apmpo_power

RUN = Path(__file__).parent.parent / "examples" / "experiment" / "run_all.py"
TINY = Settings(
    method="pmpo",
    seed=0,
    staleness=2,
    learning_rate=1e-4,
    steps=2,
    prompts=2,
    copies=4,
    evaluate_every=2,
    evaluation_problems=8,
    compare_every=2,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the small model's first weights."""
    torch.manual_seed(0)
    torch.save(small_policy().model.state_dict(), tmp_path / FILE)
    return tmp_path


@pytest.fixture(autouse=True)
def keep_threads():
    """A run takes one thread."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_problem_by_hand() -> None:
    problem = Problem(8, (7, -9))
    assert (problem.expression, problem.level, problem.totals, solution(problem)) == ("8+7-9", 2, (15, 6), "15 06")


@pytest.mark.parametrize(
    ("text", "ended", "want"),
    [
        ("15 06", True, 1),
        ("15 6", True, 1),
        ("The total is 15, then 6.", True, 1),
        ("15 06", False, 0),
        ("06 15", True, 0),
        ("16", True, 0),
        ("", True, 0),
        ("none", True, 0),
    ],
)
def test_reward_by_hand(text: str, ended: bool, want: float) -> None:
    assert reward(Problem(8, (7, -9)), text, ended) == want


def test_sides_do_not_overlap() -> None:
    sides = [{p.expression for p in draw_problems("key", 2000, side=side)} for side in SIDES]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]
    drawn = draw_problems("key", 2000)
    assert {p.level for p in drawn} == set(LEVELS)
    assert all(0 <= total <= 99 for p in drawn for total in p.totals)
    assert drawn == draw_problems("key", 2000) != draw_problems("other", 2000)
    rng = random.Random(0)
    problems = [Problem(rng.randint(1, 9), tuple(rng.choices(range(1, 10), k=4))) for _ in range(4000)]
    for side, share in zip(SIDES, (0.6, 0.2, 0.2), strict=True):
        found = sum(p.side == side for p in problems) / 4000
        assert abs(found - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    with pytest.raises(ValueError, match=r"level: expected 1 to .*, got 99"):
        draw_problem(rng, 99, "train")
    with pytest.raises(ValueError, match=r"side: expected one of .*, got 'test'"):
        draw_problem(rng, 2, "test")  # type: ignore[arg-type]


def test_noise_is_some_forgotten_carries() -> None:
    """Of 8+7 most forget to carry, 05; few are off by one; of 1+1 hardly any is wrong."""
    rng = random.Random(0)
    carried = [noisy_solution(Problem(8, (7,)), rng) for _ in range(1000)]
    plain = [noisy_solution(Problem(1, (1,)), rng) for _ in range(1000)]
    assert 500 < carried.count("05") < 650
    assert 330 < carried.count("15") < 430
    assert 920 < plain.count("02") < 980


def test_characters_there_and_back() -> None:
    ids, mask = encode_characters([Problem(8, (7, -9)), Problem(1, (1, 1, 1, 1))])
    assert bool(mask.all())
    assert [decode_characters(row).rstrip() for row in ids] == ["8+7-9=", "1+1+1+1+1="]


@torch.no_grad()
def test_sampling_with_a_cache_is_the_model() -> None:
    """The likeliest token of each position, as one forward pass of the whole sees it; answers end once."""
    torch.manual_seed(1)
    policy, problems = small_policy(), draw_problems("sample", 6)
    input_ids, attention, token_ids, mask = sample(policy, problems, 2, None)
    logits = policy.model(input_ids=input_ids).logits[:, -token_ids.shape[1] - 1 : -1]
    assert torch.equal(logits.argmax(-1)[mask], token_ids[mask])
    assert torch.equal(token_ids[::2], token_ids[1::2])
    assert attention.shape == input_ids.shape
    first = (token_ids == policy.end).int().argmax(1)
    assert all(
        int(m.sum()) == (int(f) + 1 if bool((t == policy.end).any()) else len(t))
        for f, m, t in zip(first, mask, token_ids, strict=True)
    )


@pytest.mark.parametrize("method", [*FAMILY, *ABLATION])
def test_methods_are_losses(method: str) -> None:
    """Each has a loss and a gradient, the same from logits, from hidden states and in eager PyTorch."""
    policy, settings = small_policy(), replace(TINY, method=method)
    r = roll_out(policy, draw_problems("loss", 4), settings, torch.Generator().manual_seed(0))
    r.advantages = torch.randn(len(r.mask), generator=torch.Generator().manual_seed(1))
    r.old_logp = r.old_logp + 0.3 * torch.randn(r.mask.shape, generator=torch.Generator().manual_seed(2))
    config, power = Method(method).arguments(0.25, r.rewards)
    want = eager_loss(policy.logits(r), r, config, power)
    want.backward()
    gradients = {}
    for loss in ("eager", "logits", "linear"):
        policy.model.zero_grad()
        out = backward(policy, r, config, power, loss)
        torch.testing.assert_close(out.loss.detach(), want.detach(), rtol=1e-5, atol=1e-6)
        gradients[loss] = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    size = gradients["eager"].norm()
    assert float(size) > 0 or method == "gspo"  # its bounds are so narrow that all may be clipped
    for loss in ("logits", "linear"):
        assert float((gradients[loss] - gradients["eager"]).norm()) <= 1e-4 * float(
            size
        )  # float32, sums over the batch


def test_without_staleness_all_methods_have_the_same_gradient() -> None:
    """But dapo, which adds up by tokens. With the log-probs of the rollout the ratios are 1."""
    policy = small_policy()
    r = roll_out(policy, draw_problems("same", 4), TINY, torch.Generator().manual_seed(0))
    r.advantages = torch.randn(len(r.mask), generator=torch.Generator().manual_seed(1))
    gradients = {}
    for method in FAMILY:
        policy.model.zero_grad()
        backward(policy, r, *Method(method).arguments(0.25, r.rewards), "logits")
        gradients[method] = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    want = gradients.pop("grpo")
    apart = {m: float((g - want).norm() / want.norm()) for m, g in gradients.items()}
    assert apart.pop("dapo") > 1e-2
    assert all(x < 1e-5 for x in apart.values()), apart  # float32: log-ratios of some 1e-7


def test_arguments_of_a_step() -> None:
    rewards = torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert [Method("holder").arguments(x, rewards)[1] for x in (0.0, 0.5, 1.0)] == [2, 0, -2]
    config, power = Method("apmpo").arguments(0.0, rewards)
    assert power is None
    assert config == LossConfig.apmpo(apmpo_power(rewards), apmpo_clip(rewards))
    config, _ = Method("pmpo:full_clip_fraction=0.2,ess_rule=absolute").arguments(0.0, rewards)
    assert config == LossConfig.pmpo(full_clip_fraction=0.2, ess_rule="absolute")
    assert len({Method(m).file_stem for m in (*FAMILY, *ABLATION)}) == len({*FAMILY, *ABLATION})
    assert set(methods.PRESETS) == set(FAMILY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "ppo"}, "method: expected one of"),
        ({"method": "pmpo:"}, "expected option=value"),
        ({"method": "pmpo:clip_low"}, "expected option=value"),
        ({"method": "pmpo:no_such=1"}, "expected options of LossConfig"),
        ({"method": "pmpo:full_clip_fraction=2"}, "full_clip_fraction: expected a number in"),
        ({"staleness": 0}, "staleness: expected an int >= 1, got 0"),
        ({"steps": 3}, "steps: expected a multiple of the staleness, which is 2, got 3"),
        ({"evaluate_every": 1}, "evaluate_every: expected a multiple"),
        ({"compare_every": 1}, "compare_every: expected a multiple"),
        ({"evaluate_on": "train"}, "evaluate_on: expected one of ['validation', 'held out'], got 'train'"),
        ({"copies": 1}, "copies: expected an int >= 2"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number > 0"),
        ({"model": "large"}, "model: expected small or smollm2"),
        ({"loss": "fast"}, "loss: expected one of"),
    ],
)
def test_wrong_settings_raise(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(TINY, **change)


def test_a_run_is_logged_and_not_repeated(folder: Path) -> None:
    assert train(TINY, folder)
    path = path_of(folder, TINY)
    first = path.read_bytes()
    assert not train(TINY, folder)
    assert path.read_bytes() == first
    log = read_log(path)
    assert log.settings == TINY
    assert [(row["step"], row["off"]) for row in log.rows] == [(1, 0), (2, 1)]
    assert log.rows[0]["clip_fraction"] == 0
    assert [row["step"] for row in log.evaluations] == [0, 2]
    assert all(log.times[0][f"seconds_{name}"] > 0 for name in ("ours", "eager"))
    with pytest.raises(ValueError, match=r"expected the run of these settings, got one with \{'steps': 2\}"):
        finished(folder, replace(TINY, steps=4))
    path.unlink()
    path.with_suffix(".part").write_text("an interrupted run")
    assert train(TINY, folder)
    again = read_log(path)
    assert (again.rows, again.evaluations) == (log.rows, log.evaluations)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    path.write_text(first.decode().splitlines()[0])
    with pytest.raises(ValueError, match="expected a run's log"):
        read_log(path)


def write_logs(folder: Path) -> None:
    """Runs of two methods, two seeds, two staleness levels, with numbers that can be added up by hand."""
    (folder / "runs").mkdir()
    for method, gain in (("grpo", 0.1), ("pmpo", 0.2), ("pmpo:clip_low=0.2", -0.25)):
        for staleness in (1, 2):
            for seed in (0, 1):
                s = replace(TINY, method=method, seed=seed, staleness=staleness, steps=4)
                rows = [{"kind": "evaluation", "step": 0, "accuracy": 0.4, "greedy": 0.4, "levels": {}}]
                for step in range(1, 5):
                    numbers = {"gradient_norm": float(step), "clip_fraction": 0.02, "entropy": 0.5}
                    some = None if step == 1 else [0.0, 0.25, 0.5, 0.75, 1.0]
                    rows.append({"kind": "step", "step": step, "power": some, "ess": some, **numbers})
                rows.append({"kind": "time", "step": 4, "seconds_ours": 0.1, "seconds_eager": 0.2})
                final = 0.4 + gain + 0.02 * seed * (1 + (method == "pmpo"))
                rows.append({"kind": "evaluation", "step": 4, "accuracy": final, "greedy": final, "levels": {}})
                lines = [{"kind": "settings", **s.__dict__}, *rows, {"kind": "end", "seconds": 1.0}]
                path_of(folder, s).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected finished runs in"):
        write_report(tmp_path, Console(file=StringIO()))
    write_logs(tmp_path)
    write_report(tmp_path, Console(file=StringIO()))
    one, two = panels([read_log(path) for path in (tmp_path / "runs").iterdir()])
    assert (one.staleness, two.staleness, one.learning_rate) == (1, 2, None)
    assert one.methods == ["grpo", "pmpo", "pmpo:clip_low=0.2"]
    grpo, pmpo, narrow = two.summaries()
    assert (pmpo.runs, pmpo.collapsed, narrow.collapsed) == (2, 0, 2)
    assert (pmpo.accuracy, pmpo.standard_error, pmpo.worst) == pytest.approx((0.62, 0.02, 0.6))
    assert pmpo.difference == pytest.approx((0.11, 0.01))
    assert grpo.difference is None
    assert (pmpo.gradient_median, pmpo.gradient_max, pmpo.power) == (2.5, 4, (0.25, 0.5, 0.75))
    text = (tmp_path / "results.md").read_text()
    assert "| method | runs | rate | accuracy | worst | minus grpo | greedy |" in text
    row = "| pmpo | 2 | 0.0001 | 62.0 ± 2.0 | 60.0 | +11.0 ± 1.0 | 62.0 | 0 | 2.50 | 4.0 | 0.500 | 2.00 | 0.50 (0.25 to 0.75)"
    assert row in text
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["panels"][1]["methods"][1]["accuracy"] == pytest.approx(0.62)
    assert content["commit"]
    for name in ("accuracy.png", "runs.png", "power.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert means([{"x": 1}, {"x": None}, {"x": 2}, {"x": 4}], lambda row: row["x"], 2).tolist() == [1, 3]


def test_report_of_learning_rates(tmp_path: Path) -> None:
    """Each rate is a panel, with differences of its own; three of them are a picture more; written elsewhere if wanted."""
    write_logs(tmp_path)
    for path in list((tmp_path / "runs").iterdir()):
        for factor in (2, 4):
            log = path.read_text().replace('"learning_rate": 0.0001', f'"learning_rate": {factor * 1e-4}')
            path.with_name(f"{factor}-{path.name}").write_text(log)
    write_report(tmp_path, Console(file=StringIO()), tmp_path / "report")
    found = panels([read_log(path) for path in (tmp_path / "runs").iterdir()])
    assert [(p.staleness, p.learning_rate) for p in found] == [(k, r) for k in (1, 2) for r in (1e-4, 2e-4, 4e-4)]
    assert all(p.summaries()[1].difference == pytest.approx((0.11, 0.01)) for p in found)
    pictures = sorted(p.name for p in (tmp_path / "report").iterdir())
    assert pictures == ["accuracy.png", "power.png", "rates.png", "results.json", "results.md", "runs.png"]


def test_documents_say_what_the_results_say() -> None:
    """And the learning rates are those that came out best."""
    program = RUN.with_name("document.py")
    done = subprocess.run([sys.executable, program, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert chosen() == methods.LEARNING_RATES


def test_the_whole_as_a_command(tmp_path: Path) -> None:
    """Pre-training, one run, the report; the second time nothing is trained, and wrong options end it."""
    options = ["--out", str(tmp_path), "--smoke", "--pretrain-steps", "2"]
    done = subprocess.run([sys.executable, RUN, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (log,) = (tmp_path / "runs").iterdir()
    weights = tmp_path / FILE
    before = [path.stat().st_mtime_ns for path in (log, weights)]
    (tmp_path / "results.md").unlink()
    app = typer.Typer()
    app.command()(run_all.main)
    again = CliRunner().invoke(app, options)
    assert again.exit_code == 0, again.output
    assert [path.stat().st_mtime_ns for path in (log, weights)] == before
    assert (tmp_path / "results.md").exists()
    for wrong in (["--method", "ppo"], ["--model", "large"], ["--kind", "all"], ["--loss", "fast"]):
        assert CliRunner().invoke(app, [*options, *wrong]).exit_code == 2
    other = CliRunner().invoke(app, [*options, "--copies", "8"])
    assert isinstance(other.exception, ValueError)
    assert "expected the run of these settings" in str(other.exception)
