"""The supervised cold start: `torchrun -m megatron_dgpo.sft CONFIG.toml [--section.key value]`.

Same model, parallelism, optimizer and checkpoints as the reinforcement run; its exported policy is
where that one starts. As there, what takes seconds to import is imported by `run`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_dgpo import torchrun
from megatron_dgpo.config import SFTConfig
from megatron_dgpo.entry import parse, start

if TYPE_CHECKING:
    from megatron_dgpo.inputs import SupervisedData
    from megatron_dgpo.platform import Groups

_REPORT_EVERY_SECONDS = 10.0


def run(config: SFTConfig, groups: Groups, data: SupervisedData) -> None:
    """The whole run on one rank."""
    from megatron_dgpo.coldstart import batch_of_step, evaluate, global_sum
    from megatron_dgpo.data import PromptCursor
    from megatron_dgpo.learner import supervised_loss
    from megatron_dgpo.observe.console import Console
    from megatron_dgpo.run import RunFolder, StopSignal, build_policy, finish, restore_or_start

    started, stop = time.perf_counter(), StopSignal()
    console = Console(config.run.quiet, groups.rank)
    c, examples = config.train, data.examples
    cursor = PromptCursor(len(examples), c.batch_size, seed=config.run.seed, shuffle=True)
    policy = build_policy(config, groups, total_updates=c.steps, keep_reference=False)
    folder = RunFolder(config, groups)
    state = restore_or_start(policy, folder, console, resume=config.run.resume)
    loss_fn, reported = supervised_loss(policy), time.perf_counter()

    with console.phase("cold start", c.steps, "steps", initial=state.step) as bar:
        while state.step < c.steps:
            batches = batch_of_step([examples[i] for i in cursor.indices(state.step)], config, groups)
            result = policy.update(batches, loss_fn)
            state.step += 1
            torchrun.reached(state.step)
            bar.update()
            last = state.step == c.steps
            if last or state.step % config.observe.every == 0:
                loss = global_sum(sum(float(x) for x in result.metrics), groups)
                metrics = {"loss": loss, "grad_norm": result.grad_norm, "learning_rate": result.learning_rate}
                folder.write_metrics(state.step, metrics, "train")
                if last or time.perf_counter() - reported > _REPORT_EVERY_SECONDS:
                    reported = time.perf_counter()
                    console.log(
                        f"step {state.step:5d}/{c.steps}  loss {loss:.4f}  grad {result.grad_norm:.3f}"
                    )
            stopping = stop.on_any_rank(groups)
            every = config.checkpoint.every
            if stopping or last or (every and state.step % every == 0):
                folder.checkpoints.save(policy, state.to_json(groups, config.evaluation.k))
            if stopping and not last:
                console.log(f"asked to stop after step {state.step}; go on with --resume")
                folder.close()
                return
    if data.heldout and str(state.step) not in state.evaluations:
        evaluate(config, groups, policy, data, folder, state, console)
        folder.checkpoints.rewrite_state(state.to_json(groups, config.evaluation.k))
    finish(config, policy, folder, state, console, time.perf_counter() - started)
    folder.close()


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(sys.argv[1:] if argv is None else argv, SFTConfig)
    from megatron_dgpo.inputs import load_supervised_data

    start(config, load_supervised_data, run)


if __name__ == "__main__":
    main()
