"""Compile every Triton kernel ahead of time, without a GPU, and look at its binaries.

python benchmarks/binaries.py sm_90            JSON lines, one a binary: registers, spills, widths, the loop over the vocabulary
python benchmarks/binaries.py --out FILE       the same for every architecture as one file, which docs/performance.md is made from

A program of its own, because kernels that were imported under the interpreter cannot be compiled.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
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

from pmpo_kernels.reference import STATS
from pmpo_kernels.triton.launch import (
    BLOCK_THREADS,
    BLOCK_TOKENS,
    OPTIONS,
    POWER_THREADS,
    STEP_TOKENS,
    LaunchConfig,
    launch_config,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
CASES = ((151_936, "bf16"), (151_936, "fp32"), (50_257, "bf16"), (50_257, "fp32"), (151_936, "fp16"), (151_936, "fp64"))
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
    """One combination in use: what `triton.compile` needs, the columns (or tokens) a step, and threads a program."""

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
    """Every combination in use on an architecture."""
    for V, dtype in CASES:
        yield from vocabulary_kernels(arch, V, dtype, launch_config(V, DTYPES[dtype], arch, ROWS))
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


def vocabulary_kernels(arch: str, V: int, dtype: str, config: LaunchConfig) -> Iterator[Kernel]:
    """token_logp and its merge; dlogits where rows of logits and gradient lie alike to 16-byte boundaries, and where not."""
    warp, size = TARGETS[arch].warp_size, DTYPES[dtype].itemsize
    pointers = SHARED | {f"{name}_ptr": "*fp64" if dtype == "fp64" else "*fp32" for name in SMALL}
    pointers |= {"logits_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
    block, lanes, warps, _, evict = config.token_logp
    constants = {
        "V": V,
        "BLOCK_V": block,
        "LANES": lanes,
        "VECTOR": 16 // size if V * size % 16 == 0 else 1,
        "EVICT": evict,
    }
    stage = module("token_logp")
    for name, function in (
        ("token_logp", stage._token_logp_fwd_kernel),
        ("token_logp merge", stage._token_logp_merge_kernel),
    ):
        yield Kernel(f"{name} {dtype} V={V}", function, pointers, constants, warps, block, warps * warp)
    block, _, warps, _, evict = config.dlogits
    function = module("dlogits")._dlogits_bwd_kernel
    for suffix, vector in (("", 16 // size), (" unlike alignments", 1)):
        constants = {"V": V, "BLOCK_V": block, "VECTOR": vector, "EVICT": evict}
        yield Kernel(f"dlogits {dtype} V={V}{suffix}", function, pointers, constants, warps, block, warps * warp)


def alternatives(arch: str, V: int, dtype: str) -> Iterator[tuple[dict[str, Any], Kernel]]:
    """(what differs from the default, kernel) for other numbers of threads and bytes a thread."""
    for threads in (128, 256, 512):
        for forward, backward in ((32, 16), (64, 32), (128, 64)):
            config = launch_config(V, DTYPES[dtype], arch, ROWS, threads=threads, bytes_a_thread=(forward, backward))
            for kernel in vocabulary_kernels(arch, V, dtype, config):
                stage, _, rest = kernel.name.partition(f" {dtype} ")
                if rest == f"V={V}" and stage in ("token_logp", "dlogits"):
                    size = forward if stage == "token_logp" else backward
                    yield {"threads": threads, "bytes_a_thread": size}, kernel


def compile_kernel(kernel: Kernel, target: GPUTarget) -> Any:
    """The binary for a target; pointers are 16-byte aligned, as PyTorch's tensors are, unless the kernel does not ask."""
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
    """Spilled bytes or registers; on NVIDIA also registers, how often each width of global access occurs, and the loop over
    the vocabulary."""
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
    widths = Counter(
        operation + (width or ".32")
        for operation, _, width in re.findall(r"\b(LDG|STG)\.E(\.\w+)*?(\.128|\.64|\.U16|\.U8)?\b", sass)
    )
    spills = stack + local + len(re.findall(r"\b(?:LDL|STL)\b", sass))
    found = {"spills": spills, "reported": 1, "registers": registers, "widths": dict(widths)}
    bodies, around = loop_bodies(sass)
    if kernel.name.startswith("trajectory"):
        found["instructions"] = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M))
        found["passes"] = [token_pass(body, kernel) for body in bodies if any(op.startswith("LDG") for op in body)]
        found["newton"] = max(map(len, around), default=0)
    else:
        found["loop"] = hot_loop(bodies, kernel)
    return found


def loop_bodies(sass: str) -> tuple[list[list[str]], list[list[str]]]:
    """The operations of each innermost loop, and of each loop around others."""
    lines = [re.sub(r"/\*[^*]*\*/", "", line).strip() for line in sass.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    jumps = [(i, re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) for i, line in enumerate(lines)]
    loops = [(labels[jump[1]] + 1, i + 1) for i, jump in jumps if jump and labels[jump[1]] < i]
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]

    def operations(loop: tuple[int, int]) -> list[str]:
        texts = [text for text in lines[slice(*loop)] if text and not text.endswith(":")]
        return [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].rstrip(";") for text in texts]

    return [operations(loop) for loop in inner], [operations(loop) for loop in loops if loop not in inner]


def token_pass(body: list[str], kernel: Kernel) -> dict[str, float]:
    """One loop of a trajectory kernel: instructions a token, or for each step, and of these float64."""
    tokens = kernel.step / kernel.threads
    doubles = sum(bool(re.match(r"D(ADD|MUL|FMA|SETP)", op)) for op in body)
    return {"instructions": len(body) / tokens, "float64": doubles / tokens}


def hot_loop(bodies: list[list[str]], kernel: Kernel) -> dict[str, Any]:
    """The loop that loads most: instructions a column (all; exponentials; comparisons, selections, conversions and integers),
    bytes that a thread loads a step, and how many loads stand before the first arithmetic on floats."""
    body = max(bodies, key=lambda body: (sum(op.startswith("LDG") for op in body), -len(body)), default=[])
    columns = kernel.step / kernel.threads
    loads = [op for op in body if op.startswith("LDG")]
    floats = [i for i, op in enumerate(body) if re.match(r"(FADD|FMUL|FFMA|FMNMX|FHADD|FADD2|DADD|DMUL|DFMA)", op)]
    alu = re.compile(r"(FMNMX|FSETP|FSEL|LOP3|SHF|PRMT|ISETP|IADD3|VIADD|SEL|F2FP|PLOP3|LEA)")
    width = {".128": 16, ".64": 8, ".U16": 2}
    sizes = [next((n for suffix, n in width.items() if op.endswith(suffix)), 4) for op in loads]
    ahead = body[: floats[0]] if floats else body
    return {
        "instructions": len(body) / columns,
        "exponentials": sum(op.startswith("MUFU") for op in body) / columns,
        "alu": sum(bool(alu.match(op)) for op in body) / columns,
        "bytes": sum(sizes),
        "loads": len(loads),
        "loads_ahead": sum(op.startswith("LDG") for op in ahead),
    }


def binaries(arch: str) -> Iterator[dict[str, Any]]:
    """One description a binary of an architecture."""
    for kernel in kernels(arch):
        found = inspect(compile_kernel(kernel, TARGETS[arch]), kernel, TARGETS[arch])
        yield {"arch": arch, "kernel": kernel.name, "threads": kernel.threads, "columns": kernel.step} | found


def main(
    archs: Annotated[list[str] | None, typer.Argument(help="Architectures.", show_default="all")] = None,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="One JSON file instead of lines.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
) -> None:
    """Compile for each architecture and describe the binaries."""
    unknown = [arch for arch in archs or () if arch not in TARGETS]
    if unknown:
        raise typer.BadParameter(f"expected some of {', '.join(TARGETS)}, got {', '.join(unknown)}", param_hint="ARCHS")
    if out and out.exists() and not overwrite:
        raise typer.BadParameter(f"expected a new file, got {out}; give --overwrite to replace it", param_hint="--out")
    chosen = archs or list(TARGETS)
    if not out:
        for arch in chosen:
            for binary in binaries(arch):
                print(json.dumps(binary), flush=True)
        return
    from pmpo_kernels.benchmarking.machine import provenance

    console = Console(stderr=True)
    found = [b for arch in track(chosen, "compiling", console=console) for b in binaries(arch)]
    target, compared = TARGETS["sm_90"], list(alternatives("sm_90", 151_936, "bf16"))
    others = [
        {"kernel": kernel.name, **setting, **inspect(compile_kernel(kernel, target), kernel, target)}
        for setting, kernel in track(compared, "alternatives", console=console)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**provenance(), "binaries": found, "alternatives": others}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
