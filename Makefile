# On a fresh machine with Python >= 3.10, a C++ compiler and make:  make demo   or   make test.
# Each target makes .venv if it is missing, installs what it needs (pinned by constraints.txt) and runs; a second run is quick.
#   PYTHON=python3.12   the interpreter for a new .venv        CUDA=AUTO|ON|OFF   the CUDA kernels (AUTO: where an nvcc is found)
#   ARGS="..."          handed on to the program               CUDA_ARCHS="sm_90a;compute_80"   what to compile for (empty: all)

PYTHON     ?= python3
CUDA       ?= AUTO
CUDA_ARCHS ?=
WERROR     ?= OFF
CXX        ?= g++
ARGS       ?=

VENV := .venv
PY   := $(VENV)/bin/python
PIP  := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
CORE := $(shell find csrc cmake -type f 2>/dev/null) CMakeLists.txt pyproject.toml
CPP  := $(shell find csrc -name '*.cpp' 2>/dev/null)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.DELETE_ON_ERROR:
.PHONY: help demo test bench lint format sanitize wheel cuda-compile clean FORCE

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

# ---- the environment ------------------------------------------------------------------------------------------------
$(VENV)/made:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else \
	  f"$(PYTHON) is Python {v.major}.{v.minor}; pyflowmap needs 3.10 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and alone, so that pip takes a CPU file where there is one; then what builds the core.
$(VENV)/torch: $(VENV)/made constraints.txt
	$(PIP) torch
	$(PIP) scikit-build-core pybind11 cmake ninja
	@touch $@

# The build's options are part of the stamp: another CUDA=... builds again.
$(VENV)/options: FORCE
	@mkdir -p $(VENV) && echo '$(CUDA) $(CUDA_ARCHS) $(WERROR) $(CXX)' | cmp -s - $@ || echo '$(CUDA) $(CUDA_ARCHS) $(WERROR) $(CXX)' > $@

$(VENV)/installed: $(VENV)/torch $(VENV)/options $(CORE)
	CXX=$(CXX) $(PIP) --no-build-isolation --editable '.[test]' --config-settings=cmake.define.PYFLOWMAP_SIMT=ON \
	  --config-settings=cmake.define.PYFLOWMAP_CUDA=$(CUDA) --config-settings='cmake.define.PYFLOWMAP_CUDA_ARCHS=$(CUDA_ARCHS)' \
	  --config-settings=cmake.define.PYFLOWMAP_WERROR=$(WERROR)
	@touch $@

$(VENV)/lint: $(VENV)/installed
	$(PIP) ruff mypy clang-format clang-tidy codespell
	@touch $@

# ---- what people run ------------------------------------------------------------------------------------------------
demo: $(VENV)/installed  ## train on digits, sample at 1 to 16 steps, write demo/
	$(VENV)/bin/pyflowmap demo $(ARGS)

test: $(VENV)/installed  ## every test: CPU, SIMT, and CUDA where there is a GPU
	$(PY) -m pytest $(ARGS)

bench: $(VENV)/installed  ## bench/results/<machine>.json and docs/benchmarks.md
	$(PIP) 'diffusers>=0.42' flow_matching
	@mkdir -p .build
	$(PY) -m pytest bench -o python_files='bench_*.py' -o python_functions='bench_*' --benchmark-json=.build/bench.json $(ARGS)
	$(PY) bench/report.py .build/bench.json

lint: $(VENV)/lint  ## ruff, mypy, clang-format, clang-tidy, codespell
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell
	git ls-files -co --exclude-standard 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/*.cpp' | xargs $(VENV)/bin/clang-format --dry-run -Werror
	printf '%s\n' $(CPP) | xargs -P 2 -n 1 $(VENV)/bin/clang-tidy --quiet -p "$$(dirname "$$(ls -t build/editable/*/compile_commands.json | head -1)")" \
	  --extra-arg=-fno-openmp --extra-arg=-Wno-unknown-warning-option

format: $(VENV)/lint  ## rewrite the sources as lint wants them
	$(VENV)/bin/ruff check --fix . && $(VENV)/bin/ruff format .
	git ls-files -co --exclude-standard 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/*.cpp' | xargs $(VENV)/bin/clang-format -i

# ---- proofs ---------------------------------------------------------------------------------------------------------
sanitize: $(VENV)/installed  ## the CPU and SIMT kernel tests under ASan + UBSan, then under ThreadSanitizer
	$(PY) -m pytest -m sanitizer tests/simt $(ARGS)
	$(MAKE) --no-print-directory -j 2 --output-sync=target sanitize-address,undefined sanitize-thread

sanitize-%: $(VENV)/installed
	tools/sanitize.sh $* $(ARGS)

cuda-compile: $(VENV)/torch  ## every .cu for sm_80 and sm_90a, warnings as errors; needs nvcc, no GPU
	cmake -S . -B .build/cuda -G Ninja -DCMAKE_BUILD_TYPE=Release -DPYFLOWMAP_CUDA=ON -DPYFLOWMAP_WERROR=ON -DPYFLOWMAP_MINIMAL=ON \
	  -DPYFLOWMAP_CUDA_ARCHS='sm_80;sm_90a;compute_80' \
	  -DPython_EXECUTABLE=$(CURDIR)/$(PY) -Dpybind11_DIR="$$($(PY) -m pybind11 --cmakedir)"
	cmake --build .build/cuda -j 2
	$(PY) tools/check_ptx.py

wheel: $(VENV)/torch  ## one wheel for any torch >= 2.10, audited, installed in a bare environment and smoke-tested
	PYTHON=$(PY) tools/wheel.sh

clean:  ## everything that was built, .venv included
	rm -rf $(VENV) .build build dist wheelhouse .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find pyflowmap tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
