# Builds, tests and demonstrates Defib on a Debian or Ubuntu machine with Python, git and make.
PYTHON ?= python3
VENV := .venv
PARTS := $(CURDIR)/.parts
# Grafana's own code, in which long tests look at the dashboards.
GRAFANA := tests/grafana/node_modules/.package-lock.json
BIN := $(VENV)/bin
# Of what is installed; requirements-build.lock is what builds it.
LOCKS := requirements.lock requirements-feishu.lock requirements-grpc.lock
ARGS ?=
# Most tests spend most of their time waiting.
WORKERS ?= $(shell n=$$(( $$(nproc) * 3 )); echo $$(( n > 16 ? 16 : n )))
PYTEST = $(BIN)/pytest -n $(WORKERS) --dist worksteal --durations=20
# Without bytecode, every program that a test starts would compile all modules.
unexport PYTHONDONTWRITEBYTECODE
export PATH := $(PARTS)/bin:$(PATH):/usr/local/sbin:/usr/sbin:/sbin

.PHONY: help install deps check format test test-all chaos demo bench fleet week dashboards lock audit image-digests clean

help: ## Show this help
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

test-all: deps check $(GRAFANA) ## Run the checks and all tests (up to an hour)
	$(PYTEST) -m "long or not long" $(ARGS)

chaos: deps ## Kill the remediator 200 times during many restarts (ARGS="KILLS SEED")
	$(BIN)/python -m tests.chaos $(ARGS)

week: deps ## Simulate a week, and count the notifications that need no action (ARGS="SEED --verbose")
	$(BIN)/python -m tests.simulated_week $(ARGS)

fleet: deps ## Break a small fleet in many ways, for an hour and a half
	DEFIB_FLEET=long $(BIN)/pytest -o faulthandler_timeout=9300 -m long tests/e2e/test_fleet.py $(ARGS)

dashboards: $(VENV)/developed ## Regenerate the JSON of the dashboards
	$(BIN)/python -m grafana

demo: install $(PARTS)/demo ## Show the whole loop on this machine (ARGS="--once --json")
	@$(BIN)/defib demo $(ARGS)

bench: deps ## Run the benchmarks (ARGS=NAME for one)
	$(BIN)/python -m tests.bench $(ARGS)

# Each lock adds to those before it: requirements.lock, one lock for each extra, then everything for development.
COMPILE = $(BIN)/uv pip compile -q --no-header --generate-hashes --no-strip-markers $(ARGS)
LOCKED = $$(sed -n 's/^\([^ =]*\)==.*/--no-emit-package \1/p' requirements.lock)
lock: $(VENV)/developed ## Add to the lock files what pyproject.toml needs (ARGS=--upgrade: newest versions)
	$(COMPILE) pyproject.toml -o requirements.lock
	$(COMPILE) pyproject.toml --extra feishu -c requirements.lock $(LOCKED) -o requirements-feishu.lock
	$(COMPILE) pyproject.toml --extra grpc -c requirements.lock -c requirements-feishu.lock $(LOCKED) -o requirements-grpc.lock
	$(COMPILE) pyproject.toml --extra dev --extra feishu --extra grpc $(addprefix -c ,$(LOCKS)) -o requirements-dev.lock
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
		| $(COMPILE) - -c requirements-dev.lock -o requirements-build.lock

audit: $(VENV)/developed ## Look for known vulnerabilities of the locked packages (needs https://pypi.org)
	@$(BIN)/python -c 'from urllib.request import urlopen; urlopen("https://pypi.org/pypi/pip/json", timeout=20)' 2>/dev/null \
		|| { echo "make audit: cannot reach https://pypi.org, which lists known vulnerabilities; nothing was checked" >&2; exit 1; }
	$(BIN)/pip-audit --strict --disable-pip --require-hashes $(addprefix -r ,$(LOCKS) requirements-build.lock)

image-digests: $(VENV)/installed ## Pin the images to the digests that their registry has (REGISTRY=mirror)
	$(BIN)/python -m deploy.image_digests docker-compose.yml Dockerfile

clean: ## Remove everything that make created
	rm -rf $(VENV) $(PARTS) tests/grafana/node_modules build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Defib needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) -V). Use another: make PYTHON=python3.12 …" >&2; exit 1; }
	@echo "Creating the virtual environment $(VENV) …"
	@sh deploy/venv.sh $(PYTHON) $(VENV) $(PARTS)

$(VENV)/installed: pyproject.toml requirements.lock requirements-build.lock | $(BIN)/python
	@echo "Downloading the $$(grep -c == requirements.lock) Python packages of requirements.lock into $(VENV) (about 30 MB) …"
	@$(BIN)/python -m pip install --disable-pip-version-check --require-hashes -r requirements.lock -r requirements-build.lock
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/developed: requirements-dev.lock $(VENV)/installed
	@echo "Downloading the Python packages of requirements-dev.lock into $(VENV) …"
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

$(PARTS)/demo: deploy/parts.sh
	@sh deploy/parts.sh $(PARTS) demo
	@touch $@

# Left out with a message if there is no npm, as the tests that need Node.js are.
$(GRAFANA): tests/grafana/package-lock.json
	@if command -v npm >/dev/null; then npm ci --prefix tests/grafana --ignore-scripts --no-audit --no-fund; \
		else echo "There is no npm: tests that need Grafana's code are left out" >&2; test -z "$$CI"; fi

# Tests that need a program that cannot be downloaded are skipped and listed; in CI that is an error.
$(PARTS)/test: deploy/parts.sh
	@sh deploy/parts.sh $(PARTS) test || test -z "$$CI"
	@mkdir -p $(PARTS) && touch $@
