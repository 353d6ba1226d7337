# make demo: trains a small GPT on 8 ranks of this machine (tp 4 x pp 2).   make test: the test suite.
# make pipeline: pretraining to PPO and a report, on 4 ranks. Stopped and started again it goes on where it was.
# Everything runs in .venv, which is made on first use and again only when what it is made of changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPU_SOURCES := $(wildcard csrc/cpu_*)
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: demo pipeline test check clean
.PHONY: bench-cpu bench-zero bench-generation bench-finetune bench-ppo bench-dpo-memory bench-gpu
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	@rm -rf runs/demo
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 8 examples/pretrain_gpt.py --tp 4 --pp 2 --save runs/demo

pipeline: $(VENV)/.installed
	$(BIN)/python examples/pipeline.py $(ARGS)

test: $(VENV)/.installed-test
	@$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/.installed-test
	@echo "ruff: lint and import order"
	@$(BIN)/ruff check .
	@echo "mypy: types"
	@$(BIN)/mypy
	@echo "architecture: layers and house rules"
	@$(BIN)/python -m pytest tests/test_architecture.py

bench-cpu: $(VENV)/.installed
	$(BIN)/python benchmarks/cpu.py

bench-zero: $(VENV)/.installed
	$(BIN)/python benchmarks/zero.py

bench-generation: $(VENV)/.installed
	$(BIN)/python benchmarks/generation.py $(ARGS)

bench-finetune: $(VENV)/.installed
	$(BIN)/python benchmarks/finetune.py $(ARGS)

bench-ppo: $(VENV)/.installed
	$(BIN)/python benchmarks/ppo.py $(ARGS)

bench-dpo-memory: $(VENV)/.installed
	$(BIN)/python benchmarks/dpo_memory.py $(ARGS)

# On a machine without a network there is no .venv: whatever python3 holds torch and triton runs it. ARGS="--check-only" etc.
bench-gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/megallm_kernels/*.so .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "error: Python %d.%d is too old: make PYTHON=python3.10 or newer" % v[:2])'
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py constraints.txt $(CPU_SOURCES) | $(BIN)/python
	@echo "installing megallm and what it needs (minutes on the first run)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: setup.py constraints.txt $(CPU_SOURCES) | $(BIN)/python
	@echo "installing megallm, what it needs and the test tools (minutes on the first run)"
	@$(PIP) -e '.[test]'
	@touch $@ $(VENV)/.installed
