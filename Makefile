# `make demo` and `make test` on a fresh machine do all the set-up: a virtual environment in the checkout with
# every dependency that pyproject.toml declares.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-interpreted test-fast test-gpu check bench bench-gpu soak clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade --quiet pip
	$(BIN)/python -m pip install --progress-bar off -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/python -m sglang_mminfer.evaluation.demo --out demo-out

test: setup check test-interpreted
	$(BIN)/python -m pytest

# The GPU kernel in Triton's interpreter, on the tests that hold every executor.
test-interpreted: setup
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/reference/test_kernels.py tests/reference/test_estimate.py \
		tests/semantics/test_wrapper.py tests/backend/test_self_check.py \
		-k "triton or every_pattern_is_visited or with_real_tile_sizes or found_right"

# Everything that needs no server.
test-fast: setup
	$(BIN)/python -m pytest tests/reference tests/semantics tests/backend

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types
	cp -rs $(CURDIR)/sglang_mminfer build/types/ && cp -rs $(CURDIR)/kernels build/types/sglang_mminfer/
	cp -rs $(CURDIR)/head_configs build/types/sglang_mminfer/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p sglang_mminfer

# Prefill time of the real server against stock dense, into kernels/benchmarks/results/.
bench: setup
	$(BIN)/python -m sglang_mminfer.evaluation.prefill_bench

# What only a card can tell: the kernel in bf16 and fp16, at a million keys; and its speed against dense, resumable.
test-gpu: setup
	$(BIN)/python -m pytest tests/backend/test_gpu_kernel.py tests/backend/test_gpu_flashinfer.py

bench-gpu: setup
	$(BIN)/python -m sglang_mminfer.kernels.benchmarks.tile_attention

# 300 conversations, 16 clients, aborts among them; about a quarter of an hour.
soak: setup
	$(BIN)/python -m pytest -m soak tests/server

clean:
	rm -rf build demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
