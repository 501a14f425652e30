# make serve   install what is needed and start the server   (ARGS="--port 9000" passes through)
# make test    install what is needed and run the tests      (ARGS="-k journal" passes through)
# make lint    formatting, lint rules, types, layers
# make check   lint, then the tests with coverage
# make clean   remove the environment and every cache
#
# PYTHON       the interpreter to build .venv from (3.11 or newer)
# TORCH_INDEX  a package index to take torch from, for example
#              https://download.pytorch.org/whl/cpu (by default: wherever pip looks)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
ARGS ?=

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
TORCH = $(shell sed -n 's/^ *"\(torch[<>=].*\)",.*/\1/p' pyproject.toml)
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help serve test lint check dev clean

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

serve: $(INSTALLED)
	$(VENV)/bin/palimpsest serve $(ARGS)

test: $(INSTALLED_DEV)
	$(VENV)/bin/python -m pytest $(ARGS)

lint: $(INSTALLED_DEV)
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

check: lint
	$(VENV)/bin/python -m pytest --cov $(ARGS)

dev: $(INSTALLED_DEV)

clean:
	rm -rf $(VENV) build dist *.egg-info .coverage htmlcov .hypothesis .import_linter_cache \
		.mypy_cache .pytest_cache .ruff_cache .schemathesis
	find app tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml | $(VENV)/bin/python
	$(install-torch)
	$(PIP) install -e .
	@touch $@

$(INSTALLED_DEV): pyproject.toml | $(VENV)/bin/python
	$(install-torch)
	$(PIP) install -e '.[dev]'
	@touch $(INSTALLED) $@

define install-torch
$(if $(TORCH_INDEX),$(PIP) install --index-url '$(TORCH_INDEX)' '$(TORCH)')
endef

$(VENV)/bin/python:
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Palimpsest needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 …' >&2; exit 1; }
	'$(PYTHON)' -m venv $(VENV)
