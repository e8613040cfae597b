"""Compile every Triton kernel ahead of time, without a GPU, and print what its binaries hold as JSON lines.

Run as a program, because kernels that were imported under the interpreter cannot be compiled.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pmpo_kernels.reference import STATS
from pmpo_kernels.triton.launch import BLOCK_TOKENS, VOCAB_OPTIONS, VocabLaunch, vocab_launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def kernels() -> Iterator[tuple[str, Any, dict[str, str], dict[str, int], dict[str, Any]]]:
    """(name, kernel, pointer types, constants, launch options) of every combination in use."""
    stages = {
        name: importlib.import_module(f"pmpo_kernels.triton.{name}") for name in ("token_logp", "trajectory", "dlogits")
    }
    small = ("logp", "row_max", "row_sum", "entropy", "dlogp", "dentropy", "old_logp", "ref_logp", "rollout_weights")
    shared = {"token_ids_ptr": "*i64", "mask_ptr": "*u8", "cu_seqlens_ptr": "*i64", "stats_ptr": "*fp64"}
    for V, dtype in (
        (151_936, "bf16"),
        (151_936, "fp32"),
        (50_257, "bf16"),
        (50_257, "fp32"),
        (151_936, "fp16"),
        (151_936, "fp64"),
    ):
        result = "*fp64" if dtype == "fp64" else "*fp32"
        pointers = (
            shared | {f"{name}_ptr": result for name in small} | {"logits_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
        )
        vector = 16 // ITEMSIZE[dtype] if V % (16 // ITEMSIZE[dtype]) == 0 else 1
        launch: VocabLaunch = vocab_launch(V, ITEMSIZE[dtype], vector)
        constants = {"V": V, "BLOCK_V": launch.BLOCK_V, "VECTOR": vector}
        for name, kernel in (
            ("token_logp", stages["token_logp"]._token_logp_fwd_kernel),
            ("dlogits", stages["dlogits"]._dlogits_bwd_kernel),
        ):
            options = {"num_warps": launch.num_warps, **VOCAB_OPTIONS}
            yield f"{name} {dtype} V={V}", kernel, pointers, constants, options
    for dtype in ("fp32", "fp64"):
        pointers = shared | {f"{name}_ptr": f"*{dtype}" for name in (*small, "advantages")}
        pointers |= {f"{name}_ptr": "*fp64" for name in ("power", "target_ess", "dlogp", "dentropy")}
        constants = {"BLOCK": BLOCK_TOKENS, "NUM_STATS": len(STATS)}
        yield f"trajectory {dtype}", stages["trajectory"]._trajectory_fwd_kernel, pointers, constants, {"num_warps": 8}


def compile_kernel(
    kernel: Any, pointers: dict[str, str], constants: dict[str, int], options: dict[str, Any], target: GPUTarget
) -> Any:
    signature, attributes = {}, {}
    for i, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = pointers.get(parameter.name) or parameter.annotation_type
            if parameter.name in pointers:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def inspect(compiled: Any, target: GPUTarget) -> dict[str, Any]:
    """Spilled bytes or registers; on NVIDIA also how often each width of global access occurs in the binary, and the fused
    float32 multiply-adds."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        spills = [
            int(n) for n in re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)
        ]  # scalar ones stay in vector registers
        return {"spills": sum(spills), "reported": len(spills)}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run("cuobjdump", "-res-usage", file.name)
        sass = run("nvdisasm", "-c", file.name)
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    accesses = re.findall(r"\b(LDG|STG)\.E(\.\w+)*?(\.128|\.64|\.U16|\.U8)?\b", sass)
    widths: dict[str, int] = {}
    for operation, _, width in accesses:
        key = operation + (width or ".32")
        widths[key] = widths.get(key, 0) + 1
    local_accesses = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    fused = compiled.asm["ptx"].count("fma.rn.f32")
    spills = stack + local + local_accesses
    return {"spills": spills, "reported": 1, "registers": registers, "widths": widths, "fused": fused}


def run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main(names: list[str]) -> None:
    for arch in names:
        for name, kernel, pointers, constants, options in kernels():
            compiled = compile_kernel(kernel, pointers, constants, options, TARGETS[arch])
            print(json.dumps({"arch": arch, "kernel": name} | inspect(compiled, TARGETS[arch])), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(TARGETS))
