# One command each; all of them make .venv first where it is missing.
PYTHON ?= python3
BIN := .venv/bin
PROMPT ?= The quick fox runs past the road. It

.PHONY: demo test test-all test-clients test-cuda test-npu check bench clean

DEMO := build/demo

demo: .venv/core
	@rm -rf $(DEMO) && mkdir -p $(DEMO)
	@printf '\n== Run: the embedded checkpoint, on the backend a flag names ==\n'
	$(BIN)/glm5 run --backend cpu --prompt "$(PROMPT)" --max-tokens 32
	@printf '\n== Plan: GLM-5 on eight H200, 64 requests in flight ==\n'
	$(BIN)/glm5 plan --model glm-5-fp8 --profile h200-sxm --devices 8 --concurrency 64 --out $(DEMO)/plan.json
	@printf '\n== Simulate: the same plan under a quarter of that load ==\n'
	$(BIN)/glm5 simulate --plan $(DEMO)/plan.json --concurrency 16
	@printf '\n== Emulate: four Ascend dies, their INT8 and their clock, on this CPU ==\n'
	$(BIN)/glm5 run --backend sim --profile ascend-910c-die --devices 4 --prompt "$(PROMPT)" --max-tokens 16
	@printf '\n== Export: ONNX, checked against the graph, then run without it ==\n'
	$(BIN)/glm5 export --format onnx --phase decode --context 256 --verify --out $(DEMO)/onnx
	$(BIN)/glm5 run --artifact $(DEMO)/onnx --backend ort --prompt "$(PROMPT)" --max-tokens 16
	@printf '\nThe plan and the ONNX package are in $(DEMO).\n'

test: .venv/test
	$(BIN)/pytest -n 2 --dist loadfile

test-all: .venv/test
	HYPOTHESIS_PROFILE=random $(BIN)/pytest -n 2 --dist loadfile -m "not gpu and not clients and not cuda and not npu"

# Other people's clients against a server of this checkout; they want packages that the product must not have.
test-clients: .venv/test build/clients/ready
	GLM5=$(abspath $(BIN))/glm5 build/clients/bin/python -m pytest -p no:cacheprovider -W default --confcutdir tests/clients -m clients tests/clients

# Kernels for GPUs, without one: Triton's interpreter, the assembler, XLA for an H200 that is not there.
test-cuda: build/cuda/ready
	build/cuda/bin/python -m pytest -p no:cacheprovider -W default -m cuda tests/kernels

# Exports for Ascend, with torch_npu's own schemas and Meta kernels; without an NPU, and without CANN.
test-npu: build/npu/ready
	build/npu/bin/python -m pytest -p no:cacheprovider -W default -rs -m npu tests/npu

check: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/test
	$(BIN)/python -m bench.decode

# What running the product needs.
.venv/core: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[export]"
	touch $@

# What testing it needs; torch first, so that nothing pulls another build of it.
.venv/test: pyproject.toml .venv/core
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

build/clients/ready: tests/clients/requirements.txt
	test -x build/clients/bin/python || $(PYTHON) -m venv build/clients
	build/clients/bin/pip install --quiet --disable-pip-version-check -r tests/clients/requirements.txt
	touch $@

# Load testers, for `python -m bench.testers`.
build/testers/ready: bench/testers.txt
	test -x build/testers/bin/python || $(PYTHON) -m venv build/testers
	build/testers/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	build/testers/bin/pip install --quiet --disable-pip-version-check -r bench/testers.txt
	touch $@

# JAX's CUDA plugin without the libraries of CUDA, which only running wants.
build/cuda/ready: pyproject.toml
	test -x build/cuda/bin/python || $(PYTHON) -m venv build/cuda
	build/cuda/bin/pip install --quiet --disable-pip-version-check -e ".[cuda-check]"
	jax=$$(build/cuda/bin/python -c 'import importlib.metadata as m; print(m.version("jax"))') && \
	build/cuda/bin/pip install --quiet --disable-pip-version-check --no-deps jax-cuda13-plugin==$$jax jax-cuda13-pjrt==$$jax
	touch $@

# Where there is no wheel of torch_npu, its tests say so.
build/npu/ready: pyproject.toml
	test -x build/npu/bin/python || $(PYTHON) -m venv build/npu
	build/npu/bin/pip install --quiet --disable-pip-version-check -e ".[npu-check]"
	build/npu/bin/pip install --quiet --disable-pip-version-check -e ".[npu]" || echo "torch_npu is not to be had here"
	touch $@

clean:
	rm -rf .venv build *.egg-info
