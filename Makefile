# The verbs of this repository. Each sets up what it needs in .venv, once, and again when its sources change.
#   make demo     trains a model that pronounces English words, on our kernels, and shows it learn   (→ runs/demo)
#   make test     linters, type checker, tests
#   make bench    our layers against torch.nn's
#   make docs     the API reference, from the docstrings   (→ docs/build/index.html)
#   make format   formats everything

PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*) $(wildcard csrc/cpu/*)
CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp')

.PHONY: demo test bench docs format

demo: .venv/.seq2seq
	$(BIN)/pyrnnfast demo --out runs/demo

test: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy
	$(BIN)/python -m pytest

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
