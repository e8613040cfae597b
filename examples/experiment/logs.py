"""The log of a run, in JSON lines: the first has its settings, then there is one for each optimizer step, and the last is its
end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from methods import Method
from policy import ModelName
from tasks import SIDES, Side

LossName = Literal["logits", "linear", "eager"]
LOSSES = ("logits", "linear", "eager")
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a run depends on, beside the weights that it starts from. The defaults are those of the small model.

    Args:
        method: a preset, perhaps with options: see `Method`.
        staleness: optimizer steps on each batch of rollouts, each on its own part of it: the last part is that many steps
            off-policy. Neither the number of steps nor that of rollouts depends on it.
        steps: optimizer steps, a multiple of the staleness.
        prompts, copies: problems of an optimizer step, and answers to each of them.
        loss: "logits" for `pmpo_loss`, "linear" for `linear_pmpo_loss`, "eager" for the same loss in plain PyTorch.
        evaluate_every: optimizer steps between two evaluations, a multiple of the staleness.
        evaluate_on: "held out", or "validation" where something is to be chosen by it.
        evaluation_problems: how many there are in an evaluation.
        compare_every: optimizer steps between two timings of the step with our loss and with the eager one, a multiple of the
            staleness; 0: none.

    Raises:
        ValueError: a number out of its range, or what `Method` refuses.
    """

    method: str
    seed: int
    staleness: int
    learning_rate: float
    model: ModelName = "small"
    steps: int = 160
    prompts: int = 8
    copies: int = 16
    gradient_clip: float = 1.0
    loss: LossName = "logits"
    evaluate_every: int = 32
    evaluate_on: Side = "held out"
    evaluation_problems: int = 480
    compare_every: int = 32
    device: str = "cpu"
    bfloat16: bool = False

    def __post_init__(self) -> None:
        Method(self.method)
        for name in ("staleness", "steps", "prompts", "evaluate_every", "evaluation_problems"):
            _expect(name, getattr(self, name) >= 1, "an int >= 1", getattr(self, name))
        _expect("seed", self.seed >= 0, "an int >= 0", self.seed)
        _expect("copies", self.copies >= 2, "an int >= 2, an answer is compared with the others", self.copies)
        _expect("compare_every", self.compare_every >= 0, "an int >= 0", self.compare_every)
        _expect("learning_rate", self.learning_rate > 0, "a number > 0", self.learning_rate)
        _expect("gradient_clip", self.gradient_clip > 0, "a number > 0", self.gradient_clip)
        _expect("model", self.model in ("small", "smollm2"), "small or smollm2", self.model)
        _expect("evaluate_on", self.evaluate_on in SIDES[1:], f"one of {list(SIDES[1:])}", self.evaluate_on)
        _expect("loss", self.loss in LOSSES, f"one of {list(LOSSES)}", self.loss)
        for name in ("steps", "evaluate_every", "compare_every"):
            ok = getattr(self, name) % self.staleness == 0
            _expect(name, ok, f"a multiple of the staleness, which is {self.staleness}", getattr(self, name))

    @property
    def name(self) -> str:
        """Name of the run and of its file."""
        return f"{Method(self.method).file_stem}-rate{self.learning_rate:g}-stale{self.staleness}-seed{self.seed}"


@dataclass(frozen=True)
class Log:
    """A finished run."""

    settings: Settings
    rows: list[Row]
    times: list[Row]
    evaluations: list[Row]
    end: Row


def path_of(folder: Path, settings: Settings) -> Path:
    """Path of a run's file in the experiment's folder."""
    return folder / "runs" / f"{settings.name}.jsonl"


def finished(folder: Path, settings: Settings) -> bool:
    """Whether the log of the run is there.

    Raises:
        ValueError: a run of the same name is there, with other settings.
    """
    path = path_of(folder, settings)
    if not path.exists():
        return False
    found = read_log(path).settings
    if found != settings:
        changed = {k: v for k, v in asdict(found).items() if v != asdict(settings)[k]}
        raise ValueError(f"{path}: expected the run of these settings, got one with {changed}; take another --out")
    return True


def write_log(folder: Path, settings: Settings, rows: Iterable[Row]) -> None:
    """Write the log as a whole. If this is interrupted, there is no file."""
    path = path_of(folder, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w") as file:
        for row in ({"kind": "settings", **asdict(settings)}, *rows):
            file.write(json.dumps(row) + "\n")
    os.replace(part, path)


def read_log(path: Path) -> Log:
    """Read a log that `write_log` has written.

    Raises:
        ValueError: not such a file.
    """
    kinds: dict[str, list[Row]] = {"settings": [], "step": [], "time": [], "evaluation": [], "end": []}
    try:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            kinds[row.pop("kind")].append(row)
        (settings,), (end,) = kinds["settings"], kinds["end"]
        return Log(Settings(**settings), kinds["step"], kinds["time"], kinds["evaluation"], end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a run's log, got a file that is not one ({error!r})") from None


def _expect(name: str, ok: bool, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")
