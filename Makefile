# Everything on a machine that has only Python 3.11+ and make. A second call installs nothing.
#   make demo    train on built-in data, in an environment of its own
#   make test    all tests, two files at a time
#   make lint    style, imports, types
#   make bench   benchmarks (an hour); make bench BENCH=finetune for one that takes longer
# On Linux without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves gigabytes of CUDA packages.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH_INDEX ?=
BENCH ?= loop_overhead resume ingest

export RAY_USAGE_STATS_ENABLED ?= 0
export FLWR_TELEMETRY_ENABLED ?= 0
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: demo test lint bench clean

demo: $(VENV)/.base
	$(BIN)/raytrain train digits --set workers=$$($(BIN)/python -c 'import os; print(min(2, os.cpu_count()))')

test: $(VENV)/.dev
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(VENV)/.dev
	for name in $(BENCH); do $(BIN)/python tests/benchmark/$$name.py || exit 1; done

# torch comes first and alone: resolved together with what needs it, pip may take another build.
$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .[dev]
	touch $@

clean:
	rm -rf $(VENV) runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
