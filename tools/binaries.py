"""Compile every Triton kernel ahead of time, without a GPU, and look at its binaries.

python tools/binaries.py sm_90            JSON lines, one a binary: registers, spills, widths, the loop over the vocabulary
python tools/binaries.py --out FOLDER     the same for every architecture, as binaries-<version of triton>.json
make binaries                             that for two versions; docs/performance.md is made from them

It is a program of its own, because kernels that were imported under the interpreter cannot be compiled.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
import typer
from rich.console import Console
from rich.progress import track
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from under_way import WIDTH, is_load, size_of, under_way

from pmpo_kernels.benchmarking.machine import provenance
from pmpo_kernels.benchmarking.report import files_problem
from pmpo_kernels.contract import STATS
from pmpo_kernels.triton.launch import (
    BLOCK_THREADS,
    BLOCK_TOKENS,
    OPTIONS,
    POWER_THREADS,
    STEP_TOKENS,
    LaunchConfig,
    Step,
    VocabLaunch,
    launch_config,
)

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from sweep import STAGES, steps

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
CASES = ((151_936, "bf16"), (151_936, "fp32"), (50_257, "bf16"), (50_257, "fp32"), (151_936, "fp16"), (151_936, "fp64"))
ALU = re.compile(r"(FMNMX|FSETP|FSEL|LOP3|SHF|PRMT|ISETP|IADD3|VIADD|SEL|F2FP|PLOP3|LEA)")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ROWS = 8192
SMALL = (
    "logp",
    "row_max",
    "row_sum",
    "entropy",
    "dlogp",
    "dentropy",
    "old_logp",
    "ref_logp",
    "rollout_weights",
    "lanes",
)
SHARED = {
    "token_ids_ptr": "*i64",
    "mask_ptr": "*u8",
    "policy_mask_ptr": "*u8",
    "cu_seqlens_ptr": "*i64",
    "stats_ptr": "*fp64",
}


class Kernel(NamedTuple):
    """One kernel to compile: what `triton.compile` needs, the columns (or tokens) of a step, and the threads of a program."""

    name: str
    function: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    step: int
    threads: int


def module(stage: str) -> Any:
    return importlib.import_module(f"pmpo_kernels.triton.{stage}")


def kernels(arch: str) -> Iterator[Kernel]:
    """Yield every kernel that is in use on an architecture, with each combination of its constants."""
    for V, dtype in CASES:
        yield from vocabulary_kernels(arch, V, dtype, launch_config(V, DTYPES[dtype], arch, ROWS))
    scale = module("scale")
    for dtype in ("bf16", "fp32", "fp64"):  # the fused head's gradients of float16 are float32
        pointers = {"gradient_ptr": f"*{dtype}", "factor_ptr": "*fp64" if dtype == "fp64" else "*fp32"}
        constants, threads = {"BLOCK": scale.BLOCK}, scale.NUM_WARPS * TARGETS[arch].warp_size
        yield Kernel(
            f"scale {dtype}", scale._scale_bwd_kernel, pointers, constants, scale.NUM_WARPS, scale.BLOCK, threads
        )
    for dtype in ("fp32", "fp64"):
        pointers = SHARED | {f"{name}_ptr": f"*{dtype}" for name in (*SMALL, "advantages")}
        pointers |= {f"{name}_ptr": "*fp64" for name in ("power", "target_ess", "dlogp", "dentropy")}
        pointers |= {f"{name}_ptr": "*fp64" for name in ("l", "sums", "scales")}
        constants = {"BLOCK": BLOCK_TOKENS, "STEP": STEP_TOKENS, "NUM_STATS": len(STATS)}
        for part, threads, step in (
            ("sums", BLOCK_THREADS, BLOCK_TOKENS),
            ("power", POWER_THREADS, STEP_TOKENS),
            ("gradient", BLOCK_THREADS, BLOCK_TOKENS),
        ):
            function = getattr(module("trajectory"), f"_trajectory_{part}_kernel")
            used = {name: constants[name] for name in constants if name in function.arg_names}
            warps = threads // TARGETS[arch].warp_size
            yield Kernel(f"trajectory {part} {dtype}", function, pointers, used, warps, step, threads)
        aggregate = module("aggregate")
        pointers = {f"{name}_ptr": "*fp64" for name in ("stats", "denominator", "largest", "divisor", "clip_fraction")}
        pointers |= {"skipped_ptr": "*u8", "loss_ptr": f"*{dtype}", "metrics_ptr": f"*{dtype}"}
        step, warps = aggregate.BLOCK_TRAJECTORIES, aggregate.NUM_WARPS
        threads = warps * TARGETS[arch].warp_size
        yield Kernel(
            f"aggregate {dtype}", aggregate._aggregate_fwd_kernel, pointers, {"BLOCK": step}, warps, step, threads
        )


def vocabulary_kernels(arch: str, V: int, dtype: str, config: LaunchConfig) -> Iterator[Kernel]:
    """Yield token_logp and its merge, and dlogits twice: where rows of logits and gradient lie alike to 16-byte boundaries, and
    where not."""
    pointers = SHARED | {f"{name}_ptr": "*fp64" if dtype == "fp64" else "*fp32" for name in SMALL}
    pointers |= {"logits_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}

    def kernel(name: str, function: Any, launch: VocabLaunch, vector: int) -> Kernel:
        known = {"V": V, "LANES": launch.threads, "VECTOR": vector, **launch.constants}
        constants = {name: value for name, value in known.items() if name in function.arg_names}
        threads = launch.num_warps * TARGETS[arch].warp_size
        return Kernel(name, function, pointers, constants, launch.num_warps, launch.BLOCK_V, threads)

    forward, backward = module("token_logp"), module("dlogits")
    wide, case = 16 // DTYPES[dtype].itemsize, f"{dtype} V={V}"
    aligned = wide if V % wide == 0 else 1
    yield kernel(f"token_logp {case}", forward._token_logp_fwd_kernel, config.token_logp, aligned)
    yield kernel(f"token_logp merge {case}", forward._token_logp_merge_kernel, config.token_logp, aligned)
    yield kernel(f"dlogits {case}", backward._dlogits_bwd_kernel, config.dlogits, wide)
    yield kernel(f"dlogits {case} unlike alignments", backward._dlogits_bwd_kernel, config.dlogits, 1)


def alternatives(arch: str, V: int, dtype: str) -> Iterator[tuple[Step, Kernel]]:
    """Yield the steps that `sweep.py` compares, each with its kernel."""
    for name in STAGES:
        for step in steps(name):
            config = launch_config(V, DTYPES[dtype], arch, ROWS, **{name: step})
            kernels = vocabulary_kernels(arch, V, dtype, config)
            yield step, next(kernel for kernel in kernels if kernel.name == f"{name} {dtype} V={V}")


def compile_kernel(kernel: Kernel, target: GPUTarget) -> Any:
    """Compile a kernel for a target. Pointers are 16-byte aligned, as those of PyTorch are, unless the kernel does not ask."""
    signature, attributes = {}, {}
    for i, parameter in enumerate(kernel.function.params):
        name = parameter.name
        signature[name] = (
            "constexpr" if parameter.is_constexpr else kernel.pointers.get(name) or parameter.annotation_type
        )
        if name in kernel.pointers and not parameter.do_not_specialize_on_alignment:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel.function, signature=signature, constexprs=kernel.constants, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": kernel.num_warps, **OPTIONS})


def run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def inspect(compiled: Any, kernel: Kernel, target: GPUTarget) -> dict[str, Any]:
    """Describe a binary: spilled bytes or registers; on NVIDIA also registers, how often each width of global access occurs, and
    the loop over the vocabulary."""
    if target.backend == "hip":
        # scalar spills stay in vector registers
        spills = [int(n) for n in re.findall(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])]
        return {"spills": sum(spills), "reported": len(spills)}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run("cuobjdump", "-res-usage", file.name)
        sass = run("nvdisasm", "-c", file.name)
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    accesses = re.findall(r"\b(LDG|LDGSTS|STG)\.E([.\w]*)", sass)
    widths = Counter(f"{name}.{found[1] if (found := WIDTH.search(rest)) else 32}" for name, rest in accesses)
    spills = stack + local + len(re.findall(r"\b(?:LDL|STL)\b", sass))
    found = {"spills": spills, "reported": 1, "registers": registers, "widths": dict(widths)}
    found["shared_bytes"] = compiled.metadata.shared
    bodies, around = loop_bodies(sass)
    if kernel.name.startswith(("trajectory", "aggregate")):
        found["instructions"] = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M))
        found["passes"] = [token_pass(body, kernel) for body in bodies if any(op.startswith("LDG") for op in body)]
        found["newton"] = max(map(len, around), default=0)
    else:
        found["loop"] = hot_loop(bodies, kernel)
    return found


def loop_bodies(sass: str) -> tuple[list[list[str]], list[list[str]]]:
    """Return the instructions, without their predicates, of each innermost loop, and those of each loop around others."""
    lines = [re.sub(r"/\*[^*]*\*/", "", line).strip() for line in sass.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    jumps = [(i, re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) for i, line in enumerate(lines)]
    loops = [(labels[jump[1]] + 1, i + 1) for i, jump in jumps if jump and labels[jump[1]] < i]
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]

    def instructions(loop: tuple[int, int]) -> list[str]:
        texts = [text for text in lines[slice(*loop)] if text and not text.endswith(":")]
        return [re.sub(r"^@!?U?P\w+\s+", "", text) for text in texts]

    return [instructions(loop) for loop in inner], [instructions(loop) for loop in loops if loop not in inner]


def token_pass(body: list[str], kernel: Kernel) -> dict[str, float]:
    """Count the instructions of one loop over tokens or trajectories, for each of these (or for each step), and the float64 ones
    among them."""
    tokens = kernel.step / kernel.threads
    doubles = sum(bool(re.match(r"D(ADD|MUL|FMA|SETP)", op)) for op in body)
    return {"instructions": len(body) / tokens, "float64": doubles / tokens}


def hot_loop(bodies: list[list[str]], kernel: Kernel) -> dict[str, Any]:
    """Describe the loop that loads most: instructions a column (all; exponentials; comparisons, selections, conversions and
    integers), bytes that a thread loads in a step, and how many of them are under way."""
    body = max(bodies, key=lambda body: (sum(map(is_load, body)), -len(body)), default=[])
    columns = kernel.step / kernel.threads
    loads = [text for text in body if is_load(text)]
    return {
        "instructions": len(body) / columns,
        "exponentials": sum(text.startswith("MUFU") for text in body) / columns,
        "alu": sum(bool(ALU.match(text)) for text in body) / columns,
        "loads": len(loads),
        "bytes": sum(map(size_of, loads)),
        **under_way(body),
    }


def binaries(arch: str) -> Iterator[dict[str, Any]]:
    """Yield the description of every binary of an architecture."""
    for kernel in kernels(arch):
        found = inspect(compile_kernel(kernel, TARGETS[arch]), kernel, TARGETS[arch])
        yield {"arch": arch, "kernel": kernel.name, "threads": kernel.threads, "columns": kernel.step} | found


def main(
    archs: Annotated[list[str] | None, typer.Argument(help="Architectures.", show_default="all")] = None,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder for one JSON file instead of lines.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
) -> None:
    """Compile for each architecture and describe the binaries."""
    unknown = [arch for arch in archs or () if arch not in TARGETS]
    if unknown:
        raise typer.BadParameter(f"expected some of {', '.join(TARGETS)}, got {', '.join(unknown)}", param_hint="ARCHS")
    path = out / f"binaries-{triton.__version__}.json" if out else None
    if problem := files_problem([path] if path else [], overwrite):
        raise typer.BadParameter(problem, param_hint="--out")
    chosen = archs or list(TARGETS)
    if not path:
        for arch in chosen:
            for binary in binaries(arch):
                print(json.dumps(binary), flush=True)
        return
    console = Console(stderr=True)
    found = [b for arch in track(chosen, "compiling", console=console) for b in binaries(arch)]
    target, compared = TARGETS["sm_90"], list(alternatives("sm_90", 151_936, "bf16"))
    others = [
        {"kernel": kernel.name, **step._asdict(), **inspect(compile_kernel(kernel, target), kernel, target)}
        for step, kernel in track(compared, "alternatives", console=console)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**provenance(), "binaries": found, "alternatives": others}, indent=1) + "\n")
    print(f"Written: {path}")


if __name__ == "__main__":
    typer.run(main)
