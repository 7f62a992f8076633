"""Killed at random moments while it converts or saves: what was there before always loads, bit for bit.

A kill counts where it left an unfinished folder; others are done again.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from patience import patience
from spawn import ranks_of, run_ranks
from split_ranks import rank_context
from tiny import config, hf_tensors, split, write_model
from torch import Tensor

from megatron_dgpo.weights.checkpoints import HFFolder, import_hf, open_checkpoint
from megatron_dgpo.weights.convert import export_hf
from megatron_dgpo.weights.folders import check_target

CONVERSIONS = {"export": 5, "import": 3}
SAVES = (1, 2, 2, 1, 2, 2)
"""Ranks of the run, of which one is killed."""
TRIES = 3
"""For each kill that counts."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`one`: a model folder, and `imported` from it."""
    path = tmp_path_factory.mktemp("killed")
    write_model(path / "one", family="qwen3", tied=False, num_hidden_layers=2)
    import_hf(HFFolder(path / "one"), path / "imported")
    return path


@contextmanager
def started(processes: list[BaseProcess]) -> Iterator[None]:
    """None of them outlives the block."""
    try:
        for process in processes:
            process.start()
        yield
    finally:
        for process in processes:
            process.kill()
            process.join(patience())


def wait_until(condition: Callable[[], bool], processes: list[BaseProcess]) -> float:
    """The time at which it was so, while all processes run."""
    deadline = time.monotonic() + patience()
    while not condition():
        assert all(process.is_alive() for process in processes), "one has ended"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.0005)
    return time.monotonic()


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    """float32, bit for bit."""
    return set(got) == set(want) and all(
        torch.equal(got[name].view(torch.int32), want[name].view(torch.int32)) for name in want
    )


# --- conversions ----------------------------------------------------------------------------------------


def convert(kind: str, source: Path, target: Path) -> None:
    if kind == "export":
        export_hf(open_checkpoint(source), target, overwrite=True, shard_bytes=20_000)
    else:
        import_hf(HFFolder(source), target, overwrite=True)


def convert_for_ever(kind: str, source: Path, target: Path) -> None:
    torch.set_num_threads(1)
    while True:
        convert(kind, source, target)


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_killed_while_it_replaces_a_folder_the_old_one_is_there(folder, tmp_path, kind):
    source = folder / ("imported" if kind == "export" else "one")
    target, partial, old = (tmp_path / name for name in ("model", ".model.dgpo-partial", ".model.dgpo-old"))
    convert(kind, source, target)
    begin = time.monotonic()
    convert(kind, source, target)
    undisturbed = time.monotonic() - begin
    want = hf_tensors(folder / "one")
    draw = random.Random(kind)
    kills = 0
    for _ in range(TRIES * CONVERSIONS[kind]):
        process = rank_context().Process(target=convert_for_ever, args=(kind, source, target))
        with started([process]):
            wait_until(partial.exists, [process])
            time.sleep(draw.uniform(0, undisturbed))
        assert process.exitcode == -signal.SIGKILL
        kills += partial.exists() or old.exists()
        check_target(target, overwrite=True)  # as the next conversion begins
        if kind == "export":
            HFFolder(target)
            assert same(hf_tensors(target), want)
        else:
            assert same(dict(open_checkpoint(target).stream()), want)
        if kills == CONVERSIONS[kind]:
            break
    assert kills == CONVERSIONS[kind]


# --- saves ----------------------------------------------------------------------------------------------


def weights_of(step: int, start: Tensor) -> Tensor:
    return start * (1 + step)


def resume(c, groups, folder):
    """A policy with the newest checkpoint, right to the bit; its weights before that; the store; the step."""
    from megatron_dgpo.mcore.checkpoint import CheckpointStore, restore
    from megatron_dgpo.run import build_policy

    policy = build_policy(c, groups, total_updates=1, keep_reference=False)
    start = [p.detach().clone() for p in policy.model.parameters()]
    store = CheckpointStore(folder / "checkpoints", groups, keep_last=2)
    newest = store.latest()
    if newest is None:
        return policy, start, store, 0
    restore(policy, newest)
    for parameter, before in zip(policy.model.parameters(), start, strict=True):
        assert torch.equal(parameter, weights_of(newest.step, before)), f"{newest.path} is not what was saved"
    return policy, start, store, newest.step


def save_for_ever(rank, world_size, folder, scratch):
    os.setsid()  # so that the processes that Megatron forks to write files can be told by their group
    c = config(folder / "imported", tp=world_size)
    with split(c) as groups:
        policy, start, store, newest = resume(c, groups, folder)
        (scratch / f"resumed{rank}").touch()
        for step in itertools.count(newest + 1):
            with torch.no_grad():
                for parameter, before in zip(policy.model.parameters(), start, strict=True):
                    parameter.copy_(weights_of(step, before))
            store.save(policy, {"step": step, "world_size": world_size})


def newest_step(rank, world_size, folder):
    c = config(folder / "imported", tp=world_size)
    with split(c) as groups:
        return resume(c, groups, folder)[-1]


def steps(checkpoints: Path, end: str = "") -> list[int]:
    """Of the folders whose names end so, in order."""
    names = [path.name for path in checkpoints.glob(f"step_????????{end}")]
    return sorted(int(name.removeprefix("step_").removesuffix(end)) for name in names)


def no_process_left(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def kill_a_rank(folder: Path, scratch: Path, world_size: int, which: int, moment: float) -> None:
    """Start a run, let it save once, and kill a rank in the next save, at that share of the time that the
    first took. The other rank and all processes that the two have started end because of it."""
    scratch.mkdir()
    checkpoints = folder / "checkpoints"
    step = max(steps(checkpoints), default=0) + 1
    ranks = ranks_of(save_for_ever, world_size, str(scratch), patience(), folder, scratch)
    with started(ranks):
        for rank in range(world_size):
            wait_until((scratch / f"resumed{rank}").exists, ranks)
        begin = wait_until((checkpoints / f"step_{step:08d}.partial").exists, ranks)
        seconds = wait_until((checkpoints / f"step_{step:08d}").exists, ranks) - begin
        wait_until((checkpoints / f"step_{step + 1:08d}.partial").exists, ranks)
        time.sleep(moment * seconds)
        ranks[which].kill()
        for process in ranks:
            process.join(patience())
        codes = [process.exitcode for process in ranks]
        assert codes == [-signal.SIGKILL if rank == which else 1 for rank in range(world_size)]
    for process in ranks:
        wait_until(lambda group=process.pid: no_process_left(group), [])


def test_killed_while_a_run_saves_the_checkpoint_before_loads(folder, tmp_path):
    """By the next run, which begins as a resumed one does, and by the converter."""
    checkpoints = folder / "checkpoints"
    want = hf_tensors(folder / "one")
    draw = random.Random(3)
    kills = 0
    for attempt in range(TRIES * len(SAVES)):
        world_size = SAVES[kills]
        kill_a_rank(folder, tmp_path / str(attempt), world_size, draw.randrange(world_size), draw.random())
        complete = steps(checkpoints)
        kills += any(step > complete[-1] for step in steps(checkpoints, ".partial"))
        for step in complete:
            path = checkpoints / f"step_{step:08d}"
            got = dict(open_checkpoint(path, folder / "one").stream())
            assert same(got, {name: weights_of(step, tensor) for name, tensor in want.items()})
        if kills == len(SAVES):
            break
    assert kills == len(SAVES)
    assert run_ranks(newest_step, 2, folder) == [complete[-1]] * 2
