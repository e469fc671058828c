# The commands of this project. `make serve` and `make test` are all that a newcomer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests run beside a service and its workers: one thread each keeps them from fighting over cores.
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: serve test check verify lint format redis clean

serve: $(STAMP) ## answer on http://127.0.0.1:8000 with the bundled model
	$(BIN)/tarflow serve

test: check ## everything that CI runs

check: $(STAMP) redis lint
	$(ONE_THREAD) $(BIN)/pytest -m "not long"

verify: check ## the long checks too
	$(ONE_THREAD) $(BIN)/pytest -m long

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

redis: ## a real redis-server for the tests
	@command -v redis-server >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq redis-server >/dev/null; \
	  else \
	    echo "The tests need a redis-server (6.2 or later) on PATH: install it with your system's packages," >&2; \
	    echo "for example 'sudo apt-get install redis-server' or 'brew install redis'." >&2; exit 1; \
	  fi; }

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
