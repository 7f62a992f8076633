"""Which responses' credit is recorded, and what the learner knows of their tokens.

Shape suffix: T packed tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_dgpo import platform
from megatron_dgpo.algorithms import Algorithm
from megatron_dgpo.algorithms.assignment import DistributionCredit
from megatron_dgpo.algorithms.credit import credit_scores, normalized_entropy
from megatron_dgpo.config import Config
from megatron_dgpo.learner import MiniBatch
from megatron_dgpo.observe.credit_log import CreditWriter
from megatron_dgpo.observe.token_text import TokenText
from megatron_dgpo.types import PackedBatch, Sample

COLUMNS_OF = {
    "old_log_probs": "log_prob",
    "engine_log_probs": "engine_log_prob",
    "entropy": "entropy",
    "hellinger": "hellinger",
    "kl_reference": "reverse_kl",
    "credit_weights": "weight",
    "advantages": "token_advantage",
    "ratio": "ratio",
    "clipped": "clipped",
}
"""Name in a batch's features or record -> column of the log."""


@dataclass
class Chosen:
    """A sequence of a batch that is recorded."""

    sample: Sample
    first: int
    """Position of the batch at which its first response token is the target."""
    tokens: slice
    """Where its tokens are among the recorded ones of the batch."""


class CreditAudit:
    """Records the credit of some responses of every `observe.credit_every`-th step; the same calls on every
    rank. One rank of each replica writes. Raises ImportError where pyarrow is missing.

    Args:
        tokenizer: nobody else's, since the log decodes in a thread.
    """

    def __init__(self, config: Config, groups: platform.Groups, algorithm: Algorithm, tokenizer: Any) -> None:
        self._config = config
        self._groups = groups
        self._algorithm = algorithm
        self._batches: list[tuple[PackedBatch, list[Chosen]]] = []
        self._writer: CreditWriter | None = None
        c = config.observe
        if c.credit_every and groups.speaks_for_tokens:
            replica = groups.dp.rank()
            text = TokenText(partial(tokenizer.decode, skip_special_tokens=False))
            self._writer = CreditWriter(
                config.run.folder,
                replica=replica,
                pieces=text.pieces,
                max_bytes=c.credit_max_bytes if replica == 0 else None,
            )

    def choose(self, minibatches: Sequence[MiniBatch], step: int) -> None:
        """Ask the packed batches of step `step` (completed steps, when it is done) for what their updates
        find of the chosen responses; before the first update. Collective over the replicas."""
        c = self._config
        self._batches = []
        if not c.observe.credit_every or (step % c.observe.credit_every and step not in (1, c.train.steps)):
            return
        wanted = max(1, c.observe.credit_samples // c.train.samples_per_prompt)
        mine = {s.prompt.id for m in minibatches for s in m.samples}
        every = set().union(*platform.gather_objects(mine, self._groups.dp))
        names = sorted(every, key=partial(_draw, c.run.seed, step))[:wanted]
        if self._writer is None:
            return
        for minibatch in minibatches:
            for batch in minibatch.batches:
                if chosen := _chosen(batch, minibatch.samples, set(names)):
                    batch.record = {}
                    self._batches.append((batch, chosen))

    def record(self, step: int) -> None:
        """Hand what was chosen to the log, after the last update: one copy to the host a batch."""
        if self._writer is None or not self._batches:
            return
        parts = [(chosen, _on_host(batch, chosen)) for batch, chosen in self._batches]
        self._batches = []
        settings = self._settings(step)

        def rows() -> list[dict[str, Any]]:
            return [
                _row(one, {name: values[one.tokens] for name, values in found.items()}, settings)
                for chosen, found in parts
                for one in chosen
            ]

        self._writer.put(step, settings, rows)

    def close(self) -> None:
        """Wait for the log to be written."""
        if self._writer is not None:
            self._writer.close()

    def _settings(self, step: int) -> dict[str, Any]:
        """What the weights of this step are made with: `credit_log.SETTINGS`."""
        c, credit = self._config.algorithm, self._algorithm.credit
        distribution = isinstance(credit, DistributionCredit)
        return {
            "step": step,
            "algorithm": c.name,
            "credit": "distribution" if distribution else "uniform",
            "tau": credit.tau if isinstance(credit, DistributionCredit) else None,
            "kappa": credit.kappa if isinstance(credit, DistributionCredit) else None,
            "entropy_normalization": c.entropy_normalization,
            "distance": c.distance,
            "credit_timing": c.credit_timing,
            "vocab_size": self._algorithm.vocab_size,
            "clip_low": c.clip_low,
            "clip_high": c.clip_high,
            "temperature": self._config.rollout.temperature,
        }


def _draw(seed: int, step: int, prompt_id: str) -> bytes:
    """A random number that follows from its arguments, whichever replica has the prompt."""
    return hashlib.sha256(f"{seed}:{step}:{prompt_id}".encode(errors="replace")).digest()


def _chosen(batch: PackedBatch, samples: Sequence[Sample], prompts: set[str]) -> list[Chosen]:
    starts = batch.cu_seqlens.tolist()
    out, offset = [], 0
    for n, i in enumerate(batch.sample_ids):
        if i >= 0 and samples[i].prompt.id in prompts:
            shared = bool(batch.shared_prompts) and batch.shared_prompts[n] >= 0
            first = starts[n] + (0 if shared else len(samples[i].prompt.token_ids) - 1)
            end = offset + len(samples[i].token_ids)
            out.append(Chosen(samples[i], first, slice(offset, end)))
            offset = end
    return out


def _on_host(batch: PackedBatch, chosen: Sequence[Chosen]) -> dict[str, np.ndarray]:
    """Column -> float32 values of the recorded tokens, end to end."""
    known = batch.features | (batch.record or {})
    names = [name for name in COLUMNS_OF if name in known]
    places = np.concatenate([np.arange(c.first, c.first + len(c.sample.token_ids)) for c in chosen])
    index = torch.from_numpy(places).to(batch.tokens_T.device)
    values = torch.stack([known[name][index].float() for name in names]).cpu().numpy()
    return {COLUMNS_OF[name]: row for name, row in zip(names, values, strict=True)}


def _row(chosen: Chosen, found: dict[str, np.ndarray], settings: dict[str, Any]) -> dict[str, Any]:
    """A response's line of the log, but for its step and its tokens' texts."""
    s, entropy, count = chosen.sample, torch.from_numpy(found["entropy"]), len(chosen.sample.token_ids)
    row: dict[str, Any] = {
        "index": s.index,
        "prompt_id": s.prompt.id,
        "prompt": s.prompt.text,
        "response": s.text,
        "finish_reason": s.finish_reason,
        "prompt_tokens": len(s.prompt.token_ids),
        "answer": s.prompt.answer,
        "extracted": s.answer,
        "reward": s.reward,
        "reward_parts": s.reward_parts,
        "advantage": s.advantage,
        "token_id": s.token_ids,
        "version": [v.version for v in s.weight_versions for _ in range(v.start, v.end)],
        "entropy_normalized": normalized_entropy(entropy, settings["vocab_size"]).numpy(),
        "token_advantage": np.full(count, s.advantage),
        "score": None,
    }
    if settings["credit"] == "uniform":
        row["weight"] = np.ones(count)
    else:
        distance = found["hellinger" if settings["distance"] == "hellinger" else "reverse_kl"]
        gate = {name: settings[name] for name in ("vocab_size", "kappa", "entropy_normalization")}
        row["score"] = credit_scores(torch.from_numpy(distance), entropy, **gate).numpy()
    row |= {column: found.get(column, row.get(column)) for column in COLUMNS_OF.values()}
    if row["clipped"] is not None:
        row["clipped"] = row["clipped"] > 0
    return row
