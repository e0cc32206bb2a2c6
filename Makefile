# `make demo` and `make test` need a machine with Python >= 3.11 and make; everything else they set up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench clean

demo: $(VENV)/.ready
	$(BIN)/deploykit run recipes/lenet_digits.toml

test: $(VENV)/.ready
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/startup.py --output benchmarks/results
	$(BIN)/python benchmarks/int8_latency.py --output benchmarks/results
	$(BIN)/python benchmarks/kill_sweep.py --output benchmarks/results

# Written last, so an interrupted set-up is made again.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("deploykit needs Python 3.11 or newer; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
