"""The command line, `pmpo-kernels info | verify | bench`.

Each command lives in the file of its name, and imports heavy modules only when it runs.
"""

from __future__ import annotations

import typer

from pmpo_kernels.cli import bench, info, verify

app = typer.Typer(
    name="pmpo-kernels",
    help="Fused power-mean policy losses: GRPO to PMPO.",
    no_args_is_help=True,
    add_completion=False,
)
for module in (info, verify, bench):
    app.command(module.__name__.rpartition(".")[2])(module.command)
