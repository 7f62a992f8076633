#!/usr/bin/env bash
# Data and checkpoint for the recipes of Qwen2.5-Math-7B and Qwen2.5-32B: once, on one machine, before a run.
#
#   MODEL=models/Qwen2.5-Math-7B         the Hugging Face folder
#   SOURCE=hub://BytedTsinghua-SIA/DAPO-Math-17k     or files of yours (pip install datasets for hub://)
#   SOURCE_HELDOUT=hub://BytedTsinghua-SIA/AIME-2024
#   DATA=data/dapo-math-17k.parquet HELDOUT=data/aime-2024.parquet      what is written
#   PROMPT_KEY_HELDOUT=prompt            where SOURCE_HELDOUT's rows have the problem
#   MAX_PROMPT_TOKENS=1024               longer prompts are left out
#   MEGATRON=                            a folder: the model is also imported into it, for the 32B recipe's MODEL
#
# SOURCE_HELDOUT, HELDOUT and PROMPT_KEY_HELDOUT may have several words, one for each file. AIME 2025 too:
#
#   SOURCE_HELDOUT="hub://BytedTsinghua-SIA/AIME-2024 hub://math-ai/aime25?split=test" PROMPT_KEY_HELDOUT="prompt problem" \
#       HELDOUT="data/aime-2024.parquet data/aime-2025.parquet" bash examples/prepare_math.sh
#
# What is there already is left as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/environment.sh
model="${MODEL:-models/Qwen2.5-Math-7B}"
read -ra sources <<< "${SOURCE_HELDOUT:-hub://BytedTsinghua-SIA/AIME-2024}"
read -ra heldout <<< "${HELDOUT:-data/aime-2024.parquet}"
read -ra keys <<< "${PROMPT_KEY_HELDOUT:-prompt}"
if [ "${#sources[@]}" != "${#heldout[@]}" ]; then
    echo "SOURCE_HELDOUT names ${#sources[@]} sources and HELDOUT ${#heldout[@]} files; one for each" >&2
    exit 2
fi

prepare() { # SOURCE OUT [PROMPT_KEY]
    if [ -e "$2" ]; then
        echo "$2 is there"
        return
    fi
    python tools/preprocess_data.py "$1" --out "$2" --tokenizer "$model" --prompt-key "${3:-prompt}" \
        --max-prompt-tokens "${MAX_PROMPT_TOKENS:-1024}" --rejected "${2%.*}.rejected.jsonl"
    local status=0
    python tools/check_rewards.py "$2" || status=$?
    if [ "$status" = 1 ]; then
        echo "the rows above would train or count as wrong" >&2
    elif [ "$status" != 0 ]; then
        echo "$2 is written, but its gold answers could not be checked (status $status); try again:" \
            "python tools/check_rewards.py $2" >&2
        exit "$status"
    fi
}

prepare "${SOURCE:-hub://BytedTsinghua-SIA/DAPO-Math-17k}" "${DATA:-data/dapo-math-17k.parquet}"
for i in "${!sources[@]}"; do
    prepare "${sources[i]}" "${heldout[i]}" "${keys[i]:-}"
done
if [ -n "${MEGATRON:-}" ] && [ ! -d "$MEGATRON" ]; then
    python tools/convert_checkpoint.py import "$model" "$MEGATRON"
fi
