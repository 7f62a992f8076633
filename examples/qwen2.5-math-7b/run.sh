#!/usr/bin/env bash
# Qwen2.5-Math-7B on one machine with eight GPUs.
#
#   MODEL=models/Qwen2.5-Math-7B   the Hugging Face folder
#   DATA=data/dapo-math-17k.parquet
#   HELDOUT=data/aime-2024.parquet   one or more files, with spaces between them
#   ALGORITHM=dgpo                 or grpo, dapo, dapo_dgpo, ppo and the others
#   NPROC=4                        ranks of the trainer
#   DRY_RUN=1                      check everything, print the plan, start nothing
#
# More words go to the run; one with other settings wants another folder:
#   bash examples/qwen2.5-math-7b/run.sh --algorithm.tau 0.5 --run.folder runs/qwen2.5-math-7b/tau0.5
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/environment.sh
here=examples/qwen2.5-math-7b
algorithm="${ALGORITHM:-dgpo}"
model="${MODEL:-models/Qwen2.5-Math-7B}"
nproc="${NPROC:-4}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
read -ra heldout <<< "${HELDOUT:-data/aime-2024.parquet}"
heldout=$(printf ',"%s"' "${heldout[@]}")
words=("$here/dgpo.toml" --algorithm.name "$algorithm" --run.folder "runs/qwen2.5-math-7b/$algorithm"
    --data.train "[\"${DATA:-data/dapo-math-17k.parquet}\"]"
    --evaluation.data "[${heldout:1}]")

if [ -n "${DRY_RUN:-}" ]; then
    # Without the model's folder its sizes do.
    [ -f "$model/config.json" ] || model="$here/model"
    WORLD_SIZE="$nproc" exec python -m megatron_dgpo.train "${words[@]}" --model.path "$model" --dry-run "$@"
fi
exec torchrun --standalone --max-restarts 3 --shutdown-timeout 600 --nproc-per-node "$nproc" \
    -m megatron_dgpo.train "${words[@]}" --model.path "$model" --resume "$@"
