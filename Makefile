# make            what there is to make
# make run        set up .venv, then run the quick start
# make test       set up .venv, then the tests
#
# Needs Python 3.11, 3.12 or 3.13 with venv, and nothing else.
#
#   PYTHON=python3.12   which Python .venv is made with (default: the first that fits)
#   VENV=dir            where the virtual environment goes (default: .venv)
#   ARGS="..."          further arguments: make test ARGS="-m ray -x"
#   OLDEST="..."        what make test-versions takes for the oldest versions

SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?=
ARGS ?=
CONSTRAINTS ?= constraints.txt
TORCH ?= 2.13.0
# The lower bounds in pyproject.toml.
OLDEST ?= flwr==1.41.0 ray==2.55.0 torch==2.9.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
# On all cores; ARGS="-n 0" runs the tests in one process, as a debugger needs it.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup

# Flower's telemetry and update check and Ray's usage report stay off.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help setup run test test-all test-versions lint format all-checks build clean distclean

help:
	@echo "make run         the quick start: a simulation of a few seconds, after set-up"
	@echo "make test        the tests, without the slow ones"
	@echo "make test-all    the tests, with the slow ones"
	@echo "make test-versions  the tests, with the oldest versions of Flower, Ray and PyTorch"
	@echo "                 that are promised, then with the newest"
	@echo "make lint        ruff, mypy, and who imports whom"
	@echo "make format      let ruff rewrite the files"
	@echo "make all-checks  lint, then test-all"
	@echo "make build       the wheel and the source archive, in dist/"
	@echo "make setup       only make $(VENV) and install into it"
	@echo "make clean       remove what was built; make distclean: $(VENV) too"

run: $(VENV)/.installed
	$(BIN)/fedweight run simulations/quickstart.toml $(ARGS)

test: $(VENV)/.installed
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.installed
	$(PYTEST) -m "" $(ARGS)

# The newest are those of constraints.txt. Both are tested, whatever comes of the first.
test-versions:
	@grep -v -E '^(flwr|ray|torch)==' constraints.txt > constraints-oldest.txt
	@printf '%s\n' $(OLDEST) >> constraints-oldest.txt
	@status=0; \
	$(MAKE) test VENV=$(VENV)-oldest CONSTRAINTS=constraints-oldest.txt \
	  TORCH=$(patsubst torch==%,%,$(filter torch==%,$(OLDEST))) || status=1; \
	rm -f constraints-oldest.txt; \
	$(MAKE) test || status=1; \
	exit $$status

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict fedweight
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

all-checks: lint test-all

build: $(VENV)/.installed-dev
	$(BIN)/python -m build

setup: $(VENV)/.installed

# ------------------------------------------------------------------------- set-up

# Does a Python fit? Its version, and that it can make a virtual environment
# (Debian, for one, ships venv apart).
FITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))

# An environment that stands there already is kept, unless PYTHON names another Python.
# (A folder that was moved needs make distclean first.)
$(VENV)/.made:
	@set -e; \
	if $(BIN)/python -c '$(FITS)' 2>/dev/null && [ -z "$(PYTHON)" ]; then \
	  touch $@; exit 0; \
	fi; \
	for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python); do \
	  if $$python -c '$(FITS)' 2>/dev/null; then \
	    echo "Making $(VENV) with $$($$python --version) ($$(command -v $$python))"; \
	    $$python -m venv --clear $(VENV); \
	    touch $@; exit 0; \
	  fi; \
	done; \
	echo "fedweight needs Python 3.11, 3.12 or 3.13 with the module venv; tried:" \
	  "$(or $(PYTHON),python3 python3.13 python3.12 python3.11 python)." >&2; \
	echo "Install one (on Debian and Ubuntu: apt install python3 python3-venv)," \
	  "or name it: make PYTHON=/path/to/python3.12 ..." >&2; \
	exit 1

# PyTorch goes first, alone and at one exact version. A machine without a GPU wants
# the CPU build, and where pip has been pointed at one, the exact version is what
# finds it; a range would let pip take the newest release instead, on Linux with
# gigabytes of CUDA libraries. Once it is there, the second line leaves it alone.
#
# pip is quiet but for errors, which it shows whole.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(VENV)/.made
	@echo "Installing PyTorch into $(VENV) (some hundred megabytes; minutes the first time)"
	@$(PIP) install -c $(CONSTRAINTS) torch==$(TORCH)
	@echo "Installing fedweight and what else it needs (a minute or two)"
	@$(PIP) install -c $(CONSTRAINTS) -e '.[studies,simulation,test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the tools of make lint and make build (half a minute)"
	@$(PIP) install -c $(CONSTRAINTS) -e '.[studies,simulation,test,dev]'
	@touch $@

# ----------------------------------------------------------------------- clean-up

clean:
	rm -rf build dist *.fab .pytest_cache .hypothesis .mypy_cache .ruff_cache htmlcov .coverage
	find . -path './$(VENV)' -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
