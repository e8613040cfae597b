"""`pmpo-kernels verify --peers`: the same losses by TRL, verl and Liger beside ours."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.progress import Progress
from rich.table import Table

from pmpo_kernels.benchmarking.report import wide_console
from pmpo_kernels.parity import PEERS, TOLERANCE, compare, find_peers, make_batch


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
