"""What stands in several places is the same in all of them: presets, options, implementations, signatures.

A new preset, option or implementation fails here until every place has it. Options inside trainers: test_trl.py, test_verl.py.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import call_arguments
import call_oracle
import pytest
import strategies
import torch
from hypothesis import given, settings

from pmpo_kernels import LossConfig, PMPOOutput, available_impls, pmpo_loss
from pmpo_kernels.benchmarking import cases
from pmpo_kernels.config import Preset
from pmpo_kernels.impls import IMPLS
from pmpo_kernels.ops import IMPLEMENTATIONS, SCHEMAS
from pmpo_kernels.verification.oracle import NUMBERS, configurations

ROOT = Path(__file__).parent.parent
PRESETS: tuple[str, ...] = get_args(Preset)
FIELDS = [field.name for field in fields(LossConfig)]
ADDED_UP = {
    "seq-mean-token-mean": "mean of trajectories",
    "token-mean": "mean of tokens",
    "seq-mean-token-sum-norm": "token sums / `max_length`",
}


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def table(page: str, header: str) -> list[dict[str, str]]:
    """The rows of the table whose header begins so, cells by column."""
    lines = text(page).partition(f"\n| {header}")
    assert lines[1], f"{page} has no table | {header}"
    rows = (lines[1][1:] + lines[2]).partition("\n\n")[0].splitlines()
    names, _, *cells = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)
    return [dict(zip(names, row, strict=True)) for row in cells]


def needed(preset: str) -> list[str]:
    """The arguments of a preset beside the options."""
    return [name for name in inspect.signature(getattr(LossConfig, preset)).parameters if name != "options"]


# --- presets ---------------------------------------------------------------------------------------------------------


def test_the_presets_are_the_constructors() -> None:
    constructors = [name for name, member in vars(LossConfig).items() if isinstance(member, classmethod)]
    assert list(PRESETS) == constructors


def test_benchmarks_take_every_preset_that_needs_no_p() -> None:
    assert [preset.value for preset in cases.Preset] == [name for name in PRESETS if "power" not in needed(name)]


def test_the_typed_calls_have_every_preset() -> None:
    called = re.findall(r"LossConfig\.(\w+)\(", text("tests/public_calls.py"))
    assert set(PRESETS) - set(called) == set()


def bounds(cell: str, given: dict[str, Any]) -> list[float]:
    """Clip of the log-ratio that "0.8 to 1 + eps_high" or "exp(±0.4)" tells."""
    if "±" in cell:
        size = float(re.sub(r"exp\(±(.*)\)", r"\1", cell))
        return [-size, size]
    return [math.log(eval(end, {}, given)) for end in cell.split(" to ")]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("page", "header", "call", "aggregation"),
    [
        ("README.md", "preset | p |", r"`{}\((.*?)\)`", "`{}`"),
        ("docs/losses.md", "method | p |", r"`LossConfig\.{}\((.*?)\)`", "{}"),
    ],
    ids=["README", "losses"],
)
def test_the_tables_of_presets_say_what_is_computed(
    page: str, header: str, call: str, aggregation: str, preset: str
) -> None:
    found = [(row, match) for row in table(page, header) if (match := re.search(call.format(preset), row["preset"]))]
    assert len(found) == 1, f"{page}: expected a row of {preset}"
    row, match = found[0]
    config = configurations()[preset]
    assert re.findall(r"\w+", match[1]) == ["p" if name == "power" else name for name in needed(preset)]
    where, _, clip = row["clip"].partition(", ")
    assert where == config.clip
    assert bounds(clip, NUMBERS.get(preset, {})) == pytest.approx([-config.clip_low, config.clip_high])
    how = ADDED_UP[config.loss_agg_mode] if page == "docs/losses.md" else config.loss_agg_mode
    assert aggregation.format(how) in (row.get("`loss_agg_mode`"), row.get("added up"))
    if "power" not in needed(preset):
        assert row["p"].startswith("solved") if config.power == "ess" else row["p"] == f"{config.power:g}"
    (paper,) = [cell for name, cell in row.items() if name.startswith("paper")]
    papers = [re.findall(r"\d{4}\.\d{5}", words) for words in (paper, getattr(LossConfig, preset).__doc__)]
    assert papers[0] == papers[1][:1]


# --- options ---------------------------------------------------------------------------------------------------------


def test_every_option_is_documented() -> None:
    """In the docstring, in the order of the fields; in the README's API, by name."""
    documented = re.findall(r"^        (\w+(?:, \w+)*): ", (LossConfig.__doc__ or "").partition("Raises:")[0], re.M)
    assert ", ".join(documented).split(", ") == FIELDS
    section = text("README.md").partition("\n## API\n")[2].partition("\n## ")[0]
    assert set(FIELDS) - set(re.findall(r"\w+", section)) == set()


CHOICES = {
    (name, choice)
    for name, hint in get_type_hints(LossConfig).items()
    for part in (hint, *get_args(hint))
    if get_origin(part) is Literal
    for choice in get_args(part)
}


def test_the_property_tests_draw_every_option_and_choice() -> None:
    drawn = set()

    @settings(max_examples=300, database=None)
    @given(strategies.random_configs())
    def draw(config: LossConfig) -> None:
        drawn.update((name, getattr(config, name)) for name in FIELDS)

    draw()
    assert CHOICES - drawn == set()
    assert {name for name, value in drawn if value != getattr(LossConfig(), name)} == set(FIELDS)


def test_the_random_calls_give_every_option_and_choice() -> None:
    drawn = {pair for seed in range(300) for pair in call_arguments.config(call_arguments.Draw(str(seed))).items()}
    assert CHOICES - drawn == set()
    assert {name for name, _ in drawn} == set(FIELDS)


def test_the_judge_of_random_calls_knows_every_option_and_choice() -> None:
    source = ast.parse(inspect.getsource(call_oracle.judge_LossConfig))
    written = {node.value for node in ast.walk(source) if isinstance(node, ast.Constant)}
    assert {word for pair in CHOICES for word in pair} | set(FIELDS) <= written


# --- signatures and results ------------------------------------------------------------------------------------------


def test_the_call_in_the_readme_is_the_signature() -> None:
    (block,) = re.findall(r"```python\n(out = pmpo_loss\(\n    logits,  # .*?)```", text("README.md"), re.S)
    statement = ast.parse(block).body[0]
    assert isinstance(statement, ast.Assign)
    assert isinstance(statement.value, ast.Call)
    parameters = inspect.signature(pmpo_loss).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [ast.unparse(argument) for argument in statement.value.args] == positional
    shown = {keyword.arg: ast.unparse(keyword.value) for keyword in statement.value.keywords}
    keywords = {p.name: repr(p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert list(shown) == list(keywords)
    assert {name: value for name, value in shown.items() if value != name} == {
        name: default for name, default in keywords.items() if shown[name] != name
    }
    assert set(re.findall(r"\bout\.(\w+)", block)) == set(PMPOOutput._fields)


def test_every_metric_is_in_the_docstring() -> None:
    z, ids, A = torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), torch.ones(1)
    metrics = pmpo_loss(z, ids, None, A, ref_logp=torch.zeros(1, 2)).metrics
    listed = (pmpo_loss.__doc__ or "").partition("`metrics`: ")[2].partition(":")[0]
    assert set(re.findall(r"\w+", listed)) - {"and", "where", "ref_logp", "is", "given"} == set(metrics)


# --- implementations -------------------------------------------------------------------------------------------------


def test_the_implementations_are_the_operators() -> None:
    assert set(IMPLEMENTATIONS) == set(IMPLS) == set(available_impls())


def test_the_documents_name_every_implementation() -> None:
    assert [row["name"] for row in table("README.md", "name | runs on |")] == [f"`{impl}`" for impl in IMPLS]
    (named,) = re.findall(r"^ +impl: (.*), or None", pmpo_loss.__doc__ or "", re.M)
    assert re.findall(r"\w+", named) == list(IMPLS)
    shown = dict(re.findall(r"^torch\.ops\.pmpo_kernels\.(\w+) +(.*)$", text("docs/design.md"), re.M))
    assert {name: set(overloads.split()) for name, overloads in shown.items()} == {
        name: {f".{impl}" for impl, its in IMPLEMENTATIONS.items() if name in its.operators} for name in SCHEMAS
    }
