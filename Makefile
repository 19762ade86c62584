# Everything runs from the repository root and needs only Python and make:
# the targets build `.venv` from requirements.lock by themselves.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-slow lint format compare bench \
  notebook-sync lock clean

# `python -m TOOL`, not `.venv/bin/TOOL`: a moved checkout still works.
PY := .venv/bin/python
STAMP := .venv/installed.lock
PYTHON ?=
WORKERS ?= 2
RUN ?= runs/quickstart
COMPARE_RUN ?= runs/comparison
ARGS ?=
export PYTHONPATH := $(CURDIR)

help: ## list the targets
	@echo "usage: make TARGET"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' \
	  Makefile

setup: $(STAMP) ## build .venv from requirements.lock (does nothing if current)
	@echo ".venv is ready"

# An existing .venv is kept where its interpreter still runs, so that an
# interrupted or outdated installation is completed and not started anew.
$(STAMP): requirements.lock
	@set -e; \
	is_new_enough='import sys; sys.exit(sys.version_info < (3, 11))'; \
	if ! $(PY) -c "$$is_new_enough" 2>/dev/null; then \
	  found=""; \
	  for python in $(PYTHON) python3 python3.13 python3.12 python3.11 python; \
	  do \
	    if $$python -c "$$is_new_enough" 2>/dev/null; then \
	      found=$$python; break; \
	    fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "error: roc needs Python 3.11 or newer; install it, or name" \
	      "it: make setup PYTHON=/path/to/python3.12" >&2; exit 1; \
	  fi; \
	  echo "building .venv with $$($$found --version)"; \
	  $$found -m venv --clear .venv || { \
	    echo "error: $$found cannot build a virtual environment; on Debian" \
	      "or Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	fi; \
	echo "installing requirements.lock into .venv"; \
	$(PY) -m pip install --disable-pip-version-check --quiet \
	  -r requirements.lock || { \
	  echo "error: the installation stopped (pip's reason is above);" \
	    "'make setup' again continues it" >&2; exit 1; }; \
	cp requirements.lock $(STAMP)

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

lock: ## resolve requirements-dev.txt anew into requirements.lock
	rm -rf .cache/lock
	python3.11 -m venv .cache/lock
	.cache/lock/bin/python -m pip install --quiet -r requirements-dev.txt
	sed -n '/^#/p' requirements.lock > .cache/header
	.cache/lock/bin/python -m pip freeze | cat .cache/header - \
	  > .cache/requirements.lock
	mv .cache/requirements.lock requirements.lock
	rm -rf .cache/lock .cache/header

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv .cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
