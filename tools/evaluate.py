"""Evaluates a model folder or a checkpoint on problems with gold answers.

    python tools/evaluate.py MODEL --data FILE... [--k 32] [--out samples.jsonl] [--json metrics.json]

MODEL is a Hugging Face folder, an imported checkpoint or a run's checkpoints/step_XXXXXXXX. Avg@k, Cons@k and
Pass@k come with bootstrap confidence intervals over problems. The defaults are those of arXiv 2605.03327: 32
samples a problem at temperature 1.0 and top-p 0.7.

Every sample is kept in --out: the same command again goes on from there, and --regrade grades the samples
in it once more without drawing any. Samples of other weights, questions or rewards are refused. Problems
that occur more than once count once; several files are reported together and each for itself.

The status is 2 where the command is refused, and 3 where the servers are lost: --out has what is complete.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_dgpo.config import SGLangConfig


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        help="jsonl or parquet files, or hub://owner/name[/config][?split=...]",
    )
    parser.add_argument("--prompt-key", default="prompt")
    parser.add_argument("--answer-key", default="answer")
    parser.add_argument("--system-prompt", default="")
    parser.add_argument("--no-chat-template", action="store_true")
    parser.add_argument("--max-problems", type=int, default=0, help="the first so many; 0: all")
    parser.add_argument("--reward", default="math_verify", help="a reward's name, or package.module:function")
    parser.add_argument("--reward-timeout-seconds", type=float, default=10.0)
    parser.add_argument("--reward-workers", type=int, default=1)
    parser.add_argument("--k", type=int, default=32, help="samples a problem")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=0.7)
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument(
        "--stop-tokens",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="ids or texts of one token that end a response beside the end-of-sequence\n"
        "tokens of the tokenizer, generation_config.json and config.json",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="to compute on")
    parser.add_argument("--engine", choices=("embedded", "sglang"), default="embedded")
    parser.add_argument("--batch-size", type=int, default=256, help="samples together, embedded engine")
    parser.add_argument("--url", nargs="+", default=[], help="SGLang servers that run already")
    parser.add_argument(
        "--servers-load",
        action="store_true",
        help="servers read the weights from MODEL's folder, not from a broadcast of\n"
        "this process, which the model may not fit; those of --url have done so. Implied where\n"
        "the server takes all GPUs of this machine: the broadcast comes from one of its own",
    )
    parser.add_argument(
        "--request-timeout-seconds",
        type=float,
        default=SGLangConfig().request_timeout_seconds,
        help="a sample that takes longer is drawn again, once (default: a minute, and\n--max-new-tokens at "
        "--min-tokens-per-second)",
    )
    parser.add_argument(
        "--min-tokens-per-second",
        type=float,
        default=SGLangConfig().min_tokens_per_second,
        help="of one sample at the least, its wait at the server included (default: %(default)g)",
    )
    parser.add_argument(
        "--ignore-config-fields",
        nargs="+",
        default=[],
        metavar="NAME",
        help="fields of config.json that are unknown here and, as you know, change\nnothing; those "
        "that the run of a checkpoint ignores are ignored anyway",
    )
    parser.add_argument("--sglang-python", type=Path, default=Path(".venv-sglang/bin/python"))
    parser.add_argument("--server-tensor-parallel-size", type=int, default=1)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--out", type=Path, help="samples, one a line (none: not kept)")
    parser.add_argument("--regrade", action="store_true", help="grade the samples in --out again")
    parser.add_argument("--json", type=Path, help="metrics")
    parser.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap")
    options = parser.parse_args(argv)
    if options.k < 1:
        parser.error(f"--k {options.k}: at least 1")
    if options.request_timeout_seconds < 0:
        parser.error(f"--request-timeout-seconds {options.request_timeout_seconds:g}: at least 0")
    if options.min_tokens_per_second <= 0:
        parser.error(f"--min-tokens-per-second {options.min_tokens_per_second:g}: more than 0")
    if options.regrade and options.out is None:
        parser.error("--regrade needs --out, the samples to grade")
    if options.servers_load and options.engine != "sglang":
        parser.error("--servers-load needs --engine sglang")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    from evaluation_run import run  # imports torch and Megatron, which takes seconds

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
