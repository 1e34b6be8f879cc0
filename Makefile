# make demo   real bars from a simulated gateway into checked CSV files, compared with their source
# make test   linters, types, tests
# make test-ib-async  the tests of the gateway client, with ib_async in place of ib_insync (part of make test)
# make test-all   the same on every Python this project supports, each in an environment of its own
# make ui     the Dagster UI on the demo's data, with the simulated gateway behind it
# make bench  measurements beside their rivals, into docs/benchmarks.md (25 minutes; some: make bench BENCH="jobs rows")
# make soak   130 requests and a backfill beside tails in real time, paced and judged: an hour
# make matrix every fault in every mode and timeframe, as a table (minutes)
# make kills  two hundred loads killed at random instants (the tests kill a few)
# make mutants   changes in the core packages that no test notices (minutes; MUTANTS="--minutes 20 --seed 2")
# make reference   docs/reference.md from the code
# make lint   ruff, mypy, import contracts
# Needs Python 3.11 to 3.13 and make; everything else is installed into .venv from requirements.lock.

PYTHON ?= python3
# Minor versions of Python that `make test-all` runs, oldest first.
PYTHONS ?= 3.11 3.12 3.13
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INITDB := $(firstword $(wildcard /usr/lib/postgresql/*/bin/initdb) $(shell command -v initdb))
export UV_COMPILE_BYTECODE := 1

.PHONY: demo test test-ib-async test-all ui bench soak matrix kills mutants reference lint quick-lint lock clients clean

demo: $(READY)
	@$(BIN)/python tools/demo.py

ui: $(READY)
	@$(BIN)/python tools/demo.py --ui

test: quick-lint clients
ifeq ($(INITDB),)
	@echo "No PostgreSQL on this machine: leaving out the tests of the pacing ledger in PostgreSQL."
endif
	@echo "$(BIN)/mypy beside $(BIN)/python -m pytest; what mypy finds comes last"
	@$(BIN)/mypy > $(VENV)/mypy.log 2>&1 & types=$$!; \
	  $(BIN)/python -m pytest -n 3 --dist worksteal $(if $(INITDB),,-m "not postgres"); tests=$$?; \
	  $(MAKE) --no-print-directory test-ib-async || tests=$$?; \
	  wait $$types; types=$$?; echo "mypy:"; cat $(VENV)/mypy.log; exit $$((tests || types))

test-ib-async: clients
	IB_LIBRARY=ib_async .venvs/ib_async/bin/python -m pytest -n 3 --dist worksteal ktrdr_pipelines_tests/ib --ignore ktrdr_pipelines_tests/ib/pacing

test-all:
	@found=""; for version in $(PYTHONS); do \
	  if python=$$(tools/find_python.sh $$version); then found="$$found $$version=$$python"; \
	  else echo "No Python $$version on this machine: leaving out its tests."; fi; done; \
	if [ -z "$$found" ]; then echo "None of Python $(PYTHONS) found."; exit 1; fi; \
	for each in $$found; do \
	  echo "== Python $${each%%=*}"; $(MAKE) test PYTHON="$${each#*=}" VENV=.venv-$${each%%=*} || exit 1; done

lint: quick-lint
	$(BIN)/mypy

quick-lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

bench: $(READY)
	@$(BIN)/python tools/make_venvs.py polars || echo "Leaving out polars."
	@PYTHONPATH=$(CURDIR) $(BIN)/python benchmarks/run.py $(BENCH)

soak: $(READY)
	@PYTHONPATH=$(CURDIR) $(BIN)/python tools/soak.py && PYTHONPATH=$(CURDIR) $(BIN)/python tools/soak.py --classes 40

matrix: $(READY)
	@PYTHONPATH=$(CURDIR) $(BIN)/python tools/matrix.py

kills: $(READY)
	KILLS=200 $(BIN)/python -m pytest -s ktrdr_pipelines_tests/scenarios/test_kills.py -k random_instants

mutants: $(READY)
	@$(BIN)/python tools/mutants.py $(MUTANTS)

reference: $(READY)
	@$(BIN)/python tools/make_reference.py

# Environments of the client libraries that prove the simulated gateway: they cannot share one with ib_insync.
clients: $(READY)
	@$(BIN)/python tools/make_venvs.py ib_async ibapi

lock: $(READY)
	$(BIN)/python -m uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate \
	  --python-version 3.11 --extra demo --extra postgres --extra deploy --extra api --extra dev pyproject.toml -o requirements.lock

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
	  f"ktrdr pipelines needs Python 3.11 to 3.13, and $(PYTHON) is {v[0]}.{v[1]}; try: make PYTHON=python3.12")'
	@echo "Creating $(VENV) from requirements.lock (once, about half a minute) ..."
	@rm -rf $(VENV) && $(PYTHON) -m venv $(VENV)
	@awk '/^uv==/{p=1} p{print} p&&!/\\$$/{exit}' requirements.lock > $(VENV)/uv.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r $(VENV)/uv.lock
	@$(BIN)/python -m uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --offline -e .
	@touch $(READY)

clean:
	rm -rf .venv .venv-* .venvs mutants demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
