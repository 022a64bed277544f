# Every goal works as the first command in a fresh clone: the first one installs everything into VENV (minutes, once).

PYTHON ?= python3
VENV ?= .venv
# Arguments of pytest, which then choose the tests, or of the demo: make test ARGS="tests/chaos -x", make demo ARGS="--seed 1"
ARGS ?=
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install constraints demo check-gpu test test-all test-gpu lint format clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo 'PYTHON=python3.12      which Python makes the virtual environment (3.11 or newer)'
	@echo 'VENV=DIR               where it lies (default .venv)'
	@echo 'EXTRA=cpu|gpu          which build of vLLM and torch (default: gpu where nvidia-smi works)'
	@echo 'TORCH_INDEX=URL        package index to take the CPU build of torch from'
	@echo 'GPU_WHEELS=DIR         where make check-gpu keeps the wheels of the GPU build (default .gpu-wheels)'

install: $(STAMP)  ## make the virtual environment

$(STAMP): pyproject.toml tools/install.sh $(wildcard constraints/*.txt)
	@PYTHON='$(PYTHON)' VENV='$(VENV)' EXTRA='$(EXTRA)' TORCH_INDEX='$(TORCH_INDEX)' tools/install.sh
	@touch $@

# The Pythons that the constraints are made for.
PYTHONS ?= python3.11 python3.12 python3.13

constraints:  ## resolve pyproject.toml anew and write constraints/, by which make install installs
	@TORCH_INDEX='$(TORCH_INDEX)' $(PYTHON) tools/resolve_constraints.py cpu constraints/cpu.txt $(PYTHONS)
	@$(PYTHON) tools/resolve_constraints.py gpu constraints/gpu.txt $(PYTHONS)

demo: $(STAMP)  ## train a tiny reasoner in minutes
	@$(BIN)/python jobs/demo.py $(ARGS)

# Two files at a time, as tests/conftest.py distributes them.
PYTEST = $(BIN)/python -m pytest -n 2 --no-loadscope-reorder

test: lint  ## lint, types and every test that needs no whole run
	$(PYTEST) $(or $(ARGS),-m "not slow and not browser and not gpu")

test-all: test  ## the same, then whole runs, failures of processes and nodes, and a real browser
	$(PYTEST) -m "slow or browser"

test-gpu: $(STAMP)  ## the acceptance suite on the GPUs of this machine (docs/acceptance.md)
	$(BIN)/python -m pytest -m gpu -s $(ARGS)

GPU_WHEELS ?= .gpu-wheels

check-gpu: $(STAMP)  ## compare what is used of vLLM, Ray and DeepSpeed with their GPU builds, without a GPU
	@$(BIN)/python tools/check_gpu_signatures.py --wheels '$(GPU_WHEELS)'

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
