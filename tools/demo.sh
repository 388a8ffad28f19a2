#!/usr/bin/env bash
# The whole path on this machine: text -> tokenizer -> training -> ONNX -> parity -> generated text.
#
#   tools/demo.sh [DIR]      DIR defaults to ./demo and is made anew
#
# The text is real and already here: docstrings of the installed Python packages.
set -euo pipefail
demo=${1:-demo}
prompt="Returns the"

say() { printf '\n== %s\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }

rm -rf "$demo"
mkdir -p "$demo"

say "Gather text and make a tokenizer"
run tinylm data sample --out "$demo/data" --max-mb 8
run tinylm tokenizer train --file "$demo/data/train.jsonl" --out "$demo/tokenizer" --vocab-size 4096

say "Train a ternary model (some minutes)"
run tinylm train --preset tinylm-demo --tokenizer "$demo/tokenizer" \
    --train-file "$demo/data/train.jsonl" --val-file "$demo/data/val.jsonl" --out "$demo/run" \
    --max-steps 500 --batch-size 8 --schedule linear --lr 4e-3 --min-lr-ratio 0 --warmup-steps 50 \
    --eval-every 100 --save-every 250 --log-every 25 --sample-prompt "$prompt"
run tinylm eval "$demo/run" --file "$demo/data/val.jsonl" --json "$demo/eval.json"

say "Export to ONNX and compare PyTorch with ONNX Runtime"
for format in int8 fp8; do
    run tinylm-export onnx "$demo/run" --out "$demo/onnx-$format" --activation $format
    run tinylm-export parity "$demo/onnx-$format" --json "$demo/parity-$format.json"
done
run tinylm-export inspect "$demo/onnx-int8"

say "Generate from ONNX Runtime"
run tinylm-export generate "$demo/onnx-int8" --prompt "$prompt" --max-new-tokens 100

say "Kernels that ran the custom ops"
for format in int8 fp8; do
    python -c 'import json, sys
for runtime in json.load(open(sys.argv[1]))["runtimes"]:
    print(sys.argv[2], runtime["runtime"], runtime["version"] + ":", runtime["kernels"])' \
        "$demo/parity-$format.json" "$format"
done

say "Everything lies in $demo"
cat <<EOT
$demo/data             training and held-out text
$demo/tokenizer        SentencePiece tokenizer
$demo/run              checkpoints, metrics.jsonl, tensorboard/, loss_curve.png
$demo/onnx-int8        ONNX with int8 activations; onnx-fp8: with fp8_e4m3 activations
$demo/*-parity.png     difference of every node's output, PyTorch against ONNX Runtime
$demo/parity-*.json    the parity reports
EOT
