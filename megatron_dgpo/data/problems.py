"""Problems with gold answers, in the layouts in which data sets have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron_dgpo.config.sources import Source, parse_sources
from megatron_dgpo.data.rows import Messages, number_text, require, require_text, to_messages
from megatron_dgpo.data.sources import read_rows, where
from megatron_dgpo.progress import watched

DAPO_ANSWER_KEY = "reward_model.ground_truth"
GSM8K_PROMPT_KEY = "question"
GSM8K_MARK = "####"


@dataclass(frozen=True)
class Problem:
    """A row of a data set: chat messages that end with the question, and the gold answer as it stands."""

    id: str
    """<source's stem>:<row>, the first row being 1."""
    at: str
    """Source and row, for complaints."""
    messages: Messages
    answer: str
    data_source: str | None
    """The row's own word for where it is from."""


def read_problems(
    sources: Sequence[str | Path] | str | Path,
    *,
    prompt_key: str,
    answer_key: str | None,
    system_prompt: str = "",
    malformed: list[str] | None = None,
) -> Iterator[Problem]:
    """The rows of all sources, in order; keys may be dotted paths.

    A row without `prompt_key` whose answer is GSM8K's (a solution that ends in ``#### N``) has its prompt
    under `question`. Where a row has no `answer_key` (or that is None) but a `reward_model`, the answer is
    `reward_model.ground_truth` (the layout of DAPO-Math-17k). An answer that is a number becomes the text of
    it, without an exponent, and 7.0 is ``7``.

    Raises FileNotFoundError for a missing file, and ValueError, naming source and row, for a malformed row;
    where `malformed` is given, complaints of single rows go there instead.
    """
    keys = [
        prompt_key,
        DAPO_ANSWER_KEY,
        GSM8K_PROMPT_KEY,
        "data_source",
        *([answer_key] if answer_key else []),
    ]
    for source in parse_sources(sources):
        for number, row in watched(read_rows(source, keys, malformed), f"reading {source}", unit="rows"):
            try:
                yield _problem(row, source, number, prompt_key, answer_key, system_prompt)
            except ValueError as error:
                if malformed is None:
                    raise
                malformed.append(str(error))


def final(answer: str) -> str:
    """What of a gold answer counts: a GSM8K solution's end, which is a last line ``#### N``, or all of it."""
    last = answer.rstrip().rpartition("\n")[2].strip()
    is_marked = last.startswith(GSM8K_MARK) and last.strip("# \t") != ""
    return last.lstrip("#").strip() if is_marked and not last.startswith("#####") else answer.strip()


def _problem(
    row: dict[str, Any],
    source: Source,
    number: int,
    prompt_key: str,
    answer_key: str | None,
    system_prompt: str,
) -> Problem:
    at = where(source, number)
    key, solution = prompt_key, row.get(answer_key or "answer")
    gsm8k = isinstance(solution, str) and GSM8K_MARK in solution
    if key not in row and GSM8K_PROMPT_KEY in row and gsm8k:
        key = GSM8K_PROMPT_KEY
    messages = to_messages(require(row, key, at), key, at, system_prompt)
    answer = _answer(row, answer_key, at)
    return Problem(f"{source.stem}:{number}", at, messages, answer, _data_source(row, at))


def _data_source(row: dict[str, Any], at: str) -> str | None:
    """None where the row has none, as a table's empty cell (null or NaN) says too."""
    value = row.get("data_source")
    if value is None or value != value or value == "":
        return None
    return require_text(value, "data_source", at)


def _answer(row: dict[str, Any], answer_key: str | None, at: str) -> str:
    key = answer_key
    if key is None or (key not in row and key.split(".")[0] not in row):
        if "reward_model" in row:
            key = DAPO_ANSWER_KEY
        elif key is None:
            raise ValueError(f"{at}: answer_key is not set and the row has no 'reward_model'")
    value = require(row, key, at)
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return number_text(value, key, at)
    if not isinstance(value, str):
        raise ValueError(f"{at}: {key!r} is a {type(value).__name__}, expected a string or a number")
    return require_text(value, key, at)
