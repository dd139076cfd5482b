# Every target works on a fresh clone with python3 and pip: what it needs is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PEERS_JSON ?= benchmarks/results/peers.json
GPU_PYTHON ?= python3
GPU_JSON ?= benchmarks/results/gpu.json

.PHONY: demo test lint check fuzz format train-demo bench bench-peers triton-check gpu-check gpu-bench clean

demo: .venv/.demo            ## serve the bundled swarm, send one mixed batch, print the answers
	$(BIN)/loraswarm demo

test: .venv/.dev             ## the whole test suite, on the CPU, without network
	$(BIN)/python -m pytest -q

lint: .venv/.dev             ## ruff, formatting, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint                  ## linters, then the tests with coverage
	$(BIN)/python -m pytest -q --cov --cov-report=term:skip-covered

fuzz: .venv/.dev             ## spoil adapter files at random: each must be read, or refused by name
	$(BIN)/python tests/long/fuzz_adapters.py
	$(BIN)/python tests/long/fuzz_methods.py

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train-demo: .venv/.train     ## train the demo's base model and adapters anew (about half an hour)
	$(BIN)/python -m loraswarm.demo.train --out src/loraswarm/demo

bench: .venv/.dev            ## decode throughput, base and 32 adapters
	$(BIN)/python benchmarks/decode.py

bench-peers: .venv/.dev      ## install peers, measure them and ours (hours; benchmarks/peers/README.md)
	$(BIN)/python benchmarks/peers/run_all.py --json $(PEERS_JSON) $(PEERS_OPTIONS)

triton-check: .venv/.dev     ## every test of the kernels for CUDA, in Triton's interpreter (minutes)
	LORASWARM_TEST_ALL=1 $(BIN)/python -m pytest -q $(wildcard tests/test_triton_*.py)

# Where CUDA is, these run with what its Python has: no venv, nothing fetched.
gpu-check:                   ## tests of kernels, models and engine on a CUDA device
	@PYTHONPATH=src $(GPU_PYTHON) benchmarks/gpu/check.py $(GPU_CHECK_OPTIONS)

gpu-bench:                   ## measure a CUDA device: ceilings, LoRA kernels, steps of an 8B model
	@PYTHONPATH=src $(GPU_PYTHON) benchmarks/gpu/run.py --json $(GPU_JSON) $(GPU_OPTIONS)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .coverage

.venv/.python:
	$(PYTHON) -m venv .venv
	touch $@

.venv/.demo: .venv/.python pyproject.toml constraints.txt
	$(INSTALL) -e ".[demo]"
	touch $@

.venv/.dev: .venv/.python pyproject.toml constraints.txt
	$(INSTALL) -e ".[dev,demo,train]"
	touch $@

.venv/.train: .venv/.python pyproject.toml constraints.txt
	$(INSTALL) -e ".[train]"
	touch $@
