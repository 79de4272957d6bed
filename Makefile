# Everything a developer runs. Each target sets up what it needs: python3.11 or later and make are enough.
.DEFAULT_GOAL := help
.PHONY: help venv demo test bench bench-memory lint format docs soak clean compiler

# The first Python that is new enough; `make PYTHON=/path/to/python test` chooses another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

help: ## Print this list.
	@sed -n 's/^\([a-z][a-z]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | \
	while IFS='|' read -r target sentence; do printf '%-14s %s\n' "$$target" "$$sentence"; done

venv: $(STAMP) ## Make the virtual environment .venv with the package (editable) and every tool.

demo: $(STAMP) ## Show what the library does, on a 2 GiB array.
	$(BIN)/userfault demo $(ARGS)

# The variable is for the programs that tests start; a pager follows its application (see pager/spawn.py).
test: $(STAMP) compiler ## Run the test suite in Python's development mode; ARGS="-k name" goes to pytest.
	PYTHONDEVMODE=1 $(BIN)/python -X dev -m pytest $(ARGS)

# Twenty minutes of everything at once; the pager killed whole, a thousand times; deaths between state and kernel call;
# and changes: two hours of ten times what a budget holds, a model of 100 000 steps, deaths in mid-write.
SOAK := tests/crash/test_soak.py tests/crash/test_double_kills.py tests/crash/test_transitions.py \
	tests/crash/test_flush_transitions.py tests/crash/test_overcommit.py tests/crash/test_writing_ends.py \
	tests/property/test_writeback_model.py
soak: $(STAMP) compiler ## Kill for some hours, and print figures; ARGS=tests runs the long form of every test (hours).
	$(BIN)/python -m pytest --soak -o faulthandler_timeout=7200 $(or $(ARGS),$(SOAK))

bench: $(STAMP) compiler ## Measure fault latency against a C pager and numpy.memmap; results in benchmarks/results.
	$(BIN)/python benchmarks/fault_latency.py --output benchmarks/results $(ARGS)
	$(BIN)/python benchmarks/exported.py --output benchmarks/results $(ARGS)

bench-memory: $(STAMP) ## Measure arrays larger than memory against numpy.memmap (an hour), policies, and 1000 regions.
	$(BIN)/python benchmarks/policy.py --json benchmarks/results/policy.json --plot benchmarks/results/policy.svg
	$(BIN)/python benchmarks/many_regions.py --output benchmarks/results
	$(BIN)/python benchmarks/out_of_core.py --json benchmarks/results/out_of_core.json \
		--plot benchmarks/results/out_of_core.svg $(ARGS)

lint: $(STAMP) ## Check style (ruff) and types (mypy, strict).
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP) ## Format the sources and apply the safe fixes.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(STAMP) ## Run every example of the README and the manual.
	$(BIN)/python -m pytest tests/docs $(ARGS)

clean: ## Remove the virtual environment and everything that was built or cached.
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis benchmarks/results
	find . -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is complete when its stamp is newer than pyproject.toml; a half-made one has no stamp.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later found: install one, or say make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	apt-get update -q && apt-get install -q -y --no-install-recommends python3-venv; \
	else echo "$(PYTHON) has no venv module: install it (Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; fi; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# Tests compare structure sizes with the C compiler's and benchmarks build their reference pager with it.
compiler:
	@printf '#include <linux/userfaultfd.h>\n#include <stdio.h>\n' | cc -fsyntax-only -x c - 2>/dev/null || { \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	apt-get update -q && apt-get install -q -y --no-install-recommends gcc libc6-dev linux-libc-dev; \
	else echo "a C compiler with the libc headers is needed: install it (Debian and Ubuntu: apt-get install gcc libc6-dev)" >&2; exit 1; fi; }
