# Everything runs from the repository root and needs only Python and make: the
# targets build `.venv` by themselves, from the lock file of its Python.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-slow test-bits lint format compare bench \
  notebook-sync lock clean

# `python -m TOOL`, not `.venv/bin/TOOL`: a moved checkout still works.
PY := .venv/bin/python
STAMP := .venv/installed.lock
PYTHON ?=
WORKERS ?= 2
RUN ?= runs/quickstart
COMPARE_RUN ?= runs/comparison
ARGS ?=
# For whose instructions `test-bits` compiles: native is this processor.
ISAS ?= native $(if $(filter x86_64,$(shell uname -m)),AVX2 SSE4_2)
export PYTHONPATH := $(CURDIR)

help: ## list the targets
	@echo "usage: make TARGET"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' \
	  Makefile

setup: $(STAMP) ## build .venv from a lock file (does nothing if current)
	@echo ".venv is ready"

# The interpreter: of .venv where that still runs, else the first that is found.
PYTHONS := $(PY) $(PYTHON) python3 python3.13 python3.12 python3.11 python
FOUND := $(shell for python in $(PYTHONS); do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  && { echo $$python; break; }; done)
# jax 0.10.2 is the last for Python 3.11; later ones get the newest jax.
LOCK := $(shell test -z "$(FOUND)" || $(FOUND) -c 'import sys; print( \
  "requirements.lock" if sys.version_info < (3, 12) \
  else "requirements-py313.lock")')

# An existing .venv is kept where its interpreter still runs, so that an
# interrupted or outdated installation is completed and not started anew.
$(STAMP): $(LOCK)
	@set -e; \
	if [ -z "$(FOUND)" ]; then \
	  echo "error: roc needs Python 3.11 or newer; install it, or name it:" \
	    "make setup PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	if [ "$(FOUND)" != "$(PY)" ]; then \
	  echo "building .venv with $$($(FOUND) --version)"; \
	  $(FOUND) -m venv --clear .venv || { \
	    echo "error: $(FOUND) cannot build a virtual environment; on Debian" \
	      "or Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	fi; \
	echo "installing $(LOCK) into .venv"; \
	$(PY) -m pip install --disable-pip-version-check --quiet -r $(LOCK) || { \
	  echo "error: the installation stopped (pip's reason is above);" \
	    "'make setup' again continues it" >&2; exit 1; }; \
	cp $(LOCK) $(STAMP)

quickstart: $(STAMP) ## train a tiny tool-using policy from nothing (5-15 min)
	$(PY) -m roc.main sft --config=experiments/quickstart.py \
	  --workdir=$(RUN)/sft $(ARGS)
	$(PY) -m roc.main train --config=experiments/quickstart.py \
	  --workdir=$(RUN) --config.init_from=$(RUN)/sft $(ARGS)
	$(PY) -m roc.main report --workdir=$(RUN)

test: lint ## lint, then every test that is not marked slow
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

test-slow: $(STAMP) ## the tests marked slow: whole runs, kill -9, notebooks
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -m slow $(ARGS)

# The flag binds what XLA compiles; the library that it calls for products goes
# by the processor itself.
test-bits: $(STAMP) ## the tests marked bits, once for each set of instructions
	@set -e; for isa in $(ISAS); do \
	  flags="$$XLA_FLAGS"; \
	  [ $$isa = native ] || flags="$$flags --xla_cpu_max_isa=$$isa"; \
	  echo "the tests marked bits, instructions: $$isa"; \
	  XLA_FLAGS="$$flags" $(PY) -m pytest -n $(WORKERS) --dist loadfile \
	    -m bits $(ARGS); \
	done

lint: $(STAMP) ## ruff, import contracts, types
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -c 'from importlinter import cli; cli.lint_imports_command()'
	$(PY) -m pyrefly check

format: $(STAMP) ## rewrite the sources the way `make lint` wants them
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

compare: $(STAMP) ## GRPO, RoC and controls, 7 arms x 5 seeds (1-3 hours)
	$(PY) -m roc.main compare --config=experiments/roc_vs_grpo.py \
	  --workdir=$(COMPARE_RUN) $(ARGS)

bench: $(STAMP) ## every program in benchmarks/ (ARGS=--json: one line a row)
	@set -e; for program in benchmarks/*.py; do \
	  case $$program in */__init__.py|*/common.py|*/rollout_*.py) continue;; \
	  esac; \
	  name=$${program#benchmarks/}; \
	  $(PY) -m benchmarks.$${name%.py} $(ARGS); \
	done

notebook-sync: $(STAMP) ## bring colab/*.ipynb in step with colab/*.py
	$(PY) -m jupytext --quiet --update --to ipynb colab/*.py
	@echo "colab/*.ipynb are in step with colab/*.py"

# A lock file is made by the Python that it is for; one that is not on this
# machine leaves its lock file as it is.
lock: ## resolve requirements-dev.txt anew into the lock files
	@set -e; made=0; \
	for pair in 3.11=requirements.lock 3.13=requirements-py313.lock; do \
	  python=python$${pair%=*}; lock=$${pair#*=}; \
	  $$python -c '' 2>/dev/null || { \
	    echo "no $$python: $$lock stays as it is"; continue; }; \
	  rm -rf .cache/lock; \
	  $$python -m venv .cache/lock; \
	  .cache/lock/bin/python -m pip install --quiet -r requirements-dev.txt; \
	  sed -n '/^#/p' $$lock > .cache/new.lock; \
	  .cache/lock/bin/python -m pip freeze >> .cache/new.lock; \
	  mv .cache/new.lock $$lock; \
	  rm -rf .cache/lock; \
	  echo "made $$lock"; made=1; \
	done; \
	[ $$made = 1 ] || { echo "error: no python3.11 or python3.13" >&2; exit 1; }

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv .cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
