# Every target makes or reuses .venv; nothing else is needed on a fresh machine but Python and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
# By all cores, where pip compiles with one; without it every process would, where nothing may be written beside sources.
# Families of models, but for what all of them import, compile when one is used. What is for other versions of Python
# does not compile, and is not needed.
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/(tests?|testing/_internal|transformers/models/[b-z][^/]*)/' \
	$(VENV)/lib || true
JINJA_FOR_NODE := @huggingface/jinja@0.5.11
# make demo and make test never need a network once the packages are installed.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := true

.PHONY: setup demo test test-serving real-language engines bench lint format base clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[plots]"
	$(COMPILE)
	touch $@

# What tests and lint need besides.
$(VENV)/.dev: $(VENV)/.installed
	$(PIP) --editable ".[dev,plots]"
	$(COMPILE)
	touch $@

demo: setup
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		recipes/sft.py
	@echo
	@echo 'The same question in both modes:'
	@$(BIN)/thinkfusion chat runs/tiny --mode both 'What is the sum of the digits of 293443 modulo 10?'
	@echo
	@echo 'Talk to it: $(BIN)/thinkfusion chat runs/tiny'
	@$(BIN)/python -c 'import json; print(json.load(open("runs/tiny/mode_report.json"))["verdict"]["headline"])'
	@echo 'All of it, as a page: runs/tiny/report.html'

# Training in 4 bits is tested too; what it needs says so at every start, and stays out of the demo.
$(VENV)/.quantise: $(VENV)/.dev
	$(PIP) --editable ".[quantise]"
	$(COMPILE)
	touch $@

# A test that waits for ever shows where after ten minutes, and ends the run; else CI is stopped without a word of it.
test: setup $(VENV)/.quantise
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 \
		-o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true -q

# Real servers, each in an environment of its own: vLLM, llama.cpp, transformers serve.
test-serving: setup $(VENV)/.dev
	test -f runs/tiny/config.json || $(BIN)/accelerate launch --num_processes 1 --num_machines 1 \
		--mixed_precision no --dynamo_backend no recipes/sft.py
	$(BIN)/python tests/serving/environments.py
	$(BIN)/python -m pytest tests/serving -q --durations 20

# The third engine that templates are tested in; without npm its tests are skipped, and say so.
engines: setup
	@if command -v npm >/dev/null; then \
		npm install --prefix $(VENV)/node --no-save --no-audit --no-fund $(JINJA_FOR_NODE) \
			|| echo '$(JINJA_FOR_NODE) could not be installed: its tests will be skipped.'; \
	else \
		echo 'npm is not here: the tests of $(JINJA_FOR_NODE) will be skipped.'; \
	fi

# make bench GSM8K=gsm8k_train.jsonl; without the file the rows are generated.
bench: setup $(VENV)/.dev
	mkdir -p runs/benchmarks
	$(BIN)/python tests/benchmarks/preparation.py $(if $(GSM8K),--gsm8k $(GSM8K)) --json runs/benchmarks/preparation.json
	$(BIN)/python tests/benchmarks/memory.py --json runs/benchmarks/memory.json
	$(BIN)/python tests/benchmarks/fusing.py --json runs/benchmarks/fusing.json
	$(BIN)/python tests/benchmarks/trees.py $(if $(GSM8K),--gsm8k $(GSM8K)) --json runs/benchmarks/trees.json
	$(BIN)/python tests/benchmarks/fuzzing.py $(if $(GSM8K),--data $(GSM8K)) --json runs/benchmarks/fuzzing.json
	$(BIN)/python tests/benchmarks/planning.py --json runs/benchmarks/planning.json
	$(BIN)/python tests/benchmarks/routing.py --json runs/benchmarks/routing.json
	$(BIN)/python tests/benchmarks/control_tokens.py --json runs/benchmarks/control_tokens.json
	$(BIN)/python tests/benchmarks/rl.py --json runs/benchmarks/rl.json

$(VENV)/.real-language: $(VENV)/.installed
	$(PIP) --editable ".[real-language]"
	$(COMPILE)
	touch $@

# The comparison on a real language model: hours of two cores. It stops after 60 minutes; the same again goes on.
# make real-language DATA=folder QUICK=1; without DATA the files are looked for in ../shared/data.
real-language: setup $(VENV)/.real-language
	$(BIN)/python examples/real_language/make_base.py --output runs/real_language/base
	$(BIN)/python examples/real_language/compare.py --output runs/real_language$(if $(QUICK),/quick) \
		--base runs/real_language/base $(if $(DATA),--data $(DATA)) $(if $(QUICK),--quick)

lint: setup $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

base: setup
	$(BIN)/python recipes/tiny_base.py --output_dir thinkfusion/tiny_base

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache build *.egg-info
