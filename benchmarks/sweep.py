"""Time the vocabulary kernels with other launch settings than `launch_config` chooses; needs a GPU.

python benchmarks/sweep.py --out benchmarks/results/<machine>

Threads a program, bytes a thread and step, the cache's policy; and for few rows, programs a row. Every setting is checked
to give the bits, or within rounding the values, of the default before it is timed. Writes sweep.json.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
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
from pmpo_kernels.benchmarking.report import wide_console
from pmpo_kernels.cli.bench import check_files
from pmpo_kernels.ops import stage
from pmpo_kernels.triton.launch import LaunchConfig, capability, launch_config

STAGES = ("token_logp", "dlogits")
WARMUP = 2


class Setting(NamedTuple):
    """What differs from the default; None leaves it."""

    threads: int = 256
    bytes_a_thread: int | None = None
    evict: str = ""
    shared: bool | None = None

    @property
    def name(self) -> str:
        parts = [f"{self.threads} threads", f"{self.bytes_a_thread or 'default'} bytes"]
        parts += [self.evict] * bool(self.evict)
        parts += ["" if self.shared is None else "rows shared" if self.shared else "a program a row"]
        return ", ".join(part for part in parts if part)


def settings(name: str) -> list[Setting]:
    """Alternatives of a stage, the default first."""
    sizes = (32, 64, 128) if name == "token_logp" else (16, 32, 64)
    shapes = [Setting(threads, size) for threads in (128, 256, 512) for size in sizes]
    return [Setting(), Setting(evict="evict_first"), *(s for s in shapes if s[:2] != (256, sizes[1]))]


def config_of(name: str, setting: Setting, V: int, dtype: torch.dtype, arch: str, rows: int) -> LaunchConfig:
    """`launch_config` with the setting of one stage."""
    sizes = {"token_logp": 64, "dlogits": 32}
    if setting.bytes_a_thread is not None:
        sizes[name] = setting.bytes_a_thread
    found = launch_config(
        V, dtype, arch, rows, threads=setting.threads, bytes_a_thread=(sizes["token_logp"], sizes["dlogits"])
    )
    launch = getattr(found, name)._replace(evict=setting.evict)
    if setting.shared is not None:
        blocks = -(-V // launch.BLOCK_V)
        launch = launch._replace(parts=blocks if setting.shared else 1)
    return found._replace(**{name: launch})


@contextmanager
def launching(name: str, setting: Setting) -> Iterator[None]:
    """A stage launched with this setting until the end of the block."""
    module = importlib.import_module(f"pmpo_kernels.triton.{name}")
    chosen = module.launch_config
    module.launch_config = lambda *args: config_of(name, setting, *args)
    try:
        yield
    finally:
        module.launch_config = chosen


def stages(rows: int, V: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], Any]]:
    """Each stage on random logits (1, rows, V), every row with a gradient."""
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


def agrees(name: str, setting: Setting, got: Any, want: Any) -> bool:
    """The gradient and rows shared by programs: same bits. Sums in other lanes: each result within half an eps for each of at
    most 64 columns a step, 128 steps, and 64 for the rest."""
    if name == "dlogits":
        return torch.equal(got, want)
    if setting[:2] == Setting()[:2]:
        return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    bound = torch.finfo(torch.float32).eps * 256
    return all(bool(((a - b).abs() <= bound * b.abs().clamp(min=1)).all()) for a, b in zip(got, want, strict=True))


def compare(
    name: str, f: Callable[[], Any], candidates: list[Setting], repeats: int, cuda: bool
) -> dict[Setting, Spread | str]:
    """Milliseconds of each setting, interleaved; or, for a setting that is wrong or cannot run, why there are none."""
    want: Tensor | tuple[Tensor, ...] = f()
    found: dict[Setting, Spread | str] = {}
    for setting in candidates:
        with launching(name, setting):
            try:
                found[setting] = "" if agrees(name, setting, f(), want) else "wrong result, not timed"
            except Exception as error:
                found[setting] = f"failed: {type(error).__name__}: {str(error)[:80]}"
    del want
    right = {setting.name: setting for setting, problem in found.items() if problem == ""}
    samples: dict[str, list[float]] = {key: [] for key in right}
    for keys in rotating(list(right), WARMUP + repeats):
        for key in keys:
            with launching(name, right[key]):
                samples[key].append(lap(f, cuda))
    return found | {right[key]: Spread.of(values[WARMUP:]) for key, values in samples.items()}


def main(
    vocab: Annotated[int, typer.Option(min=2, help="Vocabulary size V.")] = 151936,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the logits.")] = Dtype.bfloat16,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the logits.")] = 8192,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds, all settings in each.")] = 10,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for sweep.json.")] = Path("out/sweep"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results in --out.")] = False,
) -> None:
    """Compare launch settings for many rows, and programs a row for few."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("expected a GPU visible to PyTorch, got none", param_hint="sweep.py")
    path = out / "sweep.json"
    check_files([path], overwrite)
    kind = getattr(torch, dtype.value)
    arch = capability(torch.device("cuda", torch.cuda.current_device()))
    sharing = [Setting(shared=shared) for shared in (False, True)]
    plan = [(name, rows, settings(name)) for name in STAGES]
    plan += [(name, few, sharing) for few in (1, 16, 66, 132, 264, 528, 1056) for name in STAGES]
    table = Table(title=f"V = {vocab:,}, {dtype.value}, {arch}")
    for column in ("stage", "rows", "setting", "ms (quartiles)", "GB/s by model"):
        table.add_column(column)
    results = []
    for name, count, candidates in track(plan, "settings", console=Console(stderr=True)):
        units = 1 if name == "token_logp" else 2
        for setting, found in compare(
            name, stages(count, vocab, kind, "cuda")[name], candidates, repeats, True
        ).items():
            entry: dict[str, Any] = {"stage": name, "rows": count, **setting._asdict()}
            cells = [name, f"{count:,}", setting.name]
            if isinstance(found, str):
                table.add_row(*cells, found, "")
                results.append(entry | {"problem": found})
                continue
            rate = 1e-6 * units * count * vocab * kind.itemsize / found.median
            table.add_row(*cells, f"{found.median:.4g} ({found.q1:.4g}-{found.q3:.4g})", f"{rate:,.0f}")
            results.append(entry | {"ms": asdict(found), "gigabytes_a_second": rate})
    wide_console().print(table)
    out.mkdir(parents=True, exist_ok=True)
    content = {
        **provenance(),
        "vocab": vocab,
        "dtype": dtype.value,
        "arch": arch,
        "repeats": repeats,
        "results": results,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"Written: {path}")


if __name__ == "__main__":
    typer.run(main)
