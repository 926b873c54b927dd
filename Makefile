# A virtual environment that is active is used; otherwise one is made in .venv.
ifdef VIRTUAL_ENV
PYTHON := $(VIRTUAL_ENV)/bin/python
else
PYTHON := .venv/bin/python
endif

.PHONY: demo lint test test-clients test-e2e test-slow wheel install

$(PYTHON):
	python3 -m venv .venv

install: $(PYTHON)
	$(PYTHON) -m pip install -q torch torchvision
	$(PYTHON) -m pip install -q -e '.[dev]'

demo: install
	$(PYTHON) scripts/demo.py

lint: install
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m nbqa "mypy --config-file .ci/mypy-notebooks.ini" notebooks

test: install
	$(PYTHON) -m pytest -q -n 2 --dist loadfile -m "not slow and not e2e and not clients"

test-e2e: install
	$(PYTHON) -m pytest -q -m e2e

test-slow: install
	$(PYTHON) -m pytest -q -m slow

PICTURES ?= build/clients

test-clients:
	.ci/clients $(PICTURES)

wheel: install
	.ci/wheel $(PYTHON)
