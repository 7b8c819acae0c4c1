# mmdet-moe. `make help` lists what there is.
#
#   PYTHON=python3.12   the interpreter that makes the environment (3.10 or later)
#   VENV=path           the environment; one that exists and was not made here is used as it is
SHELL := /bin/sh
PYTHON ?= python3
VENV ?= .venv
RUN := $(abspath $(VENV))/bin/python
SEED ?= 0
DATA ?= ../shared/data/mini_uodb

# An environment that is used as it is need not have mmdet-moe installed.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
export PYTHONUNBUFFERED := 1
export MPLBACKEND := Agg

.PHONY: help setup demo test lint bench mini-uodb

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup:  ## make the environment: packages, mmcv wheel (once), checks; no-op where it is made
	@$(PYTHON) tools/setup_env.py --venv "$(VENV)"

demo: setup  ## make domains, plan, train, test per domain, table and pictures (work_dirs/demo)
	@$(RUN) tools/demo.py --seed $(SEED)

test: setup  ## the test suite
	@echo "running the tests (10 to 20 minutes on 2 cores)"
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN) -m pytest

lint: setup  ## ruff check, ruff format --check, mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: setup  ## planner, MoE layers, adapters against their rivals, the cost of recording (benchmarks/)
	@status=0; $(RUN) benchmarks/planner.py || status=1; \
	$(RUN) benchmarks/moe_layer.py || status=1; \
	$(RUN) benchmarks/domain_generalization.py || status=1; \
	$(RUN) benchmarks/expert_record.py || status=1; exit $$status

mini-uodb: setup  ## plan, train, test GEM and its dense twin on five real domains: DATA=... [SEED=0]
	@$(RUN) tools/mini_uodb.py --data "$(DATA)" --seed $(SEED)
