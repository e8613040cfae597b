"""The comparison with other packages, without them: it rejects wrong results, and `verify --peers` says what it did."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from pmpo_kernels import LossConfig
from pmpo_kernels.cli import app
from pmpo_kernels.cli import verify as command
from pmpo_kernels.verification import peers as parity_peers
from pmpo_kernels.verification.baseline import eager_loss_from_logp, eager_pmpo_loss
from pmpo_kernels.verification.peers import ParityBatch, ParityCase, Peer, compare, find_peers, make_batch

runner = CliRunner(env={"COLUMNS": "200"})


def baseline(batch: ParityBatch, logp: Tensor, config: LossConfig | None = None) -> Tensor:
    config = config or LossConfig.grpo()
    return eager_loss_from_logp(logp, logp.detach() * 0, batch.old_logp, batch.advantages, batch.mask, config)


CASE = ParityCase("grpo", baseline, "grpo")


def changed_gradient(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The baseline with another gradient of the log-probs."""

    def loss(batch: ParityBatch, logp: Tensor) -> Tensor:
        changed = logp.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(baseline(batch, changed), changed)
        return baseline(batch, logp.detach()) + (change(gradient) * (logp - logp.detach())).sum()

    return loss


WRONG = {
    "zero": torch.zeros_like,
    "sign": torch.neg,
    "1 in 50,000 too large": lambda gradient: 1.00002 * gradient,
    "shifted by one token": lambda gradient: gradient.roll(1, 1),
    "one token missing": lambda gradient: gradient.index_fill(0, torch.tensor(2), 0.0),
}


def test_the_baseline_agrees() -> None:
    assert compare(CASE, make_batch()).ok
    assert compare(replace(CASE, theirs=changed_gradient(torch.clone)), make_batch()).ok


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_gradients_are_rejected(name: str) -> None:
    agreement = compare(replace(CASE, theirs=changed_gradient(WRONG[name])), make_batch())
    assert agreement.loss <= 1e-6
    assert not agreement.ok


def test_what_is_not_finite_is_rejected() -> None:
    case = replace(CASE, theirs=lambda batch, logp: baseline(batch, logp) * torch.nan)
    assert compare(case, make_batch()) == (math.inf, math.inf)


@pytest.mark.parametrize(
    "config",
    [LossConfig.grpo(**LossConfig.ratio_clip(0.2, 0.21)), LossConfig.dapo(), LossConfig.grpo(dual_clip=1.3), LossConfig.gmpo()],
    ids=["clip", "aggregation", "dual clip", "mean"],
)  # fmt: skip
def test_another_loss_is_rejected(config: LossConfig) -> None:
    """The batch tells these apart: some token lies between the bounds, rows have different lengths."""
    case = replace(CASE, theirs=lambda batch, logp: baseline(batch, logp, config))
    assert not compare(case, make_batch()).ok


def test_a_missing_softmax_part_is_rejected() -> None:
    """A gradient of the logits that has only its target column, and the right one from logits."""

    def right(batch: ParityBatch, logits: Tensor) -> Tensor:
        given = (batch.token_ids, batch.old_logp, batch.advantages, batch.mask)
        return eager_pmpo_loss(logits[:, :-1], *given, LossConfig.grpo())

    def target_only(batch: ParityBatch, logits: Tensor) -> Tensor:
        log_sum = logits[:, :-1].detach().logsumexp(-1)
        return baseline(batch, logits[:, :-1].gather(-1, batch.token_ids[..., None])[..., 0] - log_sum)

    case = replace(CASE, source="logits", theirs=right)
    assert compare(case, make_batch()).ok
    assert not compare(replace(case, theirs=target_only), make_batch()).ok


def test_the_batch_has_signal() -> None:
    """Padding, an empty row, one of one token, all signs of A, clipped and unclipped tokens, none on a bound."""
    for seed in (0, 1):
        batch = make_batch(seed=seed)
        lengths, d = batch.mask.sum(1), batch.logp - batch.old_logp
        assert {0, 1, 12} < set(lengths.tolist())
        assert set(batch.advantages.sign().tolist()) == {-1.0, 0.0, 1.0}
        for config in (LossConfig.grpo(), LossConfig.gmpo()):
            for sign, bound in ((1, config.clip_high), (-1, -config.clip_low)):
                used = d[batch.mask & (batch.advantages.sign() == sign)[:, None]]
                clipped = sign * used > sign * bound
                assert clipped.any()
                assert not clipped.all()
                assert (used - bound).abs().min() > 1e-5
        mean = (d * batch.mask).sum(1) / lengths.clamp(min=1)
        for sign, bound in ((1, math.log(1.03)), (-1, math.log(0.98))):  # the sequence clip of the cases
            used = mean[(batch.advantages.sign() == sign) & (lengths > 0)]
            assert 0 < int((sign * used > sign * bound).sum()) < len(used)
    with pytest.raises(ValueError, match="V: expected an int > 0, got 0"):
        make_batch(V=0)


def test_a_call_is_written_as_one_reads_it() -> None:
    case = ParityCase("x", baseline, "grpo", {"dual_clip": 1.3, "loss_agg_mode": "token-mean"}, denominator="rows")
    assert case.call == "grpo(dual_clip=1.3, loss_agg_mode='token-mean'), denominator rows"
    assert case.config == LossConfig.grpo(dual_clip=1.3, loss_agg_mode="token-mean")


# --- the command -----------------------------------------------------------------------------------------------------


def show(monkeypatch: pytest.MonkeyPatch, *cases: ParityCase) -> tuple[int, str]:
    found = {
        "trl": Peer("trl", "1.2.3", list(cases), "cpu", ""),
        "verl": Peer("verl", "", [], "", "not installed (pip install verl)"),
    }
    monkeypatch.setattr(command, "find_peers", lambda: found)
    result = runner.invoke(app, ["verify", "--peers"])
    return result.exit_code, result.output


def test_verify_peers_prints_what_agrees_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = show(monkeypatch, CASE)
    assert code == 0, text
    assert "1 of 1 agree with the peers" in text
    assert "1.2.3" in text
    assert "verl: not compared, not installed (pip install verl)" in text


def test_verify_peers_fails_with_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(batch: ParityBatch, logp: Tensor) -> Tensor:
        raise RuntimeError("no such argument")

    code, text = show(
        monkeypatch, CASE, replace(CASE, theirs=changed_gradient(torch.neg)), replace(CASE, theirs=broken)
    )
    assert code == 1
    assert "1 of 3 agree with the peers, FAILED" in text
    assert "RuntimeError: no such argument" in text


def test_verify_peers_without_any_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "trl":
            return "0"  # installed, but its import fails
        raise parity_peers.importlib.metadata.PackageNotFoundError

    really = importlib.import_module

    def fails(name: str, package: str | None = None) -> ModuleType:
        if name.startswith("pmpo_kernels.verification."):
            raise AttributeError(f"no {name}")  # of whatever kind, as from a package that does not fit another
        return really(name, package)

    monkeypatch.setattr(parity_peers.importlib.metadata, "version", version)
    monkeypatch.setattr(parity_peers.importlib, "import_module", fails)
    assert find_peers()["trl"].problem == "trl 0: AttributeError: no pmpo_kernels.verification.trl"
    result = runner.invoke(app, ["verify", "--peers"])
    assert result.exit_code == 2
    assert "no peer can be called here" in result.output


@pytest.mark.parametrize("option", ["--impl", "--dtype"])
def test_verify_peers_names_an_option_that_does_not_combine(option: str) -> None:
    value = {"--impl": "reference", "--dtype": "float32"}[option]
    result = runner.invoke(app, ["verify", "--peers", option, value])
    assert result.exit_code == 2
    assert "cannot be combined with --peers" in result.output
