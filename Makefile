# A virtual environment that is active is used; otherwise one is made in .venv.
ifdef VIRTUAL_ENV
PYTHON := $(VIRTUAL_ENV)/bin/python
else
PYTHON := .venv/bin/python
endif

.PHONY: demo test test-e2e test-slow install

$(PYTHON):
	python3 -m venv .venv

install: $(PYTHON)
	$(PYTHON) -m pip install -q torch torchvision
	$(PYTHON) -m pip install -q -e '.[test]'

demo: install
	$(PYTHON) scripts/demo.py

test: install
	$(PYTHON) -m pytest -q -m "not slow and not e2e"

test-e2e: install
	$(PYTHON) -m pytest -q -m e2e

test-slow: install
	$(PYTHON) -m pytest -q -m slow
