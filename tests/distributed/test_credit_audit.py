"""What real runs record of their tokens, against transformers and the formulas written out in numpy."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spawn import run_ranks
from test_training import settings, train
from tiny import VOCAB, hf_model, write_model, write_tokenizer

from megatron_dgpo.audit import _draw
from megatron_dgpo.config import Config
from megatron_dgpo.observe import credit_log
from megatron_dgpo.observe.samples import read_samples

TEMPERATURE, TAU, KAPPA, CLIP = 0.8, 0.01, 0.5, {"clip_low": 0.005, "clip_high": 0.008}
LEFT_OVER = "credit/step_000009-replica1.parquet"
"""Of an earlier life of a run's folder."""

Row = dict[str, Any]


def make(folder: Path, name: str, *, steps: int, algorithm: dict[str, Any], **more: Any) -> Config:
    """One mini-batch a step, trained on twice; two of the four groups are recorded at every step."""
    train = {"steps": steps, "prompts_per_minibatch": 4, "epochs_per_rollout": 2, **more.pop("train", {})}
    sections: dict[str, Any] = {
        "algorithm": {**CLIP, **algorithm},
        "rollout": {"temperature": TEMPERATURE},
        "train": train,
        "checkpoint": {"every": 0, "export_hf": True, "keep_best": False},
        "observe": {"credit_every": 1, "credit_samples": 8, "samples_per_step": 100},
    }
    for section, values in more.items():
        sections[section] = {**sections.get(section, {}), **values}
    return settings(folder, name, **sections)


def work(rank: int, world: int, configs: Sequence[Config]) -> None:
    """The runs, each in a folder with files of later steps: of another run, or of its own when resumed."""
    for c in configs:
        if rank == 0:
            (c.run.folder / LEFT_OVER).parent.mkdir(parents=True, exist_ok=True)
            (c.run.folder / LEFT_OVER).touch()
            (c.run.folder / (LEFT_OVER + ".partial")).touch()
        train(rank, world, [c])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    folder = tmp_path_factory.mktemp("audit")
    write_tokenizer(write_model(folder / "model", tied=False, num_hidden_layers=2))
    rows = [{"prompt": f"{n}*{n + 3}=", "answer": str((-1, 99, 8, 9)[n % 4])} for n in range(22)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dgpo = {"name": "dgpo", "tau": TAU, "kappa": KAPPA}
    schedule = {"tau_schedule": "linear", "tau_final": TAU / 2}
    critic = {"critic_lr": 1e-3, "critic_warmup_steps": 1}
    configs = [
        make(folder, "dgpo", steps=2, algorithm=dgpo),
        make(folder, "first update", steps=1, algorithm=dgpo, train={"epochs_per_rollout": 1}),
        make(folder, "first step", steps=1, algorithm=dgpo),
        make(folder, "at update", steps=1, algorithm={**dgpo, "credit_timing": "update"}),
        make(folder, "reverse kl", steps=2, algorithm={**dgpo, "distance": "reverse_kl", **schedule}),
        make(folder, "grpo", steps=1, algorithm={"name": "grpo"}),
        make(folder, "dapo", steps=2, algorithm={"name": "dapo_dgpo", "tau": "auto"}),
        make(folder, "ppo", steps=2, algorithm={"name": "ppo", **critic}, train={"epochs_per_rollout": 1}),
        make(folder, "dgpo", steps=3, algorithm=dgpo, run={"resume": True}, observe={"credit_every": 2}),
        make(folder, "off", steps=1, algorithm=dgpo, observe={"credit_every": 0}),
    ]
    run_ranks(work, 1, configs)
    out = {c.run.folder.name: c for c in configs}
    two = {
        "TP=2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "PP=2": {"pipeline_model_parallel_size": 2},
        "DP=2": {},
    }
    splits = {name: make(folder, name, steps=2, algorithm=dgpo, parallel=p) for name, p in two.items()}
    run_ranks(work, 2, list(splits.values()))
    return out | splits


def log_of(c: Config, step: int) -> list[Row]:
    """The step's rows, and its settings in each."""
    found = []
    for path in credit_log.files(c.run.folder):
        if credit_log.step_of(path) == step:
            settings = credit_log.settings(credit_log.read(path))
            found += [row | {"settings": settings} for row in credit_log.rows(c.run.folder, [step])]
            break
    return sorted(found, key=lambda row: (row["prompt_id"], row["index"]))


class Judge:
    """Log-probs of whole distributions, in float64, behind a model folder's float32 logits."""

    def __init__(self, folder: Path) -> None:
        self.model = hf_model(folder)

    def log_probs(self, c: Config, row: Row) -> np.ndarray:
        """(tokens, V) at the sampling temperature."""
        from megatron_dgpo.inputs import load_data

        prompt = next(p.token_ids for p in load_data(c).prompts if p.id == row["prompt_id"])
        assert len(prompt) == row["prompt_tokens"]
        ids = torch.tensor([[*prompt, *row["token_id"]]])
        with torch.no_grad():
            logits = self.model(ids).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits.double() / TEMPERATURE, -1).numpy()


def at(log_probs: np.ndarray, row: Row) -> np.ndarray:
    return log_probs[np.arange(len(row["token_id"])), row["token_id"]]


def entropy(log_probs: np.ndarray) -> np.ndarray:
    return -(np.exp(log_probs) * log_probs).sum(-1)


def hellinger(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Eq. 2 of arXiv 2605.03327."""
    return ((np.exp(p / 2) - np.exp(q / 2)) ** 2).sum(-1) / 2


def weights(row: Row, tau: float, distance: str = "hellinger") -> tuple[np.ndarray, np.ndarray]:
    """(scores, weights) by Eq. 6 from what the row says of distance and entropy."""
    gate = np.clip(np.array(row["entropy"], np.float64) / math.log(VOCAB), 0, 1)
    scores = np.array(row[distance], np.float64) * gate ** row["settings"]["kappa"]
    e = np.exp((scores - scores.max()) / tau)
    return scores, len(e) * e / e.sum()


def check_weights(rows: list[Row], tau: float, distance: str = "hellinger") -> None:
    for row in rows:
        scores, wanted = weights(row, tau, distance)
        np.testing.assert_allclose(row["score"], scores, rtol=1e-6)
        np.testing.assert_allclose(row["weight"], wanted, rtol=1e-5)
    spread = np.concatenate([row["weight"] for row in rows])
    assert spread.max() - spread.min() > 0.1


def checked_clips(rows: list[Row]) -> list[bool]:
    """The clip takes the gradient away where the ratio has gone the way that the advantage pulls."""
    found = []
    for row in rows:
        ratio, advantage = np.array(row["ratio"]), np.array(row["token_advantage"])
        low = (ratio < 1 - CLIP["clip_low"]) & (advantage < 0)
        assert row["clipped"] == (low | (ratio > 1 + CLIP["clip_high"]) & (advantage > 0)).tolist()
        found += row["clipped"]
    return found


def test_rows_are_the_samples_of_whole_groups(runs: dict[str, Config]) -> None:
    c = runs["dgpo"]
    chosen = []
    for step in (1, 2):
        samples = read_samples(c.run.folder / "samples" / f"step_{step:06d}.jsonl")
        rows = log_of(c, step)
        names = {row["prompt_id"] for row in rows}
        assert len(names) == 2
        wanted = sorted(
            [s for s in samples if s["prompt_id"] in names], key=lambda s: (s["prompt_id"], s["index"])
        )
        assert len(rows) == len(wanted) == 8
        for row, sample in zip(rows, wanted, strict=True):
            for name in ("step", "index", "prompt", "response", "finish_reason", "answer", "reward"):
                assert row[name] == sample[name], name
            assert row["token_id"] == sample["token_ids"]
            assert row["advantage"] == pytest.approx(sample["advantage"], rel=1e-6)
            assert row["token_advantage"] == [row["advantage"]] * len(row["token_id"])
            assert row["version"] == [step - 1] * len(row["token_id"])
            np.testing.assert_allclose(row["engine_log_prob"], sample["log_probs"], rtol=1e-6)
            assert "".join(row["token_text"]).replace("<eos>", "").replace("<pad>", "") == row[
                "response"
            ].replace("<pad>", "")
        chosen.append([s["prompt_id"] for s in samples if s["prompt_id"] in names])
    assert chosen[0] != chosen[1]
    assert rows[0]["settings"] == {
        **{"format": 1, "step": 2, "algorithm": "dgpo", "credit": "distribution", "tau": TAU},
        **{"kappa": KAPPA, "entropy_normalization": "log_vocab", "distance": "hellinger"},
        **{"credit_timing": "rollout", "vocab_size": VOCAB, **CLIP, "temperature": TEMPERATURE},
    }


def test_every_step_and_seed_draws_other_groups() -> None:
    names = [f"train:{i}" for i in range(12)]

    def first(seed: int, step: int) -> str:
        return min(names, key=lambda name: _draw(seed, step, name))

    found = [(seed, step) for seed in range(20) for step in range(1, 21)]
    counts = Counter(first(*place) for place in found)
    assert set(counts) == set(names) and max(counts.values()) < 3 * len(found) / len(names)
    assert len({first(1, step) for step in range(20)}) > 5 and len({first(seed, 1) for seed in range(20)}) > 5


def test_statistics_are_those_of_transformers(runs: dict[str, Config]) -> None:
    c = runs["dgpo"]
    start, later = Judge(c.model.path), Judge(runs["first step"].run.folder / "hf")
    for step, judge in ((1, start), (2, later)):
        for row in log_of(c, step):
            p, q = judge.log_probs(c, row), start.log_probs(c, row)
            np.testing.assert_allclose(row["log_prob"], at(p, row), atol=1e-5)
            np.testing.assert_allclose(row["engine_log_prob"], at(p, row), atol=1e-5)
            np.testing.assert_allclose(row["entropy"], entropy(p), atol=1e-5)
            np.testing.assert_allclose(row["entropy_normalized"], entropy(p) / math.log(VOCAB), atol=1e-5)
            np.testing.assert_allclose(row["hellinger"], hellinger(p, q), atol=1e-6, rtol=1e-3)
            reverse_kl = (np.exp(p) * (p - q)).sum(-1)
            np.testing.assert_allclose(row["reverse_kl"], reverse_kl, atol=1e-6, rtol=1e-3)
            assert step == 1 or min(row["hellinger"]) > 1e-5


def test_weights_follow_from_what_is_recorded(runs: dict[str, Config]) -> None:
    c = runs["dgpo"]
    check_weights(log_of(c, 2), TAU)
    assert all(row["weight"] == [1.0] * len(row["weight"]) for row in log_of(c, 1))
    rows = log_of(runs["reverse kl"], 2)
    assert rows[0]["settings"]["tau"] == pytest.approx(TAU / 2)  # where the schedule ends
    check_weights(rows, TAU / 2, "reverse_kl")
    rows = log_of(runs["dapo"], 2)
    tau = rows[0]["settings"]["tau"]
    assert isinstance(tau, float) and rows[0]["settings"]["clip_high"] == CLIP["clip_high"]
    check_weights(rows, tau)


def test_ratio_and_clip_are_those_of_the_last_update(runs: dict[str, Config]) -> None:
    c, judge = runs["dgpo"], Judge(runs["first update"].run.folder / "hf")
    for row in log_of(c, 1):
        ratio = np.exp(at(judge.log_probs(c, row), row) - np.array(row["log_prob"]))
        np.testing.assert_allclose(row["ratio"], ratio, rtol=1e-5)
    clipped = [*checked_clips(log_of(c, 1)), *checked_clips(log_of(c, 2))]
    assert 0 < sum(clipped) < len(clipped)
    for row in log_of(runs["first update"], 1):
        assert row["ratio"] == [pytest.approx(1, abs=1e-6)] * len(row["ratio"])


def test_credit_taken_at_updates_is_that_of_the_last(runs: dict[str, Config]) -> None:
    c = runs["at update"]
    start, last = Judge(c.model.path), Judge(runs["first update"].run.folder / "hf")
    rows = log_of(c, 1)
    for row in rows:
        p, q = last.log_probs(c, row), start.log_probs(c, row)
        np.testing.assert_allclose(row["entropy"], entropy(p), atol=1e-5)
        np.testing.assert_allclose(row["hellinger"], hellinger(p, q), atol=1e-6, rtol=1e-3)
        np.testing.assert_allclose(row["log_prob"], at(q, row), atol=1e-5)
    check_weights(rows, TAU)


def test_what_an_algorithm_does_not_have_is_null(runs: dict[str, Config]) -> None:
    for row in log_of(runs["grpo"], 1):
        assert [row[name] for name in ("hellinger", "reverse_kl", "score")] == [None] * 3
        assert row["weight"] == [1.0] * len(row["token_id"])
        assert row["settings"]["credit"] == "uniform" and row["settings"]["tau"] is None
    checked_clips(log_of(runs["grpo"], 1))
    for row in log_of(runs["ppo"], 1):
        assert row["ratio"] is None and row["clipped"] is None
    advantages = [np.array(row["token_advantage"]) for row in log_of(runs["ppo"], 2)]
    assert all(row["ratio"] is not None for row in log_of(runs["ppo"], 2))
    assert max(a.std() for a in advantages) > 1e-3


@pytest.mark.parametrize("name", ["TP=2", "PP=2", "DP=2"])
def test_the_split_does_not_matter(runs: dict[str, Config], name: str) -> None:
    replicas = [path.stem[-8:] for path in credit_log.files(runs[name].run.folder)][:-1]
    assert set(replicas) == ({"replica0", "replica1"} if name == "DP=2" else {"replica0"})
    for step in (1, 2):
        wanted, got = log_of(runs["dgpo"], step), log_of(runs[name], step)
        assert len(wanted) == len(got) == 8
        for a, b in zip(wanted, got, strict=True):
            for column in credit_log.COLUMNS:
                if isinstance(a[column], list) and isinstance(a[column][0], float):
                    np.testing.assert_allclose(b[column], a[column], rtol=1e-3, atol=1e-5, err_msg=column)
                else:
                    assert a[column] == b[column], column
            np.testing.assert_allclose(b["weight"], a["weight"], rtol=1e-4)


def test_a_resumed_run_goes_on_with_its_log(runs: dict[str, Config]) -> None:
    c = runs["dgpo"]
    # Step 3 is the last, and so is recorded with credit_every = 2 as well.
    assert [credit_log.step_of(path) for path in credit_log.files(c.run.folder)] == [1, 2, 3]
    assert len(log_of(c, 3)) == 8
    assert not (c.run.folder / LEFT_OVER).exists()
    assert not list((c.run.folder / "credit").glob("*.partial"))


def test_a_fresh_start_removes_nothing_of_anothers(runs: dict[str, Config]) -> None:
    assert (runs["grpo"].run.folder / LEFT_OVER).exists()
    assert [path.name for path in credit_log.files(runs["off"].run.folder)] == [Path(LEFT_OVER).name]
