# make demo | make test | make bench | make gpu
# Each sets up .venv first (once; again only when requirements.txt or pyproject.toml changed).

PYTHON3 ?= python3
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
UV := uv==0.13.9
WANTED := $(shell cat requirements.txt pyproject.toml | cksum | tr ' ' '-')

# Bytecode is compiled once and kept in .venv, whatever the shell says: demo and tests start many processes.
unexport PYTHONDONTWRITEBYTECODE

# Seconds without a byte: a slow line is not a broken one.
export UV_HTTP_TIMEOUT ?= 180

# `make gpu` may run where nothing can be installed: it takes .venv if there is one, else the system's python3.
GPU_PYTHON := $(if $(wildcard $(PYTHON)),$(PYTHON),$(PYTHON3))

# Test files run side by side: many tests wait for processes of their own.
WORKERS ?= -n 3 --dist=loadfile --no-loadscope-reorder

# At least one test of each package that pyproject.toml names, on files, processes and whole runs.
LOWEST := .venv-lowest
SMOKE := $(addprefix tests/unit/test_, data_video.py split.py tables.py text.py vae.py weights.py checkpoint.py scores.py \
  report.py convert_tars.py fetch_parts.py) tests/distributed/test_data_parallel.py \
  $(addprefix tests/e2e/test_, data_tools.py stages.py sample_cli.py ray_tools.py)

.PHONY: help setup demo test test-all test-lowest lint types unit format bench bench-all gpu configs lock clean

help:
	@echo "make demo    train a small video model in three stages; then look at runs/demo/report.html"
	@echo "make test    lint, types and the tests that need no GPU"
	@echo "make test-all  the tests again, with every layout of processes (twice as long)"
	@echo "make test-lowest  a smoke test with the lowest releases that pyproject.toml allows (Python 3.10 to 3.12)"
	@echo "make bench   side-by-side timings and counts on this machine's CPU in a few minutes: a table, and JSON in"
	@echo "             benchmarks/results/quick/;  make bench-all: all of them at full size, an hour"
	@echo "make gpu     every check that needs an NVIDIA GPU, as JSON in benchmarks/results/"
	@echo "make configs every recipe gets the keys it lacks, docs/config.md and options.md are renewed"
	@echo "make setup   only create .venv;  make format, make lint, make types, make unit: single steps;"
	@echo "make lock    renew requirements.txt;  make clean: remove caches (runs/ and .venv stay)"

# --no-deps: requirements.txt names every package with its exact version, so nothing is left to resolve, and ColossalAI's
# own older pins do not stand in the way. The stamp is written last: an interrupted set-up starts over.
setup:
	@if [ ! -x $(PYTHON) ] || [ "$$(cat $(STAMP) 2>/dev/null)" != "$(WANTED)" ]; then $(MAKE) --no-print-directory install; fi

.PHONY: install
install:
	@command -v $(PYTHON3) >/dev/null || { echo "error: no $(PYTHON3) found; install Python 3.10 or newer" >&2; exit 2; }
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: $$($(PYTHON3) --version) is too old; name a newer one: for example make PYTHON3=python3.12 setup" >&2; exit 2; }
	@test -x $(PYTHON) || $(PYTHON3) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: python3 -m venv failed; install the venv module (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@echo "Installing the packages of requirements.txt into $(VENV) (a few GB, once)"
	@if $(PYTHON) -m uv --version >/dev/null 2>&1 || $(PYTHON) -m pip install --quiet --disable-pip-version-check $(UV); then \
	  $(PYTHON) -m uv pip install --python $(PYTHON) --no-deps --requirement requirements.txt && \
	  $(PYTHON) -m uv pip install --python $(PYTHON) --no-deps --no-build-isolation --editable . ; \
	else \
	  echo "uv cannot be installed here; going on with pip" && \
	  $(PYTHON) -m pip install --disable-pip-version-check --no-deps --requirement requirements.txt && \
	  $(PYTHON) -m pip install --disable-pip-version-check --no-deps --no-build-isolation --editable . ; \
	fi
	@echo "$(WANTED)" > $(STAMP)

demo: setup
	$(PYTHON) -m stages.demo

# The type checker has one thread: it runs beside the tests.
test: lint
	@$(MAKE) --no-print-directory --jobs=2 types tested

.PHONY: tested
tested: setup
	$(PYTHON) -m pytest -m "not gpu and not exhaustive" $(WORKERS)

test-all: setup
	$(PYTHON) -m pytest -m "not gpu" $(WORKERS)

# uv resolves each package that pyproject.toml names to its lowest release, and installs those beside .venv.
test-lowest: setup
	$(PYTHON) -m uv venv --quiet --clear --python $(PYTHON) $(LOWEST)
	$(PYTHON) -m uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --editable ".[dev,cluster]"
	$(LOWEST)/bin/python -m pytest -m "not gpu and not exhaustive" $(WORKERS) $(SMOKE)

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: setup
	$(PYTHON) -m mypy

unit: setup
	$(PYTHON) -m pytest -m "not gpu" $(WORKERS) tests/unit

format: setup
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: setup
	$(PYTHON) -m benchmarks.suite

bench-all: setup
	$(PYTHON) -m benchmarks.suite --full

gpu:
	$(GPU_PYTHON) -m tests.gpu.checks

configs: setup
	$(PYTHON) -m opensora_repro.config.renew
	$(PYTHON) -m data_tools > docs/options.md

# One file for Python 3.10 to 3.13 and every platform. requirements/overrides.txt lifts ColossalAI's own upper bounds.
lock: setup
	$(PYTHON) -m uv pip compile pyproject.toml --extra dev --universal --python-version 3.10 \
	  --override requirements/overrides.txt --no-emit-index-url --no-annotate --no-header -o requirements.txt
	@{ echo "# Made by 'make lock' from pyproject.toml and requirements/overrides.txt; install with --no-deps."; \
	  grep -v '^#' requirements.txt; } > requirements.txt.tmp && mv requirements.txt.tmp requirements.txt

clean:
	rm -rf $(LOWEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
