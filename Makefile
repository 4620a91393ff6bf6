# Every target sets up what it needs, in .venv; `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

CHECKPOINT ?= tiny
PROMPT ?= a yellow star above a purple circle
OUTPUT ?= output.png
# Empty: the fastest recipe of this machine.
RECIPE ?=
# Further options of the script that is called, as ARGS="--steps 4 --seed 1".
ARGS ?=
# Two processes of tests, a file's tests in one of them, with half of the cores each.
SIDE_BY_SIDE := OMP_NUM_THREADS=$(shell echo $$((($$(nproc) + 1) / 2))) $(BIN)/python -m pytest -n 2 --dist loadfile
# Through the environment, so that a prompt may hold quotes.
export PROMPT OUTPUT CHECKPOINT RECIPE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-dev setup-gpu hooks image ladder report test test-fast test-gpu lint format compiler

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'Variables: PROMPT= OUTPUT= CHECKPOINT= RECIPE= ARGS= of image, CHECKPOINT= ARGS= of ladder, PYTHON= of setup.'

# OpenMP's threads are to wait without spinning for long: beside busy programs they would keep the processor from each
# other.
image: $(VENV)/.ready ## draw PROMPT with the embedded model (or CHECKPOINT) into OUTPUT
	@GOMP_SPINCOUNT=$${GOMP_SPINCOUNT:-1000} $(BIN)/python gen_image.py --checkpoint "$$CHECKPOINT" --prompt "$$PROMPT" --output "$$OUTPUT" \
		$${RECIPE:+--recipe "$$RECIPE"} $(if $(findstring --use-cached-model,$(ARGS)),,--build-packages) $(ARGS)

ladder: $(VENV)/.ready ## time every rung and make the table and the chart; goes on where it was stopped
	$(BIN)/python run_benchmark.py --checkpoint "$$CHECKPOINT" --ladder $(ARGS)

report: $(VENV)/.ready ## make all tables and charts anew from the result files
	$(BIN)/python -m benchmark.report

test: $(VENV)/.ready-dev compiler ## all tests that need no GPU
	$(SIDE_BY_SIDE) -m "not gpu" $(ARGS)

test-fast: $(VENV)/.ready-dev compiler ## those of them that aren't slow
	$(SIDE_BY_SIDE) -m "not gpu and not slow" $(ARGS)

test-gpu: $(VENV)/.ready-dev setup-gpu ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(VENV)/.ready-dev ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready-dev ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.ready ## the virtual environment, for image and ladder

setup-dev: $(VENV)/.ready-dev ## the same, for test and lint

setup-gpu: $(VENV)/.ready-gpu ## the same, for the rungs that need more than PyTorch on a GPU

hooks: $(VENV)/.ready-dev ## run ruff and mypy before every commit
	$(BIN)/pre-commit install

# A stamp is younger than the files that it depends on once what they say is installed.
$(VENV)/.created:
	@command -v "$(PYTHON)" >/dev/null || { \
		echo 'error: there is no $(PYTHON): install Python 3.11 or newer, or name one with PYTHON=' >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is $$("$(PYTHON)" -V 2>&1), and 3.11 or newer is needed:" \
			'name one with PYTHON=, as in `make setup PYTHON=python3.12`' >&2; exit 2; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo 'error: $(PYTHON) lacks the module venv: install it (on Debian and Ubuntu: apt-get install python3-venv)' >&2; \
		exit 2; }
	"$(PYTHON)" -m venv "$(VENV)"
	@touch $@

$(VENV)/.ready: requirements.txt | $(VENV)/.created
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.ready-dev: requirements-dev.txt $(VENV)/.ready
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/.ready-gpu: requirements-gpu.txt $(VENV)/.ready
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-gpu.txt
	@touch $@

compiler: $(VENV)/.ready-dev
	@command -v g++ >/dev/null || command -v clang++ >/dev/null || { \
		echo 'error: the tests compile recipes, and there is no C++ compiler: apt-get install g++' >&2; exit 2; }
	@$(BIN)/python -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { \
		echo "error: the tests compile recipes, and Python's C headers are missing: apt-get install python3-dev" >&2; exit 2; }
