# Builds, tests and demonstrates Defib on a fresh Debian or Ubuntu machine with Python, git and make.
PYTHON ?= python3
VENV := .venv
PARTS := $(CURDIR)/.parts
BIN := $(VENV)/bin
ARGS ?=
# More workers than cores, since most tests wait most of the time.
WORKERS ?= $(shell n=$$(( $$(nproc) * 3 )); echo $$(( n > 16 ? 16 : n )))
PYTEST = $(BIN)/pytest -n $(WORKERS) --dist worksteal --durations=20
# Without bytecode caches, every process started by a test would compile all modules, and every worker all tests.
unexport PYTHONDONTWRITEBYTECODE
export PATH := $(PARTS)/bin:$(PATH):/usr/local/sbin:/usr/sbin:/sbin

.PHONY: help install deps check format test test-all chaos demo bench fleet dashboards lock clean

help: ## Show this help
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/installed ## Install .venv/bin/defib

deps: $(VENV)/developed $(PARTS)/test ## Install everything needed for development and tests

check: $(VENV)/developed $(PARTS)/test ## Check style, types, import directions, and the syntax of rules and configuration
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	promtool check config --syntax-only alerts/prometheus.yml
	promtool check rules alerts/rules/*.yml
	amtool check-config alerts/alertmanager.yml

format: $(VENV)/developed ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: deps check ## Check, then run all tests except the long ones
	$(PYTEST) $(ARGS)

test-all: deps check ## Check, then run all tests, up to an hour
	$(PYTEST) -m "long or not long" $(ARGS)

chaos: deps ## Kill the remediator 200 times during a storm (ARGS="KILLS SEED")
	$(BIN)/python -m tests.chaos $(ARGS)

fleet: deps ## Break a small fleet with the shipped configuration in every way, 90 minutes
	DEFIB_FLEET=long $(BIN)/pytest -o faulthandler_timeout=9300 -m long tests/e2e/test_fleet.py $(ARGS)

dashboards: $(VENV)/developed ## Generate the dashboards' JSON
	$(BIN)/python -m grafana

demo: install $(PARTS)/demo ## Show the whole loop on this machine (ARGS="--once --json")
	@$(BIN)/defib demo $(ARGS)

bench: deps ## Measure, compared with peers in the same run
	$(BIN)/python -m tests.bench $(ARGS)

lock: $(VENV)/developed ## Update the lock files from pyproject.toml
	$(BIN)/uv pip compile -q pyproject.toml --no-header --generate-hashes --upgrade -o requirements.lock
	$(BIN)/uv pip compile -q pyproject.toml --no-header --generate-hashes --extra dev --extra feishu --extra grpc -c requirements.lock -o requirements-dev.lock

clean: ## Remove everything that make has created
	rm -rf $(VENV) $(PARTS) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Defib needs Python 3.11 or newer; this is $$($(PYTHON) -V). Select one: make PYTHON=python3.12 …" >&2; exit 1; }
	sh deploy/venv.sh $(PYTHON) $(VENV) $(PARTS)

$(VENV)/installed: pyproject.toml requirements.lock | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

$(VENV)/developed: requirements-dev.lock $(VENV)/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.lock
	@touch $@

$(PARTS)/demo: deploy/parts.sh
	@sh deploy/parts.sh $(PARTS) demo
	@touch $@

# On a machine that cannot have them all, the tests that need the missing ones are left out and named; in CI that fails.
$(PARTS)/test: deploy/parts.sh
	@sh deploy/parts.sh $(PARTS) test || test -z "$$CI"
	@mkdir -p $(PARTS) && touch $@
