# Fine-tune an open LLM on AWS Trainium with make. `make help` lists the targets and the settings,
# `make demo` runs all stages here. This file is the graph: which stage reads which. Nothing else
# knows the order. stages/make/stale.py says which stages are stale: it compares what each was made
# from with what it would be made from now.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.SUFFIXES:
.DEFAULT_GOAL := help

# make would expand a `$` in a value of its command line. Values are text: PROMPT='$5' arrives as
# typed. So every variable of the command line is set again to its own unexpanded value.
given := $(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$v))
$(foreach v,$(given) RECIPE RUN,$(if $(filter-out undefined,$(origin $v)),$(eval override $v := $$(value $v))))
MAKEOVERRIDES :=

PYTHON ?= python3
VENV ?= .venv
RECIPE ?= demo
ifneq (,$(filter demo,$(MAKECMDGOALS)))
  override RECIPE := demo
endif
ifeq (undefined,$(origin RUN))
  RUN := $(value RECIPE)
endif
# PROMPT asks one question where it is typed on the command line, or exported for `make eval`. In the
# environment of another goal, PROMPT and CONTEXT may be anybody's.
asking := $(if $(value PROMPT),$(or $(filter PROMPT,$(given)),$(filter eval,$(MAKECMDGOALS))))
ifeq (,$(asking))
  unasked := $(filter-out $(given),PROMPT CONTEXT)
  unexport $(unasked)
endif
# Stages read their settings from the environment, then from the recipe, then from the defaults.
export RECIPE RUN $(filter-out MAKE%,$(given))
out := outputs/$(RUN)

# The graph. What a stage is made from: a change of that content makes it stale.
STAGES := data precompile train consolidate compile-inference eval
data.from :=
precompile.from :=
train.from := data
consolidate.from := train
compile-inference.from := consolidate
eval.from := data consolidate compile-inference
# What must exist before it, whatever its content: precompile only fills a cache.
precompile.after := data
train.after := precompile

# Ask stale.py which stages are stale, for goals that use outputs/RUN. It also checks every setting,
# RECIPE and RUN, before a target or a shell line holds them. make 4.3 does not export variables to
# $(shell), so they are quoted here: a quote in a value becomes '\'', a line break '$'\n''.
define newline


endef
quoted = '$(subst $(newline),'$$'\n'',$(subst ','\'',$1))'
comma := ,
empty :=
# data::  train:data:precompile  eval:data,consolidate,compile-inference:  ...
graph := $(foreach s,$(STAGES),$s:$(subst $(empty) ,$(comma),$($s.from)):$($s.after))
ask = env $(foreach v,$(unasked),-u $v) MAKELEVEL=$(MAKELEVEL) \
  $(foreach v,RECIPE RUN $(given),$(call quoted,$v=$(value $v))) $(PYTHON) -I -S stages/make/stale.py \
  $(call quoted,$(out)) $(graph) --given $(call quoted,$(given)) --goals $(call quoted,$(foreach g,$(MAKECMDGOALS),$g $($g.uses)))
# Goals that use what a stage published, as it is, whatever is stale; they make it only where it is
# missing. Beside a goal that makes stages (`make all push`) they come after it.
chat.uses := compile-inference
push.uses := consolidate
rehearse.uses := data
serve.uses := consolidate
serve-check.uses := eval
benchmark.uses := eval
eval.uses := $(if $(asking),compile-inference)
makes := $(filter all demo $(if $(asking),$(filter-out eval,$(STAGES)),$(STAGES)),$(MAKECMDGOALS))
used := $(foreach g,$(MAKECMDGOALS),$($g.uses:%=$(out)/%/manifest.json))
answering := $(if $(or $(makes),$(filter-out $(wildcard $(used)),$(used))),,$(used))
# What such a goal waits for: nothing where it is there.
before = $(if $(answering),,$(makes) $($1.uses:%=$(out)/%/manifest.json))
flags := $(filter-out --%,$(firstword -$(MAKEFLAGS)))
dry_run := $(findstring n,$(flags))
ifneq (,$(findstring B,$(flags)))
  $(error make -B is not for stages, which know what has changed. To make one again, remove $(out)/STAGE)
endif
uses_run := $(filter all benchmark demo chat push rehearse serve serve-check outputs/% $(STAGES),$(MAKECMDGOALS))
ifneq (,$(or $(uses_run),$(filter plan status why adopt history report watch verify clean,$(MAKECMDGOALS))))
  stale := $(shell $(ask) $(if $(uses_run),$(if $(answering),--answer,$(if $(dry_run),--dry-run)),--check-run))
  ifneq (0,$(.SHELLSTATUS))
    $(error nothing was run$(if $(filter-out 2,$(.SHELLSTATUS)),: stale.py ended with status $(.SHELLSTATUS)))
  endif
  # The model that exists is used; nothing is trained for it.
  stale := $(if $(answering),,$(stale))
endif

python := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
# What is installed: where there are Neuron devices, the requirements of optimum-neuron, or on
# Trainium 2 and 3 those of AWS's native PyTorch. Goals that test also install what the tests need.
native := $(if $(filter trn2% trn3%,$(file </sys/devices/virtual/dmi/id/product_name)),native-)
requirements := $(if $(wildcard /dev/neuron[0-9]*),docker/$(native)requirements.txt,requirements.txt)
neuron_pins := stages/backends/neuron/requirements.txt
pins := $(requirements) stages/requirements.txt $(if $(filter docker/requirements.txt,$(requirements)),$(neuron_pins))
test_pins := tests/requirements.txt $(neuron_pins)
installed := $(if $(VENV),$(VENV)/requirements.txt)
tested := $(if $(VENV),$(VENV)/tests-requirements.txt)
# AWS's own package index: what PyPI has under the names of its wheels is empty.
export NEURON_PIP_INDEX ?= https://pip.repos.neuron.amazonaws.com

.PHONY: help all demo chat push rehearse serve serve-check verify doctor
.PHONY: plan status why adopt history compare report watch
.PHONY: cache-status cache-lookup cache-synchronize
.PHONY: benchmark check test torture audit lint types clean FORCE $(STAGES)

help: ## Targets, and settings with their values
	@$(PYTHON) -I -S stages/make/help.py $(firstword $(MAKEFILE_LIST))

demo: eval ## All stages on this machine: a tiny model learns data/demo by heart and answers
all: eval ## Every stage that is stale

status: ## Each stage: up to date or why not, when, how long, its result; and the other runs
	@$(ask) --show

why: ## Every reason for which STAGE would run: STAGE=train LEARNING_RATE=1e-4
	@$(ask) --why

adopt: ## Take the published STAGE for up to date after a harmless change; its manifest says so
	@$(ask) --adopt

history: ## Earlier results of this run, stage by stage
	@$(PYTHON) -I -S stages/make/history.py $(out) $(STAGES)

compare: ## Settings that differ, and results, side by side: RUNS="one another"
	@$(PYTHON) -I -S stages/make/history.py --compare $(STAGES)

plan: $(installed) ## What would run, its memory, time and price, before it starts; INSTANCE= COMPARE=
	@MAKELEVEL=$(MAKELEVEL) $(python) -m stages.plan $(out) $(graph) --given $(call quoted,$(given))

verify: ## Read every published file and compare it with its digest
	@$(PYTHON) -I -S stages/make/verify.py $(out) $(STAGES)

report: | $(installed) $(makes) ## outputs/RUN/report.html: what was trained, whether it got better, what it cost
	@TRN_TUNE_MAKE=$$PPID $(python) -m stages.report --run $(out)

watch: | $(installed) ## The same page on 127.0.0.1, updated while a training runs, until Ctrl-C
	@TRN_TUNE_MAKE=$$PPID $(python) -m stages.watch --run $(out)

doctor: $(installed) ## Can every stage run here? A line per requirement: OK, or what to do
	@$(python) -m stages.doctor

data: $(out)/data/manifest.json ## Dataset -> packed token ids, with an account of every token
precompile: $(out)/precompile/manifest.json ## A few training steps, to fill the compile cache
train: $(out)/train/manifest.json ## Packed token ids -> sharded weights
consolidate: $(out)/consolidate/manifest.json ## Shards -> a Hugging Face model folder
compile-inference: $(out)/compile-inference/manifest.json ## Model folder -> compiled prefill and decode

# A stage runs when its manifest is missing or it is stale. Its prerequisites are order-only (after
# the |), so time stamps decide nothing. The stage gets make's process id ($PPID) and ends with it.
define stage_rule
$(out)/$1/manifest.json: $(if $(filter stale-$1,$(stale)),FORCE) | $(installed) $(foreach s,$($1.from) $($1.after),$(out)/$s/manifest.json)
	@TRN_TUNE_MAKE=$$$$PPID $(python) -m stages.$(subst -,_,$1) $(foreach s,$($1.from) $($1.after),--$s $(out)/$s) --output $(out)/$1
endef
# An interrupted make must not remove what is published.
.PRECIOUS: $(STAGES:%=$(out)/%/manifest.json)
$(foreach s,$(STAGES),$(eval $(call stage_rule,$s)))

ifeq (,$(asking))
eval: $(out)/eval/manifest.json ## Answers and validation losses; PROMPT="..." only answers that
else
eval: | $(installed) $(call before,eval)
	@TRN_TUNE_MAKE=$$PPID $(python) -m stages.eval $(foreach s,$(eval.from),--$s $(out)/$s) --output $(out)/eval
endif

chat: | $(installed) $(call before,chat) ## Talk to the compiled model
	@TRN_TUNE_MAKE=$$PPID $(python) -m stages.chat --compile-inference $(out)/compile-inference

rehearse: | $(installed) $(call before,rehearse) ## The first steps on a few layers, compared with a CPU's, and all later stages
	@TRN_TUNE_MAKE=$$PPID $(python) -m stages.rehearse --data $(out)/data

push: | $(installed) $(call before,push) ## The model, with a card, to HUB_REPO on the Hugging Face Hub
	@TRN_TUNE_MAKE=$$PPID $(python) -m stages.push $(foreach s,data train eval consolidate,--$s $(out)/$s)

serve: | $(installed) $(call before,serve) ## Serve the model as an OpenAI-compatible API
	@TRN_TUNE_MAKE=$$PPID $(python) -m stages.serve --consolidate $(out)/consolidate

serve-check: | $(installed) $(call before,serve-check) ## Ask a running server eval's questions, and compare
	@TRN_TUNE_MAKE=$$PPID $(python) -m stages.serve_check --consolidate $(out)/consolidate --answers $(out)/eval

benchmark: | $(tested) $(call before,benchmark) ## The speed of each part beside what else does it, as a dated file
	@$(python) -m tests.benchmarks.everything $(out)

ifneq (,$(installed))
# A copy of the requirements is kept with what was installed from them, and compared by content.
contents = $(strip $(foreach f,$(wildcard $1),$(file <$f)))
ifneq ($(call contents,$(installed)),$(call contents,$(pins)))
$(installed): FORCE
endif
ifneq ($(call contents,$(tested)),$(call contents,$(test_pins)))
$(tested): FORCE
endif
$(installed):
	@$(PYTHON) -I stages/make/install.py $(VENV) $(requirements)
	@cat $(pins) > $(installed)
$(tested): $(installed)
	@$(PYTHON) -I stages/make/install.py $(VENV) $(requirements) tests/requirements.txt
	@cat $(test_pins) > $(tested)
endif

cache-status: $(installed) ## Neuron's compiled graphs: how many, which are broken or locked
cache-lookup: $(installed) ## Which compiled graphs of MODEL_ID the Hub holds
cache-synchronize: $(installed) ## Push compiled graphs to CUSTOM_CACHE_REPO on the Hub
cache-status cache-lookup cache-synchronize:
	@$(python) -m stages.backends.neuron.cache_cli $(@:cache-%=%)

check: lint types ## Lint, types and the fast tests: under a minute
	$(python) -m pytest --quiet --numprocesses 2 -m 'not slow'

test: lint types ## Lint, types, every test, and the demo from data to answers
	$(python) -m pytest --numprocesses 2 --dist loadfile

torture: $(installed) $(tested) ## Kills, full disks, bad input, damaged files, at length; TORTURE_SEED=7 repeats one
	$(python) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m torture --torture $(or $(TORTURE_SEED),$(shell echo $$RANDOM))

audit: $(installed) $(tested) ## Known vulnerabilities of the pins and of what is installed (OSV)
	@$(python) -m tests.audit

lint: $(installed) $(tested) ## ruff
	$(python) -m ruff check .
	$(python) -m ruff format --check .

types: $(installed) $(tested) ## mypy
	$(python) -m mypy

# The container image: its entry point is this Makefile. docker/run gives it devices and folders.
.PHONY: image shell notebook
DOCKER ?= docker
IMAGE ?= trn-tune
build = $(DOCKER) build $(foreach v,$1,--build-arg $v)
inside = DOCKER=$(DOCKER) IMAGE=$(IMAGE) docker/run

image: ## The container image; BASE_IMAGE=python:3.11-slim REQUIREMENTS=requirements.txt for CPUs
	@[[ "$${NEURON_PIP_INDEX-}$${PIP_EXTRA_INDEX_URL-}" != *@* ]] || { \
	  echo 'error: NEURON_PIP_INDEX or PIP_EXTRA_INDEX_URL holds a password, which would stay in the history of the image.' \
	    'Use an index without one.' >&2; exit 2; }
	$(call build,BASE_IMAGE REQUIREMENTS NEURON_PIP_INDEX PIP_EXTRA_INDEX_URL) \
	  --build-arg REVISION="$$(git describe --always --dirty 2> /dev/null)" --file docker/Dockerfile --tag $(IMAGE) .

shell: ## bash in the container, with the devices, outputs/ and data/
	@$(inside) shell

notebook: ## Jupyter with the stages as a notebook, on 127.0.0.1:8080 (remote: ssh -L 8080:localhost:8080 HOST)
	$(call build,IMAGE) --file docker/notebook.Dockerfile --tag $(IMAGE)-notebook .
	@$(inside) notebook

clean: ## Remove outputs/RUN; asks before it removes a trained model (YES=1 does not)
	@if [[ -e $(out)/train && -z "$(filter 1,$(YES))" ]]; then \
	  read -r -p "$(out) holds a trained model. Remove it? [y/N] " answer || answer=no; \
	  [[ $$answer == [yY]* ]] || { echo "kept $(out)"; exit 1; }; \
	fi; rm -rf $(out); [[ ! -e outputs/.cache ]] || \
	  echo "kept outputs/.cache, $$(du -sh outputs/.cache | cut -f1): models and compiled code that all runs share"
