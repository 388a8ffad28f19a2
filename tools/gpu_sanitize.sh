#!/usr/bin/env bash
# The CUDA kernels' tests under compute-sanitizer, on a few shapes: tools/gpu_sanitize.sh [PYTHON]
# memcheck finds accesses outside of memory, racecheck races on shared memory. Like gpu_tests.sh it
# takes the Python and the libraries that are there. PROCESSES share the tests. TINYLM_NUM_SHAPES and
# TINYLM_NUM_REPEATS say how much each test does, by default less for racecheck, which is far slower.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${1:-python3}
processes=${PROCESSES:-4}
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
if [ ! -x "$sanitizer" ]; then
    echo "compute-sanitizer is not here: put a CUDA toolkit's bin folder on the path, or set CUDA_HOME" >&2
    exit 2
fi

mkdir -p build/import
ln -sfn ../../export build/import/tinylm_export
export PYTHONPATH=$PWD/build/import:$PWD${PYTHONPATH:+:$PYTHONPATH}
export TINYLM_REQUIRE_GPU=1
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # else one tensor's end is another's beginning
pytest=("$python" -m pytest -q -m gpu -p no:cacheprovider)
collected=$("${pytest[@]}" --collect-only tests/test_cuda_kernels.py) || { echo "$collected" >&2; exit 1; }
mapfile -t tests < <(grep :: <<<"$collected")
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
failed=0
for tool in ${TOOLS:-memcheck racecheck}; do
    shapes=${TINYLM_NUM_SHAPES:-16} repeats=${TINYLM_NUM_REPEATS:-4}
    [ "$tool" != racecheck ] || shapes=${TINYLM_NUM_SHAPES:-4} repeats=${TINYLM_NUM_REPEATS:-2}
    echo "== $tool, $shapes shapes a test, ${#tests[@]} tests by $processes processes"
    jobs=()
    for ((first = 0; first < processes && first < ${#tests[@]}; ++first)); do
        mine=()
        for ((i = first; i < ${#tests[@]}; i += processes)); do mine+=("${tests[i]}"); done
        TINYLM_NUM_SHAPES=$shapes TINYLM_NUM_REPEATS=$repeats \
            "$sanitizer" --tool "$tool" --error-exitcode 1 --kernel-name kernel_substring=tinylm \
            "${pytest[@]}" "${mine[@]}" >"$logs/$first" 2>&1 &
        jobs+=($!)
    done
    for first in "${!jobs[@]}"; do
        wait "${jobs[first]}" || failed=1
        cat "$logs/$first"
    done
done
exit $failed
