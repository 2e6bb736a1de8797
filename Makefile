# make quickstart | test | lint | kernels: each sets up .venv by itself and uses it again the next time.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: quickstart test lint kernels

quickstart: $(VENV)/installed
	$(RUN) resnet_18_experiments.py --quick

test: $(VENV)/installed-dev
	$(RUN) -m pytest

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m mypy

kernels: $(VENV)/installed
	$(RUN) -c "from quantization_utils.kernels import build; build.load()"

# A minute or two and some gigabytes the first time; again only when the requirements change.
$(VENV)/installed: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=python3.12, say"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "Python's venv module is missing: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
