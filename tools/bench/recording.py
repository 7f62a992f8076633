"""Times steps of the quick start's run with the credit log at every step, at its default cadence, and off.

    torchrun --standalone --nproc-per-node 2 tools/bench/recording.py [--rounds 5]

A round is one block of steps with each setting, in another order every round; all three train on the same
prompts with the same samples, since the learning rate is too small to move the policy. At the default
cadence one step of a block, in its middle, is recorded. A block ends when everything is written. Ratios are
between blocks of one round, so slow drifts of the machine cancel. Use a machine that does nothing else.

Printed: medians over the rounds and the ratios' quartiles; then what a recorded step costs by itself, on the
critical path (choosing, copying to the host, handing over) and in the writer's thread (processor time).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_dgpo import platform
from megatron_dgpo.audit import CreditAudit
from megatron_dgpo.cli import load, refusals
from megatron_dgpo.config import Config, ObserveConfig
from megatron_dgpo.inputs import Data, load_data
from megatron_dgpo.observe.console import Console
from megatron_dgpo.observe.credit_log import CreditWriter
from megatron_dgpo.observe.machine import describe_machine
from megatron_dgpo.run import RunFolder, RunState
from megatron_dgpo.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
CADENCE = ObserveConfig().credit_every
FIRST = CADENCE // 2
"""Steps before a block: of the CADENCE steps after it, one in the middle is recorded."""
SETTINGS = {"off": 0, "default": CADENCE, "every step": 1}
"""Name -> observe.credit_every."""


class Stopwatch:
    """Seconds of the calls that went through it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.seconds: list[float] = []

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._clock()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds.append(self._clock() - start)

        return timed


def parse_arguments() -> argparse.Namespace:
    quickstart = ROOT / "runs" / "quickstart" / "seed1"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "quickstart" / "dgpo.toml")
    parser.add_argument("--model", type=Path, default=quickstart / "coldstart" / "hf")
    parser.add_argument("--data", type=Path, default=quickstart / "data" / "train.jsonl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("runs/bench/recording.json"))
    args, args.settings = parser.parse_known_args()  # --section.key value: more settings of the run
    for path in (args.model / "config.json", args.data):
        if not path.exists():
            parser.error(f"{path} does not exist: run the quick start first, or give --model and --data")
    return args


def make_config(args: argparse.Namespace, folder: Path) -> Config:
    fixed = {
        "run.folder": folder, "run.quiet": "true", "model.path": args.model, "optimizer.lr": 1e-20,
        "data.train": json.dumps([str(args.data)]), "evaluation.data": "[]", "observe.tensorboard": "false",
        "train.steps": 100_000,
    }  # fmt: skip
    words = [word for key, value in fixed.items() for word in (f"--{key}", str(value))]
    with refusals():
        return load([str(args.config), *words, *args.settings], Config)


class Blocks:
    """One trainer, whose credit log is another for each setting."""

    def __init__(self, config: Config, groups: platform.Groups, data: Data) -> None:
        self.groups = groups
        self.trainer = Trainer(config, groups, Console(True, groups.rank), data)
        self.folder = RunFolder(config, groups)
        self.config, self.tokenizer = config, data.tokenizer
        self.trainer.audit.close()
        self.steps = FIRST
        self.trainer.push(self.steps)

    def run(self, every: int, draws: int) -> dict[str, Any]:
        """Seconds of CADENCE steps until the log is written, and of a recording, on the slowest rank."""
        trainer, state = self.trainer, RunState(step=self.steps, draws=draws)
        observe = self.config.observe.model_copy(update={"credit_every": every})
        config = self.config.model_copy(update={"observe": observe})
        path, thread = Stopwatch(time.perf_counter), Stopwatch(time.thread_time)
        audit = trainer.audit = CreditAudit(config, self.groups, trainer.algorithm, self.tokenizer)
        for name in ("choose", "record"):
            setattr(audit, name, path.around(getattr(audit, name)))
        write = CreditWriter._write
        CreditWriter._write = lambda *a: thread.around(write)(*a)  # type: ignore[method-assign]
        dist.barrier()
        start = time.perf_counter()
        for _ in range(CADENCE):
            self._step(state)
        audit.close()
        total = time.perf_counter() - start
        self.steps = state.step
        CreditWriter._write = write  # type: ignore[method-assign]
        recorded = CADENCE if every == 1 else 1
        mine = {
            "total": total,
            "path": sum(path.seconds) / recorded,
            "thread": sum(thread.seconds) / recorded,
        }
        parts = platform.gather_objects(mine, self.groups.world)
        return {name: max(part[name] for part in parts) for name in mine}

    def _step(self, state: RunState) -> None:
        """As in the main loop of megatron_dgpo.train."""
        trainer = self.trainer
        with trainer.timer("step"):
            rollout = trainer.rollout(state)
            minibatches, sums = trainer.prepare(rollout.minibatches, state.step)
            sums.merge(trainer.update(minibatches, self.folder, state.step))
            state.step += 1
            trainer.push(state.step)
        trainer.record(state, self.folder, rollout, sums)


def take_turns(blocks: Blocks, rounds: int, draws_per_block: int) -> dict[str, list[dict[str, Any]]]:
    names = list(SETTINGS)
    times: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    blocks.run(CADENCE, 0)  # warm-up
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(blocks.run(SETTINGS[name], i * draws_per_block))
        if dist.get_rank() == 0:
            print(f"round {i + 1}/{rounds}", flush=True)
    return times


def report(times: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> None:
    machine = describe_machine()
    print(json.dumps(machine))
    print(f"{'':12}{'s/step':>9}   over off (quartiles)          cost of one recording")
    rows: dict[str, dict[str, Any]] = {}
    for name, runs in times.items():
        ratios = [run["total"] / off["total"] for run, off in zip(runs, times["off"], strict=True)]
        low, high = statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2
        row = rows[name] = {k: statistics.median(run[k] for run in runs) for k in ("total", "path", "thread")}
        row |= {"step": row["total"] / CADENCE, "ratio": statistics.median(ratios), "quartiles": [low, high]}
        print(f"{name:12}{row['step']:9.3f}   {row['ratio']:.4f} ({low:.4f} to {high:.4f})", end="")
        if name != "off":
            print(f"      {row['path'] * 1e3:.2f} ms + {row['thread'] * 1e3:.1f} ms in the thread", end="")
        print()
    share = rows["default"]["path"] / rows["off"]["total"]
    print(f"critical path at the default cadence: {share:.5%} of the steps' time (wanted: at most 1%)")
    lines = [
        (name, f"{row['step']:.3f} s a step, {row['ratio']:.4f} times off") for name, row in rows.items()
    ]
    lines.append(("critical path", f"{share:.5%} of the steps' time at the default cadence"))
    out = {"machine": machine, "rows": rows, "runs": times, "summary": lines}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(out, indent=1) + "\n")
    print(f"written to {args.json}")


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        config = make_config(args, Path(temporary))
        data = load_data(config)
        with platform.distributed(config.parallel, seed=config.run.seed) as groups:
            blocks = Blocks(config, groups, data)
            times = take_turns(blocks, args.rounds, CADENCE)
            if groups.rank == 0:
                report(times, args)
            dist.barrier()
            blocks.trainer.close()


if __name__ == "__main__":
    main()
