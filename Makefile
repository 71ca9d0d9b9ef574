# make quickstart  set up .venv and train a small code-search model, in minutes       make test   set up .venv, run all tests
# make bench       the benchmarks (minutes each, encode_memory an hour)               make lint   ruff
# make test-aot    set up .venv-aot (2 GB) and compile every config's step for the TPUs and GPUs that it names, without any
# make test-survival   kill a run of two processes ten times, and tell it to stop ten times (8 minutes)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
export HF_HUB_OFFLINE ?= 1
# Tests and benchmarks are about the CPU unless told otherwise; the quickstart takes whatever device jax finds.
test test-survival bench: export JAX_PLATFORMS ?= cpu

.PHONY: quickstart setup setup-aot test test-aot test-survival lint format docs bench clean

quickstart: $(VENV)/.training
	$(BIN)/python -m jaxembed.train --config=configs/quickstart.py --workdir=$(RUN)
	@printf '\n%s\n' 'What to do next:'
	@printf '  %-17s %s\n' 'read the report' '$(RUN)/report/README.md' \
	  'use the model' '$(BIN)/python -c "from jaxembed import Embedder; print(Embedder.load('"'$(RUN)'"').encode('"'open a file'"'))"' \
	  'train on your own' '$(BIN)/python -m jaxembed.train --config=configs/finetune_pairs.py --data=pairs.jsonl --workdir=runs/own'

setup: $(VENV)/.installed

# What training needs, and what tests need beside it.
$(VENV)/.training: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "jaxembed needs Python 3.11 or newer; set PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt -c constraints.txt
	touch $@

$(VENV)/.installed: $(VENV)/.training requirements-test.txt
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-test.txt -c constraints.txt
	touch $@

# Two processes: most of the time goes into compiling, which takes one core.
test: setup lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-survival: setup
	$(BIN)/python -m pytest tests/survival

setup-aot: $(VENV)-aot/.installed

test-aot: setup-aot
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 $(VENV)-aot/bin/python -m pytest tests/aot

$(VENV)-aot/.installed: requirements-aot.txt constraints.txt
	$(PYTHON) -m venv $(VENV)-aot
	$(VENV)-aot/bin/python -m pip install --quiet -r requirements-aot.txt -c constraints.txt
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python -m docs.make_config

bench: setup
	$(BIN)/python -m benchmarks.plan_scale
	$(BIN)/python -m benchmarks.loss_memory
	$(BIN)/python -m benchmarks.loss_time
	$(BIN)/python -m benchmarks.train_cpu
	$(BIN)/python -m benchmarks.plan_measured
	$(BIN)/python -m benchmarks.loop_overhead
	$(BIN)/python -m benchmarks.mteb_parity
	$(BIN)/python -m benchmarks.expert_layer
	$(BIN)/python -m benchmarks.upcycled
	$(BIN)/python -m benchmarks.encode_speed
	$(BIN)/python -m benchmarks.search_flat
	$(BIN)/python -m benchmarks.mined_negatives
	$(BIN)/python -m benchmarks.encode_memory
	$(BIN)/python -m benchmarks.wrong_inputs

clean:
	rm -rf $(VENV) $(VENV)-aot .cache .pytest_cache .ruff_cache
