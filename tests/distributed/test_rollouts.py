"""How the groups of a step come about, at several splits, against a plain loop over whole draws."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from spawn import run_ranks
from tiny import config, hf_tensors, split, write_model, write_tokenizer

from megatron_dgpo.config import Config
from megatron_dgpo.rollout.embedded import EmbeddedEngine
from megatron_dgpo.rollout.engine import SamplingParams
from megatron_dgpo.rollout.policies import NotEnoughGroups, Rollouts
from megatron_dgpo.types import Group, Prompt, Sample

WANTED, MINIBATCH, N, STEPS = 12, 6, 3, 3
PROMPTS = 40
SPLITS: dict[str, tuple[int, int]] = {"DP=1": (1, 1), "DP=2": (2, 1), "TP=2": (2, 2), "DP=3": (3, 1)}
"""name -> processes, tensor-parallel size."""


def prompts_of(draw: int, size: int) -> list[Prompt]:
    numbers = [(draw * size + i) % PROMPTS for i in range(size)]
    return [Prompt(f"p{n}", tuple(2 + (n * k) % 43 for k in range(1, 3 + n % 5)), "", "") for n in numbers]


def params_of(draw: int, tokens: int = 8) -> SamplingParams:
    return SamplingParams(tokens, n=N, seed=draw, stop_token_ids=(0,))


def score(samples: Sequence[Sample]) -> None:
    """A third of the prompts is always right, a sixth always wrong; of a twelfth nothing can be scored."""
    for sample in samples:
        kind = int(sample.prompt.id[1:]) % 12
        sample.reward = float(sum(sample.token_ids) % 2)
        if kind < 4:
            sample.reward = 1.0
        elif kind < 6:
            sample.reward = 0.0
        elif kind == 6 or (kind == 7 and sample.index == 0):
            sample.reward = None


def always_right(samples: Sequence[Sample]) -> None:
    for sample in samples:
        sample.reward = 1.0


def settings(folder: Path, tp: int = 1, **rollout: Any) -> Config:
    c = config(folder, tp=tp)
    train = {"prompts_per_step": WANTED, "prompts_per_minibatch": MINIBATCH, "samples_per_prompt": N}
    return c.model_copy(
        update={
            "train": c.train.model_copy(update=train),
            "rollout": c.rollout.model_copy(update={"dynamic_sampling": True, **rollout}),
        }
    )


def engine_of(folder: Path, max_batch_size: int = 16) -> EmbeddedEngine:
    engine = EmbeddedEngine(folder, dtype=torch.float32, device="cpu", max_batch_size=max_batch_size)
    engine.update_weights(hf_tensors(folder).items(), 0)
    return engine


def no_bar(name: str, total: int, unit: str) -> Any:
    return nullcontext(SimpleNamespace(update=lambda n: None))


def seen(groups: Sequence[Group]) -> list[tuple[str, list[tuple[list[int], float | None]]]]:
    return [(g.prompt.id, [(s.token_ids, s.reward) for s in g.samples]) for g in groups]


def steps(rank: int, world: int, folder: Path, tp: int, size: int, rollout: dict[str, Any]) -> list[Any]:
    """What this rank has of each step: (metrics, mini-batches)."""
    c = settings(folder, tp, **rollout)
    out, draw = [], 0
    with split(c) as groups:
        rollouts = Rollouts(
            c,
            groups,
            engine_of(folder),
            score,
            prompts_of=lambda draw: prompts_of(draw, size),
            params_of=params_of,
        )
        for _ in range(STEPS):
            step = rollouts.step(draw, no_bar)
            draw += step.tally.rounds
            out.append((groups.dp.rank(), step.tally.metrics(), [seen(m) for m in step.minibatches]))
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_model(tmp_path_factory.mktemp("rollouts"), tied=False, num_hidden_layers=1))


@functools.cache
def plain_steps(folder: Path, size: int) -> list[tuple[dict[str, int], list[Any]]]:
    """Whole draws by one engine, looked through in order."""
    engine, draw, out = engine_of(folder), 0, []
    for _ in range(STEPS):
        good: list[Group] = []
        metrics = dict.fromkeys(
            ("groups_drawn", "groups_all_right", "groups_all_wrong", "groups_without_reward"), 0
        )
        first = draw
        while len(good) < WANTED:
            for group in engine.generate(prompts_of(draw, size), params_of(draw)):
                assert group is not None
                score(group.samples)
                rewards = {s.reward for s in group.samples} - {None}
                metrics["groups_drawn"] += 1
                metrics["groups_all_right"] += rewards == {1.0}
                metrics["groups_all_wrong"] += rewards == {0.0}
                metrics["groups_without_reward"] += rewards == set()
                good += [group] if rewards == {0.0, 1.0} else []
            draw += 1
        metrics |= {"rollout_rounds": draw - first, "groups_unfinished": 0}
        out.append((metrics, [seen(good[:MINIBATCH]), seen(good[MINIBATCH:WANTED])]))
    return out


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("size", [WANTED, 19], ids=["exact", "oversampled"])
def test_dynamic_sampling_fills_a_step_with_the_first_usable_groups(
    folder: Path, name: str, size: int
) -> None:
    world, tp = SPLITS[name]
    want = plain_steps(folder, size)
    ranks = run_ranks(steps, world, folder, tp, size, {"oversampling": size / WANTED})
    assert max(metrics["rollout_rounds"] for metrics, _ in want) > 1
    assert all(sum(metrics[f"groups_all_{x}"] for metrics, _ in want) > 3 for x in ("right", "wrong"))
    for number, (metrics, minibatches) in enumerate(want):
        replicas = {}
        for rank in ranks:
            replica, got_metrics, got = rank[number]
            assert got_metrics == metrics
            assert replicas.setdefault(replica, got) == got  # equal on all ranks of a replica
        for m, whole in enumerate(minibatches):
            shares = [replicas[r][m] for r in sorted(replicas)]
            assert {len(share) for share in shares} == {MINIBATCH // len(shares)}
            together = [group for share in shares for group in share]
            assert sorted(together, key=str) == sorted(whole, key=str)
            for share in shares:  # each in the order of the prompts
                assert [whole.index(g) for g in share] == sorted(whole.index(g) for g in share)


def short_of_groups(rank: int, world: int, folder: Path) -> None:
    c = settings(folder, max_rounds=2)
    with split(c) as groups:
        Rollouts(
            c,
            groups,
            engine_of(folder),
            always_right,
            prompts_of=lambda draw: prompts_of(draw, WANTED),
            params_of=params_of,
        ).step(0, no_bar)


def test_a_step_that_cannot_be_filled_says_why(folder: Path) -> None:
    with pytest.raises(NotEnoughGroups) as caught:
        run_ranks(short_of_groups, 2, folder)
    assert str(caught.value) == (
        "rollout: 0 of train.prompts_per_step = 12 groups are usable after 2 draws of 12 prompts; of 24 "
        "groups 24 were all right, 0 all wrong, 0 without a reward, 0 not finished. Use harder prompts in "
        "data.train, more train.samples_per_prompt, more rounds (rollout.max_rounds is 2), or "
        "rollout.dynamic_sampling = false"
    )


# --- draws that are stopped ---------------------------------------------------------------------------


def stopped_step(rank: int, world: int, folder: Path, tp: int, dynamic: bool, ahead: bool) -> Any:
    """A step of draws with three times the prompts, which are drawn group by group."""
    c = settings(folder, tp, dynamic_sampling=dynamic, oversampling=3.0)
    with split(c) as groups:
        rollouts = Rollouts(
            c,
            groups,
            engine_of(folder, max_batch_size=N),
            score,
            prompts_of=lambda draw: prompts_of(draw, 3 * WANTED),
            params_of=lambda draw: params_of(draw, 16),
            stop_early=True,
        )
        if ahead:
            rollouts.start(0)
        step = rollouts.step(0, no_bar)
        rollouts.start(step.tally.rounds)
        rollouts.close()  # what has begun is given up, here and on the other rank
        assert not {"race", "rollout ahead"} & {t.name for t in threading.enumerate()}
        return groups.dp.rank(), step.tally.metrics(), [seen(m) for m in step.minibatches]


@pytest.mark.parametrize("dynamic", [False, True], ids=["complete", "usable"])
@pytest.mark.parametrize(("tp", "ahead"), [(1, False), (2, False), (1, True)], ids=["DP=2", "TP=2", "ahead"])
def test_a_draw_stops_on_all_ranks_when_it_has_enough(
    folder: Path, tp: int, dynamic: bool, ahead: bool
) -> None:
    ranks = run_ranks(stopped_step, 2, folder, tp, dynamic, ahead)
    replicas = {replica: minibatches for replica, _, minibatches in ranks}
    metrics = ranks[0][1]
    assert ranks[1][1] == metrics
    assert metrics["groups_drawn"] == 3 * WANTED * metrics["rollout_rounds"]
    if dynamic:
        useless = sum(metrics[f"groups_{x}"] for x in ("all_right", "all_wrong", "without_reward"))
        assert metrics["groups_drawn"] - metrics["groups_unfinished"] - useless >= WANTED
    else:  # a rank would draw its half for a second, and looks at the other ten times a second
        assert metrics["rollout_rounds"] == 1
        assert 0 < metrics["groups_unfinished"] <= 2 * WANTED
    chosen = []
    for m in range(WANTED // MINIBATCH):
        shares = [replicas[r][m] for r in sorted(replicas)]
        assert {len(share) for share in shares} == {MINIBATCH // len(shares)}
        chosen += sorted(int(name[1:]) for share in shares for name, _ in share)
        for share in shares:
            for name, samples in share:
                assert len(samples) == N
                rewards = {reward for _, reward in samples} - {None}
                assert rewards == {0.0, 1.0} or not dynamic, name
    if metrics["rollout_rounds"] == 1:  # the prompts of the first draw have their numbers in order
        assert chosen == sorted(set(chosen))
