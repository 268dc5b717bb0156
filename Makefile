# kvpack: build, test and show it. `make help` lists the targets.
#
# Needed: Rust (cargo, clippy, rustfmt), Python 3.11 or later, and pip. All else goes into .venv.
# PYTHON=/path/to/python chooses the interpreter that .venv is made from.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
DEVELOPED := $(VENV)/.kvpack-develop
RELEASED := $(VENV)/.kvpack-release
COMPARED := $(VENV)/.kvpack-bench
RUST_PASSED := target/.tests-passed
PEERS := .venv-peers
PEERS_READY := $(PEERS)/.installed
SOURCES := $(shell find src -name '*.rs' 2>/dev/null) $(wildcard Cargo.toml Cargo.lock build.rs pyproject.toml)
PYTHON_CODE := $(wildcard python tests examples tools benchmarks notebooks)
# cargo-nextest where it is installed.
CARGO_TEST := cargo $(if $(shell command -v cargo-nextest),nextest run --status-level slow,test) --locked
# Processes of pytest: no more than two, as each loads the test model several times; 0 is pytest alone.
WORKERS := $(if $(filter-out 1,$(shell nproc 2>/dev/null)),2,0)
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# One interpreter for maturin and clippy, or each would rebuild the other's pyo3.
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PYO3_PYTHON := $(CURDIR)/$(BIN)/python
unexport CONDA_PREFIX PYTHONHOME
MAKEFLAGS += --no-print-directory

.NOTPARALLEL:
.PHONY: help setup demo test check rust python lint style format bench bench-peers leaderboard compat conformance clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 13

setup: $(DEVELOPED) ## make .venv, install what is needed, build the extension for development

demo: $(RELEASED) ## compare the caches on a real model; leaves a table and a picture in demo-output
	$(BIN)/python examples/demo.py $(ARGS)

test: lint rust python ## every check: lint, Rust tests, Python tests

check: style $(RUST_PASSED) ## the quick checks, after a small change: formats, lints, types, the Rust tests if Rust changed, of each quick Python test three cases
	$(PYTEST) -m "not model and not slow" --cases 3 $(ARGS)

rust: ## the tests of the Rust core (no Python needed)
	$(CARGO_TEST)
	@mkdir -p $(dir $(RUST_PASSED)) && touch $(RUST_PASSED)

$(RUST_PASSED): $(SOURCES)
	@$(MAKE) rust

python: $(DEVELOPED) ## the tests of the Python package, on a real model; WORKERS=0: in one process
	$(BIN)/python tools/test_model.py
	$(PYTEST) $(ARGS)

lint: style ## formats, lints, types, and the stub against the extension
	MYPYPATH=python $(BIN)/stubtest kvpack._kvpack

style: $(DEVELOPED)
	cargo fmt --check
	cargo clippy --locked --all-targets --features python -- -D warnings
	cargo clippy --locked --lib -- -D warnings
	$(BIN)/ruff check $(PYTHON_CODE)
	$(BIN)/ruff format --check $(PYTHON_CODE)
	$(BIN)/mypy

format: $(DEVELOPED) ## format the Rust and the Python code
	cargo fmt
	$(BIN)/ruff check --fix $(PYTHON_CODE)
	$(BIN)/ruff format $(PYTHON_CODE)

bench: $(COMPARED) ## against torch and transformers, 30 minutes; make bench ARGS="--only attention" for a part
	$(BIN)/python -m benchmarks $(ARGS)

bench-peers: $(COMPARED) $(PEERS_READY) ## against llama.cpp (compiled first, 10 minutes) and OpenVINO
	$(BIN)/python -m benchmarks --only peers $(ARGS)

leaderboard: $(COMPARED) ## every method on the test model: make leaderboard TEXT=FILE; measures what is new
	$(BIN)/python tools/leaderboard.py $(if $(TEXT),--text $(TEXT)) $(ARGS)

compat: $(DEVELOPED) ## the equality tests under the oldest, a middle and the newest transformers
	tools/compat.sh

# Tools first, then another release of transformers, where one is named.
conformance: $(DEVELOPED) ## every architecture of transformers against its own cache, 10 minutes: docs/conformance.md; RELEASE=5.4.0 for another release
	overlay=$(if $(RELEASE),$$(tools/overlay.sh $(RELEASE))); \
	PYTHONPATH=tools$${overlay:+:$$overlay} $(BIN)/python -m conformance \
	    $(if $(RELEASE),--table .compat/conformance-$(RELEASE).md) $(ARGS)

clean: ## remove everything that was built, .venv too
	rm -rf $(VENV) $(PEERS) target demo-output benchmarks/results/quick* .mypy_cache .pytest_cache .ruff_cache
	rm -f python/kvpack/_kvpack*.so

# The first Python that is new enough, unless PYTHON says which.
$(VENV)/pyvenv.cfg:
	@for python in $${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "making $(VENV) with $$python"; \
	        $$python -m venv $(VENV) && exit; rm -rf $(VENV); exit 1; \
	    fi; \
	done; echo "no Python 3.11 or later found; name one: make PYTHON=/path/to/python" >&2; exit 1

# The extension, built again when the sources or the metadata change; pip leaves alone what is installed already. It is
# built for development, or as a wheel would have it for what measures; python/kvpack holds the one that was made last.
$(DEVELOPED): BUILD := --profile develop
$(RELEASED): BUILD := --release
$(DEVELOPED) $(RELEASED): $(VENV)/pyvenv.cfg $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'maturin>=1.9,<2'
	$(BIN)/maturin develop $(BUILD) --extras transformers,dev
	@rm -f $(DEVELOPED) $(RELEASED)
	@touch $@

# What the benchmarks compare with, in transformers' own interface.
$(COMPARED): pyproject.toml | $(RELEASED)
	$(BIN)/maturin develop --release --extras transformers,dev,bench
	@touch $@

# The other runtimes have an environment of their own. One that cannot be installed is reported as missing, and tried
# again the next time.
$(PEERS_READY): benchmarks/peers-requirements.txt | $(RELEASED)
	$(BIN)/python -m venv $(PEERS)
	@failed=; while read -r package; do \
	    $(PEERS)/bin/python -m pip install --disable-pip-version-check "$$package" || failed+=" $$package"; \
	done < <(grep -v '^#' $<); \
	if [ -z "$$failed" ]; then touch $@; else echo "cannot be installed, and so not measured:$$failed" >&2; fi
