"""An implementation that cannot run says why; which ones can. Wrong arguments: test_bad_calls.py."""

from __future__ import annotations

import pytest
import torch

import pmpo_kernels
from pmpo_kernels import available_impls, pmpo_loss
from pmpo_kernels.impls import resolve_impl

GOOD = {
    "logits": torch.zeros(2, 3, 5),
    "token_ids": torch.zeros(2, 3, dtype=torch.long),
    "old_logp": torch.zeros(2, 3),
    "advantages": torch.ones(2),
}


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
    assert list(status) == list(pmpo_kernels.impls.IMPLS)
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
    monkeypatch.setattr("pmpo_kernels.impls.cpp.problem", "")  # as where the extension is built
    assert resolve_impl("cpp", torch.device("cpu")) == "cpp"
    with pytest.raises(AssertionError, match="asked for"):
        available_impls()
