"""The training loop itself, on one rank and on two: rollout policies, and what a resumed run does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from spawn import run_ranks
from tiny import split, write_model, write_tokenizer

from megatron_dgpo.config import Config
from megatron_dgpo.observe.metrics import read_metrics, without_timings
from megatron_dgpo.observe.samples import read_samples
from megatron_dgpo.rewards import Outcome, Reward, register
from megatron_dgpo.types import Sample

STEPS = 4


@register("letters")
class Letters(Reward):
    """1 where the response has more letters than the row's answer says: always, never or now and then."""

    def outcomes(self, samples: Sequence[Sample]) -> list[Outcome]:
        return [Outcome(float(sum(map(str.isalpha, s.text)) > int(s.prompt.answer))) for s in samples]

    def canonical_answer(self, text: str) -> str | None:
        return str(sum(map(str.isalpha, text)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write_tokenizer(write_model(folder / "model", tied=False, max_position_embeddings=64))
    # A response has nine letters on average: -1 is always right, 99 never.
    rows = [{"prompt": f"{n}*{n + 3}=", "answer": str((-1, 99, 8, 9)[n % 4])} for n in range(22)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(folder: Path, name: str, **more: dict[str, Any]) -> Config:
    """A run of tiny steps; `more` has further settings by section."""
    raw: dict[str, dict[str, Any]] = {
        "run": {"folder": folder / name, "quiet": True},
        "model": {"path": folder / "model"},
        "parallel": {"timeout_seconds": 60},
        "data": {"train": (folder / "train.jsonl",), "apply_chat_template": False},
        "rollout": {"max_new_tokens": 16, "max_batch_size": 8},
        "reward": {"name": "letters"},
        "algorithm": {"name": "grpo"},
        "train": {
            **{"steps": STEPS, "prompts_per_step": 4, "prompts_per_minibatch": 2},
            **{"samples_per_prompt": 4, "max_tokens_per_microbatch": 512},
        },
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 2, "export_hf": False},
        "observe": {"tensorboard": False, "samples_per_step": 100},
    }
    for section, values in more.items():
        raw.setdefault(section, {}).update(values)
    return Config.model_validate(raw)


def train(rank: int, world: int, configs: Sequence[Config]) -> None:
    """Whole runs, one after the other."""
    from megatron_dgpo.train import load_data, run

    for c in configs:
        with split(c) as groups:
            run(c, groups, load_data(c))


def rows(c: Config) -> list[dict[str, Any]]:
    return [without_timings(row) for row in read_metrics(c.run.folder, "train")]


def samples_of(c: Config, step: int) -> list[dict[str, Any]]:
    return read_samples(c.run.folder / "samples" / f"step_{step:06d}.jsonl")


# --- dynamic sampling ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dynamic(folder: Path) -> list[Config]:
    """One run that nothing interrupts, one that ends half-way and is resumed, one on two replicas."""
    policy = {"rollout": {"dynamic_sampling": True, "oversampling": 1.25}}
    whole = settings(folder, "whole", **policy)
    half = settings(folder, "resumed", **policy, train={"steps": 2})
    resumed = settings(folder, "resumed", **policy, run={"resume": True})
    replicas = settings(folder, "replicas", **policy)
    run_ranks(train, 1, [whole, half, resumed], timeout=200)
    run_ranks(train, 2, [replicas], timeout=200)
    return [whole, resumed, replicas]


def test_dynamic_sampling_trains_on_groups_that_differ(dynamic: list[Config]) -> None:
    whole, *_ = dynamic
    for row in rows(whole):
        assert row["zero_variance_groups"] == 0 and 0 < row["reward"] < 1 and row["grad_norm"] > 0
        assert row["groups_drawn"] == 5 * row["rollout_rounds"]
        assert row["groups_all_right"] > 0 and row["groups_all_wrong"] > 0
        assert row["groups_drawn"] - row["groups_all_right"] - row["groups_all_wrong"] >= 4
    draws = sum(row["rollout_rounds"] for row in rows(whole))
    assert draws > STEPS
    states = sorted((whole.run.folder / "checkpoints").glob("step_*/run_state.json"))
    assert json.loads(states[-1].read_text())["draws"] == draws


def test_a_resumed_run_goes_on_with_the_next_draw(dynamic: list[Config]) -> None:
    whole, resumed, _ = dynamic
    assert rows(resumed) == rows(whole)


def test_two_replicas_train_on_the_same_groups(dynamic: list[Config]) -> None:
    whole, _, replicas = dynamic
    for mine, other in zip(rows(whole), rows(replicas), strict=True):
        assert mine.keys() == other.keys()
        for name in ("response_tokens", "rollout_rounds", "groups_drawn", "groups_all_right"):
            assert mine[name] == other[name]
        for name in ("grad_norm", "entropy", "reward"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4)
    # Rank 0 of the two has half of each mini-batch. (A prompt may return in a later draw of a step.)
    for step in range(1, STEPS + 1):
        everyone, first = (
            {(s["prompt_id"], tuple(s["token_ids"])) for s in samples_of(c, step)} for c in (whole, replicas)
        )
        assert len(everyone) == 16 and len(first) == 8 and first < everyone
