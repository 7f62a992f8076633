#!/usr/bin/env bash
# The shape of the paper's tables on a machine without a GPU, from the quick start's task and model.
#
#   bash examples/paper_tables/run.sh [--quick] [--jobs N] [--out FOLDER]
#
# --quick  every table from a few steps and seeds, to see that it works: minutes, and no evidence of anything
# --jobs   runs at a time, of one process each (the number of cores)
# --out    runs/paper_tables, or runs/paper_tables-quick; RESULTS.md, figure3.png and results.json come there
#
# Started again, it goes on where it was ended.
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/environment.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export THP_MEM_ALLOC_ENABLE="${THP_MEM_ALLOC_ENABLE:-1}"
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-1073741824}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-1073741824}"
exec python examples/paper_tables/tables.py "$@"
