"""Pieces of decoded text: characters of several tokens, bytes that are no character."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_dgpo.observe.token_text import TokenText

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
# Bytes as the byte-level alphabet writes them; the merges end inside of characters.
SPELLING = {"space + e2 80": ("Ġ", "â", "Ģ"), "f0 9f": ("ð", "Ł"), "ab": ("a", "b")}


def byte_level() -> Any:
    """A byte-level BPE: 256 bytes, some merges of them, "<eos>"."""
    ids = {letter: i for i, letter in enumerate(BYTES)}
    merges = []
    for first, *others in SPELLING.values():
        for letter in others:
            merges.append((first, letter))
            first += letter
            ids[first] = len(ids)
    tokenizer = Tokenizer(models.BPE(ids, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


TOKENIZER = byte_level()
DECODE = partial(TOKENIZER.decode, skip_special_tokens=False)


def text_of(ids: list[int]) -> bytes:
    """What the tokens write, read off their spelling."""
    table = {letter: byte for letter, byte in zip(BYTES, _bytes_of(BYTES), strict=True)}
    return b"".join(bytes([table[x] for x in TOKENIZER.convert_ids_to_tokens(i)]) for i in ids)


def _bytes_of(letters: list[str]) -> list[int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [ord(x) if ord(x) < 256 else others[ord(x) - 256] for x in letters]


@pytest.mark.parametrize(
    "text", ["2 + 2 = 4, ab ba", "日本語 and 😀😃 –— é", "👩‍👩‍👧 \u202eabc\u202c", "a\x00b\n\n\t<script>", ""]
)
def test_a_character_is_the_piece_of_its_first_token(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert text_of(ids).decode() == text
    pieces = TokenText(DECODE).pieces(ids)
    assert "".join(pieces) == DECODE(ids) == text
    # From one place where no character is open to the next, the first token has it all.
    want, start = [""] * len(ids), 0
    for k in range(len(ids)):
        try:
            want[start] = text_of(ids[start : k + 1]).decode()
        except UnicodeDecodeError:
            continue
        start = k + 1
    assert pieces == want


def test_bytes_alone() -> None:
    ids = [BYTES.index(x) for x in "ðŁĺĢ"]  # f0 9f 98 80, a face
    assert TokenText(DECODE).pieces(ids) == ["😀", "", "", ""]
    assert TokenText(DECODE).pieces(ids[:2] + [BYTES.index("x")] + ids) == ["�", "", "x", "😀", "", "", ""]
    assert TokenText(DECODE).pieces([BYTES.index("a"), TOKENIZER.eos_token_id]) == ["a", "<eos>"]


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=60))
def test_pieces_are_the_text_whatever_the_tokens(ids: list[int]) -> None:
    pieces = TokenText(DECODE).pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == DECODE(ids)


def test_a_tokenizer_that_drops_a_leading_space() -> None:
    ids = {"▁two": 0, "▁words": 1, "s": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    decode = tokenizer.decode
    assert decode([0, 1, 2]) == "two wordss"
    assert TokenText(decode).pieces([0, 1, 2]) == ["two", " words", "s"]


def test_long_text_takes_few_calls() -> None:
    calls = 0

    def decode(ids: list[int]) -> str:
        nonlocal calls
        calls += len(ids)
        return DECODE(ids)

    ids = [BYTES.index(x) for x in "a" * 1000 + "ðŁĺĢ" + "b" * 1000]
    assert TokenText(decode).pieces(ids)[999:1005] == ["a", "😀", "", "", "", "b"]
    assert calls < 1.1 * len(ids)  # once, and the face
    calls = 0
    ids = [BYTES.index(x) for x in "ðŁĺĢa" * 100] + [BYTES.index("Ģ")] * 1000
    pieces = TokenText(decode).pieces(ids)
    assert "".join(pieces) == "😀a" * 100 + "�" * 1000
    assert calls < 40 * len(ids)  # and not the square of the length
