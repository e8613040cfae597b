"""`pmpo-kernels info`: versions, devices, which implementations run here, and which one is chosen."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pmpo_kernels.benchmarking.machine import devices, versions
from pmpo_kernels.impls import USABLE, available_impls, default_impls


def command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Show versions, devices, each implementation with the reason where it cannot run, and which one impl=None chooses."""
    sections = {
        "versions": versions(),
        "devices": devices(),
        "implementations": available_impls(),
        "impl=None chooses": default_impls(),
    }
    if as_json:
        typer.echo(json.dumps(sections, indent=2, ensure_ascii=False))
        return
    table = Table(title="pmpo_kernels", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for title, rows in sections.items():
        table.add_section()
        table.add_row(f"[underline]{title}[/underline]", "")
        for name, value in rows.items():
            missing = not value.startswith(USABLE) if title == "implementations" else "slower" in value
            table.add_row(name, value, style="yellow" if missing else None)
    Console().print(table)
