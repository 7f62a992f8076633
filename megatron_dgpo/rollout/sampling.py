"""Drawing one token per row and step, so that a sample does not depend on where it is drawn.

Shape suffixes: R rows of the batch (one sample each), A rows still generating, N new tokens,
V vocabulary.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_dgpo.rollout.engine import SamplingParams

_UNREAD: Any = None
"""The token ids that transformers' filters are given, and none of these reads."""
_BELOW_ONE = 1 - 2.0**-40
"""Keeps uniform * total below the total when the cumulative sum is searched in float64."""


def uniforms(seed: int, prompt_id: str, index: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1), float64, fixed by (seed, prompt id, sample index) alone.

    A longer stream begins with the shorter one.
    """
    key = hashlib.blake2b(f"{seed}/{index}/{prompt_id}".encode(), digest_size=16).digest()
    stream = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return np.minimum(stream.random(count), _BELOW_ONE)


def inverse_cdf(probs_RV: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """The first token at which the cumulative probability exceeds uniform * total; (R,) int64.

    Probabilities need not sum to 1; a token of probability 0 is never chosen. Both in float64.
    """
    cdf_RV = probs_RV.cumsum(-1)
    target_R1 = uniform_R.unsqueeze(1) * cdf_RV[:, -1:]
    return torch.searchsorted(cdf_RV, target_R1, right=True).squeeze(1)


class NonFiniteLogits(RuntimeError):
    """The model's logits are not finite; `rows` are the rows of the batch concerned."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(f"non-finite logits in rows {rows}")
        self.rows = rows


class TokenChooser:
    """Chooses each row's next token from its logits by inverse CDF, and notes token and log-probability.

    Results are in `tokens_RN` and `log_probs_RN`; columns after a row's stop token mean nothing.
    """

    def __init__(self, params: SamplingParams, uniform_RN: torch.Tensor) -> None:
        device = uniform_RN.device
        self.tokens_RN = torch.zeros(uniform_RN.shape, dtype=torch.int64, device=device)
        self.log_probs_RN = torch.zeros(uniform_RN.shape, dtype=torch.float32, device=device)
        self.active_A = torch.arange(uniform_RN.shape[0], device=device)
        self.ended_A = torch.zeros_like(self.active_A, dtype=torch.bool)
        self.chosen_A = torch.zeros_like(self.active_A)
        self.step = 0
        self._uniform_RN = uniform_RN
        self._params = params
        self._stops = torch.tensor(params.stop_token_ids, dtype=torch.int64, device=device)
        self._filters = LogitsProcessorList()
        if params.top_k > 0:
            self._filters.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            self._filters.append(TopPLogitsWarper(params.top_p))
        if params.min_p > 0:
            self._filters.append(MinPLogitsWarper(params.min_p))

    def keep(self, kept: torch.Tensor) -> None:
        """Go on with these positions of the active rows only."""
        self.active_A = self.active_A[kept]
        self.ended_A = self.ended_A[kept]
        self.chosen_A = self.chosen_A[kept]

    def choose(self, logits_AV: torch.Tensor) -> None:
        """Take a step's logits, float32; what they say is in `chosen_A` and `ended_A`.

        Raises NonFiniteLogits.
        """
        params = self._params
        scaled_AV = logits_AV if params.temperature in (0, 1) else logits_AV / params.temperature
        lse_A = scaled_AV.logsumexp(-1)
        if not torch.isfinite(lse_A).all():
            raise NonFiniteLogits(self.active_A[~torch.isfinite(lse_A)].tolist())
        if params.greedy:
            self.chosen_A = scaled_AV.argmax(-1)
        else:
            probs_AV = self._filters(_UNREAD, scaled_AV).softmax(-1, dtype=torch.float64)
            self.chosen_A = inverse_cdf(probs_AV, self._uniform_RN[self.active_A, self.step])
        log_probs_A = scaled_AV.gather(1, self.chosen_A.unsqueeze(1)).squeeze(1) - lse_A
        self.tokens_RN[self.active_A, self.step] = self.chosen_A
        self.log_probs_RN[self.active_A, self.step] = log_probs_A
        self.ended_A |= torch.isin(self.chosen_A, self._stops)
        self.step += 1
