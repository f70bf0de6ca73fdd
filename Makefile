# Each target makes .venv first if it is not there. `make demo PYTHON=python3.13` takes another Python.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: demo test test-short test-slow faults lint types clean
.DEFAULT_GOAL := demo

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("ddpm_jax needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing what requirements.txt names into $(VENV) (a minute or two)"
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed requirements-test.txt
	$(PIP) -r requirements-test.txt
	touch $@

demo: $(VENV)/installed           ## train on scikit-learn's digits, then sample: minutes on two CPU cores
	$(BIN)/python train.py configs/digits.py
	$(BIN)/python sample.py runs/digits --num 64

# Compiled programs, kept from one run of the tests to the next; it may be empty.
test test-short test-slow faults: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
test: $(VENV)/installed-test      ## all tests and doctests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

SLOWER := scripts scripts_on_hosts docs examples peers peers_folders peers_samplers import_is_pure
SHORT := $(filter-out $(SLOWER:%=tests/test_%.py),$(wildcard tests/test_*.py)) tests/run tests/samplers tests/training/test_step.py
test-short: $(VENV)/installed-test ## the mathematics, the networks, a training step and what a run is: about 4 minutes
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(SHORT) ddpm_jax

test-slow: $(VENV)/installed-test ## the long tests
	$(BIN)/python -m pytest -m slow

faults: $(VENV)/installed-test    ## kills, starves and damages training runs, dozens of times, and cuts the power: about 25 minutes
	$(BIN)/python tests/faults/program.py
	if command -v strace > /dev/null; then $(BIN)/python tests/faults/power_cut.py; else echo "no strace: power cuts are not replayed"; fi

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-test
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
