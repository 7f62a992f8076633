"""Algorithms: small files that compose advantages, credit and surrogate."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_dgpo.algorithms.advantages import group_advantages
from megatron_dgpo.algorithms.base import Algorithm, Metrics
from megatron_dgpo.algorithms.credit import credit_weights
from megatron_dgpo.algorithms.dgpo import Dgpo
from megatron_dgpo.algorithms.grpo import Grpo

__all__ = ["ALGORITHMS", "Algorithm", "Metrics", "build_algorithm", "credit_weights", "group_advantages"]

ALGORITHMS: dict[str, type[Dgpo] | type[Grpo]] = {"dgpo": Dgpo, "grpo": Grpo}


def build_algorithm(config: Any, *, vocab_size: int, cp_group: dist.ProcessGroup | None = None) -> Algorithm:
    """The algorithm that config.name names, with config's settings (`DgpoSettings`, `GrpoSettings`).

    vocab_size: the true size, for the normalised entropy. Raises ValueError for an unknown name.
    """
    if config.name not in ALGORITHMS:
        raise ValueError(f"algorithm.name={config.name!r}: choose one of {', '.join(sorted(ALGORITHMS))}")
    return ALGORITHMS[config.name](config, vocab_size=vocab_size, cp_group=cp_group)
