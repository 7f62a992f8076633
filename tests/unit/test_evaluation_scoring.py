"""Scoring while others are drawn: never in the engine's way, in order, and errors are not lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
from patience import patience

from megatron_dgpo.evaluation.scoring import Scoring
from megatron_dgpo.rewards import build_reward
from megatron_dgpo.types import Group, Prompt, Sample


def groups(count: int) -> list[Group]:
    made = []
    for k in range(count):
        prompt = Prompt(f"p:{k}", (1,), "", "1")
        made.append(Group(prompt, [Sample(prompt, 0, [1], [0.0], "stop", (), text="1" if k % 2 else "2")]))
    return made


def test_a_coroutine_scores_what_comes_out_of_an_event_loop() -> None:
    """A reward that runs a loop of its own, and groups that come in another one, which goes on meanwhile."""
    kept: list[Group] = []
    came = groups(4)

    async def draw(scoring: Scoring) -> None:
        for group in came:
            scoring.on_group(group)
            await asyncio.sleep(0)
        assert not kept  # a call of the reward takes 0.2 s

    with Scoring(build_reward("user_rewards:judge").score, kept.append) as scoring:
        asyncio.run(draw(scoring))
    assert kept == came
    assert [group.samples[0].reward for group in kept] == [0.0, 1.0, 0.0, 1.0]


def test_drawing_goes_on_while_a_reward_takes_its_time() -> None:
    """All groups are there before the first one is scored."""
    free, kept = threading.Event(), []

    def score(samples: Sequence[Sample]) -> None:
        assert free.wait(patience())

    with Scoring(score, kept.append) as scoring:
        for group in groups(5):
            scoring.on_group(group)
        assert not kept
        free.set()
    assert [group.prompt.id for group in kept] == [f"p:{k}" for k in range(5)]


@pytest.mark.parametrize("where", ["score", "keep"])
def test_an_error_stops_the_engine_and_is_raised(where: str) -> None:
    kept: list[Group] = []

    def score(samples: Sequence[Sample]) -> None:
        if where == "score" and samples[0].prompt.id == "p:1":
            raise RuntimeError("the workers do not start")

    def keep(group: Group) -> None:
        if where == "keep" and group.prompt.id == "p:1":
            raise RuntimeError("the workers do not start")
        kept.append(group)

    stopped = False
    with pytest.raises(RuntimeError, match="the workers do not start"), Scoring(score, keep) as scoring:
        for group in groups(2):
            scoring.on_group(group)
        scoring._thread.join(patience())  # it ends by itself: the engine need not finish first
        stopped = scoring.failed()
        scoring.on_group(groups(3)[2])
    assert stopped and [group.prompt.id for group in kept] == ["p:0"]


def test_what_came_is_kept_where_the_engine_fails_and_dropped_where_the_user_stops() -> None:
    for error, count in ((ValueError, 5), (KeyboardInterrupt, 1)):
        free, begun, kept = threading.Event(), threading.Event(), []

        def score(
            samples: Sequence[Sample], free: threading.Event = free, begun: threading.Event = begun
        ) -> None:
            begun.set()
            assert free.wait(patience())

        with pytest.raises(error), Scoring(score, kept.append) as scoring:
            for group in groups(5):
                scoring.on_group(group)
            assert begun.wait(patience())
            if error is ValueError:
                free.set()
            else:  # the one that is being scored is finished, when the block ends
                threading.Thread(
                    target=lambda s=scoring, f=free: s._dropped.wait(patience()) and f.set()
                ).start()
            raise error
        assert len(kept) == count
