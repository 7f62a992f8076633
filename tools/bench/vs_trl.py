"""Times an RL step of this project against one of TRL's GRPOTrainer, in turns in one run.

    python tools/bench/vs_trl.py [--task quickstart|smollm2] [--algorithm grpo|grpo-kl|dgpo] [--rounds 5]

Both start from the same checkpoint (the quick start's cold start or SmolLM2-135M-Instruct, unless --model
and --data say otherwise) and take the same prompts, in the same order, with the same sampling, optimizer
and number of updates, all from one config file. A round is one TRL run and one run of each of our layouts;
each run's first steps are warm-up and left out. Ratios are between the runs of one round, so that slow
drifts of the machine cancel. Use a machine that does nothing else.

Before the first round TRL tries several numbers of processes, threads and backward passes an update, and
keeps the fastest on one core and the fastest on more; ours takes one thread a process throughout. A ratio
is between runs on as many cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trl_environment
from processes import RunFailed, run

from megatron_dgpo.cli import load, refusals
from megatron_dgpo.config import Config
from megatron_dgpo.observe.machine import describe_machine
from megatron_dgpo.observe.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
# Name -> (TRL's KL coefficient, our settings). TRL has no DGPO; its KL penalty, too, takes the
# reference's statistics once per rollout batch.
ALGORITHMS: dict[str, tuple[float, dict[str, Any]]] = {
    "grpo": (0.0, {"algorithm.name": "grpo"}),
    "grpo-kl": (0.04, {"algorithm.name": "grpo", "algorithm.kl_coef": 0.04}),
    "dgpo": (0.04, {"algorithm.name": "dgpo"}),
}
LAYOUTS = {"ours, 1 process": (1, 1), "ours, TP=2": (2, 2), "ours, DP=2": (2, 1)}  # (processes, TP)
KEYS = ("time/step", "response_tokens", "memory/peak_rss_bytes")


@dataclass(frozen=True)
class Task:
    """What is trained, and how often."""

    config: Path
    model: Path
    data: Path
    layouts: tuple[str, ...]
    rounds: int
    steps: int
    warm_up: int
    timeout: float


QUICKSTART, SMOLLM2 = ROOT / "runs" / "quickstart" / "seed1", ROOT / "runs" / "bench" / "smollm2"
TASKS = {
    "quickstart": Task(
        ROOT / "examples" / "quickstart" / "dgpo.toml",
        QUICKSTART / "coldstart" / "hf",
        QUICKSTART / "data" / "train.jsonl",
        tuple(LAYOUTS),
        rounds=5,
        steps=8,
        warm_up=2,
        timeout=300.0,
    ),
    # 9 heads in 3 groups: no TP=2.
    "smollm2": Task(
        ROOT / "tools" / "bench" / "smollm2.toml",
        SMOLLM2 / "model",
        SMOLLM2 / "train.jsonl",
        ("ours, 1 process", "ours, DP=2"),
        rounds=3,
        steps=4,
        warm_up=1,
        timeout=1200.0,
    ),
}


@dataclass(frozen=True)
class Result:
    """One run: speed over its measured steps, and peak memory of all its processes together."""

    tokens_per_second: float
    seconds_per_step: float
    tokens_per_step: float
    peak_mib: float

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_second:7.0f} response tokens/s {self.seconds_per_step:7.2f} s/step "
            f"{self.tokens_per_step:6.0f} tokens/step {self.peak_mib:6.0f} MiB"
        )


@dataclass(frozen=True)
class TrlSettings:
    processes: int
    threads: int
    accumulate: int

    @classmethod
    def parse(cls, text: str) -> TrlSettings:
        return cls(*map(int, text.split(",")))

    @property
    def cores(self) -> int:
        return self.processes * self.threads

    def __str__(self) -> str:
        return f"TRL {self.processes} proc x {self.threads} thr, {self.accumulate} bwd/update"


CANDIDATES = (TrlSettings(1, 1, 1), TrlSettings(1, 2, 1), TrlSettings(1, 2, 2), TrlSettings(2, 1, 1))


def measure(rows: Sequence[Mapping[str, Any]], steps: int, warm_up: int) -> Result:
    """Raises ValueError where a step or a key is missing."""
    rows = [row for row in rows if row["phase"] == "train"]
    if [row["step"] for row in rows] != list(range(1, steps + 1)):
        raise ValueError(f"expected metrics of steps 1 to {steps}, got {[row['step'] for row in rows]}")
    missing = [key for key in KEYS if key not in rows[0]]
    if missing:
        raise ValueError(f"the metrics lack {', '.join(missing)}")
    seconds, tokens, peak = ([row[key] for row in rows[warm_up:]] for key in KEYS)
    speed = sum(tokens) / sum(seconds)
    return Result(speed, statistics.median(seconds), statistics.mean(tokens), max(peak) / 2**20)


def torchrun(python: str, processes: int) -> list[str]:
    return [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def words(settings: Mapping[str, Any]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


class Bench:
    """Runs either side with the same settings; arguments.out takes logs and run folders."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = a = arguments
        self.beta, algorithm = ALGORITHMS[a.algorithm]
        settings: dict[str, Any] = {
            "model.path": a.model, "data.train": json.dumps([str(a.data)]), "data.shuffle": "false",
            "train.steps": a.steps, "evaluation.data": "[]", "checkpoint.every": 0, "run.quiet": "true",
            "checkpoint.export_hf": "false", "observe.tensorboard": "false",
        }  # fmt: skip
        self.words = [str(a.config), *words(settings | algorithm)]
        with refusals():
            self.config = load(self.words, Config)

    def trl(self, name: str, settings: TrlSettings, seed: int, steps: int, warm_up: int) -> Result:
        c, a, python = self.config, self.arguments, str(trl_environment.PYTHON)
        values = {
            "model": a.model, "data": a.data, "steps": steps, "seed": seed, "beta": self.beta,
            "prompts": c.train.prompts_per_step, "samples": c.train.samples_per_prompt,
            "minibatches": c.train.prompts_per_step // c.train.prompts_per_minibatch,
            "accumulate": settings.accumulate, "max-new-tokens": c.rollout.max_new_tokens,
            "temperature": c.rollout.temperature, "lr": c.optimizer.lr, "adam-beta2": c.optimizer.adam_beta2,
            "weight-decay": c.optimizer.weight_decay, "clip-grad": c.optimizer.clip_grad,
        }  # fmt: skip
        # One process needs no process group, and is faster without.
        start = torchrun(python, settings.processes) if settings.processes > 1 else [python]
        command = [*start, str(ROOT / "tools" / "bench" / "trl_step.py"), *words(values)]
        out = run(command, a.out / f"{name}.log", settings.threads, a.timeout)
        rows = [json.loads(line) for line in out.splitlines() if line.startswith('{"step"')]
        return measure(rows, steps, warm_up)

    def ours(self, name: str, layout: str, seed: int) -> Result:
        a, (processes, tensor_parallel) = self.arguments, LAYOUTS[layout]
        folder = a.out / name
        settings = {"run.folder": folder, "run.seed": seed}
        settings["parallel.tensor_model_parallel_size"] = tensor_parallel
        command = [*torchrun(sys.executable, processes), "-m", "megatron_dgpo.train"]
        run([*command, *self.words, *words(settings)], a.out / f"{name}.log", 1, a.timeout)
        return measure(read_metrics(folder), a.steps, a.warm_up)

    def fastest_trl(self) -> dict[int, TrlSettings]:
        """Cores -> the fastest settings. Raises RunFailed where TRL runs with none of the candidates."""
        print("TRL's candidates, 3 steps each")
        speeds: dict[TrlSettings, float] = {}
        for i, settings in enumerate(CANDIDATES):
            if settings.cores > (os.cpu_count() or 1):
                continue
            try:
                result = self.trl(f"trl-candidate-{i}", settings, seed=0, steps=4, warm_up=1)
            except RunFailed as error:
                print(f"  {settings!s:34} left out: {error}", flush=True)
            else:
                print(f"  {settings!s:34} {result}", flush=True)
                speeds[settings] = result.tokens_per_second
        if not speeds:
            raise RunFailed(f"TRL ran with none of its settings; see {self.arguments.out}")
        # Slowest first: of equal cores, the fastest stays.
        return {settings.cores: settings for settings in sorted(speeds, key=lambda x: speeds[x])}


def report(rounds: list[dict[str, Result]], trl: dict[int, TrlSettings]) -> None:
    def spread(values: list[float], digits: int) -> str:
        return " / ".join(f"{x:.{digits}f}" for x in (min(values), statistics.median(values), max(values)))

    print("\nmin / median / max over rounds; a ratio is ours to TRL's on as many cores in the same round")
    print(f"{'':36}{'response tokens/s':>22}{'speed ratio':>22}{'peak MiB':>22}{'memory ratio':>22}")
    for name in rounds[0]:
        mine = [r[name] for r in rounds]
        speed = memory = ""
        if name in LAYOUTS:
            base = str(trl.get(LAYOUTS[name][0]) or trl[max(trl)])
            speed = spread([r[name].tokens_per_second / r[base].tokens_per_second for r in rounds], 2)
            memory = spread([r[name].peak_mib / r[base].peak_mib for r in rounds], 2)
        print(
            f"{name:36}{spread([m.tokens_per_second for m in mine], 0):>22}{speed:>22}"
            f"{spread([m.peak_mib for m in mine], 0):>22}{memory:>22}"
        )


def parse_arguments() -> argparse.Namespace:
    now = datetime.datetime.now()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="quickstart", help="says what is not given")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="grpo")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int, help="of a run, warm-up included")
    parser.add_argument("--warm-up", type=int)
    parser.add_argument("--timeout", type=float, help="seconds that a run may take")
    parser.add_argument("--trl", type=TrlSettings.parse, help="PROCESSES,THREADS,BACKWARD_PASSES: no search")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / f"vs_trl-{now:%Y%m%d-%H%M%S}")
    arguments = parser.parse_args()
    for field in dataclasses.fields(Task):
        if getattr(arguments, field.name) is None:
            setattr(arguments, field.name, getattr(TASKS[arguments.task], field.name))
    arguments.pins = trl_environment.make()
    if arguments.model == TASKS["smollm2"].model:
        make = [trl_environment.PYTHON, ROOT / "tools" / "bench" / "smollm2.py", SMOLLM2]
        if subprocess.run(make).returncode:
            sys.exit(1)
    for path in (arguments.model / "config.json", arguments.data):
        if not path.exists():
            parser.error(f"{path} does not exist: run the quick start first, or give --model and --data")
    if not 0 <= arguments.warm_up < arguments.steps:
        parser.error(f"--warm-up is {arguments.warm_up}, expected 0 to {arguments.steps - 1}")
    if arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}, expected at least 1")
    for name in ("config", "model", "data", "out"):
        setattr(arguments, name, getattr(arguments, name).resolve())
    return arguments


def main() -> None:
    arguments = parse_arguments()
    bench = Bench(arguments)
    arguments.out.mkdir(parents=True)
    t = bench.config.train
    print(f"{json.dumps(describe_machine())}\nTRL: {', '.join(arguments.pins)}")
    print(f"{t.prompts_per_step} prompts x {t.samples_per_prompt} samples a step; logs in {arguments.out}")
    print(f"ours: {arguments.algorithm}; TRL: GRPO with beta {bench.beta}", flush=True)
    trl = {arguments.trl.cores: arguments.trl} if arguments.trl else bench.fastest_trl()
    rounds: list[dict[str, Result]] = []
    for i in range(arguments.rounds):
        print(f"round {i + 1}", flush=True)
        results: dict[str, Result] = {}
        for cores, settings in sorted(trl.items()):
            name = str(settings)
            results[name] = bench.trl(f"trl-{cores}-{i}", settings, i, arguments.steps, arguments.warm_up)
            print(f"  {name:34} {results[name]}", flush=True)
        for layout in arguments.layouts:
            name = layout.replace(", ", "-").replace(" ", "-")
            results[layout] = bench.ours(f"{name}-{i}", layout, seed=i)
            print(f"  {layout:34} {results[layout]}", flush=True)
        rounds.append(results)
    report(rounds, trl)


if __name__ == "__main__":
    try:
        main()
    except RunFailed as failure:
        sys.exit(f"error: {failure}")
