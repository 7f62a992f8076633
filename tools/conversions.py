"""The commands of convert_checkpoint.py, each with its options to its exit status."""

from __future__ import annotations

import argparse
import functools
import math
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from checkpoint_log_probs import Ids, megatron_log_probs, transformers_log_probs
from split_ranks import RankFailed, run_ranks

from megatron_dgpo import jsontext, platform
from megatron_dgpo.cli import ConfigError, refusals
from megatron_dgpo.config import ParallelConfig
from megatron_dgpo.data.tokenizer import load_tokenizer
from megatron_dgpo.mcore.hf_config import ModelShape, remarks
from megatron_dgpo.progress import BYTES, progress
from megatron_dgpo.weights.checkpoints import HFFolder, MegatronFolder, import_hf, open_checkpoint
from megatron_dgpo.weights.convert import export_hf
from megatron_dgpo.weights.folders import check_target

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_SEQUENCES, DEFAULT_LENGTH = 4, 64
"""Random token ids that verify takes where no prompts are given."""
VERIFY_LIMIT_SECONDS = 3600.0


def warn(folder: Path, ignored: Sequence[str]) -> None:
    """Of the fields of config.json that are passed over."""
    for line in remarks(folder, ignored):
        print(f"warning: {line}", file=sys.stderr)


@contextmanager
def refused() -> Iterator[None]:
    """Wrong input becomes a line on stderr and status 2."""
    with refusals():
        try:
            yield
        except KeyError as error:
            raise ConfigError([" ".join(str(error.args[0]).split())]) from error


def describe(model: HFFolder | MegatronFolder) -> str:
    numbers = model.num_bytes // model.dtype.itemsize
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{model.shape.family}, {numbers:,} weights in {dtype} ({model.num_bytes / 1e6:,.1f} MB)"


def import_(options: argparse.Namespace) -> int:
    with refused():
        check_target(options.target, overwrite=options.overwrite)
        model = HFFolder(options.source, options.ignore_config_fields)
        warn(model.folder, options.ignore_config_fields)
        with progress("import", model.num_bytes, BYTES) as bar:
            import_hf(model, options.target, overwrite=options.overwrite, on_bytes=bar.update)
    print(f"imported {describe(model)}: {options.target}")
    return 0


def export(options: argparse.Namespace) -> int:
    with refused():
        check_target(options.target, overwrite=options.overwrite)
        model = open_checkpoint(options.source, options.model, options.ignore_config_fields)
        warn(model.beside, model.ignored)
        with progress("export", model.num_bytes, BYTES) as bar:
            export_hf(
                model,
                options.target,
                shard_bytes=options.shard_size,
                overwrite=options.overwrite,
                on_bytes=bar.update,
            )
    print(f"exported {describe(model)}: {options.target}")
    return 0


# --- verify ---------------------------------------------------------------------------------------------


def verify(options: argparse.Namespace) -> int:
    with refused():
        parallel = split(options)
        source = HFFolder(options.source, options.ignore_config_fields)
        checkpoint = open_checkpoint(options.checkpoint, options.model, options.ignore_config_fields)
        check_split(checkpoint.shape, parallel)
        if source.shape.vocab_size != checkpoint.shape.vocab_size:
            raise ValueError(f"{options.source} and {options.checkpoint} have different vocabularies")
        names, sequences = read_prompts(options.prompts, options.source, source.shape)
    dtype = _DTYPES[options.dtype]
    arguments = (options.checkpoint, checkpoint.shape, parallel, dtype, sequences)
    if "RANK" in os.environ:
        found = megatron_log_probs(*arguments)
        rank = int(os.environ["RANK"])
        platform.stop()
        if rank != 0:
            return 0
    else:
        try:
            with progress("log-probs of the checkpoint", bar=False):
                found = on_own_ranks(parallel, arguments)
        except (RankFailed, TimeoutError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    with progress("log-probs by transformers", bar=False):
        wanted = transformers_log_probs(options.source, dtype, sequences)
    return report(names, found, wanted, options.bound)


def split(options: argparse.Namespace) -> ParallelConfig:
    tp, pp = options.tensor_model_parallel_size, options.pipeline_model_parallel_size
    if tp < 1 or pp < 1:
        raise ValueError("parallel sizes are at least 1")
    world = int(os.environ.get("WORLD_SIZE", tp * pp))
    if world != tp * pp:
        raise ValueError(f"torchrun has started {world} processes, and the split takes {tp * pp}")
    platform.use_device(options.device, int(os.environ.get("LOCAL_WORLD_SIZE", world)), "--device")
    return ParallelConfig(
        device=options.device, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp
    )


def check_split(shape: ModelShape, parallel: ParallelConfig) -> None:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    counts = {"key/value heads": shape.num_query_groups, "MLP columns": shape.ffn_hidden_size}
    for what, count in counts.items():
        if count % tp:
            raise ValueError(f"--tensor-model-parallel-size {tp} does not divide the model's {count} {what}")
    if shape.num_layers % pp:
        raise ValueError(
            f"--pipeline-model-parallel-size {pp} does not divide the model's {shape.num_layers} layers"
        )


def read_prompts(path: Path | None, folder: Path, shape: ModelShape) -> tuple[list[str], list[Ids]]:
    """Names and token ids. Raises ValueError naming a line that is too short, too long or not of ids."""
    if path is None:
        draw = random.Random(0)
        length = min(DEFAULT_LENGTH, shape.max_positions)
        count = range(DEFAULT_SEQUENCES)
        ids = [[draw.randrange(shape.vocab_size) for _ in range(length)] for _ in count]
        return [f"random ids {i + 1}" for i in count], ids
    names, sequences = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        ids = token_ids(line, folder)
        where = f"{path}, line {number}"
        if not 2 <= len(ids) <= shape.max_positions:
            raise ValueError(f"{where}: {len(ids)} tokens; the model takes 2 to {shape.max_positions}")
        if wrong := [i for i in ids if type(i) is not int or not 0 <= i < shape.vocab_size]:
            raise ValueError(f"{where}: {wrong[0]!r} is no token id below {shape.vocab_size}")
        names.append(f"line {number}")
        sequences.append(ids)
    if not sequences:
        raise ValueError(f"{path}: there are no prompts")
    return names, sequences


def token_ids(line: str, folder: Path) -> list[int]:
    try:
        value = jsontext.loads(line)
    except ValueError:
        value = None
    if isinstance(value, list):
        return value
    return tokenizer_of(folder)(line)["input_ids"]


@functools.cache
def tokenizer_of(folder: Path) -> Any:
    return load_tokenizer(folder)


def on_own_ranks(parallel: ParallelConfig, arguments: tuple[Any, ...]) -> list[list[float]]:
    if not platform.has_gpu():
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # several ranks share a machine's cores
    world = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    with tempfile.TemporaryDirectory(prefix="verify") as scratch:
        return run_ranks(
            megatron_log_probs,
            world,
            *arguments,
            folder=Path(scratch),
            collective_seconds=parallel.timeout_seconds,
            limit_seconds=VERIFY_LIMIT_SECONDS,
        )


def report(names: list[str], found: list[list[float]], wanted: list[list[float]], bound: float) -> int:
    """A line a prompt and one for all; 1 if the largest difference is above the bound or no number."""
    print(f"{'prompt':<16} {'tokens':>6} {'max difference':>15} {'mean difference':>16}")
    everything = []
    for name, ours, theirs in zip(names, found, wanted, strict=True):
        apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        everything += apart
        print(f"{name:<16} {len(apart):>6} {max(apart):>15.3g} {sum(apart) / len(apart):>16.3g}")
    worst, mean = max(everything), sum(everything) / len(everything)
    if any(math.isnan(x) for x in everything):
        worst = math.nan
    print(f"{'all':<16} {len(everything):>6} {worst:>15.3g} {mean:>16.3g}")
    same = worst <= bound
    print(f"the log-probs {'agree' if same else 'DIFFER'}: {worst:.3g} and the bound is {bound:g}")
    return 0 if same else 1


COMMANDS = {"import": import_, "export": export, "verify": verify}
