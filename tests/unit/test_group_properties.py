"""What must hold for any group of rewards, whatever the algorithm."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_algorithm_variants import DEFAULTS, make

CASES = settings(max_examples=60)
REWARD = st.one_of(st.none(), st.sampled_from([0.0, 1.0, 0.5]), st.floats(-10, 10, width=32))
GROUP = st.lists(REWARD, min_size=2, max_size=12)
ALGORITHMS = [*DEFAULTS, "dgpo", "grpo"]
RELATIVE = [name for name in ALGORITHMS if name != "ppo"]
"""Those whose advantages are relative to the group: PPO's come from its critic."""


def build(name):
    return make(name, **({"kl_coef": 0.0} if name == "grpo" else {}))


@pytest.mark.parametrize("name", ALGORITHMS)
@CASES
@given(group=GROUP, seed=st.integers(0, 1000))
def test_the_order_of_samples_does_not_matter(name, group, seed):
    algorithm = build(name)
    order = random.Random(seed).sample(range(len(group)), len(group))
    (whole,) = algorithm.advantages([group])
    (mixed,) = algorithm.advantages([[group[i] for i in order]])
    for at, i in enumerate(order):
        if whole[i] is None:
            assert mixed[at] is None
        else:
            assert math.isclose(mixed[at], whole[i], rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("name", ALGORITHMS)
@CASES
@given(group=GROUP, others=st.lists(GROUP, max_size=3))
def test_failed_samples_and_other_groups_change_nothing(name, group, others):
    algorithm = build(name)
    known = [r for r in group if r is not None]
    (alone,) = algorithm.advantages([known])
    among = algorithm.advantages([*others, group])[-1]
    assert [a for a in among if a is not None] == alone
    assert [a is None for a in among] == [r is None for r in group]


@pytest.mark.parametrize("name", RELATIVE)
@CASES
@given(reward=st.floats(-1e6, 1e6), count=st.integers(1, 12), failed=st.integers(0, 3))
def test_equal_rewards_give_exactly_nothing(name, reward, count, failed):
    (got,) = build(name).advantages([[reward] * count + [None] * failed])
    assert got == [0.0] * count + [None] * failed


@pytest.mark.parametrize("name", RELATIVE)
@CASES
@given(group=GROUP)
def test_advantages_of_a_group_cancel(name, group):
    found = [a for a in build(name).advantages([group])[0] if a is not None]
    assert abs(math.fsum(found)) <= 1e-6 * max(1.0, *(abs(a) for a in found)) if found else True
