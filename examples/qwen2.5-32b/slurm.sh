#!/usr/bin/env bash
#SBATCH --nodes=6
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
# Two machines serve rollouts, four train: sbatch examples/qwen2.5-32b/slurm.sh (on the folder of the repository, which all
# machines share). When the trainer ends, however it ends, so do the servers, and the job has the trainer's status.
set -euo pipefail
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
servers=("${nodes[@]:0:2}") trainers=("${nodes[@]:2}")
model="${MODEL:-models/Qwen2.5-32B}"
list=$(printf ",http://%s:30000" "${servers[@]}")

srun --nodes=2 --ntasks=2 --nodelist="$(IFS=,; echo "${servers[*]}")" --output=server-%t.log \
    bash -c 'export PATH="$PWD/.venv-sglang/bin:$PATH"
        exec python -m sglang.launch_server --model-path "$0" --tp 8 --host "$(hostname)" \
        --port 30000 --load-format dummy --skip-tokenizer-init --enable-fp32-lm-head \
        --mem-fraction-static 0.85' "$model" &
step=$!
trap 'kill "$step" || true' EXIT # srun passes it on; what outlives it ends with the job
for server in "${servers[@]}"; do
    for _ in $(seq 180); do
        curl --silent --fail "http://$server:30000/health" > /dev/null && continue 2
        sleep 5
    done
    echo "the server on $server did not answer in 15 minutes; see server-*.log" >&2
    exit 1
done

export SERVERS="${list:1}" MODEL="$model" NNODES="${#trainers[@]}" MASTER_ADDR="${trainers[0]}"
srun --nodes="$NNODES" --ntasks="$NNODES" --nodelist="$(IFS=,; echo "${trainers[*]}")" \
    bash -c 'NODE_RANK=$SLURM_PROCID bash examples/qwen2.5-32b/run.sh "$@"' run "$@"
