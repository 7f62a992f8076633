"""What the ranks of test_sglang_under_way.py do; in a module of its own, which the ranks import."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from patience import patience
from sync_ranks import SMALL, Trainer, reference_log_probs, tensors
from tiny import VOCAB, config, split

from megatron_dgpo.config import SGLangConfig, SyncConfig
from megatron_dgpo.rollout.engine import SamplingParams
from megatron_dgpo.types import Prompt, Sample

TOKENS = 54
"""With the prompts, what SGLang leaves of the model's 64 positions."""
SAMPLES = 24
"""Of each of eight prompts, on each of two ranks."""
SLOTS = 64
"""Requests that a server of the tests draws at once."""
STOPS = (2, 5)
"""So that responses have different lengths, and some are always half done."""


def sync_while_drawing(
    rank: int, world: int, folder: Path, url: str, ways: tuple[Literal["retract", "abort"], ...]
) -> dict[str, dict[str, Any]]:
    """What became of samples that were being drawn when new weights came."""
    c = config(folder, tp=2)
    seen = {}
    with split(c) as groups:
        for number, way in enumerate(ways):
            sync = SyncConfig(bucket_bytes=SMALL, in_flight=way)
            # Three times what the server has slots for: the others wait at the server, among them, after a
            # retraction, those that it had begun.
            sglang = SGLangConfig(urls=(url,), max_concurrent_requests=3 * SLOTS)
            trainer = Trainer(folder, groups, c, sglang, sync)
            seeds = {1: 60 + 2 * number, 2: 61 + 2 * number}
            trainer.change_weights(seeds[1])
            trainer.sync.push(1)
            trainer.change_weights(seeds[2])
            samples, waiting = _drawn(trainer)
            trainer.engine.close()
            seen[way] = {
                "waiting": waiting,
                "complete": all(_complete(s) for s in samples),
                "spans": [len(s.weight_versions) for s in samples],
                "versions": sorted({v.version for s in samples for v in s.weight_versions}),
                "difference": _worst(samples, folder, seeds),
            }
    return seen


def _drawn(trainer: Trainer) -> tuple[list[Sample], int]:
    """Samples in the middle of which version 2 is pushed, when the first thirty are there; and how many
    waited at the server just before."""
    prompts = [
        Prompt(f"p{trainer.groups.rank}.{i}", tuple((i * k) % VOCAB for k in range(1, 4)), "", "")
        for i in range(8)
    ]
    params = SamplingParams(max_new_tokens=TOKENS, n=SAMPLES, stop_token_ids=STOPS)
    begun, done = threading.Event(), []

    def on_progress(count: int) -> None:
        done.append(count)
        if sum(done) >= 30:
            begun.set()

    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(trainer.engine.generate, prompts, params, on_progress=on_progress)
        drawing.add_done_callback(lambda _: begun.set())  # or it failed
        assert begun.wait(patience())
        if drawing.done():
            drawing.result()
        client = trainer.engine.client
        asked = client.submit(client.live[0], "/v1/loads", timeout=patience(), method="GET").result()
        trainer.sync.push(2)
        samples = [s for g in drawing.result(patience()) if g is not None for s in g.samples]
        return samples, sum(load["num_waiting_reqs"] for load in asked["loads"])


def _complete(sample: Sample) -> bool:
    ended = (
        sample.token_ids[-1] in STOPS if sample.finish_reason == "stop" else len(sample.token_ids) == TOKENS
    )
    covered = [(v.start, v.end) for v in sample.weight_versions]
    follow = [0, *(end for _, end in covered)] == [*(start for start, _ in covered), len(sample.token_ids)]
    return ended and follow and len(sample.log_probs) == len(sample.token_ids)


def _worst(samples: list[Sample], folder: Path, seeds: dict[int, int]) -> float:
    """The largest difference from transformers' log-probs under the weights that a token says drew it."""
    ids = [[*s.prompt.token_ids, *s.token_ids] for s in samples]
    longest = max(map(len, ids))
    padded = [row + [0] * (longest - len(row)) for row in ids]
    worst = 0.0
    for version, seed in seeds.items():
        reference = reference_log_probs(folder, tensors(folder, seed), padded)
        for sample, row in zip(samples, reference, strict=True):
            first = len(sample.prompt.token_ids) - 1
            for span in sample.weight_versions:
                if span.version == version:
                    ours = torch.tensor(sample.log_probs[span.start : span.end])
                    wanted = row[first + span.start : first + span.end]
                    worst = max(worst, float((ours - wanted).abs().max()))
    return worst
