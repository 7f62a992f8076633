"""A response cut into sentences and into steps of arithmetic, each a run of whole tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nltk.tokenize.punkt import PunktSentenceTokenizer

_SEPARATOR = re.compile(r"[;\n](?:[^\S\n]*[;\n])*")


@cache
def _punkt() -> PunktSentenceTokenizer:
    from nltk.tokenize.punkt import PunktSentenceTokenizer  # brings scipy with it, two seconds of work

    return PunktSentenceTokenizer()  # its own defaults: nothing to download


def sentences(pieces: Sequence[str]) -> list[int]:
    """Tokens in each sentence (nltk's Punkt), in order; together they are all of them.

    A token that reaches over a boundary belongs to the sentence of its first visible character.
    """
    text = "".join(pieces)
    return _token_counts(pieces, text, (start for start, _ in _punkt().span_tokenize(text)))


def arithmetic(pieces: Sequence[str]) -> list[int]:
    """Tokens in each of the steps that line ends and ";" separate; a separator ends its step."""
    text = "".join(pieces)
    return _token_counts(pieces, text, (match.end() for match in _SEPARATOR.finditer(text)))


def _token_counts(pieces: Sequence[str], text: str, starts: Iterable[int]) -> list[int]:
    """starts: where parts begin in the text, ascending; what stands before the first belongs to it."""
    places, place = [], 0
    for piece in pieces:
        blank = len(piece) - len(piece.lstrip())
        places.append(place + (blank if blank < len(piece) else 0))
        place += len(piece)
    ends: list[int] = []
    token = 0
    for start in starts:
        while token < len(places) and places[token] < start:
            token += 1
        if 0 < token < len(places) and (not ends or ends[-1] < token) and text[:start].strip():
            ends.append(token)
    ends += [len(pieces)] if pieces else []
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
