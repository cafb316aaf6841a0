# Everything runs in .venv, which is built on first use and again when its inputs change.
#   make env PYTHON=python3.12         with another interpreter; remove .venv to change it later
#   make test PYTEST_ARGS="-k routing" a part of the tests

SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= serve,triton,bench,dev
PYTEST_ARGS ?=
# Processes that run tests side by side; on GPUs one, since every test may use all of them.
TEST_WORKERS ?= $(shell if command -v nvidia-smi >/dev/null; then echo 0; else echo 2; fi)
# The first interpreter that is new enough; looked for only when .venv is built.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10; do \
	if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
		echo $$python; break; fi; done)

.DEFAULT_GOAL := help
.PHONY: help env demo test check format readme model clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP) ## build .venv

# Without an NVIDIA GPU the versions are pinned; with one, pip is left to find the torch that fits its driver.
$(STAMP): pyproject.toml constraints/cpu.txt
	@set -e; python="$(PYTHON)"; \
	if [ ! -x $(BIN)/python ]; then \
		if [ -z "$$python" ]; then \
			echo "Python 3.10 or newer with venv is needed; name one: make env PYTHON=..." >&2; exit 1; \
		fi; \
		echo "creating $(VENV) with $$($$python --version)"; \
		$$python -m venv $(VENV); \
	fi; \
	pins="-c constraints/cpu.txt"; if command -v nvidia-smi >/dev/null; then pins=""; fi; \
	echo "installing moe-plugin[$(EXTRAS)] $$pins"; \
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[$(EXTRAS)]" $$pins; \
	touch $@

demo: env ## serve the embedded model on one process and on two ranks, and talk to it
	@$(BIN)/python examples/demo.py

test: env ## all tests that this machine can run
	@$(BIN)/python -m pytest -n $(TEST_WORKERS) $(PYTEST_ARGS)

check: env ## lint, format, types and the fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m "not slow" $(PYTEST_ARGS)

format: env ## put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

readme: env ## write the strategy table into README.md
	$(BIN)/python -m moe_plugin.strategies.table README.md

model: env ## train the embedded model again (minutes on a GPU)
	$(BIN)/python examples/tiny_moe/train.py

clean: ## remove caches and builds; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
