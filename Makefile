# make quickstart   the main job: cold start, DGPO, evaluation, on CPU, from nothing
# make test         the tests (DGPO_TEST_PATIENCE=3: they wait three times as long before they call it hanging)
# make install      what all of these need (make -j2 install: both environments at once)
# make sglang       SGLang in an environment of its own, without a GPU
# make lint         ruff and mypy
# make bench        step time against TRL
#
# PYTHON    interpreter that makes .venv (3.11 or newer)
# PIP_ARGS  more words for pip, such as an index that has CPU builds of torch
# ENGINE    of the quick start: embedded (default), or sglang for real servers

PYTHON ?= python3
PIP_ARGS ?=
ENGINE ?= embedded
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SGLANG := .venv-sglang
SGLANG_STAMP := $(SGLANG)/.installed
# Files of tests side by side, in their order: the long ones come early. (make test PYTEST_ARGS= : one by one)
PYTEST_ARGS ?= --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# One thread a process: ranks that share a machine's cores must not fight over them.
RUN := PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1

.PHONY: quickstart test lint bench install sglang

quickstart: $(STAMP) $(if $(filter sglang,$(ENGINE)),$(SGLANG_STAMP))
	$(RUN) QUICKSTART_ENGINE=$(ENGINE) bash examples/quickstart/run.sh

test: $(STAMP) $(SGLANG_STAMP)
	$(RUN) pytest tests $(PYTEST_ARGS)

lint: $(STAMP)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

bench: $(STAMP)
	$(RUN) python tools/bench/vs_trl.py

install: $(STAMP) $(SGLANG_STAMP)

sglang: $(SGLANG_STAMP)

$(SGLANG_STAMP): requirements-sglang-cpu.txt
	test -x $(SGLANG)/bin/python || $(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/pip install --quiet --no-deps $(PIP_ARGS) -r requirements-sglang-cpu.txt
	touch $@

$(STAMP): requirements-cpu.txt setup.py pyproject.toml megatron_dgpo/data/_packing.cpp
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than Python 3.11; set PYTHON=..." >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null \
		|| { echo "error: no C++ compiler found (set CXX=... or install g++)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PIP_ARGS) -r requirements-cpu.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@
