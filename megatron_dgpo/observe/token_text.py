"""The text of each token of a response.

Token by token, text is not what the tokenizer says of the whole: a character may take several tokens, and
bytes that are no character become U+FFFD, one for each or one for several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
_BROKEN = "\ufffd"
_REACH = 4
"""Tokens to either side of the middle that a cut is looked for at: a character has at most four bytes."""


class TokenText:
    """Splits decoded text into its tokens' pieces; remembers each token's own text.

    Args:
        decode: token ids to text, special tokens included.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._known: dict[int, str] = {}

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One piece a token; end to end they are `decode(ids)`. What several tokens write together, such as
        a character, is the first one's, and the others have ""."""
        out = [self._own(i) for i in ids]
        start = 0
        while start < len(out):
            end = start
            while end < len(out) and _BROKEN in out[end]:
                end += 1
            if end > start:
                run = list(ids[start:end])
                out[start:end] = self._split(run, self._decode(run))
            start = end + 1
        whole = self._decode(list(ids))
        return out if "".join(out) == whole else self._split(list(ids), whole)

    def _own(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._decode([token])
        return self._known[token]

    def _split(self, ids: list[int], text: str) -> list[str]:
        """By halves, each cut near the middle where the parts' texts make the whole (or all of it but for
        spaces, which some tokenizers leave out at the start of a text)."""
        middle = len(ids) // 2
        near = range(max(1, middle - _REACH), min(len(ids), middle + _REACH + 1))
        for cut in sorted(near, key=lambda at: abs(at - middle)):
            left, right = self._decode(ids[:cut]), self._decode(ids[cut:])
            gap = text[len(left) : len(text) - len(right)]
            if len(left) + len(gap) + len(right) == len(text) and left + gap + right == text:
                if not gap.strip():
                    first, *others = self._split(ids[cut:], right)
                    return [*self._split(ids[:cut], left), gap + first, *others]
        return [text] + [""] * (len(ids) - 1)
