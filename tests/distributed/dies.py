"""`torchrun --max-restarts N -m dies CONFIG.toml ...`: a training run of which a rank is killed in each start
but the last. DIES is a list of (rank, moment, step) as JSON, one for each of them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import Any

from megatron_dgpo import train


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before(cls: type, name: str, at: Callable[..., bool]) -> None:
    """Die when this method is called, where `at` says so of its arguments."""
    original = getattr(cls, name)

    def method(*args: Any, **kwargs: Any) -> Any:
        if at(*args):
            _die()
        return original(*args, **kwargs)

    setattr(cls, name, method)


def _arrange(moment: str, step: int) -> None:
    """`step`: the one that is to be lost."""
    from megatron_dgpo.mcore import checkpoint
    from megatron_dgpo.trainer import Trainer

    if moment == "start":
        _before(Trainer, "push", lambda *_: True)
    elif moment == "rollout":
        _before(Trainer, "prepare", lambda self, groups, done: done + 1 == step)
    elif moment == "update":
        _before(Trainer, "update", lambda self, minibatches, folder, done: done + 1 == step)
    elif moment == "sync":
        _before(Trainer, "push", lambda self, version: version == step)
    elif moment == "save":  # all but its state is on disk
        _before(checkpoint, "flush_to_disk", lambda *_: True)  # type: ignore[arg-type]
    else:
        raise ValueError(moment)


if __name__ == "__main__":
    deaths, start = json.loads(os.environ["DIES"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if start < len(deaths):
        rank, moment, step = deaths[start]
        if os.environ["RANK"] == str(rank):
            _arrange(moment, step)
    train.main()
