"""The training loop itself, on one rank and on two: rollout policies, and what a resumed run does."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import patience
from spawn import run_ranks
from tiny import hf_tensors, split, write_model, write_tokenizer

from megatron_dgpo.config import Config
from megatron_dgpo.observe.metrics import read_metrics, without_timings
from megatron_dgpo.observe.samples import read_samples
from megatron_dgpo.rewards import Outcome, Reward, register
from megatron_dgpo.rollout.embedded import EmbeddedEngine
from megatron_dgpo.types import Sample

STEPS = 4


class Letters(Reward):
    """1 where the response has more letters than the row's answer says: always, never or now and then."""

    calls, stop_at = 0, 0
    """At this call the process gets a SIGTERM."""

    def outcomes(self, samples: Sequence[Sample]) -> list[Outcome]:
        Letters.calls += 1
        if Letters.calls == Letters.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return [Outcome(float(sum(map(str.isalpha, s.text)) > int(s.prompt.answer))) for s in samples]

    def canonical_answer(self, text: str) -> str | None:
        return str(sum(map(str.isalpha, text)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write_tokenizer(write_model(folder / "model", tied=False, num_hidden_layers=2))
    # A response has nine letters on average: -1 is always right, 99 never.
    rows = [{"prompt": f"{n}*{n + 3}=", "answer": str((-1, 99, 8, 9)[n % 4])} for n in range(22)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(folder: Path, name: str, **more: dict[str, Any]) -> Config:
    """A run of tiny steps; `more` has further settings by section."""
    raw: dict[str, dict[str, Any]] = {
        "run": {"folder": folder / name, "quiet": True},
        "model": {"path": folder / "model"},
        "parallel": {"timeout_seconds": patience()},
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


def train(rank: int, world: int, configs: Sequence[Config], stop_at: int = 0) -> None:
    """Whole runs, one after the other; asked to stop when the reward is called for the stop_at-th time."""
    from megatron_dgpo.inputs import load_data
    from megatron_dgpo.train import run

    register("letters")(Letters)  # here, so that the other tests of a session do not see it
    Letters.stop_at = stop_at
    for c in configs:
        with split(c) as groups:
            run(c, groups, load_data(c))
        assert "rollout ahead" not in [t.name for t in threading.enumerate()]


def rows(c: Config) -> list[dict[str, Any]]:
    return [without_timings(row) for row in read_metrics(c.run.folder, "train")]


def samples_of(c: Config, step: int) -> list[dict[str, Any]]:
    return read_samples(c.run.folder / "samples" / f"step_{step:06d}.jsonl")


def last_state(c: Config) -> Path:
    return sorted((c.run.folder / "checkpoints").glob("step_*/run_state.json"))[-1]


# --- dynamic sampling ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dynamic(folder: Path) -> list[Config]:
    """One run that nothing interrupts, one that ends half-way and is resumed, one on two replicas."""
    policy = {"rollout": {"dynamic_sampling": True, "oversampling": 1.25}}
    whole = settings(folder, "whole", **policy)
    half = settings(folder, "resumed", **policy, train={"steps": 2})
    resumed = settings(folder, "resumed", **policy, run={"resume": True})
    replicas = settings(folder, "replicas", **policy)
    run_ranks(train, 1, [whole, half, resumed])
    run_ranks(train, 2, [replicas])
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
    assert json.loads(last_state(whole).read_text())["draws"] == draws


def test_a_resumed_run_goes_on_with_the_next_draw(dynamic: list[Config]) -> None:
    whole, resumed, _ = dynamic
    assert rows(resumed) == rows(whole)


def test_two_replicas_train_on_the_same_groups(dynamic: list[Config]) -> None:
    whole, _, replicas = dynamic
    for mine, other in zip(rows(whole), rows(replicas), strict=True):
        assert mine.keys() == other.keys()
        for name in ("response_tokens", "rollout_rounds", "groups_drawn", "groups_all_right"):
            assert mine[name] == other[name]
        quantiles = {f"entropy_p{p}" for p in (10, 50, 90, 99)}
        assert {n for n in mine if n.startswith(("entropy_p", "hellinger"))} == quantiles  # no reference
        for name in ("grad_norm", "entropy", "reward", "log_prob_gap", *quantiles):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-7)
        assert mine["response_length_max"] == other["response_length_max"] <= 16
        assert mine["staleness"] == other["staleness"] == 0
    # Rank 0 of the two has half of each mini-batch. (A prompt may return in a later draw of a step.)
    for step in range(1, STEPS + 1):
        everyone, first = (
            {(s["prompt_id"], tuple(s["token_ids"])) for s in samples_of(c, step)} for c in (whole, replicas)
        )
        assert len(everyone) == 16 and len(first) == 8 and first < everyone


# --- a step ahead -------------------------------------------------------------------------------------

AHEAD: dict[str, dict[str, Any]] = {
    "train": {"async_steps": 1},
    "algorithm": {"name": "dgpo", "tau": 0.05, "tis_cap": 1.5},
    # One batch: all of a step's samples have weights of one version.
    "rollout": {"max_batch_size": 64},
}
"""The command line refuses this with the embedded engine, which would gain nothing by it."""


@pytest.fixture(scope="module")
def ahead(folder: Path) -> dict[str, Config]:
    """Runs a step ahead: whole, stopped in step 2 and resumed, with dynamic sampling, on two ranks."""
    usable = {**AHEAD, "rollout": {"max_batch_size": 64, "dynamic_sampling": True}}
    stopped = settings(folder, "ahead-resumed", **AHEAD, checkpoint={"every": 0})
    runs = {
        "whole": settings(folder, "ahead", **AHEAD),
        "resumed": stopped.model_copy(update={"run": stopped.run.model_copy(update={"resume": True})}),
        "dynamic": settings(folder, "ahead-dynamic", **usable, evaluation=heldout(folder)),
    }
    run_ranks(train, 1, [stopped], 2)
    assert [row["step"] for row in rows(stopped)] == [1, 2]
    run_ranks(train, 1, list(runs.values()))
    two = settings(folder, "ahead-tp", **AHEAD, parallel={"tensor_model_parallel_size": 2})
    replicas = settings(folder, "ahead-dp", **AHEAD)
    run_ranks(train, 2, [two, replicas])
    return runs | {"TP=2": two, "DP=2": replicas}


def heldout(folder: Path) -> dict[str, Any]:
    return {"data": (folder / "train.jsonl",), "every": 1, "k": 2, "greedy": False}


def versions(c: Config, step: int) -> set[int]:
    spans = [s["weight_versions"] for s in samples_of(c, step)]
    return {version for sample in spans for version, *_ in sample}


@pytest.mark.parametrize("name", ["whole", "TP=2", "DP=2"])
def test_samples_are_a_version_behind_and_say_so(ahead: dict[str, Config], name: str) -> None:
    c = ahead[name]
    assert [versions(c, step) for step in range(1, STEPS + 1)] == [{0}, {0}, {1}, {2}]
    assert [row["staleness"] for row in rows(c)] == [0, 1, 1, 1]
    first, *later = rows(c)
    assert first["log_prob_gap"] < 1e-5 and first["tis_weight"] == pytest.approx(1, abs=1e-5)
    for row in later:
        assert row["log_prob_gap"] > 1e-3  # the trainer has moved on
        assert 1e-4 < abs(row["tis_weight"] - 1) < 0.2 and 0 <= row["tis_capped"] < 0.5
        assert row["grad_norm"] > 0


def test_the_second_step_trains_on_what_the_start_weights_draw(
    ahead: dict[str, Config], folder: Path
) -> None:
    from megatron_dgpo.data import PromptCursor
    from megatron_dgpo.inputs import load_data
    from megatron_dgpo.rollout.engine import SamplingParams

    c = ahead["whole"]
    data = load_data(c)
    engine = EmbeddedEngine(c.model.path, dtype=torch.float32, device="cpu", max_batch_size=64)
    engine.update_weights(hf_tensors(c.model.path).items(), 0)
    cursor = PromptCursor(len(data.prompts), 4, seed=1, shuffle=True)
    for draw in (0, 1):
        params = SamplingParams(16, n=4, seed=1_000_003 + draw, stop_token_ids=data.stop_ids)
        groups = engine.generate([data.prompts[i] for i in cursor.indices(draw)], params)
        want = [(g.prompt.id, s.token_ids) for g in groups for s in g.samples]  # type: ignore[union-attr]
        assert [(s["prompt_id"], s["token_ids"]) for s in samples_of(c, draw + 1)] == want


def test_nothing_is_left_out_or_repeated_by_stopping_a_step_ahead(ahead: dict[str, Config]) -> None:
    def prompts(c: Config) -> list[list[str]]:
        return [[s["prompt_id"] for s in samples_of(c, step)] for step in range(1, STEPS + 1)]

    whole, resumed = ahead["whole"], ahead["resumed"]
    assert prompts(resumed) == prompts(whole)
    # What was in flight when step 2 ended is drawn again, by the weights that were there.
    assert [versions(resumed, step) for step in range(1, STEPS + 1)] == [{0}, {0}, {2}, {2}]
    assert [row["staleness"] for row in rows(resumed)] == [0, 1, 0, 1]


def test_dynamic_sampling_a_step_ahead_draws_on_with_new_weights(ahead: dict[str, Config]) -> None:
    from megatron_dgpo.data import PromptCursor
    from megatron_dgpo.inputs import load_data

    c = ahead["dynamic"]
    ids = [p.id for p in load_data(c).prompts]
    cursor, draw, several = PromptCursor(len(ids), 4, seed=1, shuffle=True), 0, 0
    for step, row in enumerate(rows(c), start=1):
        drawn = [ids[i] for d in range(draw, draw + int(row["rollout_rounds"])) for i in cursor.indices(d)]
        used = [s["prompt_id"] for s in samples_of(c, step)][:: c.train.samples_per_prompt]
        left = iter(drawn)
        assert len(used) == 4 and all(name in left for name in used)  # in the order of the draws
        draw += int(row["rollout_rounds"])
        several += row["rollout_rounds"] > 1
        assert versions(c, step) <= {max(step - 2, 0), step - 1}
        assert 0 <= row["staleness"] <= 1
    assert several and draw == json.loads(last_state(c).read_text())["draws"]
    evaluated = [row["step"] for row in read_metrics(c.run.folder, "eval")]
    assert evaluated == list(range(STEPS + 1))
