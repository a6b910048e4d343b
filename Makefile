# `make` lists the targets. Every package goes into .venv.
PYTHON ?= python3
# torch is not in the lock: which build is right (CPU, CUDA) is the machine's choice.
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=

BIN := .venv/bin
RUN := runs/quickstart
DONE := $(RUN)/evaluation/report.md

.DEFAULT_GOAL := help
.PHONY: help install train test check docs lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "PYTHON=python3.12 chooses the interpreter (3.11 or newer). On Linux, PyPI's torch brings"
	@echo "CUDA, some gigabytes; a machine without a GPU can take the small build instead:"
	@echo "  make install TORCH_FLAGS='--index-url https://download.pytorch.org/whl/cpu'"

install: .venv/.installed ## make .venv and install the locked packages, torch and Etude

# --no-deps: the lock is complete, and two of its packages are wanted for one file each, without
# their dependencies (see the group "files" in pyproject.toml).
.venv/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Etude needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)."; \
		echo "Name another interpreter, for example: make install PYTHON=python3.12"; exit 1; }
	@echo "Installing into .venv (once; a few minutes)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet '$(TORCH)' $(TORCH_FLAGS)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

train: install ## fine-tune the sample model, compare it with its base, say what to try next
	@if [ -e $(DONE) ]; then \
		cat $(DONE); \
		echo; \
		echo "$(RUN) is already trained; its report is above ($(DONE))."; \
		echo "To train again, remove the folder (rm -r $(RUN)) or choose another one (the last command below)."; \
	else \
		$(BIN)/etude train config.yml --preset quickstart && \
		$(BIN)/etude evaluate $(RUN) --base; \
	fi
	@echo
	@echo "Next:"
	@echo "  $(BIN)/etude evaluate $(RUN) --text \"What a wonderful day\""
	@echo "  $(BIN)/etude chat $(RUN)"
	@echo "  $(BIN)/etude chat $(RUN) --prompt \"...\""
	@echo "  $(BIN)/etude train config.yml --preset quickstart output.dir=runs/mine lora.r=16"

# Two processes of one thread: most of the time goes into small tests that use one core.
test: install ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=10 -n 2 --dist loadfile

check: install ## format, lint, types, import layers, notes, tests
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/notes.py check
	$(MAKE) --no-print-directory test

docs: install ## build the site in build/site/: the pages, with notes beside their code
	$(BIN)/python tools/docs.py

lock: ## write requirements.lock again from pyproject.toml
	PYTHON='$(PYTHON)' tools/lock.sh

clean: ## remove .venv and the caches; runs/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find src tests tools benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
