"""Text between brackets and outside of them; LaTeX's ``\\{`` and ``\\}`` are brackets as well."""

from __future__ import annotations

import re

_BRACKET = re.compile(r"\\?(?P<open>[(\[{])|\\?(?P<close>[)\]}])|\\.?", re.DOTALL)


def split(text: str, pattern: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The pieces between matches of the pattern outside all brackets, and the matches."""
    pieces: list[str] = []
    signs: list[str] = []
    depth = start = position = 0
    while position < len(text):
        match = pattern.match(text, position) if depth <= 0 else None
        if match:
            pieces.append(text[start:position])
            signs.append(match[0])
            start = position = match.end()
            continue
        bracket = _BRACKET.match(text, position)
        if bracket:
            depth += (bracket["open"] is not None) - (bracket["close"] is not None)
        position = bracket.end() if bracket else position + 1
    return [*pieces, text[start:]], signs


def is_closed_by_its_end(text: str) -> bool:
    """Whether the bracket that opens the text is closed by its last character."""
    depth = 0
    for match in _BRACKET.finditer(text):
        depth += (match["open"] is not None) - (match["close"] is not None)
        if depth == 0:
            return match.end() == len(text)
    return False
