"""The samples of a step, to be read by people and tools."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_dgpo.observe import jsonl
from megatron_dgpo.types import Group


class SampleWriter:
    """Writes `samples/step_000012.jsonl` in the run's folder, one line a sample; for one rank only."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder) / "samples"

    def write(self, step: int, groups: Sequence[Group]) -> Path:
        """Write one step's samples; the file appears complete or not at all, and replaces an earlier
        one of the same step."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step_{step:06d}.jsonl"
        jsonl.write(path, _rows(step, groups))
        return path


def _rows(step: int, groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    for group in groups:
        for sample in group.samples:
            yield {
                "step": step,
                "prompt_id": sample.prompt.id,
                "index": sample.index,
                "prompt": sample.prompt.text,
                "response": sample.text,
                "answer": sample.prompt.answer,
                "reward": sample.reward,
                "reward_parts": sample.reward_parts,
                "reward_error": sample.reward_error,
                "advantage": sample.advantage,
                "finish_reason": sample.finish_reason,
                "weight_versions": [[s.version, s.start, s.end] for s in sample.weight_versions],
                "token_ids": sample.token_ids,
                "log_probs": sample.log_probs,
            }


def read_samples(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a samples file, as `SampleWriter` wrote them."""
    return jsonl.read(path)
