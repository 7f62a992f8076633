"""A run's folder with numbers like a real one's, for whoever needs many responses at once.

Most tokens have next to no entropy and distance, as in a trained language model; a few percent carry both.
Weights are the trainer's own formula's, and the files are written by the run's own writers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_dgpo.algorithms.credit import credit_scores, credit_weights
from megatron_dgpo.observe.credit_log import CreditWriter
from megatron_dgpo.observe.metrics import MetricsWriter

VOCAB_SIZE = 151_665
_SYLLABLES = (
    "ba co di fe gu ha jo ki lu me no pra quo ri sta tu ve wi xa zo the ing tion ther angle sum".split()
)


class Words:
    """Token ids to texts: words of made-up prose with arithmetic in it; ids below 64 are marks and digits."""

    def __init__(self, seed: int, size: int = 6000) -> None:
        rng = np.random.default_rng(seed)
        marks = [
            *"0123456789",
            " +",
            " =",
            " *",
            " -",
            ".",
            ",",
            ";",
            "\n",
            ". ",
            ".\n\n",
            " (",
            ")",
            " $",
            "$",
        ]
        self.texts = {i: marks[i % len(marks)] for i in range(64)}
        for i in range(64, size):
            self.texts[i] = " " + "".join(rng.choice(_SYLLABLES, size=int(rng.integers(1, 4))))
        ranks = np.arange(1, size + 1)
        self.chance = (1 / ranks) / (1 / ranks).sum()

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self.texts[i] for i in ids]

    def draw(self, rng: np.random.Generator, tokens: int) -> list[int]:
        return rng.choice(len(self.chance), size=tokens, p=self.chance).tolist()


def response(
    rng: np.random.Generator, ids: list[int], settings: dict[str, Any], *, credit: bool = True
) -> dict[str, Any]:
    """Token columns of a row of the credit log, for one response."""
    tokens = len(ids)
    pivotal = rng.random(tokens) < 0.15
    entropy = np.where(pivotal, rng.gamma(2.0, 0.45, tokens), np.exp(rng.normal(-7.0, 2.5, tokens)))
    entropy = np.clip(entropy, 0, 11).astype(np.float32)
    distance = np.where(pivotal, rng.beta(0.6, 9.0, tokens), np.exp(rng.normal(-11.0, 2.5, tokens)))
    distance = np.clip(distance, 0, 1).astype(np.float32)
    log_prob = -np.minimum(rng.exponential(entropy + 1e-6), 20).astype(np.float32)
    row: dict[str, Any] = {
        "token_id": ids,
        "version": [settings["step"] - 1] * tokens,
        "log_prob": log_prob.tolist(),
        "engine_log_prob": (log_prob + rng.normal(0, 1e-3, tokens) * (entropy + 1e-3)).tolist(),
        "entropy": entropy.tolist(),
        "entropy_normalized": (entropy / np.log(VOCAB_SIZE)).tolist(),
        "hellinger": distance.tolist() if credit else None,
        "reverse_kl": (distance * 4 * rng.uniform(0.8, 1.2, tokens)).tolist() if credit else None,
        "score": None,
        "weight": [1.0] * tokens,
        "ratio": np.exp(rng.normal(0, 0.02, tokens) * (entropy + 1e-3)).tolist(),
        "clipped": (rng.random(tokens) < 0.002).tolist(),
    }
    if credit:
        d_T, h_T = torch.from_numpy(distance), torch.from_numpy(entropy)
        how = {"vocab_size": VOCAB_SIZE, "kappa": settings["kappa"],
               "entropy_normalization": settings["entropy_normalization"]}  # fmt: skip
        given = credit_weights(d_T, h_T, torch.tensor([0, tokens]), tau=settings["tau"], **how)
        row["weight"] = given.weights.tolist()
        row["score"] = credit_scores(d_T, h_T, **how).float().tolist()
    return row


def make_run(
    folder: Path,
    *,
    steps: int,
    groups: int = 2,
    group_size: int = 8,
    tokens: int | tuple[int, int] = (40, 400),
    tau: float = 0.05,
    kappa: float = 1.0,
    credit: bool = True,
    seed: int = 1,
    data_seed: int = 1,
) -> Words:
    """Write metrics.jsonl, advisories.jsonl and credit/ for `steps` recorded steps, ten apart.

    tokens: of each response, or the range of it. data_seed: runs with the same one have the same prompts.
    """
    rng, prompts = np.random.default_rng(seed), np.random.default_rng(data_seed)
    words = Words(data_seed)
    folder.mkdir(parents=True, exist_ok=True)
    writer = CreditWriter(folder, replica=0, pieces=words.pieces, max_bytes=None)
    for step in range(10, 10 * steps + 1, 10):
        settings = _settings(step, tau if credit else None, kappa if credit else None)
        rows = []
        for group in range(groups):
            prompt = "".join(words.pieces(words.draw(prompts, 60))).strip() + "?"
            right = rng.random(group_size) < step / (10 * steps + 10)
            sizes = [tokens] * group_size if isinstance(tokens, int) else rng.integers(*tokens, group_size)
            rows += _group(rng, words, settings, f"train.jsonl:{step + group}", prompt, right, sizes)
        while not writer.put(step, settings, lambda rows=rows: rows):  # it gives up after two seconds
            pass
    writer.close(timeout=600)
    _metrics(folder, 10 * steps, rng, credit)
    return words


def _settings(step: int, tau: float | None, kappa: float | None) -> dict[str, Any]:
    """tau None: GRPO."""
    return {
        "step": step,
        "algorithm": "grpo" if tau is None else "dgpo",
        "credit": "uniform" if tau is None else "distribution",
        "tau": tau,
        "kappa": kappa,
        "entropy_normalization": "log_vocab",
        "distance": "hellinger",
        "credit_timing": "rollout",
        "vocab_size": VOCAB_SIZE,
        "clip_low": 0.2,
        "clip_high": 0.28,
        "temperature": 1.0,
    }


def _group(
    rng: np.random.Generator,
    words: Words,
    settings: dict[str, Any],
    prompt_id: str,
    prompt: str,
    right: np.ndarray,
    sizes: Sequence[int],
) -> list[dict[str, Any]]:
    rows = []
    for index, size in enumerate(sizes):
        ids = words.draw(rng, int(size))
        advantage = float((right[index] - right.mean()) / (right.std() + 1e-6))
        rows.append(
            {
                "index": index,
                "prompt_id": prompt_id,
                "prompt": prompt,
                "prompt_tokens": 60,
                "answer": "7",
                "extracted": "7" if right[index] else None,
                "finish_reason": "stop" if rng.random() < 0.9 else "length",
                "reward": float(right[index]),
                "reward_parts": {"answered": 1.0},
                "response": "".join(words.pieces(ids)),
                "advantage": advantage,
                "token_advantage": [advantage] * len(ids),
                **response(rng, ids, settings, credit=settings["credit"] == "distribution"),
            }
        )
    return rows


def _metrics(folder: Path, steps: int, rng: np.random.Generator, credit: bool) -> None:
    with MetricsWriter(folder, tensorboard=False) as metrics:
        for step in range(1, steps + 1):
            rise = 1 - np.exp(-3 * step / steps)
            row = {
                "reward": 0.2 + 0.6 * rise + rng.normal(0, 0.03), "reward/answered": 0.9 + 0.1 * rise,
                "loss": rng.normal(0, 0.01), "entropy": 0.4 - 0.2 * rise, "truncated": 0.1,
                "response_length": 200 + 80 * rise, "response_length_max": 390.0,
                "clip_fraction": abs(rng.normal(0.002, 0.001)),
                "log_prob_gap": 1e-4 * abs(rng.normal(1, 0.2)), "grad_norm": abs(rng.normal(0.3, 0.05)),
                "tokens_per_second": 4000 + rng.normal(0, 200), "time/step": 1.8, "time/rollout": 0.9,
                "entropy_p10": 1e-5, "entropy_p50": 1e-3, "entropy_p90": 0.7, "entropy_p99": 2.0,
            }  # fmt: skip
            if credit:
                row |= {
                    "credit_effective_fraction": 0.9 - 0.25 * rise + rng.normal(0, 0.01),
                    "credit_top10_share": 0.2 + 0.2 * rise, "credit_top1_share": 0.05 + 0.1 * rise,
                    "credit_weight_max": 4 + 10 * rise, "hellinger_p50": 1e-5 * (1 + rise),
                    "hellinger_p10": 1e-7, "hellinger_p90": 0.02 * rise, "hellinger_p99": 0.2 * rise,
                }  # fmt: skip
            metrics.write(step, row)
            if step % max(1, steps // 6) == 0:
                metrics.write(step, {"avg@8": 0.3 + 0.5 * rise, "pass@8": 0.8 + 0.15 * rise}, "eval")
    advisory = {
        "step": steps // 2,
        "name": "entropy_collapse",
        "message": "The mean entropy fell to 0.21 nats.",
        "suggestion": "A larger clip_high or a smaller learning rate keeps exploration alive.",
    }
    (folder / "advisories.jsonl").write_text(json.dumps(advisory) + "\n", encoding="utf-8")
