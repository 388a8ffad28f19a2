#!/usr/bin/env bash
# Trains tinylm-300m and its dense twin for the same steps, in as many calls as it takes: one after the
# other, or at once where the machine has a GPU for each.
#
#   tools/real_run.sh DATA OUT STEPS [further flags of tinylm train]
#
# DATA is a folder of tinylm data prepare. A call ends by itself after LIMIT seconds (default 540)
# and saves; the same call again goes on exactly there. Runs are in OUT/ternary and OUT/dense; one
# that is done is measured on all held-out text, into OUT/ternary-eval.json and OUT/dense-eval.json.
# Nothing is installed: PYTHON (default python3) needs torch, transformers, typer, rich and safetensors.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
data=$1 out=$2 steps=$3
shift 3
python=${PYTHON:-python3}
deadline=$((SECONDS + ${LIMIT:-540}))
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

train() {
    local name=$1 left=$((deadline - SECONDS)) resume=()
    shift
    if [ -e "$out/$name-eval.json" ]; then
        echo "$name: done, see $out/$name-eval.json"
        return
    fi
    if [ "$left" -lt 30 ]; then
        echo "$name: no time left in this call; call again"
        return
    fi
    if [ -e "$out/$name/training_config.json" ]; then resume=(--resume); fi
    # SIGTERM saves and ends with 0; what does not end within a minute is killed.
    timeout --preserve-status --signal=TERM --kill-after=60 "$left" \
        "$python" -m tinylm.cli train --preset "${PRESET:-tinylm-300m}" --data "$data" \
        --out "$out/$name" --max-steps "$steps" --json "$out/$name.json" \
        --recipe two-stage --warmup-steps 200 --batch-size 32 --grad-accum-steps 2 \
        --compile --no-tensorboard --eval-every 250 --eval-max-tokens 262144 \
        --save-every 1000000 --keep-last 1 \
        --sample-prompt "The President of the United States" "$@" "${resume[@]}"
    if grep -q '"stopped": false' "$out/$name.json"; then
        "$python" -m tinylm.cli eval "$out/$name" --data "$data" --json "$out/$name-eval.json"
    fi
}

num_gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
if [ "$num_gpus" -ge 2 ]; then
    mkdir -p "$out"
    echo "both at once; see $out/ternary.log and $out/dense.log"
    CUDA_VISIBLE_DEVICES=0 train ternary "$@" >>"$out/ternary.log" 2>&1 &
    status=0
    CUDA_VISIBLE_DEVICES=1 train dense --dense "$@" >>"$out/dense.log" 2>&1 || status=$?
    wait $! || status=$?
    tail -n 3 "$out/ternary.log" "$out/dense.log"
    exit $status
fi
train ternary "$@"
train dense --dense "$@"
