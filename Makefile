# `make demo` and `make test` on a fresh machine do all the set-up: a virtual environment in the checkout with
# every dependency that pyproject.toml declares, those of commands and tests included.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup ready demo chat test test-interpreted test-fast test-server browser test-wheel test-gpu test-gpu-sanitize \
	check bench bench-plan bench-makespan bench-selectors bench-gpu bench-gpu-fa4 bench-gpu-tune bench-gpu-model soak fuzz \
	test-families test-wide test-sglang support-matrix setup-eval test-eval clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade --quiet pip
	$(BIN)/python -m pip install --progress-bar off -e ".[dev]"
	touch $@

# lmms-eval for `mminfer eval`, in an environment of its own, which finds most of what it needs in the first one.
EVAL := .venv-eval

setup-eval: $(EVAL)/.ready

$(EVAL)/.ready: sglang_mminfer/tools/evaluation/lmms_eval.txt | $(VENV)/.ready
	$(PYTHON) -m venv $(EVAL)
	$(BIN)/python -c "import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])" \
		> $$($(EVAL)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth
	$(EVAL)/bin/python -m pip install --progress-bar off --quiet --no-compile --no-deps -r $<
	touch $@

# A conversation with right answers, asked of stock SGLang, of mminfer and of a baseline that fails: a few minutes.
demo: setup
	$(BIN)/python examples/demo/demo.py --out demo-out

# Talk to the demo's model yourself, in a browser: it knows letters and digits, and demo-out/media has what to show it.
# The flag is that of the demo's servers, which makes the model see every frame, each at its own size.
EVERY_FRAME = {\"video\": {\"min_pixels\": 12544, \"max_pixels\": 50176, \"fps\": 2.0, \"max_frames\": 8192}}

chat: setup
	$(BIN)/mminfer chat --model-path examples/needle_vlm/mixed --server-flags '--mm-process-config "$(EVERY_FRAME)"'

test: check test-interpreted test-fast test-server

# The GPU kernel in Triton's interpreter, on the tests that hold every executor.
test-interpreted: setup
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/unit/kernels/test_kernels.py tests/unit/kernels/test_estimate.py \
		tests/unit/kernels/test_fa4_arguments.py tests/unit/kernels/test_low_rank_scan.py \
		tests/properties/test_wrapper.py \
		tests/unit/serving/test_self_check.py tests/unit/serving/test_stock_rows.py \
		-k "triton or every_pattern_is_visited or with_real_tile_sizes or found_right"

# Everything that needs no server, a process for each core. The tests of a GPU are skipped here, but not overlooked: one
# that cannot be imported fails.
test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --durations=20 tests/unit tests/properties tests/fuzz \
		tests/gpu

# What needs servers, which keep the cores busy by themselves.
test-server: setup browser
	$(BIN)/python -m pytest --durations=20 tests/server

# `mminfer eval` with lmms-eval itself: its client, and needle models on real servers from end to end.
test-eval: setup setup-eval
	$(BIN)/python -m pytest tests/unit/tools/test_evaluation_lmms.py tests/server/test_eval_command.py

# Chromium, for the test of the chat application: from Debian where that is allowed. Without one the test is skipped.
browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || timeout 300 sh -c \
		"apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium" \
		>/dev/null 2>&1 </dev/null \
		|| echo "no Chromium here, and apt-get installs none: the browser test is skipped"

# The wheel in an environment of its own without the extras: the doctor, and a server. A minute or two, so it is no part
# of `make test`, which holds what is in the wheel. FRESH=1 downloads all that it
# requires, 5 minutes and 11 GB; else what is installed here is linked.
test-wheel: setup
	MMINFER_FRESH=$(FRESH) $(BIN)/python -m pytest tests/packaging

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types
	cp -rs $(CURDIR)/sglang_mminfer build/types/ && cp -rs $(CURDIR)/kernels build/types/sglang_mminfer/
	cp -rs $(CURDIR)/head_configs build/types/sglang_mminfer/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p sglang_mminfer

# Prefill time of the real server against stock dense, three times anew: the table in docs/performance.md.
bench: setup
	$(BIN)/python -m sglang_mminfer.benchmarks.server_prefill --config grid_static --tokens 8192 16384 32768 --servers \
		'mminfer, whole prompt' 'mminfer, chunked' 'stock, whole prompt' --runs 3 --repeats 3 \
		--out sglang_mminfer/benchmarks/results/cpu_prefill_runs.json

# What planning one chunk costs, many small images and frames among the cases.
bench-plan: setup
	$(BIN)/python -m sglang_mminfer.benchmarks.plan_time --out sglang_mminfer/benchmarks/results/plan_time.json

# What a layer should take on a card, modelled from real plans, and what choosing keys should, from compiled code; into
# sglang_mminfer/benchmarks/results/.
bench-makespan: setup
	$(BIN)/python -m sglang_mminfer.benchmarks.makespan
	$(BIN)/python -m sglang_mminfer.benchmarks.selection_cost

# What selectors keep of synthetic heads, by density; a result file and two pictures. Half an hour on a busy machine.
bench-selectors: setup
	$(BIN)/python -m sglang_mminfer.benchmarks.selectors
	$(BIN)/python -m sglang_mminfer.benchmarks.selectors_report sglang_mminfer/benchmarks/results/selectors.json

# What only a card can tell. BARE=1 installs nothing and takes $(PYTHON) as it is, with its torch, triton, numpy, numba and
# msgspec: for a machine without SGLang. The tests then need pytest, pytest-xdist and hypothesis in it.
ifdef BARE
RUN := PYTHONPATH=$(CURDIR)/build/bare$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PYTHON) -P
ready:
	rm -rf build/bare && mkdir -p build/bare
	cp -rs $(CURDIR)/sglang_mminfer build/bare/ && cp -rs $(CURDIR)/kernels build/bare/sglang_mminfer/
	cp -rs $(CURDIR)/head_configs build/bare/sglang_mminfer/
else
RUN := $(BIN)/python
ready: setup
endif

# The kernels in bf16 and fp16, every pattern, at a million keys, and against FlashInfer where that is installed; WORKERS
# processes share the card, because most of the time kernels are compiled. Then what a clock decides, alone.
test-gpu: ready
	$(RUN) -m pytest -n $(or $(WORKERS),8) --dist loadgroup tests/gpu/test_gpu_kernel.py tests/gpu/test_gpu_flashinfer.py
	$(RUN) -m pytest tests/gpu/test_gpu_benchmarks.py tests/gpu/test_gpu_speculative.py

# A small case under compute-sanitizer.
test-gpu-sanitize: ready
	$(RUN) -m pytest tests/gpu/test_gpu_sanitizer.py

# The self-check several times, then speed against dense and others: of the Triton kernel, and of FlashAttention-4, which
# must be installed. Resumable, under 8 minutes each, or no case after MINUTES; into sglang_mminfer/benchmarks/results/.
# BLOCK_K=128 takes key tiles of 128 keys.
TILES = $(if $(BLOCK_K),--block-k $(BLOCK_K)) $(if $(MINUTES),--minutes $(MINUTES))

bench-gpu: ready
	$(RUN) -m sglang_mminfer.benchmarks.tile_attention $(TILES)

bench-gpu-fa4: ready
	$(RUN) -m sglang_mminfer.benchmarks.tile_attention --executor fa4 $(TILES)

bench-gpu-tune: ready
	$(RUN) -m sglang_mminfer.benchmarks.tile_attention --tune

# EXECUTOR=fa4 takes another executor than Triton.
bench-gpu-model: ready
	$(RUN) -m sglang_mminfer.benchmarks.model_prefill $(if $(EXECUTOR),--executor $(EXECUTOR))

# Random conversations with servers of every family in turn, hours of them; the next run goes on. Variables and what must
# hold: tests/server/test_soak.py.
soak: setup
	$(BIN)/python -m pytest -s -m soak tests/server/test_soak.py

# Cases that nobody should write: head configs, conversations, media items, payloads; 100,000 of them. A run that was
# stopped goes on.
# Variables and what must hold: tests/fuzz/test_fuzz.py.
fuzz: setup
	$(BIN)/python -m pytest -s -m fuzz tests/fuzz tests/server/test_fuzz.py

# All model families on one rank and on two; `make test` has the first of each kind on one. A server each: half an hour.
test-families: setup
	$(BIN)/python -m pytest -m families tests/server/test_families.py

# What `make test` shows on one setting of a server, on others.
test-wide: $(VENV)/.wide
	$(BIN)/python -m pytest -m wide tests/server

$(VENV)/.wide: $(VENV)/.ready
	$(BIN)/python -m pip install --progress-bar off -e ".[dev,wide]"
	touch $@

# What this package stands on in SGLang, mends, families and conversations, with another release: VERSION=0.5.22. Its
# environment is .sglang/VERSION, over that of this checkout. A quarter of an hour.
RELEASE = .sglang/$(or $(VERSION),$(error VERSION names a release of SGLang, as in `make test-sglang VERSION=0.5.22`))

test-sglang: setup
	$(BIN)/python tests/helpers/sglang_release.py $(VERSION) $(RELEASE)
	OMP_NUM_THREADS=1 $(RELEASE)/bin/python -m pytest -n logical --maxprocesses 8 tests/unit/test_releases.py \
		tests/unit/serving/test_contract.py tests/unit/serving/test_hooks.py tests/unit/serving/test_plugin.py \
		tests/unit/mends tests/unit/families
	$(RELEASE)/bin/python -m pytest -m "" tests/server/test_turns.py tests/server/test_families.py \
		-k "test_turns or (qwen2_5_vl and not 2_ranks)"

# Both, and the table of families in docs/families.md from how they ended.
support-matrix: setup
	$(BIN)/python -m pytest -m "" tests/server/test_families.py --support tests/server/support.json
	PYTHONPATH=tests $(BIN)/python tests/server/support_matrix.py tests/server/support.json docs/families.md

clean:
	rm -rf build .sglang demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
