# Fine-tune an open LLM on AWS Trainium with make. `make help` lists targets and settings, `make demo` runs all of it
# here. This file is the graph: which stage reads which, and nothing else knows the order. Whether a stage is stale is
# asked of stages/make/plan.py, which compares what it was made from with what it would be made from now.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.SUFFIXES:
.DEFAULT_GOAL := help

# A value on the command line is text, never a make expression: PROMPT='$5' arrives as typed.
given := $(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$v))
$(foreach v,$(given) RECIPE RUN,$(if $(filter-out undefined,$(origin $v)),$(eval override $v := $$(value $v))))

PYTHON ?= python3
VENV ?= .venv
RECIPE ?= demo
ifneq (,$(filter demo,$(MAKECMDGOALS)))
  override RECIPE := demo
endif
ifeq (,$(and $(filter 1,$(words $(RECIPE))),$(findstring recipes/$(RECIPE).mk,$(wildcard recipes/*.mk))))
  $(error RECIPE='$(RECIPE)' is not there. There are: $(notdir $(basename $(wildcard recipes/*.mk))))
endif

# A recipe is a list of `NAME ?= value`: the command line and the environment come before it, the defaults after it.
before := $(subst %,\%,$(.VARIABLES))
include recipes/$(RECIPE).mk
RUN ?= $(RECIPE)
given += $(filter-out before RUN,$(filter-out $(before),$(.VARIABLES)))
export $(filter-out MAKE%,$(given))
MAKEOVERRIDES :=

# RUN stands in targets and in shell lines: it may hold nothing that either would read as more than a name.
letters := a b c d e f g h i j k l m n o p q r s t u v w x y z A B C D E F G H I J K L M N O P Q R S T U V W X Y Z
rest := $(RUN)
$(foreach c,$(letters) 0 1 2 3 4 5 6 7 8 9 _ - .,$(eval rest := $$(subst $c,,$$(rest))))
ifneq (,$(or $(rest),$(filter-out 1,$(words $(RUN))),$(filter .% -%,$(RUN))))
  $(error RUN is to be a folder's name in outputs/ of letters, digits, dots, - and _, without a leading dot or dash)
endif

# The graph. What a stage is made from: a change of that content makes it stale.
STAGES := data precompile train consolidate compile-inference eval
data.from :=
precompile.from :=
train.from := data
consolidate.from := train
compile-inference.from := consolidate
eval.from := data consolidate compile-inference
# What has to be there before it, whatever its content: precompile only fills a cache.
precompile.after := data
train.after := precompile

# Ask what is stale, for goals that run stages. make 4.3 hands no variables to $(shell), so they are quoted by hand.
define newline


endef
quoted = '$(subst $(newline),'$$'\n'',$(subst ','\'',$1))'
comma := ,
empty :=
graph := $(foreach s,$(STAGES),$s:$(subst $(empty) ,$(comma),$($s.from)):$($s.after))
out := outputs/$(RUN)
plan = env $(foreach v,$(given),$(call quoted,$v=$(value $v))) $(PYTHON) -I -S stages/make/plan.py $(out) $(graph) \
  --given $(call quoted,$(given)) --goals $(call quoted,$(MAKECMDGOALS))
answering := $(and $(filter eval,$(MAKECMDGOALS)),$(value PROMPT),$(wildcard $(out)/compile-inference/manifest.json))
ifneq (,$(filter all demo outputs/% $(STAGES),$(MAKECMDGOALS)))
  stale := $(shell $(plan) $(if $(answering),--answer,$(if $(findstring n,$(filter-out --%,$(firstword -$(MAKEFLAGS)))),--dry-run)))
  ifneq (0,$(.SHELLSTATUS))
    $(error nothing was run$(if $(filter-out 2,$(.SHELLSTATUS)),: asking what is stale ended with status $(.SHELLSTATUS)))
  endif
  # One prompt is answered by the model that is there, never by training another.
  stale := $(if $(answering),,$(stale))
endif

python := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
# What is installed: the Neuron set where there are Neuron devices, and beside it what the tests need, for goals that test.
requirements := $(if $(wildcard /dev/neuron[0-9]*),docker/requirements.txt,requirements.txt)
neuron_pins := stages/backends/neuron/requirements.txt
pins := $(requirements) stages/requirements.txt $(if $(filter docker/%,$(requirements)),$(neuron_pins))
test_pins := tests/requirements.txt $(neuron_pins)
installed := $(if $(VENV),$(VENV)/requirements.txt)
tested := $(if $(VENV),$(VENV)/tests-requirements.txt)
# PyPI holds placeholders for AWS's wheels.
NEURON_PIP_INDEX ?= https://pip.repos.neuron.amazonaws.com

.PHONY: help all demo status verify doctor cache-status cache-lookup cache-synchronize test torture audit lint clean FORCE $(STAGES)

help: ## Targets, and settings with their values
	@$(PYTHON) -I -S stages/make/help.py $(MAKEFILE_LIST)

demo: eval ## The whole run on this machine: a tiny model learns data/demo by heart and answers
all: eval ## Every stage that is stale

status: ## Which stages would run, and why
	@$(plan) --show

verify: ## Read every published file: is it still what was published?
	@$(PYTHON) -I -S stages/make/verify.py $(out) $(STAGES)

doctor: $(installed) ## Can every stage run here? A line for each thing that it needs: OK, or what to do
	@$(python) -m stages.doctor

data: $(out)/data/manifest.json ## Rows -> packed token ids, and what became of every token
precompile: $(out)/precompile/manifest.json ## The training command for a few steps, to fill the compile cache
train: $(out)/train/manifest.json ## Packed rows -> sharded weights
consolidate: $(out)/consolidate/manifest.json ## Shards -> a Hugging Face model folder
compile-inference: $(out)/compile-inference/manifest.json ## Model folder -> compiled prefill and decode

# A stage's recipe runs when its manifest is missing or it is stale; time stamps decide nothing (order-only).
define stage_rule
$(out)/$1/manifest.json: $(if $(filter stale-$1,$(stale)),FORCE) | $(installed) $(foreach s,$($1.from) $($1.after),$(out)/$s/manifest.json)
	@TRN_TUNE_MAKE=$$$$PPID $(python) -m stages.$(subst -,_,$1) $(foreach s,$($1.from) $($1.after),--$s $(out)/$s) --output $(out)/$1
endef
# An interrupted make removes no target: what is published is whole.
.PRECIOUS: $(STAGES:%=$(out)/%/manifest.json)
$(foreach s,$(STAGES),$(eval $(call stage_rule,$s)))

ifeq (,$(value PROMPT))
eval: $(out)/eval/manifest.json ## Answers and validation losses; PROMPT="..." answers that alone
else
eval: | $(out)/compile-inference/manifest.json
	@TRN_TUNE_MAKE=$$PPID $(python) -m stages.eval $(foreach s,$(eval.from),--$s $(out)/$s) --output $(out)/eval
endif

ifneq (,$(installed))
# The lists of what is installed are kept beside it, and compared by content (white space aside).
contents = $(strip $(foreach f,$(wildcard $1),$(file <$f)))
ifneq ($(call contents,$(installed)),$(call contents,$(pins)))
$(installed): FORCE
endif
ifneq ($(call contents,$(tested)),$(call contents,$(test_pins)))
$(tested): FORCE
endif
pip = $(python) -m pip install --quiet --disable-pip-version-check --requirement $(requirements) \
  $(if $(filter docker/%,$(requirements)),--extra-index-url '$(NEURON_PIP_INDEX)')
$(installed):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 12) or sys.exit( \
	  f"error: Python 3.10 to 3.12 is needed, {sys.executable} is {v[0]}.{v[1]}. Set PYTHON=python3.11")'
	@echo 'installing $(requirements) into $(VENV): a minute or more, once'
	@$(PYTHON) -m venv $(VENV)
	@$(pip)
	@cat $(pins) > $(installed)
$(tested): $(installed)
	@echo 'installing tests/requirements.txt into $(VENV)'
	@$(pip) --requirement tests/requirements.txt
	@cat $(test_pins) > $(tested)
endif

cache-status: $(installed) ## Neuron's compiled graphs: how many, which are broken or locked
cache-lookup: $(installed) ## Which compiled graphs of MODEL_ID the Hub holds
cache-synchronize: $(installed) ## Push compiled graphs to CUSTOM_CACHE_REPO on the Hub
cache-status cache-lookup cache-synchronize:
	@$(python) -m stages.backends.neuron.cache_cli $(@:cache-%=%)

test: lint ## Lint, types, every test, and the demo from data to answers
	$(python) -m pytest --numprocesses 2 --dist loadfile

torture: $(installed) $(tested) ## The tests' damage at length, with a summary: kills, full disks, bad input ... TORTURE_SEED=7 repeats one
	$(python) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m torture --torture $(or $(TORTURE_SEED),$(shell echo $$RANDOM))

audit: $(installed) $(tested) ## What is known against the pinned versions and what is installed (OSV, by pip-audit)
	@$(python) -m tests.audit

lint: $(installed) $(tested) ## ruff and mypy
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

# The container image: its entry point is this Makefile. docker/run gives it the host's devices and folders.
.PHONY: image shell notebook
DOCKER ?= docker
IMAGE ?= trn-tune
build = $(DOCKER) build $(foreach v,$1,--build-arg $v)
# What was typed or exported, without the recipe's settings: in the container another recipe may be chosen.
inside = env $(foreach v,$(given),$(if $(filter file,$(origin $v)),-u $v)) DOCKER=$(DOCKER) IMAGE=$(IMAGE) docker/run

image: ## The container image; BASE_IMAGE=python:3.11-slim REQUIREMENTS=requirements.txt for CPUs
	@[[ "$${NEURON_PIP_INDEX-}$${PIP_EXTRA_INDEX_URL-}" != *@* ]] || { \
	  echo 'error: NEURON_PIP_INDEX or PIP_EXTRA_INDEX_URL holds a password, which would stay in the history of the image' >&2; exit 2; }
	$(call build,BASE_IMAGE REQUIREMENTS NEURON_PIP_INDEX PIP_EXTRA_INDEX_URL) \
	  --build-arg REVISION="$$(git describe --always --dirty 2> /dev/null)" --file docker/Dockerfile --tag $(IMAGE) .

shell: ## bash in the container, with the devices, outputs/ and data/
	@$(inside) shell

notebook: ## Jupyter with the stages as a notebook, on 127.0.0.1:8080 (from afar: ssh -L 8080:localhost:8080 HOST)
	$(call build,IMAGE) --file docker/notebook.Dockerfile --tag $(IMAGE)-notebook .
	@$(inside) notebook

clean: ## Remove outputs/RUN; asks before it removes a trained model (YES=1 does not)
	@if [[ -e $(out)/train && -z "$(filter 1,$(YES))" ]]; then \
	  read -r -p "$(out) holds a trained model. Remove it? [y/N] " answer || answer=no; \
	  [[ $$answer == [yY]* ]] || { echo "kept $(out)"; exit 1; }; \
	fi; rm -rf $(out)
