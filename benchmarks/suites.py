"""What `run.py` measures by default, and the vocabularies of real models."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from itertools import product

from pmpo_kernels.benchmarking.cases import Case, Dtype, Preset

MODELS = {
    "qwen2.5": 151936,
    "llama3": 128256,
    "smollm2": 49152,
    "gpt2": 50257,
    "gemma": 262144,
    "ministral": 131072,
}
Model = Enum("Model", {name: name for name in MODELS}, type=str)
BATCH, TOKENS = 8, 1024
CPU_SCALE = 64  # on a CPU trajectories are so many times shorter
TINY_SCALE, TINY_VOCAB = 1024, 320  # a rehearsal's
NO_ZEROS = {"padded": 0.0, "clipped": 0.0, "zero_advantage": 0.0}
WHOLE = {"padded": 0.0, "zero_advantage": 0.0}  # with the usual share clipped, so that p is solved
HALF_CLIPPED = {**NO_ZEROS, "clipped": 0.5}
HALF_ZERO_ADVANTAGE = {**NO_ZEROS, "zero_advantage": 0.5}


class Suite(str, Enum):
    """Which cases to measure. `main`: the one that is wanted most. `more`: what rows without a gradient save, sequences, p solved,
    a row of 32,768 tokens. `quick`: both and two others. `full`: every model, dtype and kind of loss, T from 512 to 32,768."""

    main = "main"
    more = "more"
    quick = "quick"
    full = "full"


def case(
    model: str, batch: int, tokens: int, dtype: str, preset: str, device: str, fractions: dict[str, float] | None = None
) -> Case:
    """Make a case with a model's vocabulary. `fractions` replaces the usual ones."""
    return Case(
        vocab=MODELS[model],
        batch=batch,
        tokens=tokens,
        dtype=Dtype(dtype),
        preset=Preset(preset),
        device=device,
        model=model,
        **(fractions or {}),
    )


def solved(device: str, scale: int) -> list[Case]:
    """Return PMPO with p solved on whole trajectories: two of 4,096 tokens, one of 32,768."""
    return [
        case("qwen2.5", batch, tokens // scale, "bfloat16", "pmpo", device, WHOLE)
        for batch, tokens in ((2, 4096), (1, 32768))
    ]


def suite(name: Suite, device: str, scale: int | None = None) -> list[Case]:
    """Return the cases of a suite: losses of token and sequence level beside Liger's, lengths, and what rows without a gradient
    save.

    The pmpo cases solve p. Trajectories are `scale` times shorter, by default `CPU_SCALE` on a CPU. On a GPU the logits take 2.5 to
    10 GB (quick) or 0.3 to 10 GB (full).
    """
    scale = scale or (1 if device != "cpu" else CPU_SCALE)
    # what is asked most first: a run that is stopped has written the cases before
    main = [case("qwen2.5", 2, 4096 // scale, "bfloat16", "grpo", device, NO_ZEROS)]
    more = [
        case("qwen2.5", 8, 1024 // scale, "bfloat16", "gspo", device, NO_ZEROS),
        case("qwen2.5", 2, 4096 // scale, "bfloat16", "grpo", device, HALF_CLIPPED),
        case("qwen2.5", 2, 4096 // scale, "bfloat16", "grpo", device, HALF_ZERO_ADVANTAGE),
        *solved(device, scale),
    ]
    others = [
        case("qwen2.5", 8, 1024 // scale, "bfloat16", "grpo", device),
        case("qwen2.5", 4, 4096 // scale, "bfloat16", "grpo", device),
    ]
    found = {Suite.main: main, Suite.more: more, Suite.quick: main + more + others}
    if name in found:
        return found[name]
    grid = product(MODELS, Dtype, (Preset.grpo, Preset.gspo, Preset.pmpo))
    cases = [*main, *more, *others]
    cases += [case(model, BATCH, TOKENS // scale, dtype, preset, device) for model, dtype, preset in grid]
    lengths = ((2, 512), (8, 512), (8, 2048), (1, 8192), (1, 16384), (1, 32768))
    cases += [case("qwen2.5", B, T // scale, "bfloat16", "grpo", device) for B, T in lengths]
    return list(dict.fromkeys(cases))


def choose(
    name: Suite,
    device: str,
    models: list[Model],
    dtypes: list[Dtype],
    presets: list[Preset],
    tokens: list[int],
    batch: int | None,
    fractions: dict[str, float],
    tiny: bool = False,
) -> list[Case]:
    """Return the suite or, if an axis is given, all combinations of what is given, with one usual value for each other axis.

    `fractions` replaces those of every case. `tiny` makes it a `rehearsal`.
    """
    scale = TINY_SCALE if tiny else CPU_SCALE if device == "cpu" else 1
    cases = suite(name, device, scale)
    if models or dtypes or presets or tokens or batch:
        grid = product(models or [Model("qwen2.5")], dtypes or [Dtype.bfloat16], presets or [Preset.grpo])
        cases = [
            case(model.value, batch or BATCH, T, dtype, preset, device)
            for model, dtype, preset in grid
            for T in tokens or [TOKENS // scale]
        ]
    cases = [replace(case, **fractions) for case in cases]
    return list(dict.fromkeys(rehearsal(cases) if tiny else cases))


def rehearsal(cases: list[Case]) -> list[Case]:
    """Return the same cases with a vocabulary of `TINY_VOCAB`, to see that everything runs. Their times say nothing."""
    return [replace(case, vocab=TINY_VOCAB, model="tiny") for case in cases]
