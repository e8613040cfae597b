"""The compiled kernels (csrc/): loading them registers the operators' `.cpp` overloads for CPU tensors."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  the extension is linked to its libraries

NOT_BUILT = Path(__file__).with_name("cpp_not_built.txt")


def load(name: str = "pmpo_kernels._C", note: Path = NOT_BUILT) -> tuple[ModuleType | None, str]:
    """Import the extension. Return it with "", or None with the reason why it cannot be used. Where it was not built, setup.py has
    left the reason in the file `note`."""
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        if error.name != name:
            return None, f"the C++ kernels cannot be loaded: {error}"
    except ImportError as error:
        return None, f"the C++ kernels cannot be loaded: {error}"
    reason = (
        note.read_text(encoding="utf-8").strip() if note.exists() else "this installation has no compiled extension"
    )
    return None, f"the C++ kernels are not built: {reason}"


extension, problem = load()
isa: str = "" if extension is None else extension.isa()
"""The instruction set that the C++ kernels use on this machine; "" without the extension."""
