"""`pmpo-kernels` and `python -m pmpo_kernels`: the command line, where the packages that it needs are installed."""

import sys
from importlib.util import find_spec


def main() -> None:
    if None in map(find_spec, ("typer", "rich", "matplotlib")):
        hint = "pip install 'pmpo-kernels[cli]'"
        print(f"pmpo-kernels: the command line needs typer, rich and matplotlib: {hint}", file=sys.stderr)
        raise SystemExit(2)
    from pmpo_kernels.cli import app

    app()


if __name__ == "__main__":
    main()
