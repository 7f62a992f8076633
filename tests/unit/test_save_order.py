"""When a step's checkpoint is written, and when it is one."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dgpo import run, train, trainer
from megatron_dgpo.cli import validate
from megatron_dgpo.config import Config
from megatron_dgpo.observe import console
from megatron_dgpo.run import RunState

STEPS = 3


def what_happens(monkeypatch: pytest.MonkeyPatch, folder: Path, *, stop_at: str = "", every: int = 2) -> str:
    """The calls of the main loop in order: Push, Update, Record, Evaluate, Write and Complete a checkpoint. A
    signal to stop comes during the call that `stop_at` names."""
    done: list[str] = []

    def call(letter: str, answer: Any = None) -> Any:
        return lambda *_: (done.append(letter), answer)[1]

    class Trainer:
        policy = critic = None
        timer = staticmethod(lambda phase: nullcontext())
        rollout = staticmethod(lambda state: SimpleNamespace(minibatches=[]))
        prepare = staticmethod(lambda *_: ([], SimpleNamespace(merge=lambda sums: None)))
        start_next = close = staticmethod(lambda *_: None)
        push, update = staticmethod(call("P")), staticmethod(call("U"))
        record, evaluate_when_due = staticmethod(call("R")), staticmethod(call("E"))

        def __init__(self, *_: Any) -> None: ...

    checkpoints = SimpleNamespace(write=call("W"), complete=call("C"))
    made = SimpleNamespace(checkpoints=checkpoints, close=lambda: None)
    asked = SimpleNamespace(on_any_rank=lambda groups: bool(stop_at) and "".join(done).endswith(stop_at))
    monkeypatch.setattr(trainer, "Trainer", Trainer)
    monkeypatch.setattr(run, "RunFolder", lambda *_: made)
    monkeypatch.setattr(run, "StopSignal", lambda: asked)
    monkeypatch.setattr(run, "restore_or_start", lambda *_, **__: RunState())
    monkeypatch.setattr(run, "finish", lambda *_: None)
    monkeypatch.setattr(console, "Console", lambda *_: SimpleNamespace(log=lambda text: None))
    raw = {
        **{"model": {"path": "m"}, "data": {"train": ["a"]}, "reward": {"name": "exact_match"}},
        **{"optimizer": {"lr": 1e-3}, "checkpoint": {"every": every}, "run": {"folder": str(folder)}},
        "train": {
            **{"steps": STEPS, "prompts_per_step": 1, "samples_per_prompt": 2, "prompts_per_minibatch": 1}
        },
    }
    groups: Any = SimpleNamespace(rank=0, world_size=1)
    train.run(validate(raw, Config), groups, data=None)  # type: ignore[arg-type]
    return "".join(done)


def test_written_before_the_engine_gets_weights_and_complete_after_the_steps_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Servers on the trainer's GPUs take their memory back in a push."""
    assert what_happens(monkeypatch, tmp_path) == "PE" + "UPRE" + "UWPREC" + "UWPREC"
    assert what_happens(monkeypatch, tmp_path, every=0) == "PE" + "UPRE" * 2 + "UWPREC"


def test_a_signal_is_heard_whenever_it_comes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """During the update it is that of a step that is due; in the evaluation, the save comes after it."""
    assert what_happens(monkeypatch, tmp_path, stop_at="EUPRE") == "PE" + "UPREWC"
    assert what_happens(monkeypatch, tmp_path, stop_at="PE") == "PE"
