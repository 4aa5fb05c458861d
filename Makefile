# make demo   the whole loop on the bundled corpus: train, evaluate, score; ten minutes on two cores
# make test   all tests, two processes at a time (make test JOBS=8 TESTS=tests/model)
# make check  ruff and mypy
# make sim    what collecting with the simulator needs
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check sim clean
.DELETE_ON_ERROR:

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: needs Python 3.11 or newer; say which: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

# a stamp for each set of packages, made again when the list of packages changes
$(VENV)/.base: pyproject.toml setup.py | $(VENV)/bin/python
	@echo "installing the package and what it needs into $(VENV) (a minute or two)"
	$(PIP) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) -e '.[test,sim,rl]'
	@touch $@

$(VENV)/.sim: $(VENV)/.base
	$(PIP) -e '.[sim]'
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) -e '.[dev,test,rl]'
	@touch $@

demo: $(VENV)/.base
	$(BIN)/rbm demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(TESTS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sim: $(VENV)/.sim
	@$(BIN)/python -c "import os; os.environ.setdefault('MUJOCO_GL', 'osmesa'); import mujoco; mujoco.GLContext(64, 64).free()" \
	  || { echo "MuJoCo cannot render: on Debian or Ubuntu, apt-get install libosmesa6 libegl1 libgl1"; exit 2; }
	@echo "ready: $(BIN)/rbm build source=metaworld corpus=..."

clean:
	rm -rf $(VENV) build *.egg-info
