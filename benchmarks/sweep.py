"""Time the vocabulary kernels with other launch settings than `launch_config` chooses; needs a GPU.

python benchmarks/sweep.py --out benchmarks/results/<machine>

It varies the threads of a program, the bytes of a thread and step, asynchronous copies, prefetch, the cache's policy and, for few
rows, the programs of a row. Before a setting is timed, in turn with the default, it is checked to give the default's bits or,
within rounding, its values. sweep.json is renewed after every setting, the most plausible ones first, so that an interrupt loses
none.

TRITON_INTERPRET=1 python benchmarks/sweep.py --vocab 5000 --rows 2 --repeats 1     a rehearsal; its times say nothing
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from pmpo_kernels.benchmarking.cases import Dtype
from pmpo_kernels.benchmarking.comparison import Spread
from pmpo_kernels.benchmarking.machine import provenance
from pmpo_kernels.benchmarking.measure import lap, rotating
from pmpo_kernels.benchmarking.report import files_problem, wide_console, write_json
from pmpo_kernels.impls import interpreted
from pmpo_kernels.ops import stage
from pmpo_kernels.triton.launch import DLOGITS, TOKEN_LOGP, LaunchConfig, Step, capability, launch_config

STAGES = {"token_logp": 1, "dlogits": 2}  # how often each moves the logits
WARMUP = 2


class Setting(NamedTuple):
    """One setting: a program's step, and whether rows are shared by programs (None for what launch_config decides)."""

    step: Step
    shared: bool | None = None

    @property
    def name(self) -> str:
        parts = [f"{self.step.threads} threads x {self.step.bytes_a_thread} bytes"]
        parts += [f"copies in {self.step.num_stages} stages"] * (self.step.num_stages > 1)
        parts += ["prefetch"] * self.step.prefetch + [self.step.evict] * bool(self.step.evict)
        parts += [] if self.shared is None else ["rows shared" if self.shared else "a program a row"]
        return ", ".join(parts)


def steps(name: str) -> list[Step]:
    """Return the alternatives of a stage, the default first, then those of whose binaries most is to be expected."""
    if name == "token_logp":
        further = [
            Step(128, 64),
            Step(128, 32, num_stages=3),
            TOKEN_LOGP._replace(evict="evict_first"),
            Step(256, 64),
            Step(128, 64, num_stages=2),
            Step(256, 32, num_stages=3),
            Step(128, 32, prefetch=True),
            Step(128, 64, prefetch=True),
            Step(256, 64, num_stages=3),
            Step(128, 32, num_stages=4),
            Step(256, 32),
            Step(256, 128),
            Step(512, 64),
        ]
        return [TOKEN_LOGP, *further]
    further = [
        Step(256, 16, num_stages=3),
        Step(256, 32),
        DLOGITS._replace(evict="evict_first"),
        Step(128, 16, prefetch=True),
        Step(256, 32, prefetch=True),
        Step(256, 16, num_stages=4),
        Step(128, 16, num_stages=3),
        Step(256, 32, num_stages=2),
        Step(512, 16, prefetch=True),
        Step(256, 16),
        Step(128, 64),
    ]
    return [DLOGITS, *further]


def config_of(name: str, setting: Setting, V: int, dtype: torch.dtype, arch: str, rows: int) -> LaunchConfig:
    """Return what `launch_config` chooses, with this setting for one stage."""
    given = {name: setting.step}
    found = launch_config(V, dtype, arch, rows, **given)
    if setting.shared is None:
        return found
    launch = getattr(found, name)
    return found._replace(**{name: launch._replace(parts=-(-V // launch.BLOCK_V) if setting.shared else 1)})


@contextmanager
def launching(name: str, setting: Setting) -> Iterator[None]:
    """Launch a stage with this setting until the end of the block."""
    module = importlib.import_module(f"pmpo_kernels.triton.{name}")
    chosen = module.launch_config
    module.launch_config = lambda *args: config_of(name, setting, *args)
    try:
        yield
    finally:
        module.launch_config = chosen


def stages(rows: int, V: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], Any]]:
    """Return each stage as a function on random logits (1, rows, V), where every row has a gradient."""
    random = torch.Generator(device).manual_seed(0)
    logits = torch.empty(1, rows, V, dtype=dtype, device=device)
    for row in range(0, rows, 1024):
        part = logits[:, row : row + 1024]
        part.copy_(2 * torch.randn(part.shape, generator=random, device=device))
    ids = torch.randint(0, V, (1, rows), generator=random, device=device)
    saved = stage("token_logp", "triton")(logits, ids, None, 1.0)
    gradient = torch.ones_like(saved[0])
    return {
        "token_logp": lambda: stage("token_logp", "triton")(logits, ids, None, 1.0),
        "dlogits": lambda: stage("dlogits", "triton")(logits, ids, None, *saved[1:], gradient, None, 1.0),
    }


def agrees(name: str, step: Step, got: Any, want: Any) -> bool:
    """Whether two results agree: in their bits, or, if a setting sums in other lanes, within 256 eps. That is half an eps for each
    of at most 64 columns a step, 128 steps, and 64 for the rest."""
    if name == "dlogits":
        return torch.equal(got, want)
    if step[:2] == TOKEN_LOGP[:2]:
        return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    bound = torch.finfo(torch.float32).eps * 256
    return all(bool(((a - b).abs() <= bound * b.abs().clamp(min=1)).all()) for a, b in zip(got, want, strict=True))


def compare(name: str, f: Callable[[], Any], setting: Setting, repeats: int, cuda: bool) -> tuple[Spread, Spread] | str:
    """Return the milliseconds with a setting and those of the default, measured in turn, or why there are none: it is wrong or
    cannot run."""
    want: Tensor | tuple[Tensor, ...] = f()
    with launching(name, setting):
        try:
            if not agrees(name, setting.step, f(), want):
                return "wrong result, not timed"
        except Exception as error:
            return f"failed: {type(error).__name__}: {str(error)[:80]}"
    del want
    samples: dict[str, list[float]] = {"setting": [], "default": []}
    for keys in rotating(list(samples), WARMUP + repeats):
        for key in keys:
            with launching(name, setting) if key == "setting" else nullcontext():
                samples[key].append(lap(f, cuda))
    mine, default = (Spread.of(values[WARMUP:]) for values in samples.values())
    return mine, default


def plan(rows: int) -> Iterator[tuple[str, int, Setting]]:
    """Yield stage, number of rows and setting: the steps of both stages in turn, then programs a row for few rows."""
    pairs = zip_longest(*([(name, rows, Setting(step)) for step in steps(name)] for name in STAGES))
    yield from (planned for pair in pairs for planned in pair if planned)
    for few in (count for count in (16, 132, 264, 528, 1056, 1, 66) if count < rows):
        for name, default in zip(STAGES, (TOKEN_LOGP, DLOGITS), strict=True):
            yield from ((name, few, Setting(default, shared)) for shared in (False, True))


def main(
    vocab: Annotated[int, typer.Option(min=2, help="Vocabulary size V.")] = 151936,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the logits.")] = Dtype.bfloat16,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the logits.")] = 8192,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds, the setting and the default in each.")] = 10,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for sweep.json.")] = Path("out/sweep"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results in --out.")] = False,
) -> None:
    """Compare launch settings for many rows, and programs a row for few."""
    cuda = torch.cuda.is_available()
    if not cuda and not interpreted():
        expected = "a GPU visible to PyTorch, or TRITON_INTERPRET=1 for a rehearsal"
        raise typer.BadParameter(f"expected {expected}, got neither", param_hint="sweep.py")
    path = out / "sweep.json"
    if problem := files_problem([path], overwrite):
        raise typer.BadParameter(problem, param_hint="--out")
    out.mkdir(parents=True, exist_ok=True)
    device, kind = "cuda" if cuda else "cpu", getattr(torch, dtype.value)
    arch = capability(torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"))
    table = Table(title=f"V = {vocab:,}, {dtype.value}, {arch}" + ", interpreted: times say nothing" * (not cuda))
    for column in ("stage", "rows", "setting", "ms (quartiles)", "the default's", "GB/s by model"):
        table.add_column(column)
    planned, results = list(plan(rows)), []
    header = {**provenance(), "vocab": vocab, "dtype": dtype.value, "arch": arch, "repeats": repeats}
    header |= {"interpreted": not cuda, "settings": len(planned)}
    functions: dict[str, Callable[[], Any]] = {}
    try:
        for i, (name, count, setting) in enumerate(track(planned, "settings", console=Console(stderr=True))):
            if i == 0 or count != planned[i - 1][1]:
                functions.clear()
                functions |= stages(count, vocab, kind, device)
            entry: dict[str, Any] = {"stage": name, "rows": count, **setting.step._asdict(), "shared": setting.shared}
            cells = [name, f"{count:,}", setting.name]
            found = compare(name, functions[name], setting, repeats, cuda)
            if isinstance(found, str):
                table.add_row(*cells, found, "", "")
                results.append(entry | {"problem": found})
            else:
                mine, default = found
                rate = 1e-6 * STAGES[name] * count * vocab * kind.itemsize / mine.median
                times = [f"{spread.median:.4g} ({spread.q1:.4g}-{spread.q3:.4g})" for spread in found]
                table.add_row(*cells, *times, f"{rate:,.0f}")
                results.append(entry | {"ms": asdict(mine), "default_ms": asdict(default), "gigabytes_a_second": rate})
            write_json({**header, "results": results}, path)
    except KeyboardInterrupt:
        print(f"interrupted after {len(results)} of {len(planned)} settings")
        raise typer.Exit(130) from None
    finally:
        wide_console().print(table)
        print(f"Written: {path}" if results else "Nothing written.")


if __name__ == "__main__":
    typer.run(main)
