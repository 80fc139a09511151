# make demo       see it work: an index of some articles, and questions with and without reuse
# make test       lint, types, and the tests that a change should pass (some nine minutes)
# make test-all   the same with every test there is: the full matrix of architectures, many kills,
#                 the notebooks, training (half an hour or more)
# make lint       lint and types
# make coverage   all tests, and what they run of the code (takes half as long again)
# make docs       the documentation as pages in build/docs
# make clean      remove what the others made
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
PIP    := $(BIN)/python -m pip install --disable-pip-version-check

.PHONY: demo test test-all coverage lint docs clean

demo: $(VENV)/.installed
	@$(BIN)/kvlink demo

test: lint
	@$(PYTEST) --quick

test-all: lint
	@$(PYTEST)

coverage: $(VENV)/.installed-dev
	@$(PYTEST) --cov --cov-report=term

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# Needs no network once it is installed, and fails where a link leads nowhere.
docs: $(VENV)/.installed-docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "written: build/docs/index.html"

clean:
	rm -rf $(VENV) build dist .coverage .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: everything else then finds it there and brings no second one.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing torch and kvlink-rag into $(VENV) (a few minutes, once)"
	@$(PIP) $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)
	@$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@$(PIP) -c constraints.txt -e '.[docs]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "kvlink_rag needs python 3.10 to 3.13, and '$(PYTHON)' is:"; $(PYTHON) --version; \
	  echo "name another one: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "This python cannot make virtual environments (Debian and Ubuntu leave that part out)."; \
	  echo "Install it (apt-get install python3-venv) and run make again."; exit 1; }
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
