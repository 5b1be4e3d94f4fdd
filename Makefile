# Everything from a fresh clone: `make train` and `make test` set up what they need by themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SOURCES := setup.py constraints.txt
# two test processes on two cores; each computes with one thread
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install train test chaos lint bench clean

help: ## show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## set up .venv with pinned versions of what training needs

train: install ## train VITS: on data/LJSpeech-1.1 if it is there, else a small model on the demo set (ARGS=...)
	$(BIN)/python recipes/ljspeech/train_vits.py $(ARGS)

test: $(VENV)/.installed-dev ## run all tests, with coverage
	$(BIN)/python -m pytest -n $(WORKERS) --cov=trainer --cov=models --cov-report=term --cov-fail-under=95

chaos: $(VENV)/.installed-dev ## kill 300 trainings at random instants, continue them, and compare (ARGS=...)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos $(ARGS)

lint: $(VENV)/.installed-dev ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed-dev ## time the Trainer against bare loops, on one rank and on two, and what saving costs
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/loop.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/ddp.py
	$(BIN)/python benchmarks/checkpoint.py

clean: ## delete the environment and caches; runs in output/ and data/ stay
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .coverage onefile_trainer.egg-info
	find . -name __pycache__ -type d -not -path './output/*' -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else f"Python {v[0]}.{v[1]}: onefile-trainer needs 3.10 to 3.13; call make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[speech,phonemes,recipes]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@
