"""Samples that are drawn in a thread, by the embedded engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patience import patience
from test_embedded import VOCAB, full_forward_log_probs, make_engine, make_prompts, random_model, save_folder
from test_embedded import tokens_of as tokens

from megatron_dgpo.rollout.ahead import Ahead
from megatron_dgpo.rollout.embedded import EmbeddedEngine
from megatron_dgpo.rollout.engine import EnginesLost, SamplingParams
from megatron_dgpo.rollout.race import Race
from megatron_dgpo.types import Group, Prompt

PARAMS = SamplingParams(12, n=2, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("tiny"))


def race(on_group: Callable[[Group], None] = lambda g: None, wanted: int = 10**6) -> Race:
    """One that calls `on_group` in the engine's thread as well."""

    class Told(Race):
        def on_group(self, group: Group) -> None:
            super().on_group(group)
            on_group(group)

    return Told(dist.HashStore(), "k", wanted=wanted, score=lambda samples: None, counts=lambda g: True)


def test_what_is_drawn_ahead_is_what_the_engine_draws(folder: Path) -> None:
    engine, prompts = make_engine(folder, random_model(folder, seed=1), max_batch_size=4), make_prompts(5)
    ahead = Ahead(engine, prompts, PARAMS)
    with pytest.raises(ValueError, match="other samples have been drawn ahead"):
        ahead.generate(prompts[:4], PARAMS)
    done: list[int] = []
    groups = ahead.generate(prompts, PARAMS, on_progress=done.append)
    assert tokens(groups) == tokens(engine.generate(prompts, PARAMS)) and sum(done) == 10
    # From now on it is the engine.
    other, come = make_prompts(9)[5:], []
    assert tokens(ahead.generate(other, PARAMS, on_group=come.append)) == tokens(
        engine.generate(other, PARAMS)
    )
    assert len(come) == 4


def test_what_the_engine_raises_comes_up_where_the_samples_are_wanted(folder: Path) -> None:
    engine = make_engine(folder, random_model(folder, seed=1))
    prompts = [*make_prompts(2), Prompt("data:x", (VOCAB,), "", "")]
    ahead = Ahead(engine, prompts, PARAMS)
    with pytest.raises(ValueError, match="'data:x' has token id 38, outside the vocabulary"):
        ahead.generate(prompts, PARAMS)


class Losing(EmbeddedEngine):
    """Loses its servers, as it were, after the first two groups of a call, once."""

    lost = False

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, **more: Any) -> Any:
        if self.lost:
            return super().generate(prompts, params, **more)
        self.lost = True
        groups: list[Group | None] = [None] * len(prompts)
        groups[:2] = super().generate(prompts[:2], params, **more)
        raise EnginesLost("gone", groups)


def test_what_lost_engines_left_over_is_drawn_by_the_engine(folder: Path) -> None:
    model, prompts = random_model(folder, seed=1), make_prompts(5)
    engine = Losing(folder, dtype=torch.float32, device="cpu", max_batch_size=8)
    engine.update_weights(model.named_parameters(), 1)
    ahead = Ahead(engine, prompts, PARAMS)
    with pytest.raises(EnginesLost) as caught:
        ahead.generate(prompts, PARAMS)
    left = [p for p, g in zip(prompts, caught.value.groups, strict=True) if g is None]
    assert left == prompts[2:]
    groups = [*caught.value.groups[:2], *ahead.generate(left, PARAMS)]
    assert tokens(groups) == tokens(make_engine(folder, model).generate(prompts, PARAMS))


def test_weights_that_change_meanwhile_are_told_by_the_samples(folder: Path) -> None:
    """The first batch has version 0, the others version 1, each with log-probs of its own weights."""
    models, prompts = [random_model(folder, seed=s) for s in (1, 2)], make_prompts(6)
    engine = make_engine(folder, models[0], max_batch_size=4, version=0)
    drawn, changed = threading.Event(), threading.Event()

    def wait_for_weights(group: Group) -> None:
        drawn.set()
        assert changed.wait(patience())

    meanwhile = race(wait_for_weights)
    ahead = Ahead(engine, prompts, PARAMS, meanwhile)
    assert drawn.wait(patience())
    engine.update_weights(models[1].named_parameters(), 1)
    changed.set()
    groups = ahead.generate(prompts, PARAMS)
    meanwhile.finish(groups)
    samples = [s for g in groups for s in g.samples]
    assert sorted(s.weight_version for s in samples) == [0] * 4 + [1] * 8
    for s in samples:
        (span,) = s.weight_versions
        assert (span.start, span.end) == (0, len(s.token_ids))
        want = full_forward_log_probs(models[span.version], s.prompt, s.token_ids, 1.0)
        assert float((torch.tensor(s.log_probs) - want).abs().max()) < 1e-5


def test_giving_up_ends_the_call(folder: Path) -> None:
    engine = make_engine(folder, random_model(folder, seed=1), max_batch_size=2)
    prompts, first = make_prompts(400), threading.Event()
    meanwhile = race(lambda g: first.set())
    ahead = Ahead(engine, prompts, PARAMS, meanwhile)
    assert first.wait(patience())
    ahead.give_up()
    meanwhile.close()
    assert None in ahead.generate(prompts, PARAMS)
    assert not [t for t in threading.enumerate() if t.name in ("rollout ahead", "race")]
