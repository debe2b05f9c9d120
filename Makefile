# The verbs of this repository. Each sets up what it needs in .venv, once, and again when its sources change.
#   make demo         trains a model that pronounces English words, on our kernels, and shows it learn   (→ runs/demo)
#   make test         linters, type checker, tests
#   make cuda-check   compiles the CUDA kernels for all architectures, and tests what can be without a GPU
#   make gpu-check    on a machine with a GPU: builds for it, tests, compute-sanitizer, benchmark  (ARGS="--stage tests")
#   make bench        our layers against torch.nn's
#   make docs         the API reference, from the docstrings   (→ docs/build/index.html)
#   make format       formats everything

PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/* csrc/cpu/* csrc/cuda/*)
CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.PHONY: demo test cuda-check gpu-check bench docs format

demo: .venv/.seq2seq
	$(BIN)/pyrnnfast demo --out runs/demo

test: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy
	$(BIN)/python -m pytest

# What ptxas says of every kernel stays beside its object; a test reads it.
cuda-check: .venv/.dev
	$(BIN)/cmake -S . -B build/cuda-check -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" -DPYRNNFAST_CUDA=on -DPYRNNFAST_EMULATION=ON \
	  -DCMAKE_CUDA_COMPILER_LAUNCHER="$(CURDIR)/$(BIN)/python;$(CURDIR)/tests/cuda_host/keep_report.py" \
	  -DCMAKE_CUDA_FLAGS=-Xptxas=-v
	$(BIN)/cmake --build build/cuda-check --target _cuda _emulation
	PYTHONPATH=build/cuda-check $(BIN)/python -m pytest tests/cuda_host

# With the Python and the torch that are there: a machine with a GPU may have no network.
gpu-check:
	$(PYTHON) -m benchmarks.gpu.check $(ARGS)

bench: .venv/.bench
	$(BIN)/python -m benchmarks $(ARGS)

docs: .venv/.docs
	$(BIN)/python docs/api.py docs/build

format: .venv/.dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# An editable build: Python files are used where they lie, and C++ files compiled again only where they changed, which is
# why the build runs in .venv itself instead of a throw-away environment.
define install
$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt --editable '.$(1)'
touch $@
endef

.venv/.seq2seq: .venv/.tools $(SOURCES)
	$(call install,[seq2seq])

.venv/.bench: .venv/.tools $(SOURCES)
	$(call install,[bench])

.venv/.docs: .venv/.tools $(SOURCES)
	$(call install,[docs])

.venv/.dev: .venv/.tools $(SOURCES)
	$(call install,[seq2seq$(,)bench$(,)docs$(,)dev])

# A comma, where make would take one for its own.
, := ,

.venv/.tools: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt cmake ninja pybind11 scikit-build-core
	touch $@
