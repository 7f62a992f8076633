"""Algorithms: small files that replace pieces of `Algorithm`; credit is a component of each."""

from __future__ import annotations

import importlib
from typing import Any

import torch.distributed as dist

from megatron_dgpo.algorithms.advantages import group_advantages
from megatron_dgpo.algorithms.base import Algorithm
from megatron_dgpo.algorithms.batch import Metrics
from megatron_dgpo.algorithms.credit import credit_weights
from megatron_dgpo.algorithms.dapo import Dapo
from megatron_dgpo.algorithms.dgpo import Dgpo
from megatron_dgpo.algorithms.dr_grpo import DrGrpo
from megatron_dgpo.algorithms.grpo import Grpo
from megatron_dgpo.algorithms.gspo import Gspo
from megatron_dgpo.algorithms.ppo import Ppo
from megatron_dgpo.algorithms.reinforce import Reinforce

__all__ = ["ALGORITHMS", "Algorithm", "Metrics", "build_algorithm", "credit_weights", "group_advantages"]

ALGORITHMS: dict[str, type[Algorithm]] = {
    "dgpo": Dgpo,
    "grpo": Grpo,
    "dapo": Dapo,
    "dapo_dgpo": Dapo,
    "gspo": Gspo,
    "dr_grpo": DrGrpo,
    "reinforce": Reinforce,
    "ppo": Ppo,
}


def build_algorithm(
    config: Any,
    *,
    vocab_size: int,
    max_response_tokens: int = 0,
    cp_group: dist.ProcessGroup | None = None,
) -> Algorithm:
    """The algorithm that config.name names, with config's settings.

    A name with a colon, "package.module:Class", is a subclass of `Algorithm` of the user's own. For the other
    arguments see `Algorithm`. Raises ValueError for an unknown name or a setting out of range.
    """
    cls = _imported(config.name) if ":" in config.name else ALGORITHMS.get(config.name)
    if cls is None:
        raise ValueError(f"algorithm.name={config.name!r}: choose one of {', '.join(sorted(ALGORITHMS))}")
    return cls(config, vocab_size=vocab_size, max_response_tokens=max_response_tokens, cp_group=cp_group)


def _imported(path: str) -> type[Algorithm]:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"it cannot be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise ValueError(f"{name!r} in {module} is not a subclass of Algorithm")
    return found
