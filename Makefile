# Two commands on a fresh machine: `make train` sets up and trains, `make test` sets up and runs the tests.
#   make train PRESET=pusht_fast ARGS="seed=1 training.max_steps=200"
PRESET ?= pusht_laptop
ARGS ?=
BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PACKAGES := --editable '.[dev]' --constraint constraints.txt
# Where Python may write no bytecode, as in many containers, each command and test would compile its imports anew.
unexport PYTHONDONTWRITEBYTECODE

# These presets learn from the demonstrations in the box, unless ARGS name other data, or a run to go on with.
BOXED := pusht_basic pusht_advanced pusht_fast pusht_cpu pusht_multigpu
DEMO := $(if $(filter $(BOXED),$(PRESET)),pusht_demo)$(if $(filter pusht_keypoints,$(PRESET)),pusht_demo_keypoints)
OWN := $(filter dataset=% dataset.root=% dataset.repo_id=%,$(ARGS)) $(findstring dataset.sources=,$(ARGS)) \
	$(filter-out %=null %=false,$(filter training.resume=%,$(ARGS)))
DATA := $(if $(DEMO),$(if $(strip $(OWN)),,dataset=$(DEMO)))

# The first Python >= 3.12 with a venv module, .python-version's (pyenv obeys it) before others.
PYTHON ?= $(shell for python in python3.12 python3 python3.13 python; do \
	if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then echo $$python; break; fi; done)

.PHONY: help setup train test lint ci clean

help:  ## Show what there is to make.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(READY)  ## Make .venv with everything in it, pinned by constraints.txt.

# uv takes a sixth of pip's time, but does not read its settings: pip where these name an index, or where uv fails.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.12 found: install one (pyenv install 3.12, apt install python3.12-venv, or uv python install 3.12), or name it with make PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	@! $(BIN)/python -m pip config list | grep '\.index-url=' >/dev/null \
		&& $(PIP) uv --constraint constraints.txt && $(BIN)/uv pip install --python $(BIN)/python $(PACKAGES) \
		|| $(PIP) $(PACKAGES) --no-compile
	@touch $@

train: setup  ## Train PRESET (pusht_laptop) with ARGS.
	$(BIN)/python -m getiaction.train +preset=$(PRESET) $(DATA) $(ARGS)

test: setup  ## Run the tests, two at a time; ARGS goes to pytest.
	$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal $(ARGS)

lint: setup  ## Check style (ruff), types (mypy) and the walls between the rooms (import-linter).
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

ci:  ## What continuous integration runs: both at once, since most of `lint` takes one core.
	$(MAKE) --jobs=2 lint test

clean:  ## Remove .venv and what tools left; runs in outputs/ stay.
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build dist
