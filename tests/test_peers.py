"""Beside TRL, verl and Liger as installed: every case of parity, and a test for each difference that docs/parity.md tells.

Without the packages these tests are skipped with the reason; with --require-peers (`make peers`) they then fail.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from pmpo_kernels import LossConfig, pmpo_loss_from_logp
from pmpo_kernels.verification.peers import (
    PEERS,
    TOLERANCE,
    ParityBatch,
    ParityCase,
    Result,
    compare,
    difference,
    evaluate,
    find_peers,
    make_batch,
    rows,
)

FOUND = find_peers()
CASES = [pytest.param(name, case, id=f"{name}: {case.name}") for name in FOUND for case in FOUND[name].cases]
DEVICE = FOUND["liger"].device
POSITIVE, NEGATIVE, ZERO, EMPTY, PADDED = 0, 3, 5, 1, 4  # rows of the batch by their advantage; 3 and 4 are padded
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(request: pytest.FixtureRequest) -> Load:
    """A peer's module of `pmpo_kernels.verification`."""

    def module(name: str) -> ModuleType:
        if FOUND[name].problem:
            missing = pytest.fail if request.config.getoption("--require-peers") else pytest.skip
            missing(f"{FOUND[name].problem}; `make peers` runs these tests")
        return importlib.import_module(f"pmpo_kernels.verification.{name}")

    return module


@pytest.mark.parametrize("name", list(PEERS))
def test_every_peer_is_there(load: Load, name: str) -> None:
    load(name)
    assert len(FOUND[name].cases) >= 16


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_parity(name: str, case: ParityCase, seed: int) -> None:
    agreement = compare(case, make_batch(V=101, seed=seed, device=FOUND[name].device))
    assert agreement.ok, agreement


@pytest.mark.parametrize(("name", "case"), CASES)
def test_every_option_of_a_case_acts(name: str, case: ParityCase) -> None:
    """Without one of its options, or one of its further arguments, our side disagrees: the case compares what it says."""
    batch = make_batch(V=101, device=FOUND[name].device)
    without = [replace(case, given={k: v for k, v in case.given.items() if k != key}) for key in case.given]
    for key, value in case.options.items():
        gone = {key, "max_length"} if key == "loss_agg_mode" else {key}
        options = {k: v for k, v in case.options.items() if k not in gone}
        changed = replace(case, options={**options, key: 2 * value} if key == "max_length" else options)
        without += [changed] if changed.config != case.config else []  # k3 is the default
    for other in without:
        assert not compare(other, batch).ok, (other.options, list(other.given))


@pytest.mark.parametrize(("name", "case"), CASES)
def test_documentation_lists_every_case(name: str, case: ParityCase) -> None:
    page = (Path(__file__).parents[1] / "docs" / "parity.md").read_text()
    assert f"| {FOUND[name].distribution} | {case.name} | `{case.call}` |" in page


def with_ratio(batch: ParityBatch, row: int, t: int, d: float) -> ParityBatch:
    """The batch with one log-ratio set."""
    old_logp = batch.old_logp.clone()
    old_logp[row, t] = batch.logp[row, t] - d
    return batch._replace(old_logp=old_logp)


def ours(config: LossConfig, batch: ParityBatch, denominator: float | None = None) -> Result:
    def loss(batch: ParityBatch, logp: Tensor) -> Tensor:
        given = (logp, batch.old_logp, batch.advantages)
        ref_logp = batch.ref_logp if config.beta else None
        return pmpo_loss_from_logp(
            *given, mask=batch.mask, ref_logp=ref_logp, config=config, denominator=denominator
        ).loss

    return evaluate(loss, "logp", batch)


def finite(result: Result) -> tuple[bool, bool]:
    """Whether the loss, and whether every entry of the gradients is finite."""
    return bool(result.loss.isfinite()), all(bool(g.isfinite().all()) for g in result.gradients)


def token_level(load: Load, peer: str, batch: ParityBatch, sequence: bool = False) -> Result:
    """The GRPO loss of a peer, on the peer's device."""
    level = "sequence" if sequence else "token"
    if peer == "trl":
        module = load("trl")
        made = module.trainer(loss_type="grpo", importance_sampling_level=level)
        return evaluate(lambda b, logp: module.loss(made, b, logp), "logp", batch)
    if peer == "verl":
        module = load("verl")
        name = "gspo" if sequence else "vanilla"
        return evaluate(
            lambda b, logp: module.loss(name, module.actor(0.2, 0.2, 3.0), b, logp, "seq-mean-token-mean"),
            "logp",
            batch,
        )
    module = load("liger")
    loss, source = {
        "liger": (module.triton_loss, "logits"),
        "liger chunked": (module.chunked_loss, "hidden"),
    }[peer]
    batch = ParityBatch(*(tensor.to(DEVICE) for tensor in batch))
    return evaluate(lambda b, *leaves: loss(b, *leaves, loss_type="grpo", level=level), source, batch)


# --- overflow --------------------------------------------------------------------------------------------------------

NAN_GRADIENT = ["trl", "liger", "liger chunked"]


@pytest.mark.parametrize("peer", NAN_GRADIENT)
def test_an_overflowing_ratio_gives_a_finite_loss_with_a_nan_gradient(load: Load, peer: str) -> None:
    """d > 88 at A > 0 is clipped: its gradient is zero. exp(d) before the clip makes it 0 times infinity."""
    batch = with_ratio(make_batch(V=33), POSITIVE, 0, 100.0)
    assert finite(token_level(load, peer, batch)) == (True, False)
    assert finite(token_level(load, "verl", batch)) == (True, True)
    result = ours(LossConfig.grpo(), batch)
    assert finite(result) == (True, True)
    assert result.gradients[0][POSITIVE, 0] == 0


@pytest.mark.parametrize("peer", ["trl", "liger chunked"])
def test_what_stands_in_the_padding_reaches_the_gradient(load: Load, peer: str) -> None:
    """A masked slot with d > 88: a NaN gradient at A > 0, at A < 0 a NaN loss too. Liger's Triton kernel skips it."""
    clean = make_batch(V=33)
    want = ours(LossConfig.grpo(), clean)
    for row, loss_is_finite in ((PADDED, True), (NEGATIVE, False)):
        batch = with_ratio(clean, row, 11, 100.0)
        assert not batch.mask[row, 11]
        assert finite(token_level(load, peer, batch)) == (loss_is_finite, False)
        result = ours(LossConfig.grpo(), batch)
        assert torch.equal(result.loss, want.loss)
        assert torch.equal(result.gradients[0], want.gradients[0])
        for peer_that_skips in ("liger", "verl"):
            assert finite(token_level(load, peer_that_skips, batch)) == (True, True)


def test_nan_in_the_padding_of_verl(load: Load) -> None:
    """vanilla selects before it sums; geo_mean and gspo multiply by the mask."""
    module, batch = load("verl"), with_ratio(make_batch(), NEGATIVE, 11, math.inf)
    for name, is_finite in (("vanilla", (True, True)), ("geo_mean", (False, False)), ("gspo", (False, True))):
        result = evaluate(lambda b, logp, name=name: module.loss(name, module.actor(0.4, 0.4), b, logp), "logp", batch)
        assert finite(result) == is_finite, name


def test_verl_stops_the_gradient_beyond_20(load: Load) -> None:
    """verl clamps d to +-20 first: no overflow, but at A < 0 and without the dual clip nothing pushes such a token back."""
    module, batch = load("verl"), with_ratio(make_batch(), NEGATIVE, 0, 21.0)
    theirs = evaluate(lambda b, logp: module.loss("vanilla", module.actor(0.2, 0.2), b, logp), "logp", batch)
    assert theirs.gradients[0][NEGATIVE, 0] == 0
    got = ours(LossConfig.grpo(loss_agg_mode="token-mean"), batch).gradients[0][NEGATIVE, 0]
    tokens, d = int(batch.mask.sum()), float(batch.logp[NEGATIVE, 0] - batch.old_logp[NEGATIVE, 0])
    assert float(got) == pytest.approx(1.4 * math.exp(d) / tokens, rel=TOLERANCE)


# --- zero advantage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("peer", "sequence", "d"), [
    *((peer, False, 100.0) for peer in NAN_GRADIENT),
    *((peer, True, 3000.0) for peer in NAN_GRADIENT),
])  # fmt: skip
def test_zero_advantage_times_an_overflow_is_nan(load: Load, peer: str, sequence: bool, d: float) -> None:
    """A trajectory with A = 0 has nothing to say, whatever its ratios are: ours is exactly 0 there and as before elsewhere.

    The gradient is NaN in all three. The loss of Liger's Triton kernel is the minimum of a NaN and 0, which Triton defines as 0;
    the interpreter of Triton 3.7 gives NaN.
    """
    clean = make_batch(V=33)
    batch = with_ratio(clean, ZERO, 0, d)
    loss_is_finite, gradient_is_finite = finite(token_level(load, peer, batch, sequence))
    assert not gradient_is_finite
    assert not loss_is_finite or peer == "liger"
    assert finite(token_level(load, "verl", batch, sequence)) == (True, True)
    config = LossConfig.holder(0.0) if sequence else LossConfig.grpo()
    want, got = ours(config, clean), ours(config, batch)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.gradients[0], want.gradients[0])
    assert not got.gradients[0][ZERO].any()


def test_gmpo_at_zero_advantage(load: Load) -> None:
    """TRL takes the negative branch, without a bound from above; verl sets d' = 0, finite like ours."""
    trl, verl = load("trl"), load("verl")
    made, actor, batch = trl.trainer(gmpo=True), verl.actor(0.4, 0.4), with_ratio(make_batch(), ZERO, 0, 3000.0)
    assert finite(evaluate(lambda b, logp: trl.loss(made, b, logp), "logp", batch)) == (False, False)
    assert finite(evaluate(lambda b, logp: verl.loss("geo_mean", actor, b, logp), "logp", batch)) == (True, True)
    assert finite(ours(LossConfig.gmpo(), batch)) == (True, True)


# --- normalisation ---------------------------------------------------------------------------------------------------

HALVES = (slice(0, 4), slice(4, 8))


def accumulated(loss: Callable[[ParityBatch], Result], batch: ParityBatch) -> Result:
    """Two micro-batches: losses added, gradients side by side."""
    parts = [loss(rows(batch, half)) for half in HALVES]
    return Result(sum(part.loss for part in parts), (torch.cat([part.gradients[0] for part in parts]),))


def test_micro_batches_of_geo_mean_add_up_to_twice_the_batch(load: Load) -> None:
    """verl's geo_mean ignores `global_batch_info`; vanilla, and ours with a denominator, add up to the whole batch."""
    module, batch = load("verl"), make_batch()
    count = int(batch.mask.any(1).sum())

    def theirs(name: str) -> Callable[[ParityBatch], Result]:
        actor = module.actor(0.4, 0.4)

        def loss(b: ParityBatch, logp: Tensor) -> Tensor:
            actor.global_batch_info.update(dp_size=1, batch_num_tokens=int(batch.mask.sum()), global_batch_size=count)
            return module.get_policy_loss_fn(name)(
                old_log_prob=b.old_logp, log_prob=logp, advantages=b.advantages[:, None].expand_as(logp),
                response_mask=b.mask, loss_agg_mode="seq-mean-token-mean", config=actor,
            )[0]  # fmt: skip

        return lambda part: evaluate(loss, "logp", part)

    def doubled(result: Result) -> Result:
        return Result(2 * result.loss, tuple(2 * gradient for gradient in result.gradients))

    assert difference(accumulated(theirs("geo_mean"), batch), doubled(theirs("geo_mean")(batch))).ok
    assert difference(accumulated(theirs("vanilla"), batch), theirs("vanilla")(batch)).ok
    with_count = accumulated(lambda part: ours(LossConfig.gmpo(), part, count), batch)
    assert difference(with_count, ours(LossConfig.gmpo(), batch)).ok


def test_bnpo_depends_on_the_split(load: Load) -> None:
    """TRL divides by the micro-batch's own tokens, then by the number of micro-batches; ours by the count it is given."""
    module, batch = load("trl"), make_batch()
    whole, half = module.trainer(loss_type="bnpo"), module.trainer(loss_type="bnpo", accumulation=2)
    want = evaluate(lambda b, logp: module.loss(whole, b, logp), "logp", batch)
    split = accumulated(lambda part: evaluate(lambda b, logp: module.loss(half, b, logp), "logp", part), batch)
    assert difference(split, want).gradient > 0.1
    config, tokens = LossConfig.grpo(loss_agg_mode="token-mean"), float(batch.mask.sum())
    assert difference(accumulated(lambda part: ours(config, part, tokens), batch), want).ok


def test_two_ranks_of_verl(load: Load) -> None:
    """Ranks average their gradients: verl multiplies by dp_size, we divide the denominator by it."""
    module, batch = load("verl"), make_batch()
    tokens, actor = int(batch.mask.sum()), module.actor(0.2, 0.28)

    def rank(b: ParityBatch, logp: Tensor) -> Tensor:
        actor.global_batch_info.update(dp_size=2, batch_num_tokens=tokens)
        return module.get_policy_loss_fn("vanilla")(
            old_log_prob=b.old_logp, log_prob=logp, advantages=b.advantages[:, None].expand_as(logp),
            response_mask=b.mask, loss_agg_mode="token-mean", config=actor,
        )[0]  # fmt: skip

    for half in HALVES:
        part = rows(batch, half)
        assert difference(ours(LossConfig.dapo(), part, tokens / 2), evaluate(rank, "logp", part)).ok


def test_empty_rows_count_in_trl_and_liger(load: Load) -> None:
    """7 of 8 rows have tokens: their mean over rows is 7/8 of verl's and of our default."""
    batch = make_batch(V=33)
    want = ours(LossConfig.grpo(), batch)
    assert not batch.mask[EMPTY].any()
    for peer, share in (("trl", 7 / 8), ("liger", 7 / 8), ("liger chunked", 7 / 8), ("verl", 1.0)):
        loss = float(token_level(load, peer, batch).loss)
        if peer == "verl":  # its dual clip at 3 is not reached
            assert loss == pytest.approx(float(want.loss), rel=TOLERANCE)
        assert loss == pytest.approx(share * float(want.loss), rel=TOLERANCE), peer


def test_an_empty_row_has_a_loss_in_trl_gmpo(load: Load) -> None:
    """The ratio of no tokens is 1 there, so the loss has -A of the row; verl's and ours have 0. The gradients agree."""
    trl, verl, batch = load("trl"), load("verl"), make_batch()
    made, actor = trl.trainer(gmpo=True), verl.actor(0.4, 0.4)
    want = ours(LossConfig.gmpo(), batch, len(batch.mask))
    theirs = evaluate(lambda b, logp: trl.loss(made, b, logp), "logp", batch)
    extra = float(batch.advantages[EMPTY]) / len(batch.mask)
    assert float(want.loss) - float(theirs.loss) == pytest.approx(extra, rel=TOLERANCE)
    assert difference(theirs, want).gradient <= TOLERANCE
    assert difference(evaluate(lambda b, logp: verl.loss("geo_mean", actor, b, logp), "logp", batch), want).ok


# --- KL and the dual clip --------------------------------------------------------------------------------------------


def test_trl_multiplies_its_kl_by_the_ratio_by_default(load: Load) -> None:
    """`use_bias_correction_kl` is True unless set; it changes the gradient even where every ratio is 1."""
    module, batch = load("trl"), make_batch()
    batch = batch._replace(old_logp=batch.logp)
    want = ours(LossConfig.grpo(beta=0.1), batch, len(batch.mask))
    found = {}
    for name, options in {"default": {}, "plain": {"use_bias_correction_kl": False}}.items():
        made = module.trainer(loss_type="grpo", beta=0.1, **options)
        found[name] = difference(evaluate(lambda b, logp, made=made: module.loss(made, b, logp), "logp", batch), want)
    assert found["plain"].ok
    assert found["default"].loss <= TOLERANCE
    assert found["default"].gradient > 1e-3


def test_the_masks_of_trl_leave_some_out(load: Load) -> None:
    """The cases with masks compare something: rows and tokens on either side of TRL's thresholds."""
    module, batch = load("trl"), make_batch()
    rows_kept = module.off_policy(batch) != 0
    assert 0 < (~rows_kept & batch.mask.any(1)).sum() < batch.mask.any(1).sum()
    kept = module.high_entropy(batch) & batch.mask
    assert 0.3 < kept.sum() / batch.mask.sum() < 0.9


def test_verl_clamps_its_k3(load: Load) -> None:
    """k3 > 10, from r > 2.6, is constant: where the policy is far from the reference, nothing pulls it back."""
    module, batch = load("verl"), make_batch()
    ref_logp = batch.ref_logp.clone()
    ref_logp[ZERO, 0] = batch.logp[ZERO, 0] + 3.0  # A = 0: the gradient is the KL term's alone
    batch = batch._replace(ref_logp=ref_logp)

    def theirs(b: ParityBatch, logp: Tensor) -> Tensor:
        return module.loss("vanilla", module.actor(0.2, 0.28), b, logp, beta=0.1)

    assert evaluate(theirs, "logp", batch).gradients[0][ZERO, 0] == 0
    got = ours(LossConfig.dapo(beta=0.1), batch).gradients[0][ZERO, 0]
    r = float(batch.ref_logp[ZERO, 0] - batch.logp[ZERO, 0])
    assert float(got) == pytest.approx(0.1 * (1 - math.exp(r)) / int(batch.mask.sum()), rel=TOLERANCE)


def test_a_delta_below_the_clip(load: Load) -> None:
    """At A < 0 TRL and Liger take the larger of min(ratio, delta) and the clipped ratio: below 1 + eps, delta bounds nothing.

    Liger's Triton kernel has this loss too, but a gradient of 0, that of a bounded one.
    """
    trl, liger, batch = load("trl"), load("liger"), with_ratio(make_batch(V=33), NEGATIVE, 0, math.log(1.15))
    made, moved = trl.trainer(loss_type="grpo", delta=1.1), ParityBatch(*(tensor.to(DEVICE) for tensor in batch))
    options = {"loss_type": "grpo", "delta": 1.1}
    bounded = ours(LossConfig.grpo(dual_clip=1.1), batch, len(batch.mask))
    from_trl = evaluate(lambda b, logp: trl.loss(made, b, logp), "logp", batch)
    chunked = evaluate(lambda b, *leaves: liger.chunked_loss(b, *leaves, **options), "hidden", moved)
    triton = evaluate(lambda b, logits: liger.triton_loss(b, logits, **options), "logits", moved)
    for result in (from_trl, chunked, triton):
        assert float(result.loss) == pytest.approx(float(from_trl.loss), rel=TOLERANCE)
        assert float(result.loss) - float(bounded.loss) > 1e-3
        assert bool(result.gradients[0][NEGATIVE, 0].any()) == (result is not triton)
    assert bounded.gradients[0][NEGATIVE, 0] == 0
