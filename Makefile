# Everything here works on a fresh Debian machine with Python >= 3.11: scripts/setup does the rest.
SHELL := /bin/bash
BIN := .venv/bin
PYTEST := $(BIN)/pytest
# Tests that run at a time. Most leave a core idle: they wait, or Python's lock does.
WORKERS ?= 2
TOGETHER = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
export PROMPT MODEL

.PHONY: help setup demo check test test-all bench bench-idle clean

help:
	@echo 'make demo       two questions about four pictures through E/P/D, compared with EPD'
	@echo '                IMAGES="a.jpg b.png" PROMPT="..." MODEL=folder-or-hub-name use your own'
	@echo 'make check      ruff, mypy --strict, import-linter, sizes'
	@echo 'make test       the tests; make test-all adds the full matrices'
	@echo 'make bench      the same loads on several topologies of a small model'
	@echo 'make bench-idle what an idle role, /encode and the router cost'
	@echo 'make clean      remove the environment, logs and caches'

setup:
	@scripts/setup

demo: setup
	@$(BIN)/triptych demo $(if $(IMAGES),--images $(IMAGES)) \
		$(if $(PROMPT),--prompt "$$PROMPT") $(if $(MODEL),--model "$$MODEL")

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_size.py

test: setup
	$(PYTEST) -m 'not full and not gpu and not timed' $(TOGETHER)
	$(PYTEST) -m 'timed and not full and not gpu'

test-all: setup
	$(PYTEST) -m 'not gpu and not timed' $(TOGETHER)
	$(PYTEST) -m 'timed and not gpu'

bench: setup
	$(BIN)/triptych bench topologies --together 2

bench-idle: setup
	$(BIN)/python benchmarks/idle_and_latency.py

clean:
	rm -rf .venv .demo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
