"""Which groups make a step, who trains them, and when a draw has enough: without process groups."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from patience import until

from megatron_dgpo.config import Config, RolloutConfig, TrainConfig
from megatron_dgpo.rollout.race import Race
from megatron_dgpo.rollout.select import Verdict, deal, verdict
from megatron_dgpo.run import RunState
from megatron_dgpo.types import Group, Prompt, Sample


def group(*rewards: float | None, name: str = "p") -> Group:
    prompt = Prompt(name, (1,), "", "")
    return Group(prompt, [Sample(prompt, i, [1], [0.0], "stop", (), reward=r) for i, r in enumerate(rewards)])


@pytest.mark.parametrize(
    ("rewards", "want"),
    [
        ((1.0, 0.0, 1.0), Verdict.USABLE),
        ((0.5, None, 0.25), Verdict.USABLE),
        ((1.0, 1.0, 1.0), Verdict.ALL_RIGHT),
        ((1.0, None, 1.0), Verdict.ALL_RIGHT),
        ((0.0, 0.0), Verdict.ALL_WRONG),
        ((None, 0.0), Verdict.ALL_WRONG),
        ((-1.0, -1.0), Verdict.ALL_WRONG),
        ((None, None), Verdict.NO_REWARD),
        ((), Verdict.UNFINISHED),
    ],
)
def test_verdicts(rewards: tuple[float | None, ...], want: Verdict) -> None:
    assert verdict(group(*rewards), need_variance=True) is want
    plain = Verdict.USABLE if rewards else Verdict.UNFINISHED
    assert verdict(group(*rewards), need_variance=False) is plain


@given(st.data())
def test_a_step_is_dealt_in_equal_numbers_and_similar_tokens(data: st.DataObject) -> None:
    replicas = data.draw(st.integers(1, 5))
    size = replicas * data.draw(st.integers(1, 6))
    count = size * data.draw(st.integers(1, 3))
    owners = data.draw(st.lists(st.integers(0, replicas - 1), min_size=count, max_size=count))
    tokens = data.draw(st.lists(st.integers(1, 100), min_size=count, max_size=count))
    targets = deal(owners, tokens, size, replicas)
    for start in range(0, count, size):
        part = slice(start, start + size)
        to, lengths = targets[part], tokens[part]
        assert [to.count(r) for r in range(replicas)] == [size // replicas] * replicas
        loads = [sum(x for x, t in zip(lengths, to, strict=True) if t == r) for r in range(replicas)]
        gap = max(loads) - min(loads)
        # No swap of two groups brings the heaviest and the lightest closer, unless they are close already.
        heavy, light = loads.index(max(loads)), loads.index(min(loads))
        of = {r: [x for x, t in zip(lengths, to, strict=True) if t == r] for r in (heavy, light)}
        close = gap * replicas * 50 <= sum(lengths)
        assert close or not [1 for x in of[heavy] for y in of[light] if 0 < x - y < gap]


def test_what_is_even_stays_and_only_what_helps_moves() -> None:
    assert deal([0, 1, 2] * 4, [7] * 12, 6, 3) == [0, 1, 2] * 4
    assert deal([0, 0, 0, 1], [1, 1, 1, 1], 4, 2) == [0, 0, 1, 1]
    # 90 + 60 against 10 + 20: to swap 90 and 20 leaves 80 against 100, as does 60 and 10; the first it is.
    assert deal([0, 0, 1, 1], [90, 60, 10, 20], 4, 2) == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="6 groups, 4 a mini-batch, cannot be shared by 2"):
        deal([0] * 6, [1] * 6, 4, 2)
    with pytest.raises(ValueError, match="cannot be shared by 2 replicas"):
        deal([0] * 6, [1] * 6, 3, 2)


def test_random_groups_of_a_large_step_come_out_even() -> None:
    """64 groups over 8 replicas, lengths as of responses: dealt by number alone the heaviest has about a
    third more than the mean."""
    g = random.Random(3)
    tokens = [round(g.lognormvariate(6, 0.8)) for _ in range(64)]
    owners = [i % 8 for i in range(64)]

    def imbalance(targets: list[int]) -> float:
        loads = [sum(x for x, t in zip(tokens, targets, strict=True) if t == r) for r in range(8)]
        return max(loads) * 8 / sum(loads) - 1

    assert imbalance(owners) > 0.2 and imbalance(deal(owners, tokens, 64, 8)) < 0.03


@pytest.mark.parametrize(
    ("prompts", "factor", "want"),
    [(8, 1.0, 8), (10, 1.1, 11), (8, 1.1, 9), (100, 1.15, 115), (3, 2.0, 6), (512, 1.25, 640)],
)
def test_prompts_of_a_draw(prompts: int, factor: float, want: int) -> None:
    train = TrainConfig.model_construct(prompts_per_step=prompts)
    config = Config.model_construct(train=train, rollout=RolloutConfig(oversampling=factor))
    assert config.prompts_per_draw == want


def test_states_from_before_draws_were_counted_took_one_a_step() -> None:
    assert RunState.from_json({"step": 7, "evaluations": {}}).draws == 7
    assert RunState.from_json({"step": 7, "draws": 12, "evaluations": {}}).draws == 12


# --- the race ---------------------------------------------------------------------------------------


def races(store: dist.Store, count: int, wanted: int, score=lambda samples: None) -> list[Race]:
    """As many ranks, each of which counts groups whose rewards differ."""
    return [
        Race(store, "k", wanted=wanted, score=score, counts=lambda g: len({s.reward for s in g.samples}) > 1)
        for _ in range(count)
    ]


def test_the_race_ends_for_all_ranks_when_all_together_have_enough() -> None:
    one, two = races(dist.HashStore(), 2, wanted=3)
    good, bad = [group(0.0, 1.0) for _ in range(3)], [group(1.0, 1.0) for _ in range(9)]
    for g in (*bad, *good[:2]):
        one.on_group(g)
    until(lambda: len(one._scored) == 11)
    time.sleep(0.3)  # some polls
    assert not one.should_stop() and not two.should_stop()
    two.on_group(good[2])
    until(lambda: one.should_stop() and two.should_stop())
    one.finish([*bad, *good[:2]])
    two.finish(good[2:])


def test_leaving_the_race_scores_everything_once() -> None:
    scored: list[Sample] = []
    (race,) = races(dist.HashStore(), 1, wanted=100, score=scored.extend)
    come, late = [group(0.0, 1.0) for _ in range(20)], group(1.0, 0.0)
    for g in come:
        race.on_group(g)
    race.finish([*come, late])
    assert sorted(map(id, scored)) == sorted(id(s) for g in (*come, late) for s in g.samples)


def test_a_failure_in_the_race_stops_it_and_is_raised_where_it_is_left() -> None:
    def score(samples: object) -> None:
        raise ArithmeticError("no")

    (race,) = races(dist.HashStore(), 1, wanted=100, score=score)
    race.on_group(group(0.0))
    until(race.should_stop)
    with pytest.raises(ArithmeticError, match="no"):
        race.finish([])
    assert not [t for t in threading.enumerate() if t.name == "race"]
