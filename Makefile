# Every goal works as the first command in a fresh clone: the first one installs everything into VENV (minutes, once).

PYTHON ?= python3
VENV ?= .venv
# Arguments of pytest, which then choose the tests, or of the demo: make test ARGS="tests/chaos -x", make demo ARGS="--seed 1"
ARGS ?=
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint format clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo 'PYTHON=python3.12      which Python makes the virtual environment (3.11 or newer)'
	@echo 'VENV=DIR               where it lies (default .venv)'
	@echo 'EXTRA=cpu|gpu          which build of vLLM and torch (default: gpu where nvidia-smi works)'
	@echo 'TORCH_INDEX=URL        package index to take the CPU build of torch from'

install: $(STAMP)  ## make the virtual environment

$(STAMP): pyproject.toml tools/install.sh
	@PYTHON='$(PYTHON)' VENV='$(VENV)' EXTRA='$(EXTRA)' TORCH_INDEX='$(TORCH_INDEX)' tools/install.sh
	@touch $@

demo: $(STAMP)  ## train a tiny reasoner in minutes
	@$(BIN)/python jobs/demo.py $(ARGS)

# Two files at a time, as tests/conftest.py distributes them.
PYTEST = $(BIN)/python -m pytest -n 2 --no-loadscope-reorder

test: lint  ## lint, types and every test that needs no whole run
	$(PYTEST) $(or $(ARGS),-m "not slow and not browser")

test-all: test  ## the same, then whole runs, failures of processes and nodes, and a real browser
	$(PYTEST) -m "slow or browser"

lint: $(STAMP)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## delete caches and builds; keep the virtual environment and runs
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
