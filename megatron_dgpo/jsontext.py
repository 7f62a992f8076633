"""JSON that came from outside: whatever is wrong with it is a ValueError of one line."""

from __future__ import annotations

import json
import sys
from typing import Any


def loads(content: bytes | str) -> Any:
    """The value of a JSON text; bytes are UTF-8, with or without a byte order mark.

    NaN, infinities and numbers beyond a double's range come back as such floats, and a lone surrogate
    (``"\\ud800"``) stays in its text: who uses the value says what is wrong with it.

    Raises ValueError, "not valid JSON (...)", "not UTF-8 (...)" or "JSON that cannot be read (...)": where
    the text is no JSON, where an integer is longer or brackets are nested deeper than Python takes, and where
    an object has a key twice with different values.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        return _DECODER.decode(text.removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not valid JSON ({error.msg}, {line}column {error.colno})") from None
    except RecursionError:
        raise ValueError("JSON that cannot be read (brackets are nested too deep)") from None
    except _DifferentValues as error:
        raise ValueError(f"JSON that cannot be read ({error})") from None
    except ValueError:  # the one other that the decoder raises
        most = sys.get_int_max_str_digits()
        raise ValueError(f"JSON that cannot be read (an integer of more than {most:,} digits)") from None


def lone_surrogate(text: str) -> int | None:
    """The place of the first half of a surrogate pair that stands alone: such a text cannot be encoded."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


class _DifferentValues(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise _DifferentValues(f"the key {key!r} occurs twice, with different values")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
