#!/usr/bin/env bash
# Qwen2.5-32B: run this on every machine of the trainer (slurm.sh does).
#
#   SERVERS=http://10.0.0.5:30000,http://10.0.0.6:30000   SGLang servers that run on other machines; without them each
#                                  machine has four ranks and a server on the four other GPUs (managed.toml)
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500
#   LOCAL_ADDR=node-0              this machine's name or address for the others (hostname)
#   MAX_RESTARTS=3                 how many times a run that lost a rank goes on by itself
#   MODEL=models/Qwen2.5-32B       the Hugging Face folder, or a checkpoint imported from it
#   DATA=data/dapo-math-17k.parquet
#   HELDOUT=data/aime-2024.parquet     one or more files, with spaces between them
#   ALGORITHM=dgpo                 or grpo, dapo, dapo_dgpo, ppo and the others
#   DRY_RUN=1                      check everything, print the plan, start nothing
#   NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0   the network interface, where several lead to other machines
#
# More words go to the run; one with other settings wants another folder:
#   bash examples/qwen2.5-32b/run.sh --algorithm.tau 0.5 --run.folder runs/qwen2.5-32b/tau0.5
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/environment.sh
here=examples/qwen2.5-32b
algorithm="${ALGORITHM:-dgpo}"
model="${MODEL:-models/Qwen2.5-32B}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
read -ra heldout <<< "${HELDOUT:-data/aime-2024.parquet}"
heldout=$(printf ',"%s"' "${heldout[@]}")
words=("$here/dgpo.toml")
[ -n "${SERVERS:-}" ] || words+=("$here/managed.toml")
words+=(--algorithm.name "$algorithm" --run.folder "runs/qwen2.5-32b/$algorithm"
    --data.train "[\"${DATA:-data/dapo-math-17k.parquet}\"]"
    --evaluation.data "[${heldout:1}]")
nproc=4
if [ -n "${SERVERS:-}" ]; then
    nproc=8
    words+=(--rollout.sglang.urls "[\"${SERVERS//,/\",\"}\"]")
fi
nnodes="${NNODES:-4}" nproc="${NPROC:-$nproc}"

if [ -n "${DRY_RUN:-}" ]; then
    # Without the model's folder its sizes do.
    [ -f "$model/config.json" ] || model="$here/model"
    export WORLD_SIZE="$((nnodes * nproc))" LOCAL_WORLD_SIZE="$nproc"
    exec python -m megatron_dgpo.train "${words[@]}" --model.path "$model" --dry-run "$@"
fi
# With c10d torchrun starts all machines again when one of them has lost a rank.
exec torchrun --nnodes "$nnodes" --nproc-per-node "$nproc" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "${MASTER_ADDR:?}:${MASTER_PORT:-29500}" --rdzv-id "${RUN_ID:-qwen2.5-32b}" \
    --rdzv-conf "is_host=$([ "${NODE_RANK:?}" = 0 ] && echo 1 || echo 0)" --local-addr "${LOCAL_ADDR:-$(hostname)}" \
    --shutdown-timeout 600 -m megatron_dgpo.train "${words[@]}" --model.path "$model" --resume "$@"
