# make quickstart   the main job: cold start, DGPO, evaluation, on CPU, from nothing
# make test         the tests, on the CPU (DGPO_TEST_PATIENCE=3: they wait three times as long before they call it hanging)
# make test-fast    most of the unit tests: no servers, no ranks, nothing that takes long
# make test-gpu     those of tests/gpu, on a GPU
# make install      what all of these need (make -j2 install: both environments at once)
# make sglang       SGLang in an environment of its own, without a GPU
# make test-mcore   the tests of training and checkpoints on another megatron-core (MCORE=0.19.2), on the same Python
# make lint         ruff and mypy
# make bench        step time against TRL's, on the quick start's model and on SmolLM2-135M
# make bench-gpu    tests/gpu and the benches on this machine's GPU, in one table (MINUTES=10: in ten minutes)
#
# PYTHON    interpreter that makes .venv (3.11 to 3.13)
# PIP_ARGS  more words for pip, such as an index that has CPU builds of torch
# MCORE     version of megatron-core that test-mcore takes
# ENGINE    of the quick start: embedded (default), or sglang for real servers
# DEVICE    of the quick start: cpu (default), or cuda, which takes the GPUs that are there

PYTHON ?= python3
PIP_ARGS ?=
ENGINE ?= embedded
DEVICE ?= cpu
MCORE ?= 0.19.2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SGLANG := .venv-sglang
SGLANG_STAMP := $(SGLANG)/.installed
# Files of tests side by side, in their order: the long ones come early. (make test PYTEST_ARGS= : one by one)
PYTEST_ARGS ?= --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# One thread a process: ranks that share a machine's cores must not fight over them.
RUN := PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1
MCORE_FOLDER := .mcore/$(MCORE)
MCORE_TESTS := tests/distributed/test_checkpoint.py \
	tests/distributed/test_killed.py::test_killed_while_a_run_saves_the_checkpoint_before_loads \
	tests/distributed/test_platform.py tests/unit/test_startup.py::test_a_rank tests/unit/test_versions.py

.PHONY: quickstart test test-fast test-gpu test-mcore lint bench bench-gpu install sglang

quickstart: $(STAMP) $(if $(filter sglang,$(ENGINE)),$(SGLANG_STAMP))
	$(RUN) QUICKSTART_ENGINE=$(ENGINE) QUICKSTART_DEVICE=$(DEVICE) bash examples/quickstart/run.sh

test: $(STAMP) $(SGLANG_STAMP)
	$(RUN) pytest tests $(PYTEST_ARGS)

# What is left out starts processes again and again, or takes the kernels through Triton's interpreter at length.
SLOW_UNIT_TESTS := test_convert test_data_tools test_demo_task test_device test_examples test_fused_compile \
	test_group_properties test_inspect_server test_model_folders test_ops_memory test_ops_properties test_paper_tables \
	test_refused_input test_reward_golds test_startup test_wandb_run

test-fast: $(STAMP)
	$(RUN) pytest tests/unit $(SLOW_UNIT_TESTS:%=--ignore=tests/unit/%.py) $(PYTEST_ARGS)

test-gpu: $(STAMP)
	$(RUN) DGPO_TEST_GPU=1 pytest tests/gpu

test-mcore: $(STAMP) $(MCORE_FOLDER)/.installed
	$(RUN) PYTHONPATH="$(CURDIR)/$(MCORE_FOLDER)" MEGATRON_CORE_VERSION=$(MCORE) pytest $(MCORE_TESTS) $(PYTEST_ARGS)

lint: $(STAMP)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

bench: $(STAMP)
	$(RUN) python tools/bench/vs_trl.py
	$(RUN) python tools/bench/vs_trl.py --task smollm2

bench-gpu: $(STAMP)
	$(RUN) python tools/bench/gpu.py $(if $(MINUTES),--minutes $(MINUTES))

install: $(STAMP) $(SGLANG_STAMP)

sglang: $(SGLANG_STAMP)

# torch with what it needs: a build for CUDA does not start without CUDA's libraries.
$(SGLANG_STAMP): requirements-sglang-cpu.txt
	test -x $(SGLANG)/bin/python || $(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/pip install --quiet --constraint $< $(PIP_ARGS) torch torchvision
	$(SGLANG)/bin/pip install --quiet --no-deps $(PIP_ARGS) -r requirements-sglang-cpu.txt
	touch $@

# The wheel is for Python 3.12 and later; what is used of it here is pure Python, and runs on 3.11 too.
$(MCORE_FOLDER)/.installed: $(STAMP)
	rm -rf $(MCORE_FOLDER)
	$(BIN)/pip install --quiet --no-deps --no-compile --python-version 3.12 --ignore-requires-python --only-binary=:all: \
		--target $(MCORE_FOLDER) $(PIP_ARGS) megatron-core==$(MCORE)
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
