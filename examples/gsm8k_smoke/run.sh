#!/usr/bin/env bash
# Two real DGPO steps on GSM8K problems with a tiny random model.
#
#   GSM8K=path/to/gsm8k.jsonl   lines of {"question": ..., "answer": "... #### N"}
#
# More words go to the run, such as: examples/gsm8k_smoke/run.sh --train.steps 4
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/environment.sh
out=runs/gsm8k_smoke
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# On CPUs, memory that is freed is kept, in huge pages: getting it from the system anew costs more than using it.
export THP_MEM_ALLOC_ENABLE="${THP_MEM_ALLOC_ENABLE:-1}"
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-1073741824}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-1073741824}"

python examples/gsm8k_smoke/prepare.py --out "$out/data"
rm -rf "$out/run"
torchrun --standalone --max-restarts 3 --shutdown-timeout 120 --nproc-per-node 2 -m megatron_dgpo.train examples/gsm8k_smoke/dgpo.toml "$@"
