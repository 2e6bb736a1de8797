# make quickstart   a real experiment on handwritten digits, in minutes on two cores
# make test         the tests
# make lint         ruff, mypy, and whether the READMEs' tables are what results/ give
# make tables       put the tables of results/ into the READMEs
# make kernels      compile the C++ kernels now, not at first use
# The environment is made once in .venv and changed only when the requirements are. PYTHON=python3.12 chooses another
# interpreter for it, VENV=DIR another place.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

# Empty is off. Where it is set, as in many containers, every start of Python would compile its packages anew: half a minute.
export PYTHONDONTWRITEBYTECODE :=

TABLES := $(RUN) -m train_test_utils.report results --readme

.PHONY: quickstart test lint tables kernels
.DELETE_ON_ERROR:

# Each thread has a core of its own: where another program kept one busy, the threads shared the other, where each waited
# for the other's turn to end, and that took five times as long. Whole cores, as PyTorch has a thread for each of these. Not
# with fewer threads than cores: two runs would share one.
# Kernels first, as compilers would be kept on one core too; without a compiler there are none.
quickstart: $(VENV)/requirements.stamp
	@$(RUN) -m quantization_utils.kernels || true
	$(if $(OMP_NUM_THREADS),,OMP_PROC_BIND=true OMP_PLACES=cores )$(RUN) resnet_18_experiments.py --quick

test: $(VENV)/requirements-dev.stamp
	$(RUN) -m pytest -n logical --maxprocesses 8 --dist worksteal

lint: $(VENV)/requirements-dev.stamp
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(TABLES) README.md --check
	$(TABLES) results/README.md --check

tables: $(VENV)/requirements.stamp
	$(TABLES) README.md
	$(TABLES) results/README.md

kernels: $(VENV)/requirements.stamp
	$(RUN) -m quantization_utils.kernels

# --no-compile: Python compiles what it imports when it does; all of the packages take a minute.
$(VENV)/requirements.stamp: requirements.txt | $(VENV)/bin/pip
	$(RUN) -m pip install --no-compile --disable-pip-version-check --no-input -r requirements.txt
	@touch $@

$(VENV)/requirements-dev.stamp: requirements-dev.txt $(VENV)/requirements.stamp
	$(RUN) -m pip install --no-compile --disable-pip-version-check --no-input -r requirements-dev.txt
	@touch $@

# pip is the last thing that venv installs, so where it is the environment is whole.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is missing or older than Python 3.10: name another one, as in make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: on Debian or Ubuntu, run apt install python3-venv first" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
