#!/usr/bin/env bash
#SBATCH --nodes=6
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
# The whole run as one job: sbatch --nodes=6 examples/qwen2.5-32b/slurm.sh (on the folder of the repository, which all
# machines share). When the trainer ends, however it ends, so do the servers, and the job has the trainer's status.
#
#   SERVER_NODES=2    machines that serve rollouts; the others train. By default the trainer has as many as its ranks
#                     divide over, and the rest serve: 2 of 6, 8 of 16. 0: every machine trains and serves (managed.toml).
#   IN_FLIGHT=1024    samples in flight at a server (its CUDA graphs cover as many)
#
# Of several network interfaces, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the one between the machines; they are
# passed on, as the whole environment is.
set -euo pipefail

# A replica has 16 ranks; with servers on the same machines 8, of 4 ranks each. All replicas share a mini-batch of 64 prompts.
divides() { # MACHINES RANKS_OF_A_MACHINE RANKS_OF_A_REPLICA
    local ranks=$(($1 * $2))
    ((ranks > 0 && ranks % $3 == 0 && 64 % (ranks / $3) == 0))
}
server_nodes() { # MACHINES: how many of them serve by default
    local trainers
    for ((trainers = $1 - 1; trainers > 0; trainers--)); do
        if divides "$trainers" 8 16; then
            echo $(($1 - trainers))
            return
        fi
    done
    echo "$1 machines are too few for servers of their own; use 3 or more, or SERVER_NODES=0" >&2
    return 2
}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
serving="${SERVER_NODES:-$(server_nodes "${#nodes[@]}")}"
ranks=8 replica=16
if [ "$serving" = 0 ]; then
    ranks=4 replica=8
fi
if ! divides "$((${#nodes[@]} - serving))" "$ranks" "$replica"; then
    echo "$((${#nodes[@]} - serving)) machines of $ranks ranks do not divide into replicas of $replica that share 64" \
        "prompts; use 2, 4, 8 or more of them (SERVER_NODES=$serving of ${#nodes[@]} serve)" >&2
    exit 2
fi
servers=("${nodes[@]:0:serving}") trainers=("${nodes[@]:serving}")
model="${MODEL:-models/Qwen2.5-32B}" in_flight="${IN_FLIGHT:-1024}"
export MODEL="$model" NNODES="${#trainers[@]}" MASTER_ADDR="${trainers[0]}" RUN_ID="${SLURM_JOB_ID:-qwen2.5-32b}"

if [ "$serving" != 0 ]; then
    list=$(printf ",http://%s:30000" "${servers[@]}")
    # On all of a machine's addresses: its own name may mean 127.0.1.1 there. One that ends is started again, and the run
    # takes it back.
    srun --nodes="$serving" --ntasks="$serving" --nodelist="$(IFS=,; echo "${servers[*]}")" --output=server-%t.log \
        bash -c 'export PATH="$PWD/.venv-sglang/bin:$PATH"
            while sleep 1; do
                python -m sglang.launch_server --model-path "$0" --tp 8 --host 0.0.0.0 --port 30000 \
                    --load-format dummy --skip-tokenizer-init --enable-fp32-lm-head --mem-fraction-static 0.85 \
                    --max-running-requests "$1" --cuda-graph-max-bs-decode "$1" || true
            done' "$model" "$in_flight" &
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
    export SERVERS="${list:1}"
fi
srun --nodes="$NNODES" --ntasks="$NNODES" --nodelist="$(IFS=,; echo "${trainers[*]}")" \
    bash -c 'NODE_RANK=$SLURM_PROCID LOCAL_ADDR=$SLURMD_NODENAME bash examples/qwen2.5-32b/run.sh "$@"' run \
    --rollout.sglang.max_concurrent_requests "$in_flight" "$@"
