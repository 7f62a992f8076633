"""The learning rate of every update, against formulas written here."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from megatron_dgpo.config import OptimizerConfig
from megatron_dgpo.mcore.policy import Schedule, _build_scheduler

LR, MIN_LR = 3e-4, 1e-5


def expected(style: str, warmup: int, total: int, update: int) -> float:
    """Of update 1, 2, ...: linear up to LR at update `warmup`, then what the decay has left after the
    updates before this one."""
    if update <= warmup:
        return LR * update / warmup
    done = (update - 1 - warmup) / (total - warmup)
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[style]
    return LR if style == "constant" else MIN_LR + (LR - MIN_LR) * left


def made(style: str, warmup: int, total: int) -> tuple[Schedule, dict[str, float]]:
    group = {"lr": 0.0, "weight_decay": 0.1}
    c = OptimizerConfig(lr=LR, min_lr=MIN_LR, warmup_steps=warmup, decay_style=style)  # type: ignore[arg-type]
    return _build_scheduler(SimpleNamespace(param_groups=[group]), c, total), group


def rates(schedule: Schedule, group: dict[str, float], updates: int) -> list[float]:
    found = []
    for _ in range(updates):
        found.append(group["lr"])  # what `Policy.update` uses and reports
        schedule.step(1)
    return found


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
def test_every_update_has_its_rate(style: str) -> None:
    for warmup, total in ((0, 1), (1, 1), (0, 10), (1, 10), (4, 10), (9, 10), (10, 10)):
        want = [expected(style, warmup, total, update) for update in range(1, total + 1)]
        got = rates(*made(style, warmup, total), total)
        assert got == pytest.approx(want, rel=1e-12) and min(got) > 0
        # A resumed run: the same numbers, wherever the checkpoint is.
        for done in range(total):
            schedule, group = made(style, warmup, total)
            rates(schedule, group, done)
            again, group = made(style, warmup, total)
            again.load_state_dict(schedule.state_dict())
            assert rates(again, group, total - done) == got[done:]
