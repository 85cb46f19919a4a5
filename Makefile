# make demo, make test: each sets up .venv first if there is none; a second call installs nothing.
# make test-all runs the tests marked slow as well, as CI does.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/installed
SCORER := $(VENV)/scorer
# Waiting OpenMP threads must not spin: they would fight with decoder threads for the cores.
export OMP_WAIT_POLICY ?= PASSIVE
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: install demo test test-all faults lint docs lock oldest audit clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; name another one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# The official scorer asks for a newer Python than it needs, and one of its packages for a C compiler; the tests that run
# it are skipped where it cannot be installed.
$(SCORER): $(INSTALLED)
	-$(RUN) -m pip install --quiet --disable-pip-version-check click click-pathlib rdp zipfile-deflate64
	-$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python isic-challenge-scoring==5.8.0
	@touch $@

demo: install
	$(RUN) -m triderm_dist demo

# Each pytest worker takes one file after the other, in the order of tests/conftest.py: the longest first.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(SCORER)
	$(PYTEST)

test-all: $(SCORER)
	$(PYTEST) -m ''

# The fault matrix of docs/reliability.md: about an hour on two cores.
faults: install
	OMP_NUM_THREADS=1 $(RUN) -m tests.faults

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The documentation site in site/; strict: a broken link or anchor, or a page missing from the navigation, is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "open site/index.html"

# requirements.lock: the package with all extras and what else the image needs. uv keeps the versions that are already in
# the file where it can, here those of .venv, with which the tests ran.
lock: install
	$(RUN) -m pip install --quiet --disable-pip-version-check 'uv>=0.8'
	$(RUN) -m pip list --disable-pip-version-check --format freeze --exclude-editable > requirements.lock
	$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --extra all --no-annotate \
		--custom-compile-command 'make lock' --output-file requirements.lock \
		pyproject.toml launch/kubernetes/requirements.in

# The oldest versions that pyproject.toml allows, in an environment of their own.
oldest:
	PYTHON=$(PYTHON) .ci/oldest

# Known vulnerabilities of the versions in requirements.lock, by the database of PyPI or, with AUDIT=osv, of osv.dev.
AUDIT ?= pypi
audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet --disable-pip-version-check 'pip-audit>=2.9'
	.venv-audit/bin/pip-audit --requirement requirements.lock --strict --no-deps --disable-pip \
		--vulnerability-service $(AUDIT)

clean:
	rm -rf $(VENV) .venv-oldest .venv-audit runs/demo site
