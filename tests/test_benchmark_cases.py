"""What the harness measures: inputs with the fractions that the case promises, suites, and the model of the traffic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import traffic
from suites import MODELS, Suite, choose, suite
from torch import Tensor

from pmpo_kernels.benchmarking.cases import Case, Dtype, Preset
from pmpo_kernels.benchmarking.inputs import Inputs, build_inputs, flat_trajectory
from pmpo_kernels.contract import STATS


def logp_of(i: Inputs) -> Tensor:
    return i.logits.double().log_softmax(-1).gather(-1, i.token_ids[..., None])[..., 0]


@pytest.mark.parametrize("preset", list(Preset))
@pytest.mark.parametrize("fractions", [(0.25, 0.3, 0.25), (0.0, 0.5, 0.0), (0.0, 0.0, 0.5), (0.5, 1.0, 1.0)])
def test_inputs_have_the_fractions_of_the_case(preset: Preset, fractions: tuple[float, float, float]) -> None:
    padded, clipped, zero_advantage = fractions
    case = Case(
        vocab=40, batch=16, tokens=64, preset=preset, padded=padded, clipped=clipped, zero_advantage=zero_advantage
    )
    i, config = build_inputs(case), case.config
    assert (~i.mask).double().mean() == pytest.approx(padded, abs=0.5 / case.tokens)  # each length is rounded
    assert (i.advantages == 0).double().mean() == zero_advantage
    acting = i.advantages != 0
    assert zero_advantage == 1 or {-1.0, 1.0} <= set(i.advantages.sign().tolist())
    stats = dict(zip(STATS, flat_trajectory(logp_of(i), i.old_logp, i.advantages, i.mask, config)[2], strict=True))
    found = stats["clipped_low"] + stats["clipped_high"]
    if config.clip == "token":
        assert found.sum() == pytest.approx(clipped * int(stats["tokens"][acting].sum()), abs=0.5)
    else:
        assert (found > 0).sum() == pytest.approx(clipped * int(acting.sum()), abs=0.5)


@pytest.mark.parametrize("preset", [Preset.grpo, Preset.pmpo, Preset.gspo])
def test_no_log_ratio_is_near_a_bound(preset: Preset) -> None:
    case = Case(vocab=40, batch=16, tokens=64, preset=preset, clipped=0.5)
    i, config = build_inputs(case), case.config
    d = logp_of(i) - i.old_logp.double()
    bounds, nearest = torch.tensor([-config.clip_low, config.clip_high], dtype=torch.float64), 1e-3
    if config.clip == "sequence":
        d, nearest = (d * i.mask).sum(-1) / i.mask.sum(-1), config.clip_low / 3
    assert (d[..., None] - bounds).abs().min() > nearest
    assert d.abs().max() < 1


def test_the_usual_case_solves_p_between_its_limits() -> None:
    i = build_inputs(Case(vocab=40, batch=8, tokens=512))
    assert i.power is not None
    power = i.power[i.advantages != 0]
    assert 0.2 < float(power.min()) <= float(power.max()) < 1


def test_inputs_do_not_depend_on_how_often_they_are_built_and_look_like_a_model() -> None:
    case = Case(vocab=2000, batch=8, tokens=64)
    i = build_inputs(case)
    assert all(torch.equal(a, b) for a, b in zip(i, build_inputs(case), strict=True) if a is not None)
    assert not torch.equal(i.logits, build_inputs(replace(case, seed=1)).logits)
    log_q = i.logits.double().log_softmax(-1)
    assert 0.5 < -(log_q.exp() * log_q).sum(-1).mean() < 4  # nats; a uniform row has 7.6
    assert -4 < logp_of(i).mean() < -0.5


def test_the_case_names_a_bad_fraction() -> None:
    with pytest.raises(ValueError, match=r"padded: expected a fraction from 0 to 0.5, got 0.6"):
        Case(vocab=10, batch=2, tokens=4, padded=0.6)


def test_suites_have_every_model_and_fit_their_devices() -> None:
    for name in Suite:
        cases = suite(name, "cuda")
        assert len({case.name for case in cases}) == len(cases)
        assert all(3e8 < case.logits_bytes < 11e9 for case in cases)
    assert {case.model for case in cases} == set(MODELS)
    assert {case.tokens for case in cases} >= {512, 1024, 4096, 32768}
    chosen = choose(Suite.quick, "cuda", [], [Dtype.float32], [], [16, 16, 32], None, {"padded": 0.0})
    assert [case.name for case in chosen] == [f"qwen2.5-8x{T}-float32-grpo-p0-c0.05-z0.125" for T in (16, 32)]


def test_the_two_small_suites_are_the_beginning_of_the_usual_one() -> None:
    main, more = suite(Suite.main, "cuda"), suite(Suite.more, "cuda")
    assert suite(Suite.quick, "cuda")[: len(main + more)] == main + more
    assert [
        (case.preset.value, case.batch, case.tokens, case.clipped, case.zero_advantage) for case in main + more
    ] == [
        ("grpo", 2, 4096, 0.0, 0.0),
        ("gspo", 8, 1024, 0.0, 0.0),
        ("grpo", 2, 4096, 0.5, 0.0),
        ("grpo", 2, 4096, 0.0, 0.5),
        ("pmpo", 2, 4096, 0.05, 0.0),
        ("pmpo", 1, 32768, 0.05, 0.0),
    ]
    assert {(case.vocab, case.dtype, case.padded) for case in main + more} == {(151936, Dtype.bfloat16, 0.0)}


def test_a_rehearsal_has_the_cases_of_the_suite_on_a_few_tokens() -> None:
    whole, tiny = (choose(Suite.quick, "cuda", [], [], [], [], None, {}, tiny) for tiny in (False, True))
    assert [replace(case, vocab=0, tokens=0, model=None) for case in tiny] == [
        replace(case, vocab=0, tokens=0, model=None) for case in whole
    ]
    assert all(case.logits_bytes <= 2 * 32 * 320 for case in tiny)
    assert len({case.name for case in tiny}) == len(tiny)


@pytest.mark.parametrize("tokens", [4096, 32768])
def test_p_is_solved_between_its_limits_where_the_trajectory_stage_is_measured(tokens: int) -> None:
    (case,) = (case for case in suite(Suite.more, "cpu", 1) if case.preset is Preset.pmpo and case.tokens == tokens)
    i = build_inputs(replace(case, vocab=40))
    assert i.power is not None
    assert i.power.shape == (case.batch,)
    assert 0.2 < float(i.power.min()) <= float(i.power.max()) < 1


def test_bytes_and_shares_by_hand() -> None:
    case = Case(vocab=100, batch=2, tokens=5, dtype=Dtype.bfloat16)
    moved = traffic.model_bytes(case, unmasked_rows=8, gradient_rows=6)
    assert moved == (8 * 200, 6 * 200 + 10 * 200)
    assert moved.both == 24 * 200
    bandwidth = traffic.copy_bandwidth(case, milliseconds=4.0)
    assert bandwidth == 2 * 10 * 200 / 4e-3
    assert traffic.share(moved.forward, 2.0, bandwidth) == pytest.approx(1600 / 2e-3 / 1e6)
    assert traffic.share(2 * case.logits_bytes, 4.0, bandwidth) == pytest.approx(1.0)
