#!/usr/bin/env bash
# The whole road on a CPU: data, supervised cold start, DGPO, evaluation, export.
#
#   QUICKSTART_SEED    seed of data, start weights and sampling (1)
#   QUICKSTART_DEVICE  cpu (default), or cuda: a GPU for each process, and one for the server of `sglang`
#   QUICKSTART_NPROC   processes (2; with cuda 1 where there is no GPU for a second); with 2 or more,
#                      tensor_model_parallel_size = 2, so a multiple of it
#   QUICKSTART_SHORT   1: a few steps of everything, to see that it works
#   QUICKSTART_OUT     folder (runs/quickstart/seed<seed>)
#   QUICKSTART_RUN     name of the RL run in it (dgpo); a run with other settings wants another name
#   QUICKSTART_ENGINE  embedded (default), or sglang: rollouts from a real SGLang server, which gets the
#                      weights by broadcast after every step (`make sglang` installs it)
#
# More words go to the DGPO run, such as: QUICKSTART_RUN=tau bash examples/quickstart/run.sh --algorithm.tau 0.05
# Started again, it goes on where it was ended.
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/environment.sh

seed="${QUICKSTART_SEED:-1}"
device="${QUICKSTART_DEVICE:-cpu}"
short="${QUICKSTART_SHORT:-}"
out="${QUICKSTART_OUT:-runs/quickstart/seed$seed${short:+-short}}"
engine="${QUICKSTART_ENGINE:-embedded}"
run="${QUICKSTART_RUN:-dgpo$([ "$engine" = embedded ] || echo "-$engine")}"
here=examples/quickstart
nproc="${QUICKSTART_NPROC:-2}"
if [ "$device" = cuda ] && [ -z "${QUICKSTART_NPROC:-}" ]; then
    gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
    nproc=$((gpus - ($([ "$engine" = sglang ] && echo 1 || echo 0)) > 1 ? 2 : 1))
fi
split=(--parallel.device "$device" --parallel.tensor_model_parallel_size "$((nproc > 1 ? 2 : 1))")
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# On CPUs, memory that is freed is kept, in huge pages: getting it from the system anew costs more than using it.
export THP_MEM_ALLOC_ENABLE="${THP_MEM_ALLOC_ENABLE:-1}"
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-1073741824}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-1073741824}"

sft_size=() rl_size=() data_size=()
if [ -n "$short" ]; then
    data_size=(--traces 2000 --train-prompts 256 --heldout-prompts 32)
    sft_size=(--train.steps 60)
    rl_size=(--train.steps 4 --evaluation.every 2 --checkpoint.every 2)
fi
engine_args=()
if [ "$engine" = sglang ]; then
    engine_args=("$here/sglang.toml")
fi
launch() { torchrun --standalone --max-restarts 3 --shutdown-timeout 120 --nproc-per-node "$nproc" "$@"; }

started=$SECONDS
if [ ! -d "$out/data" ]; then
    echo "== 1/3 data: chained arithmetic with worked steps, seed $seed"
    python "$here/make_data.py" --out "$out/data" --seed "$seed" "${data_size[@]}"
fi

echo "== 2/3 supervised cold start from a noisy teacher"
launch -m megatron_dgpo.sft "$here/sft.toml" "${split[@]}" --resume --run.seed "$seed" \
    --run.folder "$out/coldstart" --model.path "$out/data/model" \
    --data.train "[\"$out/data/sft.jsonl\"]" "${sft_size[@]}"

echo "== 3/3 DGPO: 32 prompts x 8 samples a step, vocabulary sharded over $nproc processes"
launch -m megatron_dgpo.train "$here/dgpo.toml" "${engine_args[@]}" "${split[@]}" --resume --run.seed "$seed" \
    --run.folder "$out/$run" --model.path "$out/coldstart/hf" \
    --data.train "[\"$out/data/train.jsonl\"]" --evaluation.data "[\"$out/data/heldout.jsonl\"]" \
    "${rl_size[@]}" "$@"

python "$here/summary.py" "$out/$run" --seconds "$((SECONDS - started))"
