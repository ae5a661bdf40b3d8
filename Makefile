# The two set-up commands, make demo and make test. Both install what they need into VENV, once: again only if the
# requirements change. Another environment or Python: make test VENV=/tmp/env PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
python = $(VENV)/bin/python
run = runs/phantom/dtml-8-seed1337

export PATH := $(abspath $(VENV))/bin:$(PATH)
.PHONY: help demo test
.DELETE_ON_ERROR:

help:
	@echo "make demo   install, train on made-up scans, test, print the table: 4 to 8 minutes on 2 cores"
	@echo "make test   install, check the code, run all tests: 8 to 20 minutes on 2 cores"

demo: $(VENV)/.installed
	$(python) train_dtml.py --data data/phantom --resume auto
	$(python) test_la.py --checkpoint $(run)
	@echo "picture: $$(ls $(run)/pictures/labeled-*.png | tail -n 1)"

test: $(VENV)/.installed-dev
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy ./*.py methods networks losses evaluation dataloaders utils tools benchmarks
	$(python) -m pytest -n 2 --dist loadfile

$(VENV)/.installed: requirements.txt | $(python)
	$(python) -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements.txt | $(python)
	$(python) -m pip install --quiet -r requirements-dev.txt
	@touch $@

$(python):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, as make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
