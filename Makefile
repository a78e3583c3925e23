# Builds, tests and demonstrates Defib on a Debian or Ubuntu machine with Python, git and make.
PYTHON ?= python3
VENV := .venv
PARTS := $(CURDIR)/.parts
BIN := $(VENV)/bin
ARGS ?=
# Most tests spend most of their time waiting.
WORKERS ?= $(shell n=$$(( $$(nproc) * 3 )); echo $$(( n > 16 ? 16 : n )))
PYTEST = $(BIN)/pytest -n $(WORKERS) --dist worksteal --durations=20
# Without bytecode, every program that a test starts would compile all modules.
unexport PYTHONDONTWRITEBYTECODE
export PATH := $(PARTS)/bin:$(PATH):/usr/local/sbin:/usr/sbin:/sbin

.PHONY: help install deps check format test test-all chaos demo bench fleet dashboards lock clean

help: ## Show this help
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/installed ## Install Defib and its dependencies into .venv

deps: $(VENV)/developed $(PARTS)/test ## Install the dependencies of development and tests into .venv and .parts

check: $(VENV)/developed $(PARTS)/test ## Run the linters, the type checker and the checks of rules and configuration
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

test: deps check ## Run the checks and all tests except long ones
	$(PYTEST) $(ARGS)

test-all: deps check ## Run the checks and all tests (up to an hour)
	$(PYTEST) -m "long or not long" $(ARGS)

chaos: deps ## Kill the remediator 200 times during many restarts (ARGS="KILLS SEED")
	$(BIN)/python -m tests.chaos $(ARGS)

fleet: deps ## Break a small fleet in many ways, for an hour and a half
	DEFIB_FLEET=long $(BIN)/pytest -o faulthandler_timeout=9300 -m long tests/e2e/test_fleet.py $(ARGS)

dashboards: $(VENV)/developed ## Regenerate the JSON of the dashboards
	$(BIN)/python -m grafana

demo: install $(PARTS)/demo ## Show the whole loop on this machine (ARGS="--once --json")
	@$(BIN)/defib demo $(ARGS)

bench: deps ## Run the benchmarks (ARGS=NAME for one)
	$(BIN)/python -m tests.bench $(ARGS)

lock: $(VENV)/developed ## Update the lock files from pyproject.toml
	$(BIN)/uv pip compile -q pyproject.toml --no-header --generate-hashes --upgrade -o requirements.lock
	$(BIN)/uv pip compile -q pyproject.toml --no-header --generate-hashes --extra dev --extra feishu --extra grpc -c requirements.lock -o requirements-dev.lock

clean: ## Remove everything that make created
	rm -rf $(VENV) $(PARTS) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Defib needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) -V). Use another: make PYTHON=python3.12 …" >&2; exit 1; }
	@echo "Creating the virtual environment $(VENV) …"
	@sh deploy/venv.sh $(PYTHON) $(VENV) $(PARTS)

$(VENV)/installed: pyproject.toml requirements.lock | $(BIN)/python
	@echo "Downloading the $$(grep -c == requirements.lock) Python packages of requirements.lock into $(VENV) (about 30 MB) …"
	@$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

$(VENV)/developed: requirements-dev.lock $(VENV)/installed
	@echo "Downloading the Python packages of requirements-dev.lock into $(VENV) …"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.lock
	@touch $@

$(PARTS)/demo: deploy/parts.sh
	@sh deploy/parts.sh $(PARTS) demo
	@touch $@

# Tests that need a program that cannot be downloaded are skipped and listed; in CI that is an error.
$(PARTS)/test: deploy/parts.sh
	@sh deploy/parts.sh $(PARTS) test || test -z "$$CI"
	@mkdir -p $(PARTS) && touch $@
