PYTHON ?= python3
BIN := .venv/bin

.PHONY: test lint clean

# The stamp is remade when what it was made from changes.
.venv/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

test: .venv/stamp
	$(BIN)/python -m pytest -q --cov --cov-report=term $(TEST_ARGS)

lint: .venv/stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .coverage
