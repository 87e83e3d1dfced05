# make demo: a report from a fresh clone. make test: the tests. make docs: the documentation as a site.
# Each makes .venv and installs what it needs.
# make survival: 50 kills of each way. make hostile: every hostile input and more of the fuzzer than make test runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo

.PHONY: demo test check docs gallery survival hostile format clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/netgloss demo --out $(OUT)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

gallery: $(VENV)/.installed
	$(BIN)/python scripts/make_gallery.py

survival: $(VENV)/.installed
	$(BIN)/python tests/survival.py --kills 50 --by both

hostile: $(VENV)/.installed
	$(BIN)/python -m pytest tests/test_hostile.py tests/test_fuzz.py --all-hostile

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) demo site
