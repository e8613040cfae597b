"""`pmpo-kernels verify`: every usable implementation, dtype and configuration against float64, or beside other packages."""

from __future__ import annotations

from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pmpo_kernels.benchmarking.report import wide_console
from pmpo_kernels.impls import IMPLS, USABLE, available_impls, interpreted, resolve_impl
from pmpo_kernels.verification import Verdict, configurations, make_case, verify
from pmpo_kernels.verification.peers import PEERS, TOLERANCE, compare, find_peers, make_batch

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def command(
    impl: Annotated[list[str] | None, typer.Option(help="Implementations to check; default: all usable ones.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(DTYPES)}; default: all.")] = None,
    vocab: Annotated[int, typer.Option(min=2, help="Vocabulary size of the cases.")] = 201,
    seed: Annotated[int, typer.Option(help="Seed of the cases.")] = 0,
    peers: Annotated[bool, typer.Option("--peers", help="Compare with TRL, verl and Liger, as installed.")] = False,
) -> None:
    """Check loss and gradient (target column, off-target columns, row sum) against float64; exit code 1 on a failure.

    With --peers: check them against the packages that compute the same losses, in float32, with the fastest implementation.
    """
    if peers:
        for option, value in (("--impl", impl), ("--dtype", dtype)):
            if value:
                raise typer.BadParameter(f"{option}: cannot be combined with --peers, got {value}")
        check_peers(vocab, seed)
    for name in impl or []:
        if name not in IMPLS:
            raise typer.BadParameter(f"--impl: expected one of {', '.join(IMPLS)}, got {name!r}")
    for name in dtype or []:
        if name not in DTYPES:
            raise typer.BadParameter(f"--dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    console = Console()
    status = available_impls()
    names = impl or [name for name in IMPLS if status[name].startswith(USABLE)]
    cells = [(i, d, c) for i in names for d in dtype or list(DTYPES) for c in configurations()]
    table = Table(title="Largest error against float64 (relative; see pmpo_kernels.verification)")
    for column in (
        "impl",
        "dtype",
        "configuration",
        "loss",
        "target",
        "off-target",
        "row sum",
        "p residual",
        "bound",
        "",
    ):
        table.add_column(column, justify="left" if column in ("impl", "dtype", "configuration") else "right")
    failed = 0
    with Progress(console=console, transient=True) as progress:
        for name, kind, config in progress.track(cells, description="verifying"):
            device = device_of(name)
            resolve_impl(name, torch.device(device))
            verdict = verify(make_case(DTYPES[kind], V=vocab, device=device, seed=seed), configurations()[config], name)
            failed += not verdict.ok
            table.add_row(name, kind, config, *_figures(verdict))
    console.print(table)
    for name in IMPLS:
        if name not in names:
            console.print(f"{name}: not checked, {status[name]}")
    console.print(
        f"[bold]{len(cells) - failed} of {len(cells)} agree with float64[/bold]" + (", FAILED" if failed else "")
    )
    raise typer.Exit(1 if failed or not cells else 0)


def check_peers(vocab: int, seed: int) -> NoReturn:
    """Print the table and exit with 0 if all agree, 1 on a disagreement or a failure, 2 if no peer can be called."""
    console = wide_console()
    found = find_peers()
    missing = [f"{peer.distribution}: not compared, {peer.problem}" for peer in found.values() if peer.problem]
    if len(missing) == len(PEERS):
        raise typer.BadParameter("--peers: no peer can be called here; " + "; ".join(missing))
    table = Table(title=f"Relative difference from the peers, float32, at most {TOLERANCE:g}")
    for column in ("peer", "version", "its loss", "ours", "loss", "gradient", ""):
        table.add_column(column, justify="right" if column in ("loss", "gradient", "") else "left")
    cells = [(peer, case) for peer in found.values() for case in peer.cases]
    failed = 0
    with Progress(console=console, transient=True) as progress:
        for peer, case in progress.track(cells, description="comparing"):
            names = (peer.distribution, peer.version, case.name, case.call)
            try:
                agreement = compare(case, make_batch(V=vocab, seed=seed, device=peer.device))
            except Exception as error:  # of another package; shown, and a failure
                failed += 1
                table.add_row(*names, "", "", f"[red]{type(error).__name__}: {error}[/red]")
                continue
            failed += not agreement.ok
            verdict = "[green]ok[/green]" if agreement.ok else "[red]FAIL[/red]"
            table.add_row(*names, f"{agreement.loss:.1e}", f"{agreement.gradient:.1e}", verdict)
    console.print(table)
    for line in missing:
        console.print(line)
    agreed = f"[bold]{len(cells) - failed} of {len(cells)} agree with the peers[/bold]"
    console.print(agreed + (", FAILED" if failed else ""))
    raise typer.Exit(1 if failed or not cells else 0)


def device_of(impl: str) -> str:
    """Device that an implementation is checked on: the GPU for Triton unless it is interpreted, else the CPU."""
    if impl == "triton" and not interpreted():
        return "cuda"
    return "cpu"


def _figures(verdict: Verdict) -> list[str]:
    errors = [f"{e:.1e}" for e in (verdict.loss, *verdict.grad, verdict.power_residual, verdict.tolerance)]
    return [*errors, "[green]ok[/green]" if verdict.ok else "[red]FAIL[/red]"]
