"""Every sample of an evaluation in a jsonl file, from which it can go on or be graded again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dgpo.types import Group, Prompt, Sample, VersionSpan

_HEADER = "evaluation"


class SampleFile:
    """A line with the settings, then one a sample; groups are appended whole.

    Args:
        settings: what the samples depend on (JSON). A file that is there has to have the same.

    Raises ValueError naming the setting that differs, or a line that is no sample.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._settings = dict(settings)
        self._rows: list[dict[str, Any]] = []
        if path.exists() and path.stat().st_size:
            self._read(settings)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({_HEADER: self._settings}) + "\n", encoding="utf-8")

    def _read(self, settings: Mapping[str, Any]) -> None:
        text = self.path.read_bytes()
        complete = text[: text.rfind(b"\n") + 1]
        if complete != text:  # a run was killed while it wrote
            with self.path.open("rb+") as file:
                file.truncate(len(complete))
        lines = complete.decode().splitlines()
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number} is no JSON ({error})") from error
        had = rows[0].get(_HEADER) if rows and isinstance(rows[0], dict) else None
        if had is None:
            raise ValueError(f"{self.path} does not begin with an evaluation's settings")
        for key in sorted({*had, *settings}):
            if had.get(key) != settings.get(key):
                raise ValueError(
                    f"{self.path} has samples of {key} = {had.get(key)!r}, not {settings.get(key)!r}; "
                    "give the same, or another file"
                )
        self._rows = rows[1:]

    def groups(self, prompts: Sequence[Prompt], n: int) -> dict[str, Group]:
        """The complete groups in the file, by prompt id: n samples each."""
        by_id = {p.id: p for p in prompts}
        found: dict[str, dict[int, Sample]] = {}
        for row in self._rows:
            if row["prompt"] in by_id:
                sample = _sample(row, by_id[row["prompt"]])
                found.setdefault(sample.prompt.id, {})[sample.index] = sample
        return {
            key: Group(by_id[key], [of[i] for i in range(n)])
            for key, of in found.items()
            if set(range(n)) <= set(of)
        }

    def append(self, group: Group, answers: Sequence[str | None]) -> None:
        """Write a group's samples and flush them; `answers`: canonical, one a sample."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_lines(group, answers))

    def rewrite(self, groups: Sequence[tuple[Group, Sequence[str | None]]]) -> None:
        """Put these in place of all samples; the file is the old one until the new one is complete."""
        partial = self.path.with_name(f".{self.path.name}.partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps({_HEADER: self._settings}) + "\n")
            file.writelines(_lines(group, answers) for group, answers in groups)
        os.replace(partial, self.path)


def _lines(group: Group, answers: Sequence[str | None]) -> str:
    rows = [_row(s, a) for s, a in zip(group.samples, answers, strict=True)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _row(sample: Sample, answer: str | None) -> dict[str, Any]:
    return dict(
        prompt=sample.prompt.id,
        index=sample.index,
        question=sample.prompt.text,
        gold=sample.prompt.answer,
        text=sample.text,
        answer=answer,
        reward=sample.reward,
        reward_parts=sample.reward_parts,
        reward_error=sample.reward_error,
        finish_reason=sample.finish_reason,
        token_ids=list(sample.token_ids),
    )


def _sample(row: Mapping[str, Any], prompt: Prompt) -> Sample:
    return Sample(
        prompt=prompt,
        index=row["index"],
        token_ids=row["token_ids"],
        log_probs=[],
        finish_reason=row["finish_reason"],
        weight_versions=(VersionSpan(0, 0, len(row["token_ids"])),),
        text=row["text"],
        reward=row["reward"],
        reward_parts=row["reward_parts"],
        reward_error=row["reward_error"],
    )
