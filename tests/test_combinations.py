"""What combines: the table of docs/losses.md, each cell tried. `python tests/test_combinations.py` prints it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pmpo_kernels import LossConfig, pmpo_loss
from pmpo_kernels.verification import Case, make_case

DOCUMENT = Path(__file__).parent.parent / "docs" / "losses.md"
YES, NO, SAME = "yes", "raises", ""


class Feature(NamedTuple):
    """Fields of `LossConfig`, and arguments of the call made from a case; two that set the same field are alternatives."""

    config: dict[str, Any]
    arguments: tuple[str, ...] = ()


FEATURES = {
    "`power=` a number": Feature({"power": 0.5}),
    '`power="ess"`': Feature({"power": "ess"}),
    "`power` (B,)": Feature({}, ("power",)),
    "`target_ess` (B,)": Feature({"power": "ess"}, ("target_ess",)),
    '`clip="sequence"`': Feature({"clip": "sequence"}),
    '`clip="none"`': Feature({"clip": "none"}),
    '`clip_sides="two"`': Feature({"clip_sides": "two"}),
    "`dual_clip`": Feature({"dual_clip": 2.0}),
    "`rollout_weights`": Feature({}, ("rollout_weights",)),
    "`policy_mask`": Feature({}, ("policy_mask",)),
    "`beta`": Feature({"beta": 0.1}, ("ref_logp",)),
    "`kl_straight_through`": Feature({"beta": 0.1, "kl_straight_through": True}, ("ref_logp",)),
    "`kl_bias_correction`": Feature({"beta": 0.1, "kl_bias_correction": True}, ("ref_logp",)),
    "`entropy_coef`": Feature({"entropy_coef": 0.01}),
    "`temperature`": Feature({"temperature": 0.7}),
    "`loss_agg_mode`": Feature({"loss_agg_mode": "token-mean"}),
    "`denominator`": Feature({}, ("denominator",)),
}
NAMES = list(FEATURES)


def arguments(case: Case) -> dict[str, Any]:
    """A value of each argument."""
    B = len(case.advantages)
    return {
        "power": torch.linspace(-1, 2, B, dtype=torch.float64),
        "target_ess": case.mask.sum(1) * torch.linspace(0.95, 1, B, dtype=torch.float64),
        "rollout_weights": case.rollout_weights,
        "policy_mask": case.ref_logp < case.old_logp,
        "ref_logp": case.ref_logp,
        "denominator": 11.0,
    }


def call(case: Case, impl: str, *features: Feature) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of the logits with these features, on top of a power of 1 and a token clip."""
    fields: dict[str, Any] = {"power": 1.0, "clip": "token"}
    for feature in features:
        fields |= feature.config
    given = {name: arguments(case)[name] for feature in features for name in feature.arguments}
    z = case.logits.clone().requires_grad_()
    config = LossConfig(**fields)
    out = pmpo_loss(
        z, case.token_ids, case.old_logp, case.advantages, mask=case.mask, config=config, impl=impl, **given
    )
    out.loss.backward()
    return out.loss.detach(), z.grad


def cell(row: str, column: str) -> str:
    """What the code does with a pair: runs, the same in both implementations, or raises."""
    a, b = FEATURES[row], FEATURES[column]
    if any(name in b.config and b.config[name] != value for name, value in a.config.items()):
        return SAME
    case = make_case(torch.float64, T=6, V=20)
    try:
        want, want_grad = call(case, "reference", a, b)
    except ValueError:
        with pytest.raises(ValueError, match=": "):
            call(case, "cpp", a, b)
        return NO
    loss, grad = call(case, "cpp", a, b)
    assert torch.isfinite(loss)
    # sums of 6 tokens and 20 columns, in another order; a solved p is right to 1e-10 in log ESS
    tolerance = 1e-12 if "ess" not in (a.config.get("power"), b.config.get("power")) else 1e-8
    assert torch.allclose(loss, want, rtol=tolerance, atol=tolerance)
    assert torch.allclose(grad, want_grad, rtol=tolerance, atol=tolerance)
    return YES


def table() -> list[str]:
    """Markdown: numbered rows, the pairs below the diagonal."""
    lines = ["| | " + " | ".join(str(i) for i in range(1, len(NAMES))) + " |", "| --- |" + " --- |" * (len(NAMES) - 1)]
    for i, row in enumerate(NAMES):
        cells = [cell(row, column) if j < i else SAME for j, column in enumerate(NAMES[:-1])]
        lines.append(f"| {i + 1} {row} | " + " | ".join(cells) + " |")
    return [line.replace("  ", " ") for line in lines]


@pytest.mark.parametrize("row", NAMES)
def test_the_table_is_what_the_code_does(row: str) -> None:
    """Each pair of options either works, the same in C++ and in the reference, or raises, as the document says."""
    i = NAMES.index(row)
    (line,) = [text for text in DOCUMENT.read_text().splitlines() if text.startswith(f"| {i + 1} {row} |")]
    found = [text.strip() for text in line.strip("|").split("|")[1:]]
    assert found[:i] == [cell(row, column) for column in NAMES[:i]]
    assert not any(found[i:])


if __name__ == "__main__":
    print("\n".join(table()))
