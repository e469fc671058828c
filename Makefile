# The commands of this project. `make serve` and `make test` are all that a newcomer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := redis-server dataset-fashion-mnist curl openssl prometheus chromium fonts-liberation
# What they bring that is asked for here.
PROGRAMS := redis-server curl openssl promtool chromium
# What builds images where no Docker engine runs, and what torch.compile takes.
BUILDERS := buildah debootstrap g++
DATASET := /usr/share/datasets/fashion-mnist
# Tests run beside a service and its workers: one thread each keeps them from fighting over cores.
ONE_THREAD := OMP_NUM_THREADS=1
# Whole files, since a file's tests may share a server.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: serve test check verify lint format tools tools-verify screenshots clean

serve: $(STAMP) ## answer on http://127.0.0.1:8000 with the bundled model
	$(BIN)/tarflow serve

test: check ## everything that CI runs

check: $(STAMP) tools lint
	$(ONE_THREAD) $(BIN)/pytest -m "not long" $(PARALLEL)

verify: check tools-verify ## the long checks too
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

tools: ## what the tests need from the system: real servers, a real browser, a real data set
	@if ! (test -d $(DATASET) && for program in $(PROGRAMS); do command -v $$program >/dev/null || exit 1; done); then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(PACKAGES) >/dev/null; \
	  else \
	    echo "The tests need $(PROGRAMS) (Redis 6.2 or later), and Fashion-MNIST in $(DATASET):" >&2; \
	    echo "on Debian or Ubuntu, 'sudo apt-get install $(PACKAGES)'." >&2; exit 1; \
	  fi; fi

tools-verify: ## what the long tests need beside it: a compiler, and Docker, or what builds images without it
	@if ! { command -v g++ && { docker info || { command -v buildah && command -v debootstrap; }; }; } >/dev/null 2>&1; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(BUILDERS) >/dev/null; \
	  else \
	    echo "The long tests need g++ and, to build the images, Docker's engine; or as root 'apt-get install $(BUILDERS)'." >&2; \
	    exit 1; \
	  fi; fi

screenshots: $(STAMP) tools ## make the pictures of the page that the README shows
	$(ONE_THREAD) $(BIN)/python -m tests.page.screenshots

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
