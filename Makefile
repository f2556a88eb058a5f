# Set-up, demo, tests: everything a newcomer or the CI runs. `make` alone lists the targets.

# The first of these that is 3.11 or newer; PYTHON=... names another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
STAMP_ALL := $(VENV)/.stamp-all
STAMP_SIM := $(VENV)/.stamp-sim
OUT := out
PYTEST_ARGS ?=
BENCH_ARGS ?=
TWIN_ARGS ?=
# One more than cores: a third of a test's time goes by in waiting for clocks and other processes.
WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)

.DEFAULT_GOAL := help
.PHONY: help install demo test proofs lint strip hooks docs check bench auto twin twin-outside clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:[^#]*## /\t/' | expand -t 10

install: $(STAMP_ALL)  ## the whole set-up: .venv with all extras and the development tools

demo: $(STAMP_SIM) examples/batch.jsonl  ## plan the example batch (out/report.html), then run it against a provider here
	@$(BIN)/paceline plan examples/batch.jsonl --env-file examples/today.env --out $(OUT)
	@$(BIN)/python examples/live.py --out $(OUT)

# A test that other processes starved may pass at the second try: it is listed as RERUN above the closing line. The
# seed stays the same, so a random test that fails fails again.
test: $(STAMP_ALL)  ## the whole test suite, a process more than cores (PYTEST_ARGS='-k law' for a part)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --reruns 2 $(PYTEST_ARGS)

proofs: $(STAMP_ALL)  ## the long forms of tests: a hundred kills, a million requests in both worlds
	@$(BIN)/python -m pytest -m long --timeout 3600 $(PYTEST_ARGS)

lint: $(STAMP_ALL)  ## ruff, the rooms' imports and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@$(BIN)/mypy

docs: $(STAMP_ALL)  ## the documentation (out/site/index.html); a warning or a dead link is an error
	@$(BIN)/python docs/build.py $(OUT)/site

strip: $(STAMP_ALL)  ## take the outputs out of the notebooks: they belong to a run, not to the repository
	@$(BIN)/python -m nbstripout notebooks/*.ipynb

hooks: $(STAMP_ALL)  ## let git do that by itself, whenever a notebook is added
	@$(BIN)/python -m nbstripout --install

# One after the other even under `make -j`, so that pytest's closing line is the last.
check: lint  ## what the CI runs: lint, documentation, then test
	@$(MAKE) --no-print-directory docs
	@$(MAKE) --no-print-directory test

bench: $(STAMP_ALL)  ## every figure that the README claims (BENCH_ARGS=--short for a quick look)
	@missed=; for script in benchmarks/bench_*.py; do \
		name=$$(basename "$$script" .py); echo "== $$name"; \
		$(BIN)/python -m "benchmarks.$$name" $(BENCH_ARGS) || missed="$$missed $$name"; \
	done; [ -z "$$missed" ] || { echo "not as promised:$$missed" >&2; exit 1; }

auto: $(STAMP_ALL)  ## live, flex or Batch API: 200 drawn cases against the clairvoyant's bound (BENCH_ARGS=--list)
	@$(BIN)/python -m benchmarks.bench_auto $(BENCH_ARGS)

twin: $(STAMP_ALL)  ## 200 pairs of live runs against what is said of them, into docs (TWIN_ARGS=--short: 3, not written)
	@$(BIN)/python -m benchmarks.twin $(or $(TWIN_ARGS),--write)

twin-outside: $(STAMP_ALL)  ## the same against rate limiters of others: slowapi, pyrate-limiter (TWIN_ARGS=--short)
	@$(BIN)/python -m benchmarks.twin_outside $(TWIN_ARGS)

clean:  ## remove the environment, the caches and out/
	rm -rf $(VENV) $(OUT) docs/made build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache .numba_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

examples/batch.jsonl: | $(STAMP_SIM)
	@$(BIN)/python examples/make_batch.py

$(BIN)/pip:
	@[ -n "$(PYTHON)" ] || { echo "Paceline needs Python 3.11 or newer and found none: name one with PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "PYTHON=$(PYTHON) is not a Python 3.11 or newer ($$($(PYTHON) --version 2>&1 | tail -n 1)): name another" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make environments: install its venv module (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# Everything includes what planning needs, so the light stamp is current too. A failed pip leaves no stamp.
$(STAMP_ALL): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "setting up $(VENV) with all extras and tools: a minute or two the first time ..."
	@$(PIP) install --constraint constraints.txt --editable '.[all,dev,docs]'
	@.ci/promtool $(BIN)
	@touch $(STAMP_SIM) $@

$(STAMP_SIM): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "setting up $(VENV) with what planning and rehearsing need: about a minute the first time ..."
	@$(PIP) install --constraint constraints.txt --editable '.[sim,server]'
	@touch $@
