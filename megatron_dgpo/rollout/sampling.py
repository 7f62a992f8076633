"""Drawing one token per row and step, so that a sample does not depend on where it is drawn.

Shape suffixes: R rows of the batch (one sample each), A rows still generating, N new tokens,
V vocabulary.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_dgpo.rollout.engine import SamplingParams

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


class TokenChooser(LogitsProcessor):
    """Chooses each row's next token and makes it the only possible one.

    It runs as the last logits processor of a greedy `generate`: it picks a token from the scores by
    inverse CDF, notes token and log-probability, and raises the token's score to +inf, so that the
    argmax that follows returns it. Only one step's scores exist at a time.

    Results are in `tokens_RN` and `log_probs_RN`; columns after a row's stop token mean nothing.
    """

    def __init__(self, params: SamplingParams, uniform_RN: torch.Tensor) -> None:
        device = uniform_RN.device
        self.tokens_RN = torch.zeros(uniform_RN.shape, dtype=torch.int64, device=device)
        self.log_probs_RN = torch.zeros(uniform_RN.shape, dtype=torch.float32, device=device)
        self.active_A = torch.arange(uniform_RN.shape[0], device=device)
        self.ended_A = torch.zeros_like(self.active_A, dtype=torch.bool)
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

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        """`scores`: (A, V) float32 logits, a copy that generate hands over; changed and returned."""
        params = self._params
        scaled_AV = scores if params.temperature in (0, 1) else scores / params.temperature
        lse_A = scaled_AV.logsumexp(-1)
        if not torch.isfinite(lse_A).all():
            raise NonFiniteLogits(self.active_A[~torch.isfinite(lse_A)].tolist())
        if params.greedy:
            token_A = scaled_AV.argmax(-1)
        else:
            probs_AV = self._filters(input_ids, scaled_AV).softmax(-1, dtype=torch.float64)
            token_A = inverse_cdf(probs_AV, self._uniform_RN[self.active_A, self.step])
        token_A1 = token_A.unsqueeze(1)
        self.tokens_RN[self.active_A, self.step] = token_A
        self.log_probs_RN[self.active_A, self.step] = scaled_AV.gather(1, token_A1).squeeze(1) - lse_A
        self.ended_A |= torch.isin(token_A, self._stops)
        self.step += 1
        return scores.scatter_(1, token_A1, torch.inf)


class EndOrCompact(StoppingCriteria):
    """Ends rows that met their stop token, and the whole call when few enough rows are left.

    Finished rows go on costing a forward pass each. Once no more than `share` of the rows are
    active, the call ends; the caller drops the finished rows and starts it again from the cache.
    """

    def __init__(self, chooser: TokenChooser, share: float) -> None:
        self._chooser = chooser
        self._share = share

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        ended_A = self._chooser.ended_A
        if len(ended_A) - int(ended_A.sum()) <= self._share * len(ended_A):
            return torch.ones_like(ended_A)
        return ended_A
