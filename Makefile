# Everything a developer does; `make help` lists it. Every target works from a bare clone: it creates .venv first.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= -c constraints.txt
BIN := $(VENV)/bin
# Else every process compiles every module again.
unexport PYTHONDONTWRITEBYTECODE

BUILD_INPUTS := pyproject.toml setup.py constraints.txt recmas_kernels/sources.py $(shell find csrc -type f -not -path 'csrc/tests/*')
RUNTIME := $(VENV)/.installed
DEVELOPMENT := $(VENV)/.installed-dev
CXX_SOURCES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc')

.DEFAULT_GOAL := help
.PHONY: help install demo demo-real test test-slow lint format docs bench bench-runtime native sanitize torture gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Installed again only when what is compiled, or how, has changed.
$(RUNTIME): $(BUILD_INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install $(CONSTRAINTS) -e .
	@touch $@

# Of twenty thousand modules a fifth is ever imported: Python compiles those when they are, pip would compile all.
$(DEVELOPMENT): $(BUILD_INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install --no-compile $(CONSTRAINTS) -e '.[dev]'
	@touch $(RUNTIME) $@

install: $(RUNTIME) ## the library and its command line, in .venv

demo: $(RUNTIME) ## the main job: relay questions answered through latents, with controls, on the shipped system
	$(BIN)/python -m recmas_kernels.info
	$(BIN)/recmas lab demo examples/relay

demo-real: $(DEVELOPMENT) ## MODELS=DIR: the links of examples/trio between the released models in DIR, in some minutes
	$(if $(MODELS),,$(error demo-real: name the folder of the models: make demo-real MODELS=DIR (examples/trio/README.md)))
	TRANSFORMERS_VERBOSITY=error $(BIN)/python -m benchmarks.trio.demo "$(MODELS)"

# Three processes, so that on two cores one works while another waits; each with the threads that its share of the
# processor has. The slowest tests are named at the end.
WORKERS ?= 3
TESTED = OMP_NUM_THREADS=$$(( ($$(nproc) + $(WORKERS) - 1) / $(WORKERS) )) \
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 25
test: $(DEVELOPMENT) ## every test that this machine can run, but for the slow ones
	$(TESTED) -m 'not slow'

test-slow: $(DEVELOPMENT) ## tests that build, start clusters, and compile or interpret Triton kernels
	$(TESTED) -m slow

lint: $(DEVELOPMENT) ## ruff, mypy, import contracts, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(DEVELOPMENT) ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# With --quiet, mkdocs would not count the warnings.
docs: $(DEVELOPMENT) ## the documentation as a site, in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/site/index.html"

bench: $(DEVELOPMENT) ## measure the kernels' full grid here (a quiet quarter of an hour), store it, draw tables and plots
	$(call measured,not runtime)

bench-runtime: $(DEVELOPMENT) ## the same of agents' steps, systems, training, serving (most of an hour)
	$(call measured,runtime)

native: $(DEVELOPMENT) ## the native checks, and that no instruction set leaks into another
	$(call native_checks,build/native,-DRECMAS_SANITIZE=)

sanitize: $(DEVELOPMENT) ## the native checks under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
	$(call native_checks,build/sanitize,-DRECMAS_SANITIZE=address)
	$(call native_checks,build/sanitize-threads,-DRECMAS_SANITIZE=thread)

# Another seed: RECMAS_TORTURE_SEED=N. A failure names it.
torture: $(DEVELOPMENT) ## 10,000 random calls, 100 kills, every escape and hostile folder, with a table: minutes
	RECMAS_TORTURE=1 RECMAS_FUZZ_CALLS=10000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal \
		tests/torture tests/runtime/sandbox tests/kernels/test_fuzz.py
	RECMAS_TORTURE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p tests.torture.conftest tests/runtime/distributed

define measured
@mkdir -p build
@status=0; \
$(BIN)/python -m pytest benchmarks -m '$(1)' --grid full --benchmark-json=build/benchmarks.json || status=$$?; \
$(BIN)/python -m benchmarks.report build/benchmarks.json && exit $$status
endef

define native_checks
	$(BIN)/cmake -S csrc -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Release \
		-DRECMAS_PYTHON=OFF -DRECMAS_TESTS=ON -DRECMAS_WERROR=ON $(2)
	$(BIN)/cmake --build $(1)
	$(BIN)/ctest --test-dir $(1) --output-on-failure --parallel $$(nproc)
endef

# Not in .venv: a machine for measuring has its own torch and may reach no registry.
gpu: ## all that needs a CUDA device, in ten minutes, with the active Python: tests, benchmarks, sanitizers
	$(PYTHON) -m benchmarks.gpu.run $(if $(DIR),"$(DIR)")

clean: ## remove everything that building and testing made, .venv too
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
	rm -f recmas_kernels/*.so recmas_kernels/_build.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
