# Everything runs in .venv, made from pyproject.toml and pinned by constraints.txt.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: install serve test test-all fuzz lint bench gpu clean

install: $(VENV)/.installed

# torch goes first and alone, so that a CPU build that is at hand is taken and later steps find it satisfied.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) --constraint constraints.txt --editable ".[dev]"
	touch $@

serve: $(VENV)/.installed  ## the bundled model on http://127.0.0.1:8000
	$(BIN)/kvasir serve $(ARGS)

test: $(VENV)/.dev lint  ## what CI runs; at most 15 minutes on two cores
	$(BIN)/python -m pytest $(ARGS)

test-all: $(VENV)/.dev lint  ## the long proofs too
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)

fuzz: $(VENV)/.dev  ## thousands of cases against our own OpenAPI document; part of test-all
	$(BIN)/python -m pytest -m slow tests/server/test_schemathesis.py $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev  ## start the bundled model, measure it, stop it; report in bench-report/
	$(BIN)/python -m loadtest.run $(ARGS)

gpu: ## every GPU check and benchmark, JSON under loadtest/results/; uses the Python that has CUDA torch
	$(PYTHON) -m loadtest.gpu $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
