"""GSPO (arXiv 2507.18071): ratio and clip of whole sequences."""

from __future__ import annotations

import torch

from megatron_dgpo.algorithms.base import Algorithm, Tokens
from megatron_dgpo.algorithms.surrogate import sequence_ratio


class Gspo(Algorithm):
    """min(s A, clip(s) A) with the length-normalised ratio s of the sequence (Eq. 5 to 7 there).

    Written token by token (GSPO-token, Eq. 13 and 14), which has the same gradient where a sequence's tokens
    share its advantage, and lets credit spread it otherwise.
    """

    def ratio(self, tokens: Tokens) -> torch.Tensor:
        return sequence_ratio(
            tokens.log_probs_T, tokens.old_T, tokens.mask_T, tokens.batch.cu_seqlens, self.cp_group
        )
