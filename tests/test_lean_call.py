"""How many kernels a call starts on a GPU: counted without one, every operator that is no view, and the launches of Triton's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

import pmpo_kernels
from pmpo_kernels import LossConfig, batch, checks, impls, pmpo_loss
from pmpo_kernels import triton as stages
from pmpo_kernels.impls import interpreted
from pmpo_kernels.ops import stage
from pmpo_kernels.verification import make_case

pytestmark = pytest.mark.skipif(not interpreted(), reason="counts launches of Triton's interpreter")
PACKAGE = Path(pmpo_kernels.__file__).parent
NO_KERNEL = ("aten.empty", "aten.new_empty", "aten.detach")


def is_view(operator: Any) -> bool:
    returned = [result.alias_info for result in operator._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


class Count(TorchDispatchMode):
    """Names of what would be kernels of a GPU; the operators of this package count as what they start."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(operator)
        if not (is_view(operator) or name.startswith((*NO_KERNEL, "pmpo_kernels."))):
            self.started.append(name)
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Count:
    """The mode, which looks into the stages too, on tensors whose values nobody checks, as on a GPU."""
    count = Count()

    def inside(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            with count:
                return function(*args, **options)

        return counted

    for name in stages.__all__:
        monkeypatch.setattr(stages, name, inside(getattr(stages, name)))

    run = InterpretedFunction.run

    def launch(kernel: Any, *args: Any, **options: Any) -> Any:
        count.started.append(kernel.fn.__name__)
        with torch.utils._python_dispatch._disable_current_modes():  # the interpreter's own copies
            return run(kernel, *args, **options)

    monkeypatch.setattr(InterpretedFunction, "run", launch)
    monkeypatch.setattr(checks, "checks_values", lambda tensor: False)
    return count


EVERY_TERM = LossConfig.pmpo(beta=0.1, entropy_coef=0.01, full_clip_fraction=0.5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", ["few", "many"])
@pytest.mark.parametrize(
    ("config", "optional"),
    [(LossConfig.pmpo(), False), (LossConfig.gspo(), False), (LossConfig.dapo(), False), (EVERY_TERM, True)],
    ids=["pmpo", "gspo", "dapo", "every term"],
)
def test_kernels_of_a_call(count: Count, config: LossConfig, optional: bool, rows: str, packed: bool) -> None:
    """At most 14 forward and 6 backward, metrics included."""
    B, T, V = (3, 5, 64) if rows == "many" else (2, 3, 9000)  # few rows of many columns are shared by several programs
    case = make_case(torch.bfloat16, B=B, T=T, V=V)
    tokens = {
        "old_logp": case.old_logp,
        "mask": case.mask.int() if optional else case.mask,
        "ref_logp": case.ref_logp,
        "rollout_weights": case.rollout_weights,
    }
    if not optional:
        del tokens["ref_logp"], tokens["rollout_weights"]
    ids, logits = case.token_ids, case.logits
    if packed:
        ids, logits, tokens = ids.flatten(), logits.flatten(0, 1), {k: x.flatten() for k, x in tokens.items()}
        tokens["cu_seqlens"] = torch.arange(B + 1) * T
    old_logp = tokens.pop("old_logp")
    logits.requires_grad_()
    with count:
        out = pmpo_loss(logits, ids, old_logp, case.advantages, config=config, impl="triton", **tokens)
    forward = count.started.copy()
    assert len(out.metrics) >= 15
    assert {"_token_logp_fwd_kernel", "_aggregate_fwd_kernel"} <= set(forward)
    assert len(forward) <= 14, forward
    count.started.clear()
    with count:
        torch.autograd.grad(out.loss, logits)
    assert "_dlogits_bwd_kernel" in count.started
    assert len(count.started) <= 6, count.started


def test_what_is_counted(count: Count) -> None:
    """Each kernel once: arithmetic, what an operator starts within, launches; neither views nor room for results."""
    x = torch.ones(3, 4)
    with count:
        y = x.view(4, 3)[1:].t() + 1
        torch.empty_like(y).copy_(y)
    assert count.started == ["aten.add.Tensor", "aten.copy_.default"]
    count.started.clear()
    stats = torch.zeros(13, 2, dtype=torch.float64)
    with count:
        stage("aggregate", "triton")(
            stats.t().contiguous().t(), None, None, None, [0.0, 0.0, 0.0, 1.0, 0.0], torch.float32
        )
    assert count.started == ["aten.clone.default", "_aggregate_fwd_kernel"]


CHECKS = {"check_config", "check_logits", "check_call", "check_offsets", "check_token_ids", "resolve_impl"}
FILES = {module.__file__ for module in (batch, checks, impls)}


@pytest.mark.parametrize("packed", [False, True])
def test_each_thing_is_checked_once(packed: bool) -> None:
    case, checked = make_case(torch.float32, B=3, T=5, V=64), []
    tokens = {name: getattr(case, name) for name in ("token_ids", "old_logp", "mask", "ref_logp", "rollout_weights")}
    logits = case.logits
    if packed:
        logits, tokens = logits.flatten(0, 1), {name: x.flatten() for name, x in tokens.items()}
        tokens["cu_seqlens"] = torch.arange(4) * 5

    def enter(frame: FrameType, event: str, _: object) -> None:
        name = frame.f_code.co_name
        if event == "call" and frame.f_code.co_filename in FILES and name in CHECKS | {"check_tensor"}:
            checked.append(frame.f_locals["name"] if name == "check_tensor" else name)

    sys.setprofile(enter)
    try:
        pmpo_loss(logits, advantages=case.advantages, target_ess=case.advantages.abs(), impl="reference", **tokens)
    finally:
        sys.setprofile(None)
    assert sorted(checked) == sorted({*CHECKS, "logits", "advantages", "target_ess", *tokens})


class FirstKernel(Exception):
    """Instead of a launch."""


def tensors(value: object) -> list[Tensor]:
    if isinstance(value, (tuple, list)):
        return [tensor for element in value for tensor in tensors(element)]
    return [value] if isinstance(value, Tensor) else []


def test_the_way_to_the_first_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who follows the logits opens six files and comes back once, to api.py; who follows all tensors of a call, eight."""
    case = make_case(torch.float32, B=3, T=5, V=64)
    of_logits, of_all = [], set()

    def enter(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents:
            given = tensors(list(frame.f_locals.values()))
            if given:
                of_all.add(path)
            if any(tensor.data_ptr() == case.logits.data_ptr() for tensor in given):
                of_logits.append(path.relative_to(PACKAGE).as_posix())

    def launch(*args: Any, **options: Any) -> None:
        raise FirstKernel

    monkeypatch.setattr(InterpretedFunction, "run", launch)
    sys.setprofile(enter)
    try:
        with pytest.raises(FirstKernel):
            pmpo_loss(case.logits, case.token_ids, case.old_logp, case.advantages, mask=case.mask, impl="triton")
    finally:
        sys.setprofile(None)
    way = [path for path, _ in groupby(of_logits)]
    assert way[:5] == ["api.py", "checks.py", "api.py", "autograd.py", "ops.py"]
    assert way[5:7] == ["triton/token_logp.py", "triton/launch.py"]
    assert len(of_all) <= 8, of_all
