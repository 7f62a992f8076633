"""Checks, on your own model and settings, that the split changes nothing but rounding.

    python tools/check_split_invariance.py --config my.toml [more.toml ...] [--section.key VALUE ...]

Takes the config of a training run, makes one rollout batch (prompts from data.train, random responses and
rewards) and replays it through a whole training step at several splits, each in processes of its own:
tensor, pipeline and data parallelism of 1 and 2, sequence parallelism on and off, micro-batches large and
small. Reference, old policy and updated policy are three different sets of weights, so that distances,
ratios and clips are not trivial. Compared with the first split (one process, one micro-batch) are

    loss         difference over the mean absolute advantage: the advantages of a group cancel, and what is
                 left of them may be as small as rounding
    norm         of the gradient: difference over its size
    gradient     of every Hugging Face tensor: largest difference over the tensor's largest gradient
    copies       the same between ranks that hold one parameter, such as a norm on every TP rank
    credit       the token weights of every response: largest difference over its largest weight

The second split, `TP=1 moved`, is the first one again with every weight moved by a unit in the last place:
what mere rounding does to this step, which for a sharp policy is more than for a random one. The bound is
1e-5 in float32 and 0.1 in bfloat16, or three times that rounding where it is more, or --bound.

bfloat16 keeps 8 bits: it tells a wrong gradient from a right one and no more. Check what it leaves open in
float32 (--model.params_dtype float32). Its rounding also carries ratios over the clip's edge, where a token
has its gradient or none, so in bfloat16 nothing is clipped.

Exit status: 0 if no split differs, 1 if one differs or fails, 2 for wrong settings. Splits that the model
does not divide into, or that need more GPUs than there are, are skipped; the table says why. Meanwhile TMPDIR
holds the gradients of two splits in float32.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from splits import Split

from megatron_dgpo.checks import check_all
from megatron_dgpo.cli import ConfigError, compose, refusals, validate
from megatron_dgpo.config import Config
from megatron_dgpo.entry import MODEL_CHECKS

CHECKED_SECTIONS = ("model", "algorithm", "rollout", "optimizer", "ddp")
"""Of the config; this tool sets the batch and the split itself, and leaves the run's folder alone."""


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Own options, and the words of a training command line."""

    def number(kind: type, least: float) -> Any:
        def read(text: str) -> Any:
            value = kind(text)
            if not value >= least:
                raise argparse.ArgumentTypeError(f"{text} is below {least}")
            return value

        return read

    about, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about,
        epilog=details,
        allow_abbrev=False,
        usage="%(prog)s --config CONFIG.toml [MORE.toml ...] [--section.key VALUE ...] [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", nargs="+", required=True, help="of a training run")
    parser.add_argument("--max-world-size", type=number(int, 1), default=4, help="processes of a split (4)")
    parser.add_argument("--prompts", type=number(int, 1), default=4, help="of the batch (4)")
    parser.add_argument("--samples", type=number(int, 2), default=4, help="responses to each (4)")
    parser.add_argument("--response-tokens", type=number(int, 1), default=64, help="of the longest (64)")
    parser.add_argument("--bound", type=number(float, 0.0), help="of every difference (see below)")
    parser.add_argument("--timeout", type=number(float, 1.0), default=1800.0, help="seconds a split (1800)")
    parser.add_argument("--json", type=Path, help="write everything to this file too")
    options, more = parser.parse_known_args(argv)
    return options, [*options.config, *more]


def load_config(words: Sequence[str]) -> Config:
    """The training config, with the checks of what this tool uses. Raises ConfigError."""
    raw, problems = compose(words, Config)
    if problems:
        raise ConfigError(problems)
    raw.setdefault("data", {}).setdefault("train", [])
    config: Config = validate(raw, Config)
    problems = [p for check in MODEL_CHECKS for p in check(config)]
    alone = Split(1, 1, 1, False, 0).apply(config)
    for problem in check_all(alone, 1):
        key = problem.partition(": ")[0]
        if key.partition(".")[0] in CHECKED_SECTIONS and key not in {p.partition(": ")[0] for p in problems}:
            problems.append(problem)
    if problems:
        raise ConfigError(problems)
    return config


def main(argv: Sequence[str] | None = None) -> int:
    options, words = parse(argv)
    with refusals():
        config = load_config(words)
        if options.json is not None and not options.json.absolute().parent.is_dir():
            raise ConfigError([f"--json: {options.json.parent} is no folder"])
    from split_check import run  # imports torch and Megatron, which takes seconds

    return run(config, options)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ranks and gradients are cleared away
    sys.exit(main())
