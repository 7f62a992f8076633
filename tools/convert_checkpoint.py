"""Hugging Face checkpoints to Megatron's distributed checkpoints and back, and a check that they agree.

    python tools/convert_checkpoint.py import HF_FOLDER TARGET
    python tools/convert_checkpoint.py export CHECKPOINT TARGET [--shard-size 5GB] [--model FOLDER]
    python tools/convert_checkpoint.py verify HF_FOLDER CHECKPOINT [--prompts FILE] [--bound 1e-4]

import   reads safetensors (one file, or several and an index) and writes a checkpoint that loads at any
         tensor- and pipeline-parallel size, with config.json and the tokenizer's files beside it. A run's
         `model.path` may name such a folder.
export   reads an imported checkpoint, or one that a run wrote (RUN/checkpoints/step_00000020), and writes a
         Hugging Face folder. Configuration and tokenizer come from the checkpoint's folder, from the run's
         model.path, or from --model.
verify   compares the log-probs of transformers with those of the checkpoint at a split, for the tokens of
         --prompts (lines of text, or of JSON lists of token ids) or for random ones. It starts a process for
         each rank, or takes torchrun's.

import and export are one process without a GPU or process groups. They pass on one tensor at a time: no more
is in memory than the largest of them a few times over, and export also holds one output file
(--shard-size). The source is checked completely before anything is written. The target appears
under its name when it is complete; until then it is called .TARGET.dgpo-partial, and what --overwrite
replaces stays. No other folder is touched.

Exit status: 0, 1 if verify finds a difference above the bound, 2 for wrong input (one line on stderr).
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def size(text: str) -> int:
    """Bytes of "5GB", "200MB", "1GiB" or "1000000"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text, re.IGNORECASE)
    value = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size (such as 5GB or 200MB)")
    return value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("import", help="Hugging Face to Megatron", allow_abbrev=False)
    add.add_argument("source", type=Path, metavar="HF_FOLDER")
    add.add_argument("target", type=Path)
    add_ignore(add)
    add.add_argument("--overwrite", action="store_true", help="replace a target that is there")
    add = commands.add_parser("export", help="Megatron to Hugging Face", allow_abbrev=False)
    add.add_argument("source", type=Path, metavar="CHECKPOINT")
    add.add_argument("target", type=Path)
    add.add_argument("--model", type=Path, help="folder with config.json and tokenizer")
    add_ignore(add)
    add.add_argument("--shard-size", type=size, default=5 * 10**9, help="of a file, such as 5GB (default)")
    add.add_argument("--overwrite", action="store_true", help="replace a target that is there")
    add = commands.add_parser("verify", help="compare log-probs", allow_abbrev=False)
    add.add_argument("source", type=Path, metavar="HF_FOLDER")
    add.add_argument("checkpoint", type=Path)
    add.add_argument("--model", type=Path, help="folder with the checkpoint's config.json")
    add_ignore(add)
    add.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N")
    add.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="N")
    add.add_argument("--prompts", type=Path, help="a line each: text, or a JSON list of token ids")
    add.add_argument("--bound", type=float, default=1e-4, help="on the largest difference (default 1e-4)")
    add.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="to compute in (default float32)"
    )
    add.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="to compute on")
    return parser.parse_args(argv)


def add_ignore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ignore-config-fields",
        nargs="+",
        default=[],
        metavar="NAME",
        help="fields of config.json that are unknown here and, as you know, change nothing",
    )


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if "RANK" in os.environ and options.command != "verify" and os.environ["RANK"] != "0":
        return 0  # one process converts
    from conversions import COMMANDS  # imports torch and Megatron, which takes seconds

    from megatron_dgpo.observe.console import set_up_logging

    set_up_logging(False, int(os.environ.get("RANK", "0")))
    return COMMANDS[options.command](options)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ranks and scratch files are cleared
    sys.exit(main())
