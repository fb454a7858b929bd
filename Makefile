# The two commands that matter are `make book` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
VENV_PYTHON := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help env book preview execute test test-other lint pages bench wheel clean

help: ## list the targets
	@echo "make TARGET, where TARGET is one of:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "PYTHON=python3.12 names another Python to make the environment with (3.11 or newer)."

env: ## make .venv, or bring it up to date (the other targets do this too)
	@command -v "$(PYTHON)" >/dev/null || { echo "There is no $(PYTHON) here. Install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" .ci/environment.py

book: env ## run every notebook and render the book; says which page to open
	@$(VENV_PYTHON) book/build.py book

preview: env ## render the book with the outputs stored in the notebooks, without running them
	@$(VENV_PYTHON) book/build.py preview

execute: env ## run the notebooks in place and store their outputs; CHAPTER=roofline for one
	@$(VENV_PYTHON) book/build.py execute $(CHAPTER)

test: env ## lint, types, imports, spelling, tests, and every notebook against its stored outputs
	@$(VENV_PYTHON) .ci/checks.py test

test-other: env ## the notebooks once more, computed as another processor would
	@$(VENV_PYTHON) .ci/checks.py test-other

lint: env ## the part of `make test` that runs no code of ours
	@$(VENV_PYTHON) .ci/checks.py lint

pages: book ## open every page of the built book in Chromium and look for faults
	@$(VENV_PYTHON) tests/pages.py

bench: env ## speed and accuracy beside other tools
	@$(VENV_PYTHON) benchmarks/analyze_speed.py

wheel: env ## build dist/rooflm-*.whl, which carries data/
	@$(VENV_PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

clean: ## remove what the targets wrote, but keep .venv
	@rm -rf book/_build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .venv-setup.log
	@find lib tests book benchmarks .ci -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
