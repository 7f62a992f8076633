#!/usr/bin/env bash
# Qwen2.5-32B: run this on every machine of the trainer, with SGLang servers running on others (slurm.sh starts both).
#
#   SERVERS=http://10.0.0.5:30000,http://10.0.0.6:30000
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500
#   MODEL=models/Qwen2.5-32B       the Hugging Face folder, or a checkpoint imported from it
#   DATA=data/dapo-math-17k.parquet
#   HELDOUT=data/aime-2024.parquet     one or more files, with spaces between them
#   ALGORITHM=dgpo                 or grpo, dapo, dapo_dgpo, ppo and the others
#   DRY_RUN=1                      check everything, print the plan, start nothing
#
# More words go to the run; one with other settings wants another folder:
#   bash examples/qwen2.5-32b/run.sh --algorithm.tau 0.5 --run.folder runs/qwen2.5-32b/tau0.5
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/environment.sh
here=examples/qwen2.5-32b
algorithm="${ALGORITHM:-dgpo}"
model="${MODEL:-models/Qwen2.5-32B}"
nnodes="${NNODES:-4}" nproc="${NPROC:-8}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
read -ra heldout <<< "${HELDOUT:-data/aime-2024.parquet}"
heldout=$(printf ',"%s"' "${heldout[@]}")
words=("$here/dgpo.toml" --algorithm.name "$algorithm" --run.folder "runs/qwen2.5-32b/$algorithm"
    --data.train "[\"${DATA:-data/dapo-math-17k.parquet}\"]"
    --evaluation.data "[${heldout:1}]")
if [ -n "${SERVERS:-}" ]; then
    words+=(--rollout.sglang.urls "[\"${SERVERS//,/\",\"}\"]")
fi

if [ -n "${DRY_RUN:-}" ]; then
    # Without the model's folder its sizes do.
    [ -f "$model/config.json" ] || model="$here/model"
    WORLD_SIZE="$((nnodes * nproc))" exec python -m megatron_dgpo.train "${words[@]}" --model.path "$model" --dry-run "$@"
fi
exec torchrun --nnodes "$nnodes" --nproc-per-node "$nproc" --node-rank "${NODE_RANK:?}" \
    --master-addr "${MASTER_ADDR:?}" --master-port "${MASTER_PORT:-29500}" --shutdown-timeout 600 \
    -m megatron_dgpo.train "${words[@]}" --model.path "$model" --resume "$@"
