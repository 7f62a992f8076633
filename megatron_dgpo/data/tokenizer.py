"""A model folder's tokenizer: loading it, prompts as token ids, and the tokens that end a response."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dgpo import jsontext
from megatron_dgpo.progress import watched

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TOKENIZE_CHUNK = 4096
"""Texts per tokenizer call: large enough to be fast, small enough to keep memory flat."""


# --- loading --------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder: tokenizer.json, vocab.json with merges.txt, or tokenizer.model.

    Raises ValueError where it cannot be loaded, naming the package that is missing if that is why.
    """
    from transformers import AutoTokenizer

    if missing := _missing_package(folder):
        raise ValueError(f"the tokenizer of {folder} cannot be loaded: {missing}")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers and tokenizers raise errors of many kinds
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the tokenizer of {folder} cannot be loaded: {said}") from error


def _missing_package(folder: Path) -> str:
    """What is to be installed to read the folder's tokenizer.model, if it is the tokenizer."""
    path = folder / "tokenizer.model"
    if (folder / "tokenizer.json").is_file() or not path.is_file():
        return ""
    with path.open("rb") as file:
        binary = (
            file.read(1) == b"\n"
        )  # a sentencepiece model begins with its first piece, tiktoken's with text
    package = "sentencepiece" if binary else "tiktoken"
    if importlib.util.find_spec(package) is not None:
        return ""
    return f"its tokenizer.model needs the package {package} (pip install {package})"


# --- prompts as token ids -------------------------------------------------------------------------------


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, add_special_tokens: bool
) -> list[tuple[int, ...]]:
    """Token ids of each text; equal texts are encoded once.

    With `add_special_tokens` they begin with what the tokenizer puts before a text, such as its BOS: once,
    also where a text begins with it already, which is counted in the log. What it puts after a text, such as
    EOS, is left out, since a response follows.
    """
    before = _put_before(tokenizer, texts) if add_special_tokens else ()
    unique = list(dict.fromkeys(texts))
    ids: dict[str, tuple[int, ...]] = {}
    begin_with_it = 0
    starts = range(0, len(unique), TOKENIZE_CHUNK)
    for start in watched(starts, "tokenizing", len(starts), f"times {TOKENIZE_CHUNK:,} texts"):
        chunk = unique[start : start + TOKENIZE_CHUNK]
        encoded = tokenizer(
            chunk,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for text, row in zip(chunk, map(tuple, encoded["input_ids"]), strict=True):
            there = bool(before) and row[: len(before)] == before
            begin_with_it += there
            ids[text] = row if there else before + row
    if begin_with_it:
        logger.warning(
            "%d of %d distinct prompts begin with %s, which the tokenizer puts before a text: it is not put "
            "there a second time",
            begin_with_it, len(unique), tokenizer.decode(list(before)),
        )  # fmt: skip
    return [ids[text] for text in texts]


def _put_before(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before a text, found with one that has none itself."""
    for probe in ("a", "0", *texts):
        bare, full = (
            tuple(tokenizer(probe, add_special_tokens=special, verbose=False)["input_ids"])
            for special in (False, True)
        )
        if len(full) == len(bare):
            return ()
        if not bare or {tokenizer.bos_token_id, tokenizer.eos_token_id}.issuperset(bare):
            continue
        for at in range(len(full) - len(bare) + 1):
            if full[at : at + len(bare)] == bare:
                return full[:at]
        raise ValueError(
            f"the tokenizer encodes {probe!r} as {list(full)} with special tokens and as {list(bare)} "
            "without them: what belongs before a prompt cannot be told"
        )
    return ()


# --- what ends a response -------------------------------------------------------------------------------


def stop_token_ids(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    more: Sequence[int | str] = (),
    *,
    vocab_size: int,
    key: str = "rollout.stop_tokens",
) -> tuple[int, ...]:
    """The ids that end a response: the tokenizer's eos_token, the eos_token_id of generation_config.json and
    of config.json (which may each list several), and `more`, ids or texts of one token. In this order, each
    once.

    Raises ValueError naming a file whose eos_token_id is no id, or what of `more` is not one token of the
    vocabulary, by `key`, the setting that it is from.
    """
    named = [] if tokenizer.eos_token_id is None else [("the tokenizer", int(tokenizer.eos_token_id))]
    for name in ("generation_config.json", "config.json"):
        named += [(name, number) for number in _eos_of(folder / name)]
    found = []
    for name, number in named:
        if number < vocab_size:
            found.append(number)
        else:  # not an error: some folders list tokens that were never added to the model
            logger.info("%s: eos_token_id %d of %s is above the vocabulary", folder, number, name)
    try:
        found += [_one_token(tokenizer, token, vocab_size) for token in more]
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return tuple(dict.fromkeys(found))


def _eos_of(path: Path) -> list[int]:
    if not path.is_file():
        return []
    try:
        read = jsontext.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from error
    given = read.get("eos_token_id") if isinstance(read, dict) else None
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if wrong := [i for i in ids if type(i) is not int or i < 0]:
        raise ValueError(f"{path}: eos_token_id has {wrong[0]!r}, which is no token id")
    return ids


def _one_token(tokenizer: PreTrainedTokenizerBase, token: int | str, vocab_size: int) -> int:
    if isinstance(token, int):
        if not 0 <= token < vocab_size:
            raise ValueError(f"{token} is no token id below the model's {vocab_size}")
        return token
    ids = tokenizer(token, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(
            f"{token!r} is {len(ids)} tokens of this model and not one; use a text that is one, or ids"
        )
    # An unknown token stands for many texts, and a normaliser may make another text of it.
    if token not in (tokenizer.convert_ids_to_tokens(ids[0]), tokenizer.decode(ids)):
        raise ValueError(f"{token!r} is no token of this model's vocabulary")
    return int(ids[0])
