# `make` lists the targets. Everything is installed into one folder, $(VENV).
#
# Each finished step is a file in $(DONE), so that nothing is installed twice:
#
#   python ──> run ──> package      make demo
#               ├────> dev          make lint; make test needs both
#               └────> bench        make bench, with package

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PYTEST_ARGS ?=
SECONDS ?= 600
SEED ?=
ONLY ?=
PEERS ?=
SIZE ?= full
HISTORY ?=
OUT ?=

ifneq ($(words $(VENV)),1)
$(error VENV must be one word, without spaces: '$(VENV)')
endif
BIN := $(VENV)/bin
DONE := $(VENV)/done
# The tools that check the page's code.
JAVASCRIPT := tests/javascript
# Labelers and consumers by other authors, which tests run: the newest Ozone, and an older one that
# is still in use. They are installed into a cache outside the tree, once for each lock.
NODE := tests/node
NODE_CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/sse-labels
# In $(VENV), because a cache of another user in the checkout cannot be written.
CACHES := $(VENV)/caches
WHEELS := $(VENV)/wheels
PIP := $(BIN)/python -m pip

# With the folders, so that a deleted file counts as a change.
SOURCES := $(shell find sse_labels sql -name __pycache__ -prune -o -print)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
export PIP_NO_INPUT := 1
export RUFF_CACHE_DIR := $(CACHES)/ruff
export MYPY_CACHE_DIR := $(CACHES)/mypy
export HYPOTHESIS_STORAGE_DIRECTORY := $(CACHES)/hypothesis
# A user's settings for other Pythons: with them Python would import the checkout as the package, or
# pip would install elsewhere.
unexport PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:
.PHONY: help demo test system soak bench lint format lock clean FORCE

## Targets

help: ## Show this list
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16
	@echo
	@echo "  ARGS=…         options of sse-labels demo: make demo ARGS='--port 8081'"
	@echo "  PYTEST_ARGS=…  options of pytest:          make test PYTEST_ARGS='-k cutover'"
	@echo "  SECONDS=…      length of a soak; SEED=… repeats the faults of an earlier soak"
	@echo "  ONLY=… PEERS=… SIZE=small HISTORY=… OUT=…"
	@echo "                 scenarios, peers (- for none), size, most labels stored, and folder"
	@echo "                 of a bench:                 make bench ONLY='A B' PEERS=nchan"
	@echo "  PYTHON=…       the Python to use          ($(PYTHON))"
	@echo "  VENV=…         where it is installed      ($(VENV))"

demo: $(DONE)/package ## Install, run a PostgreSQL of its own, serve, publish made-up labels
	@$(BIN)/sse-labels demo $(ARGS)

test: $(DONE)/package $(DONE)/dev $(DONE)/javascript $(DONE)/node system ## Install what the tests need, and run all of them
	@$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal -o cache_dir='$(CACHES)/pytest' $(PYTEST_ARGS)

system: $(DONE)/python ## As root: install the Debian packages for the tests; else print the command
	@set -eu; missing="$$($(BIN)/python tests/support/system.py)"; \
	[ -n "$$missing" ] || exit 0; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	  echo "tests that need them are skipped; on Debian: sudo apt-get install $$missing"; exit 0; fi; \
	if [ ! -e $(POLICY) ]; then \
	  trap 'rm -f $(POLICY)' EXIT; printf '#!/bin/sh\nexit 101\n' >$(POLICY); chmod +x $(POLICY); fi; \
	$(call apt_install,$$missing,)

soak: $(DONE)/package $(DONE)/dev $(DONE)/node system ## Run all faults in random order for SECONDS=600
	@SSE_LABELS_SOAK_SECONDS='$(SECONDS)' $(if $(SEED),SSE_LABELS_TEST_SEED='$(SEED)') \
	  $(BIN)/pytest -o cache_dir='$(CACHES)/pytest' $(PYTEST_ARGS) \
	  tests/soak/soak.py tests/soak/behind_nginx.py tests/soak/mirror.py tests/soak/dashboard.py tests/soak/foreign_clients.py tests/acceptance/test_frozen_readers.py

# The command as the user gave it; figures and tables show it.
bench_command = $(strip make bench $(foreach name,ONLY PEERS SIZE HISTORY,\
  $(if $(findstring file,$(origin $(name))),,$(name)="$($(name))")))

bench: $(DONE)/package $(DONE)/bench ## Measure the service beside its peers; takes a long while
	@cd tests && exec $(abspath $(BIN))/python -m benchmarks --command '$(bench_command)' \
	  --size '$(SIZE)' $(if $(ONLY),--only '$(ONLY)') $(if $(PEERS),--peers '$(PEERS)') \
	  $(if $(HISTORY),--history '$(HISTORY)') $(if $(OUT),--out '$(abspath $(OUT))')

lint: $(DONE)/dev $(DONE)/javascript ## Check style, types, and the direction of imports
	@status=0; \
	echo 'ruff check'; $(BIN)/ruff check --quiet . || status=1; \
	echo 'ruff format --check'; $(BIN)/ruff format --quiet --check . || status=1; \
	echo 'mypy'; $(BIN)/mypy --no-error-summary || status=1; \
	echo 'lint-imports'; $(BIN)/lint-imports --cache-dir $(CACHES)/imports >$(DONE)/imports.log 2>&1 \
	  || { cat $(DONE)/imports.log; status=1; }; \
	echo 'tsc'; $(BIN)/node $(JAVASCRIPT)/node_modules/typescript/bin/tsc -p $(JAVASCRIPT) || status=1; \
	exit $$status

format: $(DONE)/dev ## Format the code, and fix what ruff can fix
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format .

clean: ## Remove everything that make has made, but no data
	@test ! -e $(VENV)/pyvenv.cfg || rm -rf $(VENV)
	@rm -rf $(JAVASCRIPT)/node_modules build dist .cache .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	@find sse_labels tests -name __pycache__ -type d -prune -exec rm -rf {} +

## Steps

# $(call apt_install,PACKAGES,PROBLEM): installs them as root on Debian, else prints the command.
apt_install = if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "apt-get install $(1)"; export DEBIAN_FRONTEND=noninteractive; \
	  said="$$(apt-get update -qq 2>&1; \
	    apt-get install -qq --no-install-recommends -o DPkg::Lock::Timeout=120 $(1) 2>&1)" \
	    || { echo "$$said" >&2; exit 1; }; \
	else echo "$(2); on Debian: sudo apt-get install $(1)" >&2; exit 1; fi

# Debian starts the service of a package that it installs, unless this policy forbids it.
POLICY := /usr/sbin/policy-rc.d

# Checked each time, and changed only when $(VENV) is made anew: with another Python, in another
# folder (its programs contain the full path of their interpreter), or for another user.
$(DONE)/python: FORCE
	@set -eu; \
	fail() { echo "$$*" >&2; exit 1; }; \
	command -v $(PYTHON) >/dev/null || fail '$(PYTHON) is not installed; Python 3.11 or newer is needed (Debian: apt-get install python3), or say PYTHON=…'; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || fail "$$($(PYTHON) --version) is too old; Python 3.11 or newer is needed: say PYTHON=…"; \
	wanted="$$($(PYTHON) -c 'import os, sys; print(sys.version.split()[0], sys.base_prefix, os.getcwd(), os.getuid(), sep="\n")')"; \
	if [ "$$wanted" = "$$(cat $@ 2>/dev/null)" ] && $(BIN)/python -c 'import pip' 2>/dev/null; then exit 0; fi; \
	if [ -e $(VENV) ]; then \
	  [ -e $(VENV)/pyvenv.cfg ] || [ -z "$$(ls -A $(VENV))" ] || fail '$(VENV) is there already and is no virtual environment; say VENV=…'; \
	  rm -rf $(VENV) 2>/dev/null \
	    || fail "$(VENV) belongs to $$(stat -c %U $(VENV)): remove it (sudo rm -rf $(VENV)), or say VENV=…"; \
	fi; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  package="$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; \
	  $(call apt_install,$$package,$(PYTHON) cannot make virtual environments); }; \
	mkdir -p $(VENV) 2>/dev/null || fail 'cannot write here; say VENV=…'; \
	echo "making $(VENV) with $$($(PYTHON) --version)"; \
	$(PYTHON) -m venv $(VENV); \
	mkdir -p $(DONE); \
	echo "$$wanted" >$@

# The requirements of pyproject.toml, without the package itself. So a change of the sources costs
# one second. Versions and hashes of what runs and what is tested are locked, so that the same
# command passes a year from now. `make lock` renews the locks.
requirements = $(BIN)/python -c 'import sys, tomllib; \
	of = tomllib.load(open("pyproject.toml", "rb")); \
	extras = of["project"]["optional-dependencies"]; \
	extras["run"] = of["build-system"]["requires"] + of["project"]["dependencies"]; \
	extras["dev"] += extras["run"]; \
	print(*extras[sys.argv[1]], sep="\n")'
LOCKS := tests/python

# Wheels are kept, because test_wheel.py installs from them into an empty environment. The lock has
# no hash of a wheel that was built here, so the second step compares only versions.
$(DONE)/run: $(DONE)/python $(LOCKS)/run.lock
	@cmp -s $(LOCKS)/run.lock $@.installed || { echo 'installing what it runs on'; \
	  $(PIP) wheel -q -w $(WHEELS) --require-hashes -r $(LOCKS)/run.lock && \
	  sed -n 's/ *\\$$//; /^[a-z]/p' $(LOCKS)/run.lock >$@.wanted && \
	  $(PIP) install -q --no-index --find-links $(WHEELS) -r $@.wanted && \
	  cp $(LOCKS)/run.lock $@.installed; }
	@touch $@

$(DONE)/dev: $(DONE)/run $(LOCKS)/dev.lock
	@cmp -s $(LOCKS)/dev.lock $@.installed || { echo 'installing what it is tested with'; \
	  $(PIP) install -q --require-hashes -r $(LOCKS)/dev.lock && cp $(LOCKS)/dev.lock $@.installed; }
	@touch $@

# One lock holds for every supported Python. `run` gets the same versions as `dev`.
lock: $(DONE)/python ## Lock all packages of the program and its tests at today's versions
	@set -eu; tools=$(VENV)/lock; [ -x $$tools/bin/uv ] || { $(PYTHON) -m venv $$tools; $$tools/bin/pip install -q uv; }; \
	for of in dev run; do \
	  $(requirements) $$of >$(DONE)/$$of.in; also=''; [ $$of = dev ] || also='-c $(LOCKS)/dev.lock'; \
	  $$tools/bin/uv pip compile -q --universal --python-version 3.11 --upgrade --generate-hashes \
	    --no-header --no-annotate --no-emit-index-url $$also $(DONE)/$$of.in -o $(LOCKS)/$$of.lock; \
	done

$(DONE)/javascript: $(DONE)/dev $(JAVASCRIPT)/package-lock.json
	@echo 'installing what the page is checked with'
	@PATH="$(abspath $(BIN)):$$PATH" npm ci --prefix $(JAVASCRIPT) --loglevel=error --no-audit --no-fund >/dev/null
	@touch $@

# Checked each time: the cache may have been deleted, or filled by another VENV.
$(DONE)/node: $(DONE)/dev FORCE
	@set -eu; mkdir -p "$(NODE_CACHE)"; made=''; trap 'rm -rf "$$made"' EXIT; \
	for lock in $(NODE)/*/package-lock.json; do \
	  name="node-$$(sha256sum "$$lock" | cut -c1-12)"; \
	  [ ! -d "$(NODE_CACHE)/$$name" ] || continue; \
	  echo "installing the packages of $${lock%/*} into $(NODE_CACHE)"; \
	  made="$$(mktemp -d "$(NODE_CACHE)/making.XXXXXX")"; \
	  cp "$${lock%/*}/package.json" "$$lock" "$$made"; \
	  PATH="$(abspath $(BIN)):$$PATH" npm ci --prefix "$$made" --loglevel=error --no-audit --no-fund --ignore-scripts >/dev/null; \
	  mv -T "$$made" "$(NODE_CACHE)/$$name" 2>/dev/null || [ -d "$(NODE_CACHE)/$$name" ]; \
	done

$(DONE)/bench: $(DONE)/run
	@$(requirements) bench >$@.wanted
	@cmp -s $@.wanted $@.installed || { echo 'installing what it is measured beside'; \
	  $(PIP) install -q --prefer-binary -r $@.wanted && mv $@.wanted $@.installed; }
	@touch $@

$(DONE)/package: $(DONE)/run $(SOURCES)
	@echo 'installing sse_labels'
	@$(PIP) install -q --no-deps --force-reinstall --no-build-isolation .
	@touch $@
