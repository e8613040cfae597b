"""The policy losses inside verl as installed: its registry, its configuration, its actor's loss, and the recipe; docs/verl.md.

Without verl these tests are skipped with the reason; with --require-peers (`make peers`) they then fail.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pmpo_kernels import LossConfig, checks, pmpo_loss_from_logp
from pmpo_kernels.verification.peers import TOLERANCE, ParityBatch, make_batch

PROBLEM = ""
try:
    from hydra import compose, initialize_config_module
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn
    from verl.utils import tensordict_utils
    from verl.utils.config import omega_conf_to_dataclass, validate_config
    from verl.workers.config import ActorConfig, PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    from pmpo_kernels.integrations import verl as ours
except ImportError as error:
    PROBLEM = f"{type(error).__name__}: {error}"

ROOT = Path(__file__).parent.parent
EPS = torch.finfo(torch.float32).eps
NAMES = ("pmpo", "gmpo", "holder")
MODES = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
HORIZON = 10  # loss_scale_factor; the batch is 12 wide, so that it cannot be mistaken for the width
POLICY = "actor_rollout_ref.actor.policy_loss"
TARGET = f"{POLICY}._target_=pmpo_kernels.integrations.verl.PowerMeanLossConfig"
POSITIVE, EMPTY = 0, 1  # rows of the batch


@pytest.fixture(autouse=True)
def _verl_is_there(request: pytest.FixtureRequest) -> None:
    if PROBLEM:
        missing = pytest.fail if request.config.getoption("--require-peers") else pytest.skip
        missing(f"{PROBLEM}; `make peers` runs these tests")


@pytest.fixture
def registry() -> Iterator[None]:
    """What a test registers is gone after it."""
    kept, losses = dict(POLICY_LOSS_REGISTRY), dict(ours._losses)
    yield
    POLICY_LOSS_REGISTRY.clear()
    POLICY_LOSS_REGISTRY.update(kept)
    ours._losses.clear()
    ours._losses.update(losses)


def actor(name: str = "pmpo", options: dict[str, Any] | None = None, **fields: Any) -> ActorConfig:
    """verl's actor configuration for one of our losses (HölderPO at p = 2 unless given), or a loss of verl's."""
    given = {"power": 2.0, **(options or {})} if name == "holder" else options or {}
    policy = (
        ours.PowerMeanLossConfig(loss_mode=name, options=given)
        if name in ours._losses
        else PolicyLossConfig(loss_mode=name)
    )
    needed = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 2, "loss_scale_factor": HORIZON}
    return ActorConfig(**{**needed, "policy_loss": policy, **fields})


def counts(batch: ParityBatch, dp_size: int = 1) -> dict[str, Any]:
    """`global_batch_info` of a step whose whole batch is `batch`; as verl, the rows count with the empty one."""
    tokens, rows = int(batch.mask.sum()), batch.mask.shape[0]
    return {
        "dp_size": dp_size,
        "batch_num_tokens": tokens,
        "global_batch_size": rows,
        "loss_scale_factor": HORIZON,
    }


def call(
    name: str,
    config: ActorConfig,
    batch: ParityBatch,
    mode: str = "token-mean",
    rows: slice = slice(None),
    **changed: Any,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Loss, gradient (B, T) and metrics of some rows of the batch, called as verl's actor does."""
    logp = changed.pop("log_prob", batch.logp)[rows].clone().requires_grad_()
    given = {
        "old_log_prob": batch.old_logp[rows],
        "advantages": (batch.advantages[:, None] * batch.mask)[rows],  # 0 where masked, as verl's estimators leave it
        "response_mask": batch.mask[rows],
        **changed,
    }
    loss, found = get_policy_loss_fn(name)(log_prob=logp, loss_agg_mode=mode, config=config, **given)
    return loss.detach(), torch.autograd.grad(loss, logp)[0], found


def in_parts(
    name: str, batch: ParityBatch, mode: str, parts: int, info: dict[str, Any]
) -> tuple[Tensor, Tensor, float]:
    """Summed loss and gradients of `parts` micro-batches, and the sum of the losses' magnitudes."""
    config = actor(name)
    config.global_batch_info.update(info)
    n = batch.mask.shape[0] // parts
    found = [call(name, config, batch, mode, slice(i * n, i * n + n)) for i in range(parts)]
    losses = torch.stack([loss for loss, _, _ in found])
    return losses.double().sum(), torch.cat([grad for _, grad, _ in found]), float(losses.abs().sum())


# --- registered -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_registry_of_verl_has_the_losses(name: str) -> None:
    assert get_policy_loss_fn(name).func is ours.power_mean_policy_loss
    assert get_policy_loss_fn(name).args == (name,)


LOADED = "from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as r; print(*[n for n in ('pmpo', 'gmpo', 'holder') if n in r])"


# what a worker does with `model.external_lib`, up to the model, which is not there; and with an actor's section
WORKER = f"""
import contextlib
from verl.workers.config import HFModelConfig
with contextlib.suppress(Exception):
    HFModelConfig(path="none", external_lib="pmpo_kernels.integrations.verl")
{LOADED}"""
READS = f"""
from verl.utils.config import omega_conf_to_dataclass
from omegaconf import OmegaConf
target = "pmpo_kernels.integrations.verl.PowerMeanLossConfig"
omega_conf_to_dataclass(OmegaConf.create({{"_target_": target, "loss_mode": "pmpo"}}))
{LOADED}"""


@pytest.mark.parametrize(
    ("code", "environment", "expected"),
    [
        (f"import verl; {LOADED}", {}, "pmpo gmpo holder"),
        (f"import pmpo_kernels.integrations.verl; {LOADED}", {}, "pmpo gmpo holder"),
        (f"import verl; {LOADED}", {"VERL_USE_EXTERNAL_PLUGINS": "none"}, ""),
        (
            f"import verl; {LOADED}",
            {"VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_USE_EXTERNAL_MODULES": "pmpo_kernels.integrations.verl"},
            "pmpo gmpo holder",
        ),
        (WORKER, {"VERL_USE_EXTERNAL_PLUGINS": "none", "HF_HUB_OFFLINE": "1"}, "pmpo gmpo holder"),
        (READS, {"VERL_USE_EXTERNAL_PLUGINS": "none"}, "pmpo gmpo holder"),
    ],
    ids=["plugin", "plugin, module first", "neither", "external module", "external_lib", "_target_"],
)
def test_verl_loads_the_plugin_in_a_process(
    code: str, environment: dict[str, str], expected: str, tmp_path: Path
) -> None:
    """verl's own loader finds the entry point of pyproject.toml, written here as an installation writes it."""
    tomllib = pytest.importorskip("tomllib")
    plugins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["verl.plugins"]
    info = tmp_path / "pmpo_kernels_plugin_test-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pmpo-kernels-plugin-test\nVersion: 0\n")
    lines = [f"{name} = {module}" for name, module in plugins.items()]
    (info / "entry_points.txt").write_text("\n".join(["[verl.plugins]", *lines, ""]))
    clean = {key: value for key, value in os.environ.items() if not key.startswith("VERL_")}
    env = {**clean, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env, cwd=tmp_path
    )
    assert done.stdout.strip() == expected


def test_a_loss_of_ones_own(registry: None) -> None:
    batch = make_batch(V=11)
    ours.register("mine", LossConfig.hmpo(clip_low=0.2, clip_high=0.3))
    section = PolicyLossConfig(loss_mode="mine")  # verl's own, without our `_target_`
    plain = actor("vanilla", policy_loss=section)
    loss, _, _ = call("mine", plain, batch, "seq-mean-token-mean")
    config = LossConfig.hmpo(clip_low=0.2, clip_high=0.3)
    expected = pmpo_loss_from_logp(batch.logp, batch.old_logp, batch.advantages, mask=batch.mask, config=config).loss
    assert loss == expected
    # options act on it, too
    changed, _, _ = call("mine", actor("mine", {"clip_high": 0.1}), batch, "seq-mean-token-mean")
    assert changed != expected


def test_the_page_has_every_option_and_what_each_loss_makes_of_it() -> None:
    section = (ROOT / "docs" / "verl.md").read_text().partition("## Options")[2].partition("\n\n**")[0]
    header, _, *rows = (
        [cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.*$", section, re.M)
    )
    options = [re.findall(r"`(\w+)`", row[0]) for row in rows]
    assert header[1:] == list(NAMES)
    assert sorted(name for names in options for name in names) == sorted(ours.OPTIONS)
    for loss, *cells in list(zip(header, *rows, strict=True))[1:]:
        config = ours._losses[loss](**({"power": 2.0} if loss == "holder" else {}))
        for names, cell in zip(options, cells, strict=True):
            values = re.sub(r" \(.*?\)", "", cell).split(", ")
            if names == ["impl"] or values in ([""], ["must be given"]):
                continue
            for name, told in zip(names, values, strict=True):
                value = getattr(config, name)
                assert told.strip('"') == (f"{value:.4g}" if isinstance(value, float) else str(value).lower()), name


def test_the_lines_of_the_documentation_register_a_loss(registry: None) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "verl.md").read_text(), re.S)
    exec(compile(block, "docs/verl.md", "exec"), {})
    batch = make_batch(V=11)
    loss, _, _ = call("hmpo", actor("hmpo"), batch, "seq-mean-token-mean")
    given = (batch.logp, batch.old_logp, batch.advantages)
    assert loss == pmpo_loss_from_logp(*given, mask=batch.mask, config=LossConfig.hmpo()).loss


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("vanilla", LossConfig.pmpo(), "name: expected a str that is not a loss of verl's, got 'vanilla'"),
        ("mine", "pmpo", "config: expected a LossConfig, got str"),
        (
            "mine",
            LossConfig.dapo(),
            "config.loss_agg_mode: expected 'seq-mean-token-mean' .in verl set actor.loss_agg_mode",
        ),
        ("mine", LossConfig.pmpo(beta=0.1), "config.beta: expected 0.0 .in verl set actor.kl_loss_coef., got 0.1"),
        ("mine", LossConfig.pmpo(entropy_coef=0.1), "config.entropy_coef: expected 0.0"),
        ("mine", LossConfig.pmpo(temperature=0.7), "config.temperature: expected 1.0"),
    ],
)
def test_what_cannot_be_registered(registry: None, name: str, config: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ours.register(name, config)


# --- normalised -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_any_split_into_micro_batches_is_the_whole_batch(name: str, mode: str) -> None:
    """1 x 8 = 2 x 4 = 8 x 1. A token is in one micro-batch only: its gradient has no sum over them, but the coefficient in float64
    rounded once, or a scale that took a few roundings. A loss is a float32, so the sum is off by half a unit for each."""
    batch = make_batch(V=11)
    whole, grad, _ = in_parts(name, batch, mode, 1, counts(batch))
    assert grad.abs().max() > 0
    for parts in (2, 4, 8):
        loss, part_grad, magnitude = in_parts(name, batch, mode, parts, counts(batch))
        assert abs(loss - whole) <= EPS * (magnitude + abs(whole)), (parts, loss, whole)
        torch.testing.assert_close(part_grad, grad, rtol=2 * EPS, atol=0)
    if mode != "token-sum":  # which has no count: the test above can fail
        loss, part_grad, _ = in_parts(name, batch, mode, 2, {"loss_scale_factor": HORIZON})
        assert (part_grad - grad).norm() > 0.1 * grad.norm()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_average_to_the_whole_batch(name: str, mode: str) -> None:
    batch = make_batch(V=11)
    whole, grad, magnitude = in_parts(name, batch, mode, 1, counts(batch))
    loss, rank_grad, magnitude = in_parts(name, batch, mode, 2, counts(batch, dp_size=2))
    assert abs(loss / 2 - whole) <= EPS * (magnitude / 2 + abs(whole))
    torch.testing.assert_close(rank_grad / 2, grad, rtol=2 * EPS, atol=0)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_that_of_the_package(name: str, mode: str) -> None:
    """Without counts of verl's, the mean over what is there; bit for bit the public call."""
    batch = make_batch(V=11)
    presets = {"pmpo": LossConfig.pmpo, "gmpo": LossConfig.gmpo, "holder": lambda **o: LossConfig.holder(2.0, **o)}
    logp = batch.logp.clone().requires_grad_()
    config = presets[name](loss_agg_mode=mode)
    out = pmpo_loss_from_logp(logp, batch.old_logp, batch.advantages, mask=batch.mask, config=config)
    loss, grad, found = call(name, actor(name), batch, mode)
    assert loss == out.loss.detach()
    assert torch.equal(grad, torch.autograd.grad(out.loss, logp)[0])
    assert found["actor/pmpo/ess"] == float(out.metrics["ess"])


@pytest.mark.parametrize("dp_size", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_p_1_is_verls_vanilla_in_every_mode(mode: str, dp_size: int) -> None:
    """All of verl's normalisation by verl itself: `agg_loss`, with an empty row, on the first half of the batch's rows."""
    batch, clip = make_batch(V=11), LossConfig.ratio_clip(0.2, 0.28)
    both = []
    for name, options in (("vanilla", None), ("pmpo", {"power": 1.0, "dual_clip": 1.3, **clip})):
        config = actor(name, options, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=1.3)
        config.global_batch_info.update(counts(batch, dp_size))
        both.append(call(name, config, batch, mode, slice(0, 4)))
    (theirs, their_grad, their_metrics), (loss, grad, found) = both
    assert abs(loss - theirs) <= TOLERANCE * abs(theirs)
    assert (grad - their_grad).norm() <= TOLERANCE * their_grad.norm()
    assert found["actor/ppo_kl"] == pytest.approx(their_metrics["actor/ppo_kl"], rel=TOLERANCE)
    # verl counts what the dual clip bounds apart from what the clip bounds, we count both as clipped
    tokens = int(batch.mask[:4].sum())
    clipped = (their_metrics["actor/pg_clipfrac"] + their_metrics["actor/pg_clipfrac_lower"]) * tokens
    assert found["actor/pg_clipfrac"] * tokens == pytest.approx(clipped, abs=1e-4)


def test_gmpo_is_geo_mean_on_a_whole_batch_and_not_on_two_halves() -> None:
    batch, mode = make_batch(V=11), "seq-mean-token-mean"
    clip = {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}  # what ours does anyway, so that it may stand there
    found = {}
    for name in ("geo_mean", "gmpo"):
        for parts in (1, 2):
            config = actor(name, **clip)
            config.global_batch_info.update(counts(batch))
            n = 8 // parts
            sums = [call(name, config, batch, mode, slice(i * n, i * n + n)) for i in range(parts)]
            found[name, parts] = sum(float(loss) for loss, _, _ in sums), torch.cat([grad for _, grad, _ in sums])
    theirs, their_grad = found["geo_mean", 1]
    for parts, factor in ((1, 1.0), (2, 2.0)):
        loss, grad = found["gmpo", parts]
        assert loss == pytest.approx(theirs, rel=TOLERANCE)
        assert (grad - their_grad).norm() <= TOLERANCE * their_grad.norm()
        split, split_grad = found["geo_mean", parts]
        assert split == pytest.approx(factor * loss, rel=TOLERANCE)
        assert (split_grad - factor * grad).norm() <= TOLERANCE * grad.norm()


def test_what_verl_must_count() -> None:
    batch = make_batch(V=11)
    config = actor()
    config.global_batch_info["dp_size"] = 2
    for mode, key in (("token-mean", "batch_num_tokens"), ("seq-mean-token-sum", "global_batch_size")):
        with pytest.raises(ValueError, match=f"{key}: expected a count because dp_size is 2, got None"):
            call("pmpo", config, batch, mode)
    with pytest.raises(ValueError, match=r"loss_agg_mode: expected one of .* got 'batch-mean'"):
        call("pmpo", config, batch, "batch-mean")
    # verl takes the padded width, which depends on the split
    with pytest.raises(ValueError, match=r"actor.loss_scale_factor: expected a number > 0 with .* got None"):
        call("pmpo", actor(loss_scale_factor=None), batch, "seq-mean-token-sum-norm")


# --- masked rows, advantages, weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_fully_masked_rows(name: str, mode: str) -> None:
    batch = make_batch(V=11)
    config = actor(name)
    config.global_batch_info.update(counts(batch))
    loss, grad, _ = call(name, config, batch, mode)
    assert (grad[EMPTY] == 0).all()
    # nothing that stands in masked slots has an effect
    dirty = torch.where(batch.mask, 0.0, torch.nan)
    other = call(
        name, config, batch, mode, log_prob=batch.logp + dirty, old_log_prob=batch.old_logp + dirty,
        advantages=batch.advantages[:, None] + dirty, response_mask=batch.mask.long(),
    )  # fmt: skip
    assert other[0] == loss
    assert torch.equal(other[1], grad)
    # a micro-batch, and a batch, of nothing but masked rows
    for tokens in (counts(batch)["batch_num_tokens"], 0, None):
        config.global_batch_info["batch_num_tokens"] = tokens
        nothing, zero, found = call(name, config, batch, mode, slice(EMPTY, EMPTY + 1))
        assert nothing == 0
        assert (zero == 0).all()
        assert found["actor/ppo_kl"] == found["actor/pg_clipfrac"] == 0


def test_an_advantage_that_varies_in_a_row_raises() -> None:
    batch = make_batch(V=11)
    for row, column in ((0, 11), (3, 6), (6, 1)):  # last tokens and one within
        A = batch.advantages[:, None].repeat(1, 12)
        A[row, column] = 7.0
        old = float(batch.advantages[row])
        message = rf"advantages: expected one number .* got {old}\d* and 7.0 in row {row}"
        with pytest.raises(ValueError, match=message):
            call("pmpo", actor(), batch, advantages=A)
    A = batch.advantages[:, None].repeat(1, 12)
    A[3, 0] = torch.nan
    with pytest.raises(ValueError, match="advantages: expected one number"):
        call("pmpo", actor(), batch, advantages=A)


def test_the_first_response_token_need_not_be_the_first() -> None:
    """Of several turns, the first slot may be a tool's answer, where verl's estimators leave 0."""
    batch = make_batch(V=11)
    mask = batch.mask.clone()
    mask[:, 0] = False
    loss, grad, _ = call("gmpo", actor("gmpo"), batch, response_mask=mask, advantages=batch.advantages[:, None] * mask)
    config = LossConfig.gmpo(loss_agg_mode="token-mean")
    assert loss == pmpo_loss_from_logp(batch.logp, batch.old_logp, batch.advantages, mask=mask, config=config).loss
    assert grad[POSITIVE].abs().sum() > 0


def test_rollout_weights_enter_the_mean() -> None:
    batch, clip = make_batch(V=11), {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}
    weights = {"rollout_is_weights": batch.rollout_weights * batch.mask}
    plain, _, _ = call("gmpo", actor("gmpo"), batch, "seq-mean-token-mean")
    config, theirs = actor("gmpo", **clip), actor("geo_mean", **clip)
    config.global_batch_info.update(counts(batch))
    loss, grad, _ = call("gmpo", config, batch, "seq-mean-token-mean", **weights)
    expected, expected_grad, _ = call("geo_mean", theirs, batch, **weights)
    assert loss == pytest.approx(float(expected), rel=TOLERANCE)
    assert (grad - expected_grad).norm() <= TOLERANCE * expected_grad.norm()
    assert abs(loss - plain) > 100 * TOLERANCE


def test_a_rollout_weight_of_zero_leaves_its_token_out() -> None:
    batch = make_batch(V=11)
    weights = batch.rollout_weights.clone()
    weights[:, 4] = 0
    # at p = 1 that is verl's product of weight and loss; unclipped, because verl multiplies after its clip
    wide = LossConfig.ratio_clip(0.9, 9.0)
    bounds = {"clip_ratio_low": 0.9, "clip_ratio_high": 9.0, "clip_ratio_c": 99.0}
    loss, grad, _ = call(
        "pmpo", actor("pmpo", {"power": 1.0, "dual_clip": 99.0, **wide}, **bounds), batch, rollout_is_weights=weights
    )
    expected, expected_grad, _ = call("vanilla", actor("vanilla", **bounds), batch, rollout_is_weights=weights)
    assert loss == pytest.approx(float(expected), rel=TOLERANCE)
    assert (grad - expected_grad).norm() <= TOLERANCE * expected_grad.norm()
    # at p = 0 a factor of 0 would end the whole trajectory
    _, grad, _ = call("gmpo", actor("gmpo"), batch, rollout_is_weights=weights)
    assert (grad[:, 4] == 0).all()
    assert (grad[POSITIVE] != 0).any()


# --- options ----------------------------------------------------------------------------------------------------------

# option -> (loss, options beside it, the value); at each the loss differs from that without the option
EFFECTS = {
    "power": ("gmpo", {}, 0.5),
    "power_min": ("pmpo", {}, 0.9),
    "power_max": ("pmpo", {}, 3.0),
    "ess_rule": ("pmpo", {}, "absolute"),
    "full_clip_fraction": ("pmpo", {}, 0.9),
    "ess_sharpness": ("pmpo", {"full_clip_fraction": 0.9}, 3.0),
    "ess_floor": ("pmpo", {"ess_rule": "absolute", "full_clip_fraction": 0.9}, 0.99),
    "clip": ("holder", {}, "token"),
    "clip_low": ("gmpo", {}, 0.1),
    "clip_high": ("gmpo", {}, 0.1),
    "clip_sides": ("gmpo", {"clip_low": 0.1, "clip_high": 0.1}, "two"),
    "dual_clip": ("gmpo", {}, 1.05),
}


def test_every_option_has_a_test() -> None:
    assert {*EFFECTS, "impl"} == set(ours.OPTIONS)
    assert {*ours.OPTIONS, *ours.VERL_DECIDES} - {"impl"} == set(LossConfig.__dataclass_fields__)


@pytest.mark.parametrize("option", list(EFFECTS))
def test_every_option_acts_as_in_the_package(option: str) -> None:
    name, beside, value = EFFECTS[option]
    batch, mode = make_batch(V=11), "seq-mean-token-mean"
    without, _, _ = call(name, actor(name, beside), batch, mode)
    loss, _, _ = call(name, actor(name, {**beside, option: value}), batch, mode)
    preset = {"pmpo": LossConfig.pmpo, "gmpo": LossConfig.gmpo, "holder": lambda **o: LossConfig.holder(2.0, **o)}[name]
    config = preset(**beside, **{option: value})
    out = pmpo_loss_from_logp(batch.logp, batch.old_logp, batch.advantages, mask=batch.mask, config=config)
    assert loss == out.loss
    assert abs(loss - without) > 100 * EPS * abs(without)


def test_the_implementation_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(V=11)
    loss, _, _ = call("pmpo", actor(), batch)
    named, _, _ = call("pmpo", actor("pmpo", {"impl": "reference"}), batch)
    assert named == pytest.approx(float(loss), rel=8 * EPS)
    called = []
    monkeypatch.setattr(
        ours, "pmpo_loss_from_logp", lambda *a, impl, **k: called.append(impl) or pmpo_loss_from_logp(*a, **k)
    )
    for impl in ("reference", None):
        call("pmpo", actor("pmpo", {"impl": impl}), batch)
    assert called == ["reference", None]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pmpo", {"clip_hi": 0.2}, r"policy_loss.options.clip_hi: expected one of \[.*'clip_high'.*\], got 0.2"),
        ("pmpo", {"clip_high": -1.0}, "policy_loss.options.clip_high: expected a finite number > 0, got -1.0"),
        ("pmpo", {"power": "0.5"}, "policy_loss.options.power: expected a finite number or \"ess\", got '0.5'"),
        (
            "gmpo",
            {"loss_agg_mode": "token-mean"},
            "options.loss_agg_mode: expected none: in verl set actor.loss_agg_mode",
        ),
        ("gmpo", {"beta": 0.1}, "options.beta: expected none: in verl set actor.kl_loss_coef, got 0.1"),
        (
            "gmpo",
            {"entropy_coef": 0.1},
            "options.entropy_coef: expected none: in verl set actor.entropy_coeff, got 0.1",
        ),
        ("holder", {}, 'options.power: expected a finite number with loss_mode="holder" .* got None'),
        (
            "vanilla",
            {"power": 1.0},
            r"policy_loss.loss_mode: expected one of \['gmpo', 'holder', 'pmpo'\], got 'vanilla'",
        ),
        ("pmpo", 3, "policy_loss.options: expected a mapping, got 3"),
        ("pmpo", {"clip": "sequence"}, 'options.clip: expected "token" with power "ess", .* got \'sequence\''),
        ("pmpo", {"impl": "cuda"}, r"options.impl: expected None or one of .* got 'cuda'"),
    ],
)
def test_wrong_options_raise_when_verl_reads_its_configuration(name: str, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.PowerMeanLossConfig(loss_mode=name, options=options)


def test_holder_needs_p_without_our_section_too() -> None:
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=2, policy_loss=PolicyLossConfig(loss_mode="holder")
    )
    with pytest.raises(ValueError, match=r"options.power: expected a finite number"):
        call("holder", config, make_batch(V=11))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clip_ratio": 0.3}, r"clip_ratio: expected verl's default 0.2 .set policy_loss.options.clip_low and clip_high., got 0.3"),
        ({"clip_ratio_low": 0.3}, "clip_ratio_low: expected .* got 0.3"),
        ({"clip_ratio_high": 0.28}, "clip_ratio_high: expected .*clip_high.*got 0.28"),
        ({"clip_ratio_c": 10.0}, "clip_ratio_c: expected verl's default 3.0 .set policy_loss.options.dual_clip., got 10.0"),
        ({"clip_ratio_low": 0.4, "section": {"options": {"clip": "none", "power": 0.0}}}, "clip_ratio_low: expected .* got 0.4"),
        ({"tau_pos": 2.0}, "tau_pos: expected verl's default 1.0 .no loss of pmpo_kernels reads it., got 2.0"),
        ({"section": {"ppo_kl_coef": 0.7}}, "ppo_kl_coef: expected verl's default 0.1 .*got 0.7"),
    ],
)  # fmt: skip
def test_a_field_of_verls_that_would_be_ignored_raises(fields: dict[str, Any], message: str) -> None:
    section = ours.PowerMeanLossConfig(loss_mode="pmpo", **fields.get("section", {}))
    fields = {"policy_loss": section, **{name: value for name, value in fields.items() if name != "section"}}
    with pytest.raises(ValueError, match=message):
        call("pmpo", actor(**fields), make_batch(V=11))


def test_a_field_of_verls_may_ask_for_what_the_loss_does() -> None:
    batch = make_batch(V=11)
    plain, _, _ = call("gmpo", actor("gmpo"), batch)
    ratio = {
        "clip_ratio_low": 0.32967995396436073,
        "clip_ratio_high": 0.4918246976412703,
    }  # 1 - exp(-0.4), exp(0.4) - 1
    for same in ({"clip_ratio_low": 0.4, "clip_ratio_high": 0.4, "clip_ratio": 0.4}, ratio, {"clip_ratio_low": None}):
        assert call("gmpo", actor("gmpo", **same), batch)[0] == plain


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"advantages": torch.zeros(8)}, r"advantages: expected shape \(8, 12\), got \(8,\)"),
        ({"response_mask": torch.ones(8, 3)}, "response_mask: expected dtype"),
        ({"old_log_prob": torch.zeros(8, 3)}, r"old_log_prob: expected shape \(8, 12\), got \(8, 3\)"),
        ({"rollout_is_weights": torch.ones(8)}, r"rollout_is_weights: expected shape \(8, 12\), got \(8,\)"),
        ({"rollout_is_weights": -torch.ones(8, 12)}, "rollout_weights: expected"),
    ],
)
def test_wrong_tensors_raise(changed: dict[str, Tensor], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call("pmpo", actor(), make_batch(V=11), **changed)


def test_without_a_configuration_it_raises() -> None:
    batch = make_batch(V=11)
    with pytest.raises(TypeError, match="config: expected verl's ActorConfig, got None"):
        get_policy_loss_fn("pmpo")(batch.old_logp, batch.logp, batch.logp, batch.mask)


def test_metrics_are_floats() -> None:
    batch = make_batch(V=11)
    _, _, found = call("pmpo", actor(), batch)
    assert all(type(value) is float for value in found.values())
    assert set(found) == {
        "actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl", "actor/pmpo/power_mean", "actor/pmpo/power_min",
        "actor/pmpo/power_max", "actor/pmpo/ess", "actor/pmpo/ess_target", "actor/pmpo/ratio_mean", "actor/pmpo/ratio_max",
    }  # fmt: skip
    d = (batch.logp - batch.old_logp).double()[batch.mask]
    assert found["actor/ppo_kl"] == pytest.approx(-float(d.mean()), rel=1e-6)
    A = batch.advantages[:, None].expand_as(batch.mask)
    low, high = (batch.logp - batch.old_logp < -0.4) & (A < 0), (batch.logp - batch.old_logp > 0.4) & (A > 0)
    assert found["actor/pg_clipfrac"] == pytest.approx(float((low | high)[batch.mask].float().mean()))
    assert found["actor/pg_clipfrac_lower"] == pytest.approx(float(low[batch.mask].float().mean()))
    assert 0 < found["actor/pg_clipfrac_lower"] < found["actor/pg_clipfrac"]


class HostReads(TorchDispatchMode):
    """Counts the reads of single values, each of which waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("info", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_read_on_the_host_but_the_metrics_at_once(
    mode: str, info: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where no values are checked. verl's own loss reads its three metrics one by one."""
    monkeypatch.setattr(checks, "checks_values", lambda tensor: False)
    batch, found = make_batch(V=11), {}
    for name in ("pmpo", "vanilla"):
        config = actor(name)
        if info:
            config.global_batch_info.update(counts(batch))
        with HostReads() as reads:
            call(name, config, batch, mode, rollout_is_weights=batch.rollout_weights)
        found[name] = reads.found
    assert found == {"pmpo": 0, "vanilla": 3}


# --- verl's configuration and its actor's loss ------------------------------------------------------------------------


def composed(*overrides: str) -> Any:
    """verl's own configuration with these overrides, as `python -m verl.trainer.main_ppo` composes it."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))


MICRO = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2"


def test_options_from_verls_command_line_reach_the_loss() -> None:
    options = f"+{POLICY}.options.full_clip_fraction=0.9"
    config = omega_conf_to_dataclass(
        composed(MICRO, TARGET, f"{POLICY}.loss_mode=pmpo", options).actor_rollout_ref.actor
    )
    assert config.policy_loss.options == {"full_clip_fraction": 0.9}
    batch = make_batch(V=11)
    expected, _, _ = call("pmpo", actor("pmpo", {"full_clip_fraction": 0.9}), batch)
    assert call("pmpo", config, batch)[0] == expected != call("pmpo", actor(), batch)[0]
    again = pickle.loads(pickle.dumps(config))  # the way to a worker
    assert call("pmpo", again, batch)[0] == expected


def test_the_loss_mode_alone_is_enough_for_a_preset() -> None:
    config = omega_conf_to_dataclass(composed(MICRO, f"{POLICY}.loss_mode=gmpo").actor_rollout_ref.actor)
    assert type(config.policy_loss) is PolicyLossConfig
    batch = make_batch(V=11)
    assert call("gmpo", config, batch)[0] == call("gmpo", actor("gmpo"), batch)[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((TARGET, f"{POLICY}.loss_mode=pmpo", f"+{POLICY}.options.clip_hi=0.2"), "clip_hi: expected one of"),
        ((TARGET, f"+{POLICY}.options.power=1"), "loss_mode: expected one of .*got 'vanilla'"),
        ((f"{POLICY}.loss_mode=pmpo", f"+{POLICY}.options.power=1"), "unexpected keyword argument 'options'"),
    ],
)
def test_a_wrong_command_line_raises_before_training(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(Exception, match=message):  # hydra's own class around it
        omega_conf_to_dataclass(composed(MICRO, *overrides).actor_rollout_ref.actor)


def step(name: str, batch: ParityBatch, parts: int, **fields: Any) -> tuple[float, list[Tensor], dict[str, float]]:
    """One step of verl's actor: `ppo_loss` over micro-batches of nested tensors, as its engine calls it; summed loss, gradients of
    each row's log-probs (prompt and response), metrics aggregated as verl does."""
    lengths = [max(int(n), 3) for n in batch.mask.sum(1)]  # an empty row has tokens, all of them masked
    config = actor(name, loss_agg_mode="seq-mean-token-mean", **fields)
    total, grads, collected = 0.0, [], []
    n = 8 // parts
    for start in range(0, 8, n):
        rows = range(start, start + n)
        whole, values, prompts = [], [], []
        for i in rows:  # the log-prob of a token stands one slot before it
            prompt = 2 + i % 3
            x = torch.cat([torch.zeros(prompt - 1), batch.logp[i, : lengths[i]], torch.zeros(1)])
            values.append(x.requires_grad_())
            whole.append(x.detach() * 0.5)
            prompts.append(torch.zeros(prompt, dtype=torch.long))

        def nested(tensors: list[Tensor]) -> Tensor:
            return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

        def of(tensor: Tensor, rows: range = rows) -> Tensor:
            return nested([tensor[i, : lengths[i]].clone() for i in rows])

        tensors = {
            "prompts": nested(prompts),
            "responses": of(batch.token_ids),
            "response_mask": of(batch.mask.long()),
            "old_log_probs": of(batch.old_logp),
            "ref_log_prob": of(batch.ref_logp),
            "advantages": of(batch.advantages[:, None] * batch.mask),
        }
        info = {"dp_size": 1, "batch_num_tokens": int(batch.mask.sum()), "global_batch_size": 8}
        data = tensordict_utils.get_tensordict(tensors, info)
        output = {"log_probs": nested(values), "entropy": nested(whole)}
        loss, found = ppo_loss(config, output, data)
        grads += torch.autograd.grad(loss, values)
        total += float(loss.detach())
        collected.append(found)
    keys = [key for key in collected[0] if key.startswith("actor/")]
    merged = {key: sum(float(found[key].aggregate()) for found in collected) / parts for key in keys}
    return total, grads, merged


@pytest.mark.parametrize("terms", [{}, {"entropy_coeff": 0.01, "use_kl_loss": True, "kl_loss_coef": 0.1}])
@pytest.mark.parametrize("name", NAMES)
def test_verls_actor_loss_does_not_depend_on_the_split(name: str, terms: dict[str, Any]) -> None:
    """Micro-batches of different widths. verl's own KL and entropy terms are float32 sums over up to 96 tokens."""
    batch = make_batch(V=11)
    total, grads, found = step(name, batch, 1, **terms)
    assert sum(float(grad.abs().sum()) for grad in grads) > 0
    assert "actor/pmpo/power_mean" in found
    for parts in (2, 8):
        other, other_grads, _ = step(name, batch, parts, **terms)
        assert other == pytest.approx(total, rel=96 * EPS, abs=96 * EPS)
        torch.testing.assert_close(torch.cat(other_grads), torch.cat(grads), rtol=8 * EPS, atol=8 * EPS)


def test_verls_actor_loss_of_geo_mean_does() -> None:
    batch, clip = make_batch(V=11), {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}
    total, _, _ = step("gmpo", batch, 1)
    assert step("geo_mean", batch, 1, **clip)[0] == pytest.approx(total, rel=TOLERANCE)
    assert step("geo_mean", batch, 2, **clip)[0] == pytest.approx(2 * total, rel=TOLERANCE)


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_the_lines_of_the_readme_are_a_configuration_of_verls() -> None:
    (command,) = re.findall(
        r"^python3 -m verl.trainer.main_ppo (.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M
    )
    config = omega_conf_to_dataclass(
        composed(MICRO, *shlex.split(command.replace("\\\n", " "))).actor_rollout_ref.actor
    )
    assert type(config.policy_loss) is ours.PowerMeanLossConfig
    assert (config.policy_loss.loss_mode, config.policy_loss.options) == ("pmpo", {"full_clip_fraction": 0.2})


def recipe(*arguments: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """The script with a `python3` that prints its arguments, one a line."""
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    script = str(ROOT / "examples" / "verl" / "run_qwen2_5_math_7b.sh")
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(["bash", script, *arguments], capture_output=True, text=True, env=env)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("pmpo", LossConfig.pmpo()),
        ("gmpo", LossConfig.gmpo()),
        ("holder", LossConfig.holder(1.0)),
        ("grpo", None),
        ("gspo", None),
    ],
)
def test_the_recipe_is_a_configuration_of_verls(method: str, expected: LossConfig | None, tmp_path: Path) -> None:
    module, name, *overrides = recipe(method, "trainer.nnodes=2", tmp_path=tmp_path).stdout.splitlines()
    assert (module, name) == ("-m", "verl.trainer.main_ppo")
    config = composed(*overrides)
    assert config.trainer.nnodes == 2
    validate_config(config, use_reference_policy=False, use_critic=False)
    found = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert (found.ppo_mini_batch_size, found.rollout_n, found.ppo_epochs) == (16, 8, 1)
    assert (found.optim.lr, found.use_kl_loss, found.loss_agg_mode) == (1e-6, False, "seq-mean-token-mean")
    assert config.data.max_prompt_length + config.data.max_response_length <= 4096  # positions of Qwen2.5-Math
    if expected is None:
        clip = {"grpo": (0.2, 0.2), "gspo": (3e-4, 4e-4)}[method]
        assert (found.clip_ratio_low, found.clip_ratio_high) == clip
        assert found.policy_loss.loss_mode == {"grpo": "vanilla", "gspo": "gspo"}[method]
        return
    assert ours._resolve(method, found.policy_loss) == (expected, None)
    batch = make_batch(V=11)
    found.global_batch_info.update(counts(batch))
    loss, _, _ = call(method, found, batch, found.loss_agg_mode)
    out = pmpo_loss_from_logp(
        batch.logp, batch.old_logp, batch.advantages, mask=batch.mask, config=expected, denominator=8
    )
    assert loss == out.loss


def test_the_last_word_counts(tmp_path: Path) -> None:
    """As in the README's staircase of p."""
    done = recipe("holder", f"{POLICY}.options.power=-2", "trainer.total_training_steps=100", tmp_path=tmp_path)
    config = composed(*done.stdout.splitlines()[2:])
    assert config.trainer.total_training_steps == 100
    found = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert ours._resolve("holder", found.policy_loss)[0] == LossConfig.holder(-2)


@pytest.mark.parametrize("arguments", [(), ("ppo",)])
def test_the_recipe_names_its_methods(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = recipe(*arguments, tmp_path=tmp_path)
    assert done.returncode != 0
    assert not done.stdout
    assert "gmpo" in done.stderr


def test_the_data_of_the_recipe(tmp_path: Path) -> None:
    """Answers stay text, and verl's reward function takes a row."""
    import pandas as pd
    from verl.utils.reward_score import default_compute_score

    spec = importlib.util.spec_from_file_location("prepare_math", ROOT / "examples" / "verl" / "prepare_math.py")
    assert spec is not None
    assert spec.loader is not None
    source, target = tmp_path / "math.jsonl", tmp_path / "out" / "train.parquet"
    source.write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": "x?", "answer": "007"}\n')
    command = [sys.executable, str(ROOT / "examples" / "verl" / "prepare_math.py"), str(source), str(target)]
    subprocess.run(command, check=True, capture_output=True)
    assert subprocess.run(command, capture_output=True).returncode != 0  # nothing is overwritten
    rows = pd.read_parquet(target)
    assert [row["ground_truth"] for row in rows["reward_model"]] == ["2", "007"]
    assert rows["prompt"][0][1] == {"content": "1+1?", "role": "user"}
    scores = [default_compute_score(rows["data_source"][0], rf"so \boxed{{{x}}}", "2") for x in (2, 3)]
    assert scores == [1.0, 0.0]
