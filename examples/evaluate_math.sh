#!/usr/bin/env bash
# The paper's evaluation of a policy: 32 samples a problem at temperature 1.0 and top-p 0.7, by an SGLang server.
#
#   MODEL=runs/qwen2.5-math-7b/dgpo/hf   a Hugging Face folder
#   HELDOUT="data/aime-2024.parquet data/aime-2025.parquet"   (by default the first) numbers for each and for all
#   ENGINE=sglang TP=2                   a server on so many GPUs; or ENGINE=embedded, in this process
#   MAX_NEW_TOKENS=3072                  (a minute and 0.1 s a token is what a sample may take: --min-tokens-per-second)
#   OUT=runs/evaluation                  samples.jsonl (from which it goes on) and metrics.json
#
# More words go to the tool, such as: examples/evaluate_math.sh --k 8
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/environment.sh
out="${OUT:-runs/evaluation}"
engine=(--engine "${ENGINE:-sglang}")
if [ "${ENGINE:-sglang}" = sglang ]; then
    engine+=(--servers-load --server-tensor-parallel-size "${TP:-2}")
fi
read -ra heldout <<< "${HELDOUT:-data/aime-2024.parquet}"
python tools/evaluate.py "${MODEL:-runs/qwen2.5-math-7b/dgpo/hf}" --data "${heldout[@]}" "${engine[@]}" \
    --dtype "${DTYPE:-bfloat16}" --max-new-tokens "${MAX_NEW_TOKENS:-3072}" --reward-workers 2 \
    --out "$out/samples.jsonl" --json "$out/metrics.json" "$@"
