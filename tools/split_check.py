"""What check_split_invariance.py does once its settings are right: a batch, its replays, the verdict."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from split_ranks import RankFailed, run_ranks
from split_replay import Replay, positions, relative, replay, rollout_batch
from splits import Split, all_splits

from megatron_dgpo import platform
from megatron_dgpo.checks import check_all
from megatron_dgpo.cli import ConfigError, refusals
from megatron_dgpo.config import Config
from megatron_dgpo.data import load_prompts
from megatron_dgpo.inputs import load_tokenizer
from megatron_dgpo.mcore.model import ModelShape
from megatron_dgpo.progress import progress
from megatron_dgpo.types import Group, Prompt
from megatron_dgpo.weights import convert

BOUNDS = {"float32": 1e-5, "bfloat16": 0.1}
ROUNDINGS = 3
"""The bound is the one or, where it is more, so many times what the moved weights change."""
SEED = 20260503
COLUMNS = ("loss", "norm", "gradient", "copies", "credit")


@dataclass(frozen=True)
class Differences:
    """From the first split, each relative (see check_split_invariance.py)."""

    loss: float
    norm: float
    gradient: float
    copies: float
    credit: float | None
    """None for an algorithm without credit."""
    worst_parameter: str
    """Hugging Face name of the tensor with the largest gradient or copies difference, if there is one."""

    def largest(self) -> float:
        return max(getattr(self, name) or 0.0 for name in COLUMNS)


@dataclass
class Row:
    """One split's line of the table."""

    split: Split
    name: str
    status: str = "skipped"
    """ok, DIFFERS, FAILED or skipped; rounding for the row that measures it."""
    reason: str = ""
    seconds: float = 0.0
    replay: Replay | None = None
    differences: Differences | None = None


def why_not(config: Config, split: Split, num_prompts: int) -> str:
    """Why the split cannot be run here, or nothing."""
    if platform.has_gpu() and split.world_size > (there := torch.cuda.device_count()):
        return f"needs {split.world_size} GPUs, and there are {there}"
    if num_prompts % split.dp:
        return f"{num_prompts} prompts do not divide by {split.dp} replicas"
    problems = check_all(split.apply(config), split.world_size)
    reason = next((p for p in problems if p.startswith("parallel")), "")
    return reason.partition(": ")[2].partition(" (")[0]


def without_clipping(config: Config) -> Config:
    wide = config.algorithm.model_copy(update={"clip_low": 0.99, "clip_high": 100.0})
    return config.model_copy(update={"algorithm": wide})


def make_batch(config: Config, options: argparse.Namespace) -> list[Group]:
    """Raises ConfigError where the sequences do not fit into the model."""
    shape = ModelShape.of(config.model)
    room = shape.max_positions - options.response_tokens
    if room < 1:
        raise ConfigError([f"--response-tokens: the model has {shape.max_positions} positions"])
    prompts = _prompts_of_data(config, min(room, config.data.max_prompt_tokens), options.prompts)
    if len(prompts) < options.prompts:
        g = random.Random(SEED)
        for i in range(len(prompts), options.prompts):
            ids = tuple(g.randrange(shape.vocab_size) for _ in range(g.randint(1, min(room, 32))))
            prompts.append(Prompt(f"random:{i + 1}", ids, "", ""))
    return rollout_batch(
        prompts,
        samples=options.samples,
        response_tokens=options.response_tokens,
        vocab_size=shape.vocab_size,
        seed=SEED,
    )


def _prompts_of_data(config: Config, max_tokens: int, count: int) -> list[Prompt]:
    """The first prompts of data.train that fit; says so where there are too few."""
    try:
        if not config.data.train:
            raise ValueError("data.train is not given")
        prompts = load_prompts(
            config.data.train,
            load_tokenizer(config),
            prompt_key=config.data.prompt_key,
            answer_key=config.data.answer_key,
            apply_chat_template=config.data.apply_chat_template,
            system_prompt=config.data.system_prompt,
            max_prompt_tokens=max_tokens,
        )[:count]
    except (ValueError, OSError) as error:
        print(f"prompts of random tokens, since {' '.join(str(error).split())}")
        return []
    if len(prompts) < count:
        print(f"data.train has {len(prompts)} prompts that fit; the others are of random tokens")
    return prompts


# --- comparison ---------------------------------------------------------------------------------------


def compare(first: Replay, first_folder: Path, other: Replay, other_folder: Path) -> Differences:
    """The folders hold the gradients. Raises KeyError where tensors or responses are not the same ones."""
    loss, norm = (abs(other.metrics[name] - first.metrics[name]) for name in ("loss", "grad_norm"))
    gradient, worst = worst_gradient(first_folder, other_folder)
    copies, worst_copy = other.copies
    return Differences(
        loss=relative(loss, first.metrics["advantage_size"]),
        norm=relative(norm, first.metrics["grad_norm"]),
        gradient=gradient,
        copies=copies,
        credit=worst_credit(first, other),
        worst_parameter=worst_copy if copies > gradient else worst,
    )


def worst_gradient(first_folder: Path, other_folder: Path) -> tuple[float, str]:
    """(relative difference, name) of the tensor that differs most; (0, "") where none does."""
    (names, want), (others, got) = (convert.folder_source(f) for f in (first_folder, other_folder))
    if unlike := set(names) ^ set(others):
        raise KeyError(f"only one split has a gradient of {min(unlike)!r}")
    worst = (0.0, "")
    for name in names:
        a, b = want(name).double(), got(name).double()
        difference = relative(float((b - a).abs().max()), float(a.abs().max()))
        worst = (difference, name) if difference > worst[0] else worst
    return worst


def worst_credit(first: Replay, other: Replay) -> float | None:
    """Over every response on every rank that weighs it."""
    if not first.credit:
        return None
    (want,) = first.credit
    if unlike := set(want) ^ {key for weights in other.credit for key in weights}:
        raise KeyError(f"only one split has credit for {min(unlike)}")
    return max(
        relative(float((w - want[key]).abs().max()), float(want[key].abs().max()))
        for weights in other.credit
        for key, w in weights.items()
    )


# --- the run ------------------------------------------------------------------------------------------


def check(config: Config, batch: Sequence[Group], options: argparse.Namespace, scratch: Path) -> list[Row]:
    """Replay the batch at every split and compare; one row each, printed as they come. Sets options.bound
    where it is not given."""
    batch_file = scratch / "batch"
    batch_file.write_bytes(pickle.dumps(list(batch)))
    lengths = [positions(s) for g in batch for s in g.samples]
    splits = all_splits(options.max_world_size, large=sum(lengths), small=max(lengths))
    rows = [Row(split, name) for name, split in splits]
    print(f"{len(batch)} prompts, {len(lengths)} responses, {sum(lengths)} tokens; {len(rows)} splits")
    first_folder = scratch / "split0"
    for number, row in enumerate(rows):
        name = f"[{number + 1}/{len(rows)}] {row.name}"
        print(name, end=" ", flush=True)
        folder = scratch / f"split{number}"
        folder.mkdir()
        try:
            with progress(name, shown=True, bar=False):
                run_split(row, config, len(batch), batch_file, folder, options.timeout)
            if row.replay is not None:
                assert rows[0].replay is not None, "the loop ends when the first one fails"
                row.differences = compare(rows[0].replay, first_folder, row.replay, folder)
                judge(row, config, options)
                if rows[0].replay.metrics["clip_fraction"] != row.replay.metrics["clip_fraction"]:
                    row.reason = "(not the same tokens are clipped: a ratio may be at the edge)"
        except (RankFailed, TimeoutError, KeyError) as error:
            row.status, row.reason = "FAILED", str(error)
            print(getattr(error, "details", ""), file=sys.stderr)
        print(f"{row.status} {row.seconds:.1f} s {row.reason}".rstrip(), flush=True)
        if folder != first_folder:
            for file in folder.iterdir():  # a model's gradients can be large
                file.unlink()
        elif row.replay is None:
            break  # there is nothing to compare the others with
    return rows


def judge(row: Row, config: Config, options: argparse.Namespace) -> None:
    assert row.differences is not None, "compared before"
    largest = row.differences.largest()
    if row.split.moved:
        row.status = "rounding"
        if options.bound is None:
            options.bound = max(BOUNDS[config.model.params_dtype], ROUNDINGS * largest)
        return
    bound = BOUNDS[config.model.params_dtype] if options.bound is None else options.bound
    row.status = "ok" if largest <= bound else "DIFFERS"


def run_split(
    row: Row, config: Config, num_prompts: int, batch_file: Path, folder: Path, limit_seconds: float
) -> None:
    """Fill in the row; leaves it skipped where the split does not fit."""
    row.reason = why_not(config, row.split, num_prompts)
    if row.reason:
        return
    start = time.monotonic()
    try:
        row.replay = run_ranks(
            replay,
            row.split.world_size,
            config,
            row.split,
            batch_file,
            folder,
            folder=folder,
            collective_seconds=config.parallel.timeout_seconds,
            limit_seconds=limit_seconds,
        )
    finally:
        row.seconds = time.monotonic() - start


# --- output -------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Relative differences, one line a split."""
    width = max(len(row.name) for row in rows)
    head = f"{'split':{width}}  ranks  batches  " + "".join(f"{name:>9}" for name in COLUMNS)
    lines = [f"{head}  verdict   worst parameter"]
    for row in rows:
        line = f"{row.name:{width}}  {row.split.world_size:5}  "
        if row.replay is None or row.differences is None:
            lines.append(f"{line}{'-':>7}  {'':45}  {row.status:8}  {row.reason}")
            continue
        values = [getattr(row.differences, name) for name in COLUMNS]
        cells = "".join(f"{'-' if v is None else '0' if v == 0 else f'{v:.1e}':>9}" for v in values)
        counts = "+".join(map(str, row.replay.microbatches))
        lines.append(
            f"{line}{counts:>7}  {cells}  {row.status:8}  {row.differences.worst_parameter} {row.reason}"
        )
    return "\n".join(line.rstrip() for line in lines)


def verdict(rows: Sequence[Row], bound: float) -> str:
    compared = [r for r in rows[1:] if r.differences is not None and not r.split.moved]
    bad = [r.name for r in rows if r.status in ("DIFFERS", "FAILED")]
    skipped = sum(r.status == "skipped" for r in rows)
    tail = f" ({skipped} skipped)" if skipped else ""
    if bad:
        return f"NOT INVARIANT: {', '.join(bad)}; bound {bound:.2g}{tail}"
    if not compared:
        return f"NOTHING COMPARED: no split but the first could be run{tail}"
    worst = max(r.differences.largest() for r in compared if r.differences is not None)
    return f"INVARIANT: {len(compared)} splits within {worst:.1e} of the first; bound {bound:.2g}{tail}"


def as_json(config: Config, rows: Sequence[Row], bound: float) -> dict[str, Any]:
    out = []
    for row in rows:
        values = {"name": row.name, **dataclasses.asdict(row.split), "world_size": row.split.world_size}
        values |= {"status": row.status, "reason": row.reason, "seconds": row.seconds}
        if row.replay is not None:
            values |= {"metrics": row.replay.metrics, "microbatches": row.replay.microbatches}
        if row.differences is not None:
            values["differences"] = dataclasses.asdict(row.differences)
        out.append(values)
    return {"model": str(config.model.path), "params_dtype": config.model.params_dtype} | {
        "bound": bound,
        "verdict": verdict(rows, bound),
        "splits": out,
    }


def run(config: Config, options: argparse.Namespace) -> int:
    """The exit status of check_split_invariance.py, whose options these are."""
    with refusals():
        platform.use_device(config.parallel.device, ranks=1)  # each split says what it needs
    if not platform.has_gpu():
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # several ranks share a machine's cores
    with refusals():
        batch = make_batch(config, options)
    if config.model.params_dtype == "bfloat16":
        print("bfloat16: ratios are not clipped")
        config = without_clipping(config)
    with tempfile.TemporaryDirectory(prefix="splits") as scratch:
        rows = check(config, batch, options, Path(scratch))
    if options.bound is None:  # the split that measures rounding failed
        options.bound = BOUNDS[config.model.params_dtype]
    print(f"\n{table(rows)}\n")
    if (first := rows[0].replay) is not None:
        names = ("loss", "grad_norm", "clip_fraction", "hellinger")
        shown = [f"{name} {first.metrics[name]:.4g}" for name in names if name in first.metrics]
        print(f"the step: {', '.join(shown)}")
    print(verdict(rows, options.bound))
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(config, rows, options.bound), indent=1) + "\n")
    return int(any(row.status in ("DIFFERS", "FAILED") for row in rows))
