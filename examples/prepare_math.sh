#!/usr/bin/env bash
# Data and checkpoint for the recipes of Qwen2.5-Math-7B and Qwen2.5-32B: once, on one machine, before a run.
#
#   MODEL=models/Qwen2.5-Math-7B         the Hugging Face folder
#   SOURCE=hub://BytedTsinghua-SIA/DAPO-Math-17k     or files of yours (pip install datasets for hub://)
#   SOURCE_HELDOUT=hub://BytedTsinghua-SIA/AIME-2024
#   DATA=data/dapo-math-17k.parquet HELDOUT=data/aime-2024.parquet      what is written
#   MAX_PROMPT_TOKENS=1024               longer prompts are left out
#   MEGATRON=                            a folder: the model is also imported into it, for the 32B recipe's MODEL
#
# What is there already is left as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
model="${MODEL:-models/Qwen2.5-Math-7B}"

prepare() { # SOURCE OUT
    if [ -e "$2" ]; then
        echo "$2 is there"
        return
    fi
    python tools/preprocess_data.py "$1" --out "$2" --tokenizer "$model" \
        --max-prompt-tokens "${MAX_PROMPT_TOKENS:-1024}" --rejected "${2%.*}.rejected.jsonl"
    python tools/check_rewards.py "$2" || echo "the rows above would train or count as wrong" >&2
}

prepare "${SOURCE:-hub://BytedTsinghua-SIA/DAPO-Math-17k}" "${DATA:-data/dapo-math-17k.parquet}"
prepare "${SOURCE_HELDOUT:-hub://BytedTsinghua-SIA/AIME-2024}" "${HELDOUT:-data/aime-2024.parquet}"
if [ -n "${MEGATRON:-}" ] && [ ! -d "$MEGATRON" ]; then
    python tools/convert_checkpoint.py import "$model" "$MEGATRON"
fi
