"""Write the table of docs/parity.md from a comparison with the installed packages. Exits 1 if one disagrees.

PYTHONPATH=. TRITON_INTERPRET=1 .venv-peers/bin/python tools/parity_table.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from pmpo_kernels.benchmarking.machine import provenance
from pmpo_kernels.verification.peers import compare, find_peers, make_batch

PAGE = Path(__file__).parent.parent / "docs" / "parity.md"
START, END = "<!-- parity:start -->", "<!-- parity:end -->"


def main() -> int:
    """Compare everything, renew the block between the markers, and say whether all agree."""
    found = find_peers()
    if missing := [peer.problem for peer in found.values() if peer.problem]:
        print("docs/parity.md needs every peer: " + "; ".join(missing), file=sys.stderr)
        return 1
    about = provenance()
    names = ", ".join(f"{peer.distribution} {peer.version}" for peer in found.values())
    machine = f"{about['devices']['cpu']}, torch {about['versions']['torch']}, triton {about['versions']['triton']}"
    lines = [f"{names}; {machine}, {about['date'][:10]}:", "", "| peer | its loss | ours | loss | gradient |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    disagree = False
    for peer in found.values():
        for case in peer.cases:
            agreement = compare(case, make_batch(device=peer.device))
            disagree |= not agreement.ok
            errors = f"{agreement.loss:.0e} | {agreement.gradient:.0e}"
            lines.append(f"| {peer.distribution} | {case.name} | `{case.call}` | {errors} |")
    before, _, rest = PAGE.read_text().partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(before + "\n".join([START, "", *lines, "", END]) + after)
    return int(disagree)


if __name__ == "__main__":
    sys.exit(main())
