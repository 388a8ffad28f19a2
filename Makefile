# Every target sets up what it needs in .venv; nothing is installed anywhere else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Compiled modules make every later start of Python seconds faster.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup native native-gpu native-if-possible lint test test-gpu sanitize sanitize-gpu demo clean

help:
	@echo "make demo    train, export, check and run a small model on this machine (minutes)"
	@echo "make test    ruff, mypy, clang-format, the C++ unit tests and pytest"
	@echo "make sanitize  the C++ unit tests under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make lint    ruff, mypy and clang-format only"
	@echo "make test-gpu  the tests that need an NVIDIA GPU, with PYTHON and its packages as they are"
	@echo "make native  build the CPU kernels for ONNX Runtime, and the GPU's plugins where the"
	@echo "             CUDA compiler and TensorRT's headers are on this machine"
	@echo "make native-gpu  build both, and fetch nvcc and TensorRT (1.9 GB) if need be"
	@echo "make setup   make $(VENV) only"
	@echo "make clean   remove $(VENV), build/, demo/ and caches"

setup: $(READY)

# uv installs PyTorch and the rest in seconds where pip takes minutes.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else \
	    f"TinyLM needs Python 3.10 or newer, found {v.major}.{v.minor}: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[cpu,dev]'
	@touch $@

native: setup
	$(BIN)/tinylm-export native build

native-gpu: setup
	$(BIN)/tinylm-export native build --gpu --cuda-tests

# Says so loudly where a compiler or header is missing; a build that fails still stops make.
native-if-possible: setup
	$(BIN)/tinylm-export native build --if-possible --cuda-tests

# mypy does not follow an editable install that renames a folder, so it gets a link.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p $(VENV)/typing && ln -sfn ../../export $(VENV)/typing/tinylm_export
	MYPYPATH=$(VENV)/typing $(BIN)/mypy -p tinylm -p tinylm_export
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'trt_plugins/*.cpp' 'trt_plugins/*.h' 'trt_plugins/*.cu' 'trt_plugins/*.cuh')

test: lint native-if-possible
	PATH="$(abspath $(BIN)):$$PATH" bash tools/native_tests.sh tests
	$(BIN)/pytest --numprocesses 2

# No set-up: a GPU machine may have no network.
test-gpu:
	bash tools/gpu_tests.sh $(PYTHON)

sanitize-gpu:
	bash tools/gpu_sanitize.sh $(PYTHON)

# The kernels' unit tests under AddressSanitizer with UBSan, and under ThreadSanitizer.
sanitize: setup
	PATH="$(abspath $(BIN)):$$PATH" bash tools/native_tests.sh asan tsan

demo: native-if-possible
	PATH="$(abspath $(BIN)):$$PATH" bash tools/demo.sh demo

clean:
	rm -rf $(VENV) demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
