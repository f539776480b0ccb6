# Two commands on a machine with Python 3.11 to 3.14, pip and make:
#   make demo   set up, fetch a small real model, run the main job
#   make test   set up, run the tests
# Both use their own .venv and start at once the second time. PYTHON=/path/to/python picks the interpreter for it.

VENV  := .venv
PY    := $(VENV)/bin/python
MODEL := smollm2-135m-instruct
CONSTRAINTS := .ci/constraints.txt
TESTS := $(PY) -m pytest -n auto --dist loadfile

.PHONY: help demo test check test-all lint docs clean

help:
	@echo "make demo      set up, fetch SmolLM2-135M-Instruct and run the main job on it (about a minute after setup)"
	@echo "make test      set up and run the tests"
	@echo "make check     lint, types and the quick tests (under 2 minutes)"
	@echo "make test-all  the full product of cases"
	@echo "make lint      ruff and mypy"
	@echo "make docs      build the documentation into site/, every link checked"
	@echo "make clean     remove .venv and caches"

demo: $(VENV)/.run
	@$(PY) -m puna pull $(MODEL) >/dev/null
	@$(PY) -m puna demo

test: $(VENV)/.dev
	$(TESTS)

check: lint
	$(TESTS) -m "not slow and not full"

test-all: $(VENV)/.dev
	$(TESTS) -m ""

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# The variable silences mkdocs-material's advertisement of its successor.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A stamp older than pyproject.toml is stale. The install is editable, so that changes of the source need none.
$(VENV)/.run: pyproject.toml | $(VENV)/.made
	@echo "Installing puna into $(VENV) (torch is large: minutes the first time) ..."
	@$(PY) -m pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/.made
	@echo "Installing puna with its test tools into $(VENV) (torch is large: minutes the first time) ..."
	@$(PY) -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	@touch $@ $(VENV)/.run

$(VENV)/.docs: pyproject.toml $(CONSTRAINTS) | $(VENV)/.made
	@echo "Installing puna with its documentation tools into $(VENV) (torch is large: minutes the first time) ..."
	@$(PY) -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[docs]"
	@touch $@ $(VENV)/.run

$(VENV)/.made:
	@rm -rf $(VENV)
	@for python in $(PYTHON) python3.13 python3.12 python3.11 python3.14 python3 python; do \
	  "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null || continue; \
	  echo "Making $(VENV) with $$("$$python" --version) ..."; \
	  "$$python" -m venv $(VENV) && touch $@ && exit 0; \
	  rm -rf $(VENV); echo "$$python has no venv module: on Debian and Ubuntu, apt install python3-venv"; exit 1; \
	done; \
	echo "No Python 3.11 to 3.14 was found: install one, or name it: make PYTHON=/path/to/python"; exit 1
