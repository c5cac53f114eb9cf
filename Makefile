# Everything on a machine that has only Python 3.11+ and make. A second call installs nothing.
#   make demo    train, search and federate on built-in data, in an environment of its own
#   make test    all tests, two files at a time
#   make lint    style, imports, types
#   make bench   benchmarks (an hour); make bench BENCH=finetune for one that takes longer
# On Linux without a GPU of NVIDIA's torch's build for CPUs is taken; TORCH_INDEX=URL names another index for torch.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo-$(shell date +%Y%m%d-%H%M%S)
BENCH ?= loop_overhead resume ingest

export RAY_USAGE_STATS_ENABLED ?= 0
export FLWR_TELEMETRY_ENABLED ?= 0
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: demo test lint bench clean

demo: $(VENV)/.base
	$(BIN)/raytrain train digits --out $(DEMO)/train workers=$$($(BIN)/python -c 'import os; print(min(2, os.cpu_count()))')
	$(BIN)/raytrain search digits-pbt --out $(DEMO)/search
	$(BIN)/raytrain federate digits-fedkseed --out $(DEMO)/federate
	for run in train search federate; do $(BIN)/raytrain report $(DEMO)/$$run || exit 1; done

test: $(VENV)/.dev
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(VENV)/.dev
	for name in $(BENCH); do $(BIN)/python tests/benchmark/$$name.py || exit 1; done

$(VENV)/.base: pyproject.toml constraints.txt install.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python install.py
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python install.py dev
	touch $@

clean:
	rm -rf $(VENV) runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
