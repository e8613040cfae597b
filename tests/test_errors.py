"""Every wrong call raises before a kernel starts and names the argument, what was expected and what was got."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pmpo_kernels
from pmpo_kernels import LossConfig, available_impls, linear_pmpo_loss, pmpo_loss, pmpo_loss_from_logp, token_logp
from pmpo_kernels.impls import resolve_impl

B, T, V = 2, 3, 5
GOOD = {
    "logits": torch.zeros(B, T, V),
    "token_ids": torch.zeros(B, T, dtype=torch.long),
    "old_logp": torch.zeros(B, T),
    "advantages": torch.ones(B),
}
PACKED = {
    "logits": torch.zeros(4, V),
    "token_ids": torch.zeros(4, dtype=torch.long),
    "old_logp": torch.zeros(4),
    "cu_seqlens": torch.tensor([0, 3, 4]),
}
BAD_LOSS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logits": [1.0]}, TypeError, "logits: expected a tensor, got list"),
    ({"logits": torch.zeros(V)}, ValueError, r"logits: expected shape \(B, T, V\), .* got \(5,\)"),
    ({"logits": torch.zeros(B, T, V, dtype=torch.long)}, TypeError, "logits: expected dtype float16, .* got int64"),
    ({"logits": torch.zeros(B, T, 0)}, ValueError, "logits: expected a vocabulary of at least 1"),
    ({"logits": torch.zeros(B, V, T).transpose(1, 2)}, ValueError, "logits: expected stride 1 in the vocabulary dimension"),
    ({"logits": torch.zeros(B, T, 1).expand(B, T, V)}, ValueError, "logits: expected stride 1 in the vocabulary dimension"),
    ({"logits": torch.zeros(B, T + 2, V)}, ValueError, r"token_ids: expected shape \(2, 5\), got \(2, 3\)"),
    ({"token_ids": None}, TypeError, "token_ids: expected a tensor, got NoneType"),
    ({"token_ids": torch.zeros(B, T)}, TypeError, "token_ids: expected dtype int32, int64, got float32"),
    ({"token_ids": torch.full((B, T), V)}, ValueError, r"token_ids: expected ids in \[0, 5\) where mask is true, got 5 at \[0, 0\]"),
    ({"token_ids": torch.full((B, T), -100)}, ValueError, r"token_ids: expected ids in \[0, 5\) where mask is true, got -100"),
    ({"old_logp": torch.zeros(B, T + 1)}, ValueError, r"old_logp: expected shape \(2, 3\), got \(2, 4\)"),
    ({"old_logp": torch.zeros(B, T, dtype=torch.long)}, TypeError, "old_logp: expected dtype .* got int64"),
    ({"old_logp": torch.zeros(B, T, requires_grad=True)}, ValueError, "old_logp: expected a tensor without requires_grad"),
    ({"old_logp": torch.zeros(B, T, device="meta")}, ValueError, "old_logp: expected a tensor on cpu, got one on meta"),
    ({"advantages": torch.ones(B, T)}, ValueError, r"advantages: expected shape \(2,\), one number a trajectory, got \(2, 3\)"),
    ({"advantages": torch.ones(B + 1)}, ValueError, r"advantages: expected shape \(2,\), got \(3,\)"),
    ({"advantages": None}, TypeError, "advantages: expected a tensor, got None"),
    ({"mask": torch.ones(B, T)}, TypeError, "mask: expected dtype bool, .* got float32"),
    ({"mask": torch.ones(B, dtype=torch.bool)}, ValueError, r"mask: expected shape \(2, 3\), got \(2,\)"),
    ({"rollout_weights": torch.ones(T)}, ValueError, r"rollout_weights: expected shape \(2, 3\), or \(2,\) for all tokens of a trajectory, got \(3,\)"),
    ({"rollout_weights": torch.ones(B, dtype=torch.long)}, TypeError, "rollout_weights: expected dtype .* got int64"),
    ({"rollout_weights": torch.tensor([1.0, -0.5])}, ValueError, "rollout_weights: expected finite weights >= 0 where mask is true, got -0.5"),
    ({"policy_mask": torch.ones(T, dtype=torch.bool)}, ValueError, r"policy_mask: expected shape \(2, 3\), or \(2,\) for all tokens of a trajectory, got \(3,\)"),
    ({"policy_mask": torch.ones(B, T)}, TypeError, "policy_mask: expected dtype bool, .* got float32"),
    ({"policy_mask": torch.ones(B)}, TypeError, "policy_mask: expected dtype bool, .* got float32"),
    ({"ref_logp": torch.zeros(T)}, ValueError, r"ref_logp: expected shape \(2, 3\), got \(3,\)"),
    ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, r"cu_seqlens: expected None because token_ids is padded, of shape \(2, 3\)"),
    ({"power": torch.ones(B + 1)}, ValueError, r"power: expected shape \(2,\), got \(3,\)"),
    ({"power": float("nan")}, ValueError, "power: expected a finite number or a tensor"),
    ({"power": torch.ones(B), "target_ess": torch.ones(B)}, ValueError, "target_ess: expected None when power is given"),
    ({"target_ess": torch.ones(B), "config": LossConfig.grpo()}, ValueError, 'target_ess: expected None unless config.power is "ess"'),
    ({"config": LossConfig.pmpo(clip="sequence")}, ValueError, 'config.power: "ess" needs clip="token" or an explicit target_ess'),
    ({"config": LossConfig.pmpo(clip="none")}, ValueError, 'config.power: "ess" needs clip="token"'),
    ({"config": LossConfig.grpo(beta=0.1)}, ValueError, "ref_logp: expected a tensor because config.beta is 0.1, got None"),
    ({"config": "grpo"}, TypeError, "config: expected a LossConfig or None, got str"),
    ({"denominator": 0}, ValueError, "denominator: expected a finite number > 0, got 0"),
    ({"denominator": torch.ones(2)}, ValueError, r"denominator: expected shape \(\), got \(2,\)"),
    ({"denominator": torch.tensor(0.0)}, ValueError, "denominator: expected a finite number > 0, got 0.0"),
    ({"power": torch.tensor([1.0, float("nan")])}, ValueError, "power: expected finite numbers, got nan"),
    ({"target_ess": torch.tensor([1.0, -1.0])}, ValueError, "target_ess: expected numbers >= 0, got -1.0"),
    ({"rollout_weights": torch.full((B, T), -0.5)}, ValueError, "rollout_weights: expected finite weights >= 0 where mask is true, got -0.5"),
    ({"impl": "cuda"}, ValueError, r"impl: expected None or one of \['triton', 'cpp', 'reference'\], got 'cuda'"),
    ({"logits": torch.zeros(1, T, V).expand(B, T, V), "inplace": True}, ValueError, "logits: expected rows that do not overlap with inplace=True"),
    (PACKED | {"cu_seqlens": None}, ValueError, r"cu_seqlens: expected offsets \(B \+ 1,\) because token_ids has shape \(4,\), got None"),
    (PACKED | {"cu_seqlens": torch.tensor([0, 3, 2, 4]), "advantages": torch.ones(3)}, ValueError, r"cu_seqlens: expected non-decreasing offsets from 0 to the 4 tokens, got \[0, 3, 2, 4\]"),
    (PACKED | {"cu_seqlens": torch.tensor([1, 3, 4])}, ValueError, "cu_seqlens: expected non-decreasing offsets from 0"),
    (PACKED | {"cu_seqlens": torch.tensor([0, 3, 5])}, ValueError, "cu_seqlens: expected non-decreasing offsets from 0 to the 4 tokens"),
    (PACKED | {"cu_seqlens": torch.tensor([0.0, 3.0, 4.0])}, TypeError, "cu_seqlens: expected dtype int32, int64, got float32"),
    (PACKED | {"cu_seqlens": torch.zeros(2, 2, dtype=torch.long)}, ValueError, r"cu_seqlens: expected a tensor of shape \(B \+ 1,\), got \(2, 2\)"),
]  # fmt: skip


class Finished(TorchDispatchMode):
    """Names of the package's operators that gave a result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "pmpo_kernels":
            self.names.append(str(func))
        return result


@pytest.mark.parametrize("impl", ["reference", "cpp"])
@pytest.mark.parametrize(("change", "error", "message"), BAD_LOSS)
def test_bad_loss_call(change: dict[str, Any], error: type[Exception], message: str, impl: str) -> None:
    with Finished() as finished, pytest.raises(error, match=message):
        pmpo_loss(**(GOOD | {"impl": impl} | change))
    assert not finished.names, "a kernel ran before the error"


@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_good_loss_call(impl: str) -> None:
    """What the test above says of a call that is right."""
    with Finished() as finished:
        pmpo_loss(**GOOD, impl=impl)
    assert finished.names == [f"pmpo_kernels.token_logp.{impl}", f"pmpo_kernels.trajectory.{impl}"]


HEAD = {"hidden": torch.zeros(B, T, 4), "weight": torch.zeros(V, 4)}
BAD_HEAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden": [1.0]}, TypeError, "hidden: expected a tensor, got list"),
    ({"hidden": torch.zeros(4)}, ValueError, r"hidden: expected shape \(B, T, H\), .* got \(4,\)"),
    ({"hidden": torch.zeros(B, T, 4, dtype=torch.long)}, TypeError, "hidden: expected dtype float16, .* got int64"),
    ({"hidden": torch.zeros(B, T + 2, 4)}, ValueError, r"token_ids: expected shape \(2, 5\), got \(2, 3\)"),
    ({"weight": None}, TypeError, "weight: expected a tensor, got NoneType"),
    ({"weight": torch.zeros(V, 3)}, ValueError, r"weight: expected shape \(V, 4\), V at least 1, got \(5, 3\)"),
    ({"weight": torch.zeros(0, 4)}, ValueError, r"weight: expected shape \(V, 4\), V at least 1, got \(0, 4\)"),
    ({"weight": torch.zeros(V, 4, dtype=torch.bfloat16)}, TypeError, "weight: expected dtype float32, got bfloat16"),
    ({"weight": torch.zeros(V, 4, device="meta")}, ValueError, "weight: expected a tensor on cpu, got one on meta"),
    ({"bias": torch.zeros(V + 1)}, ValueError, r"bias: expected shape \(5,\), got \(6,\)"),
    ({"bias": 0.0}, TypeError, "bias: expected a tensor, got float"),
    ({"bias": torch.zeros(V, dtype=torch.float64)}, TypeError, "bias: expected dtype float32, got float64"),
    ({"logit_scale": 0.0}, ValueError, "logit_scale: expected a finite number > 0, got 0.0"),
    ({"logit_scale": -1.0}, ValueError, "logit_scale: expected a finite number > 0, got -1.0"),
    ({"logit_softcap": float("inf")}, ValueError, "logit_softcap: expected a finite number > 0, got inf"),
    ({"logit_softcap": 1e-39}, ValueError, "logit_softcap: expected a number from 1e-30 to 1e30, got 1e-39"),
    ({"logit_scale": 1e-20, "config": LossConfig.grpo(temperature=1e20)}, ValueError, "config.temperature / logit_scale: expected a number from 1e-30 to 1e30, got 1e"),
    ({"max_chunk_tokens": 0}, ValueError, r"max_chunk_tokens: expected an int > 0 and below 2\^63, got 0"),
    ({"max_chunk_tokens": 8.0}, ValueError, "max_chunk_tokens: expected an int > 0 and .*, got 8.0"),
    ({"max_chunk_tokens": 2**63}, ValueError, "max_chunk_tokens: expected an int > 0 and .*, got 9223372036854775808"),
    ({"logit_scale": 1e-20, "logit_softcap": 1e20}, ValueError, "logit_scale / logit_softcap: expected a number from 1e-30 to 1e30, got 1e-40"),
    ({"hidden": torch.zeros(B, T, 0), "weight": torch.zeros(V, 0)}, ValueError, r"hidden: expected H at least 1, got shape \(2, 3, 0\)"),
    ({"skip_zero_advantage": None}, TypeError, "skip_zero_advantage: expected a bool, got NoneType"),
    ({"inplace": True}, TypeError, "unexpected keyword argument 'inplace'"),
]  # fmt: skip


@pytest.mark.parametrize("impl", ["reference", "cpp"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [*BAD_HEAD, *(bad for bad in BAD_LOSS if "logits" not in bad[0])],
)
def test_bad_call_from_hidden(change: dict[str, Any], error: type[Exception], message: str, impl: str) -> None:
    """Its own arguments, and the same messages as `pmpo_loss` for those that both have."""
    rest = {name: value for name, value in GOOD.items() if name != "logits"}
    with Finished() as finished, pytest.raises(error, match=message):
        linear_pmpo_loss(**(HEAD | rest | {"impl": impl} | change))
    assert not finished.names, "a kernel ran before the error"


@pytest.mark.parametrize("bad", [bad for bad in BAD_LOSS if "cu_seqlens" in bad[0] and "logits" in bad[0]])
def test_bad_packed_call_from_hidden(bad: tuple[dict[str, Any], type[Exception], str]) -> None:
    change, error, message = bad
    rest = {name: value for name, value in (GOOD | change).items() if name != "logits"}
    with pytest.raises(error, match=message):
        linear_pmpo_loss(torch.zeros(4, 4), HEAD["weight"], **rest)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logp": 1.0}, TypeError, "logp: expected a tensor, got float"),
        ({"logp": torch.zeros(B, T, V)}, ValueError, r"logp: expected shape \(B, T\) or \(N,\), got \(2, 3, 5\)"),
        ({"logp": torch.zeros(B, T, dtype=torch.int32)}, TypeError, "logp: expected dtype .* got int32"),
        ({"entropy": torch.zeros(B)}, ValueError, r"entropy: expected shape \(2, 3\), got \(2,\)"),
        ({"config": LossConfig.grpo(entropy_coef=0.1)}, ValueError, "entropy: expected a tensor because config.entropy_coef is 0.1"),
        ({"config": LossConfig.grpo(temperature=0.7)}, ValueError, "config.temperature: expected 1 for a loss from log-probs, got 0.7"),
    ],
)  # fmt: skip
def test_bad_call_from_logp(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"logp": torch.zeros(B, T), "old_logp": None, "advantages": torch.ones(B)}
    with pytest.raises(error, match=message):
        pmpo_loss_from_logp(**(good | change))


def test_bad_token_logp_call() -> None:
    with pytest.raises(ValueError, match="temperature: expected a finite number > 0, got 0"):
        token_logp(GOOD["logits"], GOOD["token_ids"], temperature=0)
    with pytest.raises(ValueError, match="temperature: expected a number from 1e-30 to 1e30, got 1e-39"):
        token_logp(GOOD["logits"], GOOD["token_ids"], temperature=1e-39)
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 3\), got \(3,\)"):
        token_logp(GOOD["logits"], GOOD["token_ids"], mask=torch.ones(T, dtype=torch.bool))


def test_named_triton_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run on cpu tensors: .*TRITON_INTERPRET=1"):
        pmpo_loss(**GOOD, impl="triton")


def test_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pmpo_kernels.impls, "TRITON_INSTALLED", False)
    assert available_impls()["triton"] == "Triton is not installed (pip install triton)"
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        pmpo_loss(**GOOD, impl="triton")


def test_available_impls() -> None:
    status = available_impls()
    assert list(status) == ["triton", "cpp", "reference"]
    assert status["triton"].startswith("usable")
    assert status["cpp"].startswith("usable on CPU tensors (")  # a machine that runs these tests has a compiler
    assert status["reference"].startswith("usable")


def test_an_implementation_is_chosen_without_asking_for_the_name_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile cannot trace that question, and every call would pay for it."""

    def name(*args: object) -> str:
        raise AssertionError("asked for the name of the GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert resolve_impl(None, torch.device("cuda")) == "triton"
    assert resolve_impl("triton", torch.device("cuda", 0)) == "triton"
    assert resolve_impl("cpp", torch.device("cpu")) == "cpp"
    with pytest.raises(AssertionError, match="asked for"):
        available_impls()
