"""The last word of the quick start: accuracy before and after, time, artefacts, what to try next."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_dgpo.observe.console import Console
from megatron_dgpo.observe.metrics import read_metrics

RUN = "QUICKSTART_RUN={} bash examples/quickstart/run.sh"
"""From the same cold start, into a folder of its own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the DGPO run")
    parser.add_argument("--seconds", type=float, required=True, help="wall-clock time of the quick start")
    args = parser.parse_args()
    evaluations = read_metrics(args.run, "eval")
    before, after = evaluations[0], evaluations[-1]
    steps = read_metrics(args.run, "train")[-1]["step"]
    names = [name for name in before if name.startswith(("avg@", "pass@", "cons@"))] + ["greedy"]
    rows = [
        {"held-out accuracy": name, "cold start": before[name], f"after {steps} steps": after[name]}
        for name in names
    ]
    console = Console(quiet=False, rank=0)
    console.table(f"Quick start: {before['num_problems']:.0f} held-out problems", rows)
    console.table(
        "Where things are",
        [
            {"what": "time", "where": f"{args.seconds:.0f} s"},
            {"what": "policy", "where": f"{args.run / 'hf'} (transformers loads it)"},
            {"what": "metrics", "where": f"{args.run / 'metrics.jsonl'}, {args.run / 'tensorboard'}"},
            {"what": "samples", "where": str(args.run / "samples")},
            {"what": "compare with GRPO", "where": f"{RUN.format('grpo')} --algorithm.name grpo"},
            {"what": "sharper credit", "where": f"{RUN.format('tau')} --algorithm.tau 0.05"},
        ],
    )


if __name__ == "__main__":
    main()
