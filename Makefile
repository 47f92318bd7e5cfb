PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all test-web test-long lint lint-python lint-web bench results clean web screenshots

WEB := src/onthefly/hub/web

# The stamp is remade when what it was made from changes. pip would compile on one core alone, which takes as long as the rest. Some
# packages carry files that are no Python of this version: what cannot be compiled is left.
.venv/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	touch $@

# The dashboard. Node comes with the development packages.
web: $(WEB)/dist/index.html

$(WEB)/dist/index.html: .venv/stamp hatch_build.py $(wildcard $(addprefix $(WEB)/,package-lock.json index.html *.ts *.js)) $(shell find $(WEB)/src $(WEB)/public -type f)
	$(BIN)/python hatch_build.py
	touch $@

# Trains with a live view, then proves that it comes back bit for bit. DEMO_ARGS="--epochs 3 --no-view" needs nobody to watch.
demo: .venv/stamp web
	@$(BIN)/python examples/demo.py $(DEMO_ARGS)

# Those of the dashboard share one browser and one training, and run beside the others.
test: .venv/stamp web
ifdef TEST_ARGS
	$(BIN)/python -m pytest -q -n 2 --dist worksteal $(TEST_ARGS)
else
	$(MAKE) --jobs=2 test-all test-web
endif

test-all:
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --ignore=tests/web

test-web:
	$(BIN)/python -m pytest -q tests/web

# Which lines no test reaches in its own process; tests take a quarter longer.
coverage: .venv/stamp web
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --ignore=tests/web --cov --cov-report=term-missing:skip-covered $(TEST_ARGS)

lint: .venv/stamp web
	$(MAKE) --jobs=2 lint-python lint-web

lint-python:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lint-web:
	cd $(WEB) && PATH="$(CURDIR)/$(BIN):$$PATH" npm run --silent lint
	cd $(WEB) && PATH="$(CURDIR)/$(BIN):$$PATH" npm run --silent check
	cd $(WEB) && PATH="$(CURDIR)/$(BIN):$$PATH" npm run --silent test

# What takes many minutes: the full random matrix of exactness, in as many cells as ONTHEFLY_CELLS says, and every attack on the hub.
test-long: .venv/stamp
	$(BIN)/python -m pytest -q -m long $(TEST_ARGS)

# Every benchmark runs, also after one has missed its target.
bench: .venv/stamp web
	@failed=0; for name in start_up log_call step_overhead pause_latency checkpoint sample_selectors dynamics scan fork fisher merge \
		reports hub browser; do \
		$(BIN)/python benchmarks/$$name.py || failed=1; done; exit $$failed

# The README's pictures of the dashboard. They need a Chromium.
screenshots: .venv/stamp web
	$(BIN)/python docs/screenshots.py

# What docs/results/ reports, measured again: real data, 10 seeds. Figures go to results/.
results: .venv/stamp
	$(BIN)/python benchmarks/results/label_errors.py
	$(BIN)/python benchmarks/results/forking.py
	$(BIN)/python benchmarks/results/merging_tasks.py
	$(BIN)/python benchmarks/results/merging_soups.py
	$(BIN)/python benchmarks/results/merge_floor.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .coverage
