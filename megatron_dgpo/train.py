"""The reinforcement-learning run: `torchrun -m megatron_dgpo.train CONFIG.toml [--section.key value]`.

`run` is the loop; `Trainer` holds the parts that it moves. What takes seconds to import is imported by `run`,
so that `--help`, a dry run and wrong settings are answered without it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_dgpo import torchrun
from megatron_dgpo.config import Config
from megatron_dgpo.entry import parse, start

if TYPE_CHECKING:
    from megatron_dgpo.inputs import Data
    from megatron_dgpo.platform import Groups


def run(config: Config, groups: Groups, data: Data) -> None:
    """The whole run on one rank: generate, score, learn, sync; evaluate and save when due."""
    from megatron_dgpo.observe.console import Console
    from megatron_dgpo.run import RunFolder, StopSignal, finish, restore_or_start
    from megatron_dgpo.trainer import Trainer

    started, stop = time.perf_counter(), StopSignal()
    console = Console(config.run.quiet, groups.rank)
    trainer = Trainer(config, groups, console, data)
    folder = RunFolder(config, groups)
    critic = trainer.critic.policy if trainer.critic else None
    state = restore_or_start(trainer.policy, folder, console, resume=config.run.resume, critic=critic)
    trainer.push(state.step)
    if state.step == 0:
        trainer.evaluate_when_due(state, folder)

    stopping = stop.on_any_rank(groups)
    checkpoints, every = folder.checkpoints, config.checkpoint.every
    while state.step < config.train.steps and not stopping:
        with trainer.timer("step"):
            with trainer.timer("generate"):
                rollout = trainer.rollout(state)
                trainer.start_next(state)
            with trainer.timer("prepare"):
                minibatches, sums = trainer.prepare(rollout.minibatches, state.step)
            with trainer.timer("update"):
                sums.merge(trainer.update(minibatches, folder, state.step))
        state.step += 1
        stopping = stop.on_any_rank(groups)
        due = stopping or state.step == config.train.steps or (every > 0 and state.step % every == 0)
        if due:
            with trainer.timer("save"):  # before servers on these GPUs take their memory back
                checkpoints.write(trainer.policy, state.step, critic)
        with trainer.timer("step"), trainer.timer("sync"):
            trainer.push(state.step)
        torchrun.reached(state.step)
        trainer.record(state, folder, rollout, sums)
        trainer.evaluate_when_due(state, folder)
        stopping = stop.on_any_rank(groups)
        if stopping and not due:
            checkpoints.write(trainer.policy, state.step, critic)
        if stopping or due:
            checkpoints.complete(state.to_json(groups, config.evaluation.k))
    if state.step < config.train.steps:
        console.log(f"asked to stop after step {state.step}; go on with --resume")
    else:
        finish(config, trainer.policy, folder, state, console, time.perf_counter() - started)
    folder.close()
    trainer.close()


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(sys.argv[1:] if argv is None else argv, Config)
    from megatron_dgpo.inputs import load_data

    start(config, load_data, run)


if __name__ == "__main__":
    main()
