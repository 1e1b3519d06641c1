# Every target sets up what it needs from nothing; a second call takes seconds. Settings, after the target:
#   PYTHON=python3.12     the Python to start from (3.11 or newer); its torch is kept if it has one
#   VENV=.venv            where the environment goes
#   TORCH=auto            auto: the torch PYTHON has, else the pinned one; or a pip requirement
#   NET=1                 0: download nothing, say what is missing
#   WORKERS=5             processes that run tests; 5 keep two cores busy, for many tests wait
#   ZEROTOP_TEST_PATIENCE=2  all deadlines of tests, times this
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= auto
NET    ?= 1
ARGS   ?=
WORKERS ?= 5
N      ?= 20
KEYS   ?= 100000
SEED   ?= 0
FIRST  ?= 1
RECORD ?=
export NET
# Deadlines of tests are for an idle machine; the workers share this one.
export ZEROTOP_TEST_PATIENCE ?= 2

bin    := $(VENV)/bin
setup  := bash tools/setup.sh "$(PYTHON)" "$(VENV)" "$(TORCH)"
# The editable install lists the modules that exist when it is made, so a module that came, went or moved wants a new one.
modules := build/modules.txt
inputs := $(modules) pyproject.toml CMakeLists.txt tools/setup.sh $(wildcard csrc/* csrc/*/* themes/* examples/*)

spread := -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo finetune install test test-all test-integrations chaos monkey gpu-check lint clean FORCE

help:                ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20
demo: $(VENV)/.ok-train  ## start a two-rank ZeRO-2 run on real text and open the screen on it (q leaves the run running)
	@echo "zerotop launch examples/quickstart.json"
	@$(bin)/zerotop launch examples/quickstart.json $(ARGS)
finetune: $(VENV)/.ok-material  ## fine-tune SmolLM2-135M on real dialogues on the CPU (ten minutes) and open the screen on it
	@$(bin)/python tools/tutorial.py build/tutorial
	@echo "zerotop launch examples/finetune.json"
	@$(bin)/zerotop launch examples/finetune.json $(ARGS)
install: $(VENV)/.ok-finetune  ## set up the environment and install zerotop into it, with the trainer and the packages for Hugging Face models
	@echo "installed: $(bin)/zerotop (or: source $(bin)/activate)"
	@echo "  train      the ZeRO trainer (torch, safetensors, tokenizers)"
	@echo "  finetune   Hugging Face models, data sets and LoRA (transformers, datasets, peft)"
test: $(VENV)/.ok-dev  ## run the tests but those marked slow; or with ARGS="-k name" what pytest makes of that, in one process
	@$(bin)/python -m pytest -q $(or $(ARGS),-m "not slow" $(spread))
test-all: $(VENV)/.ok-dev  ## run every test, and 20 faults into training runs
	@$(bin)/python -m pytest -q $(spread) $(ARGS)
	@$(MAKE) --no-print-directory chaos
test-integrations:   ## run the tests of other trainers on this screen, DeepSpeed and TRL among them, in an environment of their own
	@$(MAKE) --no-print-directory VENV=.venv-integrations .venv-integrations/.ok-dev
	@DS_BUILD_OPS=0 DS_ACCELERATOR=cpu .venv-integrations/bin/python -m pip install -q --no-build-isolation --no-deps \
	  -r tests/integrations/trainers.txt
	@.venv-integrations/bin/python -m pytest -q -rs tests/integrations $(ARGS)
chaos: $(VENV)/.ok-dev  ## strike a training run N times at random, or N=each: once in every way; count what is resumed and lost (N=20, SEED=0, FIRST=1, RECORD=file)
	@$(bin)/python -m tests.faults.chaos $(N) --seed $(SEED) --first $(FIRST) $(if $(RECORD),--record $(RECORD))
monkey: $(VENV)/.ok-dev  ## press random keys on every kind of screen (KEYS=100000, SEED=0)
	@$(bin)/python -m tests.tui.monkey $(KEYS) --seed $(SEED)
gpu-check: $(VENV)/.ok-dev  ## run the tests that need an NVIDIA GPU
	@$(bin)/python -m pytest -q -rs tests/gpu $(ARGS)
lint: $(VENV)/.ok-dev  ## ruff, mypy and the import contracts
	@failed=; for check in "ruff check ." "ruff format --check ." mypy lint-imports; do \
	  echo "$$check"; $(bin)/$$check || failed="$$failed [$$check]"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }
clean:               ## remove the environment and what was built
	rm -rf "$(VENV)" build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(modules): FORCE
	@mkdir -p build; find runtime zerotop -name '*.py' | sort > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@
FORCE:
$(VENV)/.ok-train: $(inputs)
	@$(setup) train
	@touch $@
$(VENV)/.ok-finetune: $(inputs)
	@$(setup) train,finetune
	@touch $@ $(VENV)/.ok-train
$(VENV)/.ok-material: $(inputs) tests/material.txt
	@$(setup) train,finetune tests/material.txt
	@touch $@ $(VENV)/.ok-train $(VENV)/.ok-finetune
$(VENV)/.ok-dev: $(inputs) tests/material.txt
	@$(setup) train,finetune,dev tests/material.txt
	@touch $@ $(VENV)/.ok-train $(VENV)/.ok-finetune $(VENV)/.ok-material
