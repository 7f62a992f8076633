"""Ways to share a training step over processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megatron_dgpo.config import Config


@dataclass(frozen=True)
class Split:
    """A way to share the work of one step."""

    tp: int
    pp: int
    dp: int
    sequence_parallel: bool
    max_tokens: int
    """Of a micro-batch."""
    moved: bool = False
    """Move every weight by a unit in the last place: how far mere rounding carries this step."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def apply(self, config: Config) -> Config:
        """The config of a run at this split."""
        parallel = {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "context_parallel_size": 1,
            "sequence_parallel": self.sequence_parallel,
        }
        transformer = dict(config.model.transformer)
        if self.pp != config.parallel.pipeline_model_parallel_size:  # they are for that number of stages
            for end in ("first", "last"):
                transformer.pop(f"num_layers_in_{end}_pipeline_stage", None)
        return config.model_copy(
            update={
                "parallel": config.parallel.model_copy(update=parallel),
                "model": config.model.model_copy(update={"transformer": transformer}),
            }
        )


def all_splits(max_world_size: int, large: int, small: int) -> Iterator[tuple[str, Split]]:
    """(name, split): the one to compare with, the one that measures rounding, and the others; `large` and
    `small` are token budgets."""
    yield "TP=1", Split(1, 1, 1, False, large)
    yield "TP=1 moved", Split(1, 1, 1, False, large, moved=True)
    layouts = [(tp, pp, dp) for tp, pp, dp in product((1, 2), repeat=3) if tp * pp * dp <= max_world_size]
    for tp, pp, dp in sorted(layouts, key=lambda sizes: (sizes[0] * sizes[1] * sizes[2], sizes[::-1])):
        sizes = {"TP": tp, "PP": pp, "DP": dp}
        name = " ".join(f"{key}={n}" for key, n in sizes.items() if n > 1) or "TP=1"
        if tp == 1:
            yield f"{name} small", Split(tp, pp, dp, False, small)
        else:
            yield name, Split(tp, pp, dp, False, large)
            yield f"{name} SP small", Split(tp, pp, dp, True, small)
