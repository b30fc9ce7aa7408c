# Everything a fresh machine needs: Python 3.11, Java 17 and make. Each target sets up what it uses.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The versions to work with: `current`, or `oldest`, the lower bounds of pyproject.toml.
STACK  ?= current
VENV   := $(if $(filter current,$(STACK)),.venv,.venv-$(STACK))
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
LAKE   ?= bench
# Two processes, a file at a time in the order of tests/conftest.py: one computes while the other waits for Spark.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

ifeq ($(wildcard requirements/$(STACK).lock),)
$(error STACK=$(STACK) has no lock below requirements/: give current or oldest)
endif

.DEFAULT_GOAL := help
.PHONY: help setup lock installs bench-stacks check-machine demo test test-fast test-more soak bench bench-retrieval lint settings notebook clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

setup: $(READY) ## create .venv (STACK=oldest: .venv-oldest), install the locked dependencies, fetch Delta's jars

demo: $(READY) ## make a small archive and run ingest, train, index, retrieve, evaluate over it
	$(BIN)/cbmir demo

test: $(if $(filter current,$(STACK)),lint,$(READY)) ## ruff, mypy and the tests, but for those of test-more and soak; at most 15 minutes on two cores; STACK=oldest: the tests alone
	$(PYTEST)

test-fast: $(READY) ## the tests without servers, clusters and training, for the loop of a change; 4 minutes
	$(PYTEST) -m "not soak and not more and not slow and not server"

test-more: $(READY) ## clusters, kills and whole chains of commands: with `make test`, what a submission must pass
	$(PYTEST) -m "more and not soak"

soak: $(READY) ## the tests that take hours: more mutants, cuts, kills and nights
	$(BIN)/python -m pytest -m soak

bench: $(READY) ## ingest and training beside their alternatives; results in tests/benchmarks
	$(BIN)/python -m tests.benchmarks.ingest
	$(BIN)/python -m tests.benchmarks.training

bench-retrieval: $(READY) ## retrieval and indexing beside their alternatives, over an AlexNet trained first; an hour
	$(BIN)/pip install --quiet --disable-pip-version-check faiss-cpu
	test -d $(LAKE) || $(BIN)/python -m tests.benchmarks.labelled --preset alexnet --lake $(LAKE)
	$(BIN)/python -m tests.benchmarks.retrieval --lake $(LAKE)
	$(BIN)/python -m tests.benchmarks.retrieval --lake $(LAKE) --disk
	$(BIN)/python -m tests.benchmarks.retrieval --lake $(LAKE) --others
	$(BIN)/python -m tests.benchmarks.retrieval --lake $(LAKE) --random
	$(BIN)/python -m tests.benchmarks.retrieval --lake $(LAKE) --tags
	$(BIN)/python -m tests.benchmarks.indexing --lake $(LAKE)

lint: $(READY) ## ruff, mypy and the other hooks of pre-commit, over every file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	SKIP=ruff,ruff-format,mypy $(BIN)/pre-commit run --all-files

lock: $(READY) ## renew the locks below requirements/ from pyproject.toml; UPGRADE=--upgrade takes newer versions
	PATH=$(CURDIR)/$(BIN):$$PATH deploy/lock.sh $(UPGRADE)

bench-stacks: $(READY) ## ingest, index and retrieve on both stacks in turn; after make setup STACK=oldest
	$(BIN)/python -m tests.benchmarks.stacks

installs: $(READY) ## install base, [embed] and [all] into empty environments: time, size, packages; results in tests/benchmarks
	$(BIN)/python -m tests.benchmarks.installs

settings: $(READY) ## renew conf/base.yaml with the descriptions that stand in the code
	$(BIN)/python -m cbmir_spark.config.annotate

notebook: $(READY) ## run the notebook over the demo's lake
	$(BIN)/jupytext --quiet --to ipynb --output demo/demo_lake.ipynb notebooks/demo_lake.py
	$(BIN)/jupyter-execute --inplace demo/demo_lake.ipynb

clean: ## remove the environment and all that the targets made
	rm -rf .venv .venv-oldest demo build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache

check-machine:
	@bash deploy/check_machine.sh "$(PYTHON)"

# The stamp makes a second `make` start at once, and a changed lock or jar list install again.
$(READY): pyproject.toml setup.py requirements/$(STACK).lock $(wildcard requirements/jars-*.lock) deploy/install.sh deploy/fetch_jars.py | check-machine
	deploy/install.sh "$(PYTHON)" $(VENV) requirements/$(STACK).lock
	@touch $@
