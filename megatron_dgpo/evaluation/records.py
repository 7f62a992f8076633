"""Every sample of an evaluation in a jsonl file, from which it can go on or be graded again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from megatron_dgpo import jsontext
from megatron_dgpo.types import Group, Prompt, Sample, VersionSpan

_HEADER = "evaluation"
WEIGHTS = "weights"
"""The setting that has the weights' fingerprint."""
STOPS = "stop_token_ids"
"""The setting that has what ended a response, where that was not the tokenizer's eos_token alone."""
REWARD = ("reward", "reward_source")
"""Settings that say how samples were scored."""


class SampleFile:
    """A line with the settings, then one a sample; groups are appended whole.

    Args:
        settings: what the samples depend on (JSON). A file that is there has to have the same.
        regrade: the samples will be scored again: by what, and against which gold answers, may differ. So
            may the weights and what ends a response; the file goes on naming those that drew what is there.

    Raises ValueError naming the setting that differs and what to do, or a line that is no sample.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, regrade: bool = False) -> None:
        self.path = path
        self._regrade = regrade
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
        rows = [self._row(number, line) for number, line in enumerate(complete.split(b"\n")[:-1], start=1)]
        had = rows[0].get(_HEADER) if rows else None
        if not isinstance(had, dict):
            raise ValueError(f"{self.path} does not begin with an evaluation's settings")
        for key in sorted({*had, *settings}):
            may_differ = self._regrade and key in (WEIGHTS, STOPS, *REWARD)
            if had.get(key) != settings.get(key) and not may_differ:
                raise ValueError(self._refusal(key, had.get(key), settings.get(key)))
        if self._regrade:
            drawn_with = {key: had[key] for key in (WEIGHTS, STOPS) if key in had}
            self._settings = {k: v for k, v in self._settings.items() if k != STOPS} | drawn_with
        self._rows = rows[1:]

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        """A line's object. Raises ValueError naming file and line for what no evaluation wrote."""
        try:
            row = jsontext.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.path}, line {number} is {error}") from None
        if not isinstance(row, dict) or (number > 1 and (problem := _problem(row))):
            what = "no JSON object" if not isinstance(row, dict) else f"no sample: {problem}"
            raise ValueError(f"{self.path}, line {number} is {what}")
        return row

    def _refusal(self, key: str, had: Any, given: Any) -> str:
        if key == WEIGHTS:
            return (
                f"{self.path} has samples of other weights (fingerprint {had}) than the model's folder "
                f"has now ({given}): it has changed since; give another --out"
            )
        if key in REWARD:
            return (
                f"{self.path} has samples scored with {key} = {had!r}, not {given!r}; --regrade scores them "
                "anew without drawing any, or give another --out"
            )
        return f"{self.path} has samples of {key} = {had!r}, not {given!r}; give the same, or another --out"

    @property
    def weights(self) -> str | None:
        """The fingerprint of the weights that drew the samples."""
        return self._settings.get(WEIGHTS)

    def strangers(self, prompts: Sequence[Prompt]) -> list[str]:
        """Ids of problems that the file has samples of and `prompts` lack."""
        known = {p.id for p in prompts}
        return sorted({row["prompt"] for row in self._rows} - known)

    def groups(self, prompts: Sequence[Prompt], n: int) -> dict[str, Group]:
        """The complete groups in the file, by prompt id: n samples each.

        Raises ValueError, naming the row, where its question is another than the prompt's, or its gold
        answer, by which it was scored.
        """
        by_id = {p.id: p for p in prompts}
        found: dict[str, dict[int, Sample]] = {}
        for row in self._rows:
            if row["prompt"] in by_id:
                sample = _sample(row, by_id[row["prompt"]])
                self._check_row(row, sample.prompt)
                found.setdefault(sample.prompt.id, {})[sample.index] = sample
        return {
            key: Group(by_id[key], [of[i] for i in range(n)])
            for key, of in found.items()
            if set(range(n)) <= set(of)
        }

    def _check_row(self, row: Mapping[str, Any], prompt: Prompt) -> None:
        asked, gold = row["question"], row["gold"]
        if asked != prompt.text:
            raise ValueError(
                f"{self.path} has samples of {prompt.id} as {asked[-100:]!r}, and the data has "
                f"{prompt.text[-100:]!r} there: the data, the chat template or the tokenizer has changed; "
                "give another --out"
            )
        if gold != prompt.answer and not self._regrade:
            raise ValueError(
                f"{self.path} has samples of {prompt.id} scored against {gold[-100:]!r}, and the data has "
                f"{prompt.answer[-100:]!r}; --regrade scores them anew without drawing any, or give another "
                "--out"
            )

    def append(self, group: Group) -> None:
        """Write a group's samples and flush them."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_lines(group))

    def rewrite(self, groups: Sequence[Group]) -> None:
        """Put these in place of all samples; the file is the old one until the new one is complete."""
        partial = self.path.with_name(f".{self.path.name}.partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps({_HEADER: self._settings}) + "\n")
            file.writelines(map(_lines, groups))
        os.replace(partial, self.path)


def _lines(group: Group) -> str:
    return "".join(_line(_row(s)) + "\n" for s in group.samples)


def _line(row: Mapping[str, Any]) -> str:
    """With escapes where a text of a reward function's own has half of a surrogate pair."""
    line = json.dumps(row, ensure_ascii=False)
    return line if jsontext.lone_surrogate(line) is None else json.dumps(row)


def _row(sample: Sample) -> dict[str, Any]:
    return dict(
        prompt=sample.prompt.id,
        index=sample.index,
        question=sample.prompt.text,
        gold=sample.prompt.answer,
        text=sample.text,
        answer=sample.answer,
        reward=sample.reward,
        reward_parts=sample.reward_parts,
        reward_error=sample.reward_error,
        finish_reason=sample.finish_reason,
        token_ids=list(sample.token_ids),
    )


_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("prompt", "question", "gold", "text"), (str,)),
    **dict.fromkeys(("answer", "reward_error"), (str, NoneType)),
    "finish_reason": (str,),
    "index": (int,),
    "reward": (float, int, NoneType),
    "reward_parts": (dict,),
    "token_ids": (list,),
}


def _problem(row: Mapping[str, Any]) -> str | None:
    """What keeps a row from being a sample."""
    for key, kinds in _KINDS.items():
        if key not in row:
            return f"it has no {key!r}"
        if not isinstance(row[key], kinds):
            return f"its {key!r} is {row[key]!r:.40}"
    if row["reward"] is not None and not math.isfinite(row["reward"]):
        return f"its 'reward' is {row['reward']}"
    return None


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
        answer=row["answer"],
    )
