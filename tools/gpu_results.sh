#!/usr/bin/env bash
# Makes again what benchmarks/results/gpu holds, on a machine with an NVIDIA GPU:
#
#   TENSORRT_ROOT=... TINYLM_NATIVE_DIR=build/native tools/gpu_results.sh OUT [PART...]
#
# Parts, by default all in this order; each leaves its files in OUT as soon as it has them:
#   kernels   tests of the CUDA kernels alone (needs no TensorRT)
#   tests     make test-gpu
#   sanitize  the kernels' tests under compute-sanitizer
#   export    the 300M preset with random weights as ONNX, in WORK
#   bench-engines  its bf16 and dense engines, while nothing else has the GPU: TensorRT times kernels
#   engines   the other engines, parity and generation, four things at a time
#   bench     the engines' speed
#   speed     benchmarks/gpu.py, with these engines where they are
#   counters  what limits the kernels, by ncu
#
# DEMO names a folder as tools/demo.sh makes it: a trained model goes through `engines` too. Where
# `datasets` is missing, TINYLM_CACHE must name the cache in which demo.sh left its text's tokens.
# WORK is where models and engines are kept between calls. Like gpu_tests.sh it installs nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?usage: tools/gpu_results.sh OUT [PART...]}
shift
work=${WORK:-/tmp/tinylm-gpu-results}
python=${PYTHON:-python3}
program=${TINYLM_NATIVE_DIR:-build/native}/bin/tinylm-run
mkdir -p "$out" "$work" build/import
ln -sfn ../../export build/import/tinylm_export
export PYTHONPATH="$PWD/build/import:$PWD${PYTHONPATH:+:$PYTHONPATH}"
cores=$(nproc)

say() { echo "$(date +%T) $*"; }

# Runs a command or function on some cores with as many threads: processes that each take all cores
# for theirs are ten times slower together.
on() (
    first=$1 count=$2
    shift 2
    taskset --pid --cpu-list "$first-$((first + count - 1))" "$BASHPID" >/dev/null
    export OMP_NUM_THREADS=$count
    "$@"
)

# Lane 0 to 3 of `engines`: a quarter of the cores each.
lane() {
    local index=$1 count=$((cores < 4 ? 1 : cores / 4))
    shift
    on $((index * count % cores)) $count "$@"
}

# --out joins what all parts found, after each: whatever ends a call, what is there is kept.
engines() { "$python" benchmarks/trt_engines.py --work "$work/300m" --out "$out/engines_300m.json" "$@"; }

demo_engines() {
    "$python" benchmarks/trt_engines.py --work "$work/demo" --out "$out/engines_demo.json" \
        --onnx-int8 "$DEMO/onnx-int8" --onnx-fp8 "$DEMO/onnx-fp8" --text "$DEMO/data/val.jsonl" "$@"
}

run_kernels() {
    TINYLM_REQUIRE_GPU=1 "$python" -m pytest -q -m gpu -p no:cacheprovider --numprocesses 12 --durations 10 \
        tests/test_cuda_kernels.py
}

run_tests() { bash tools/gpu_tests.sh "$python"; }

run_sanitize() {
    local half=$((cores / 2)) status=0
    TOOLS=memcheck on 0 $half bash tools/gpu_sanitize.sh "$python" >"$out/memcheck.log" 2>&1 &
    TOOLS=racecheck on $half $half bash tools/gpu_sanitize.sh "$python" >"$out/racecheck.log" 2>&1 || status=1
    wait $! || status=1
    return $status
}

run_export() { engines --part export; }

run_bench_engines() { engines --max-batch-size 64 --part build-dense-bf16 --part build-int8-bf16; }

run_engines() {
    (
        lane 0 engines --part build-int8-fp32
        touch "$work/fp32-is-built"
        lane 0 engines --part generation --program "$program"
    ) &
    (
        lane 1 engines --part build-int8-fp16
        until [ -e "$work/fp32-is-built" ]; do sleep 1; done
        lane 1 engines --part parity-int8
    ) &
    lane 2 engines --part build-fp8-fp32 --part build-fp8-bf16 --part build-fp8-fp16 --part parity-fp8 &
    if [ -n "${DEMO:-}" ]; then
        (
            for name in int8-fp32 int8-bf16 int8-fp16 fp8-fp32 fp8-bf16 fp8-fp16; do
                lane 3 demo_engines --part "build-$name"
            done
            lane 3 demo_engines --part parity-int8 --part parity-fp8 --part generation --text-tokens 224 \
                --program "$program"
        ) &
    fi
    local status=0 one
    for one in $(jobs -p); do
        wait "$one" || status=1
    done
    engines --part join # lanes that ended together may have missed each other's last part
    if [ -n "${DEMO:-}" ]; then demo_engines --part join; fi
    return $status
}

# PyTorch runs on the CPU in it, which takes minutes for more rows; gpu.py times engines with more.
run_bench() { engines --part bench --batch-size 1 --prompt-len 512; }

run_speed() {
    local models=()
    if [ -d "$work/300m/int8-bf16" ]; then
        models=(--engine "$work/300m/int8-bf16" --dense-engine "$work/300m/dense-bf16" --onnx "$work/300m/onnx-int8")
    fi
    "$python" benchmarks/gpu.py --out "$out/gpu.json" "${models[@]}"
}

run_counters() { "$python" benchmarks/gpu_counters.py --out "$out/gpu_counters.json"; }

parts=("$@")
[ $# -gt 0 ] || parts=(kernels tests sanitize export bench-engines engines bench speed counters)
failed=()
for part in "${parts[@]}"; do
    if ! declare -F "run_${part//-/_}" >/dev/null; then
        echo "unknown part '$part'; see the head of $0" >&2
        exit 2
    fi
    say "$part"
    ("run_${part//-/_}") >"$out/$part.log" 2>&1 || failed+=("$part")
    tail -n 4 "$out/$part.log"
done
say "failed: ${failed[*]:-none}"
[ ${#failed[@]} = 0 ]
