#!/usr/bin/env bash
# The quick start with the algorithm of cispo.py. More words go to the run.
set -euo pipefail
cd "$(dirname "$0")/../.."
export QUICKSTART_RUN="${QUICKSTART_RUN:-cispo}"
exec bash examples/quickstart/run.sh examples/custom_algorithm/algorithm.toml "$@"
