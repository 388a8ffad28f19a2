#!/usr/bin/env bash
# Runs the GPU's tests: gpu_tests.sh PYTHON. With what is on the machine; never installs anything.
#
# TENSORRT_ROOT names TensorRT, in include/ and lib/, or its libraries alone. TINYLM_NATIVE_DIR names native libraries that were built
# before (tinylm-export native build --gpu --cuda-tests); without it they are built here.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
command -v "$python" >/dev/null || { echo "no $python on the path: make test-gpu PYTHON=python3" >&2; exit 2; }

# The checkout is imported as it lies; what the user put on the path comes after it.
mkdir -p build/import
ln -sfn ../../export build/import/tinylm_export
export PYTHONPATH="$PWD/build/import:$PWD${PYTHONPATH:+:$PYTHONPATH}"
tinylm_export() { "$python" -m tinylm_export.cli "$@"; }

# Sets CUDACXX, TENSORRT_INCLUDE_DIR, TENSORRT_ROOT and LD_LIBRARY_PATH, and says what is missing.
variables=$(tinylm_export native sdk --no-fetch) || [ -n "$variables" ]
eval "$variables"

if [ -z "${TINYLM_NATIVE_DIR:-}" ]; then
    for tool in cmake ninja "${CXX:-c++}" "${CUDACXX:-nvcc}"; do
        command -v "$tool" >/dev/null || {
            echo "no $tool on the path to build the native libraries with; set TINYLM_NATIVE_DIR to" \
                "a folder of libraries that were built elsewhere" >&2
            exit 2
        }
    done
    if [ -z "${TENSORRT_INCLUDE_DIR:-}" ]; then
        echo "no TensorRT headers to build the plugins with; put them in TENSORRT_ROOT's include/, or" \
            "set TINYLM_NATIVE_DIR to a folder of libraries that were built elsewhere" >&2
        exit 2
    fi
    # ONNX Runtime's header may be missing here: the ops' function bodies run then.
    (cd trt_plugins && cmake --preset gpu \
        ${ONNXRUNTIME_INCLUDE_DIR:+-DONNXRUNTIME_INCLUDE_DIR="$ONNXRUNTIME_INCLUDE_DIR"} &&
        cmake --build --preset gpu)
fi

"$python" - <<'EOF'
import platform, torch
from tinylm_export import gpu_sdk, native_gpu
print("Python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
print("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
print("TensorRT", gpu_sdk.load_tensorrt(), "plugins", native_gpu.describe_plugins())
EOF

# Only files with such tests: the others may need packages that are not on this machine.
mapfile -t files < <(grep -lE 'mark\.gpu\b' tests/test_*.py)
export TINYLM_REQUIRE_GPU=1  # a test that is skipped is a failure here
# Most of the time goes into building engines, on one core each; PROCESSES build at once.
workers=()
if "$python" -c "import xdist" 2>/dev/null; then workers=(--numprocesses "${PROCESSES:-8}"); fi
exec "$python" -m pytest -m gpu -p no:cacheprovider --durations 15 "${workers[@]}" "${files[@]}"
