#!/usr/bin/env bash
# Builds and runs the C++ unit tests: native_tests.sh PRESET..., of trt_plugins/CMakePresets.json.
# Says so loudly, and succeeds, where a compiler or GoogleTest is missing.
set -euo pipefail
cd "$(dirname "$0")/../trt_plugins"

skip() {
    echo "SKIPPED: the C++ unit tests ($*): $reason" >&2
    exit 0
}

reason="no C++ compiler on the path (Debian: g++)"
command -v "${CXX:-c++}" >/dev/null || skip "$@"
for tool in cmake ninja; do
    reason="no $tool on the path (pip install $tool)"
    command -v $tool >/dev/null || skip "$@"
done
reason="GoogleTest not found (Debian: libgtest-dev)"
echo '#include <gtest/gtest.h>' | "${CXX:-c++}" -E -x c++ - >/dev/null 2>&1 || skip "$@"

for preset in "$@"; do
    echo "C++ unit tests, preset $preset"
    # The ops, the runtime and the GPU's part are tested from Python; here are the CPU kernels alone.
    cmake --preset "$preset" -DTINYLM_ORT=OFF -DTINYLM_RUNTIME=OFF -DTINYLM_CUDA=OFF >/dev/null
    cmake --build --preset "$preset"
    only=()
    if [ "$preset" = tsan ]; then only=(--tests-regex Threads); fi  # the others have one thread
    ctest --preset "$preset" --parallel 2 "${only[@]}" | tail -n 5
done
