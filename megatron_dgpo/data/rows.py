"""Looks values up in rows and turns prompts into text; every complaint names the place."""

from __future__ import annotations

import logging
import math
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from megatron_dgpo.jsontext import lone_surrogate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Messages = list[dict[str, str]]


def lookup(row: dict[str, Any], key: str) -> Any:
    """The value under `key`, which may be a dotted path; KeyError where there is none."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise KeyError(key)
        value = value[part]
    return value


def require(row: dict[str, Any], key: str, at: str) -> Any:
    """`lookup` that complains with the place and the keys that are there."""
    try:
        return lookup(row, key)
    except KeyError:
        raise ValueError(f"{at}: no key {key!r}; the row has {sorted(row)}") from None


def require_text(value: Any, key: str, at: str) -> str:
    """A string that is not blank and that can be encoded; ValueError for anything else."""
    if not isinstance(value, str):
        raise ValueError(f"{at}: {key!r} is a {type(value).__name__}, expected a string")
    _require_encodable(value, repr(key), at)
    if not value.strip():
        raise ValueError(f"{at}: {key!r} is empty")
    return value


def number_text(value: int | float | Decimal, key: str, at: str) -> str:
    """A number as people write it: ``7`` for 7.0, and no exponent. ValueError where it is not finite."""
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise ValueError(f"{at}: {key!r} is {value}, expected a string or a finite number")
    if value == 0:
        return "0"
    digits = format(Decimal(repr(value)) if isinstance(value, float) else value, "f")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def _require_encodable(value: str, what: str, at: str) -> None:
    place = lone_surrogate(value)
    if place is not None:
        raise ValueError(
            f"{at}: {what} is no text: character {place + 1} is a lone surrogate, {ascii(value[place])[1:-1]}"
        )


def to_messages(value: Any, key: str, at: str, system_prompt: str) -> Messages:
    """A prompt (a string, or chat messages) as chat messages that end with the question.

    Raises ValueError where it is neither, is empty, or names a second system prompt.
    """
    if isinstance(value, str):
        messages = [{"role": "user", "content": require_text(value, key, at)}]
    elif isinstance(value, list) and value:
        messages = []
        for number, message in enumerate(value, start=1):
            if not isinstance(message, dict):
                raise ValueError(
                    f"{at}: message {number} of {key!r} is a {type(message).__name__}, expected an object"
                )
            for part in ("role", "content"):
                if not isinstance(message.get(part), str):
                    raise ValueError(f"{at}: message {number} of {key!r} has no string {part!r}")
                _require_encodable(message[part], f"{part!r} of message {number} of {key!r}", at)
            messages.append({"role": message["role"], "content": message["content"]})
    elif isinstance(value, list):
        raise ValueError(f"{at}: {key!r} is empty")
    else:
        raise ValueError(
            f"{at}: {key!r} is a {type(value).__name__}, expected a string or a list of chat messages"
        )
    if not messages[-1]["content"].strip():
        raise ValueError(f"{at}: {key!r} is empty")
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{at}: {key!r} ends with an assistant message; there is nothing to answer")
    if system_prompt:
        if messages[0]["role"] == "system":
            raise ValueError(f"{at}: {key!r} has a system message of its own; leave system_prompt empty")
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


class Renderer:
    """Turns chat messages into the text that the policy is given."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, apply_chat_template: bool) -> None:
        if apply_chat_template and not tokenizer.chat_template:
            raise ValueError(
                "apply_chat_template is true but the tokenizer has no chat template; "
                "give it one or set apply_chat_template to false"
            )
        self._tokenizer = tokenizer
        self._template = apply_chat_template
        self._special = tuple(tokenizer.all_special_tokens)
        # A file in DAPO's layout repeats each problem a hundred times; a template is slow.
        self._known: dict[tuple[str, ...], str] = {}

    def __call__(self, messages: Messages, at: str) -> str:
        key = tuple(part for message in messages for part in (message["role"], message["content"]))
        if key not in self._known:
            self._known[key] = self._render(messages, at)
        return self._known[key]

    def _render(self, messages: Messages, at: str) -> str:
        if self._template:
            self._warn_of_rendered(messages, at)
            try:
                text = self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            except Exception as error:  # a template raises errors of its own making
                raise ValueError(f"{at}: the chat template refuses the prompt: {error}") from error
            assert isinstance(text, str)
            return text
        if sum(message["role"] != "system" for message in messages) > 1:
            raise ValueError(f"{at}: a prompt of several turns needs apply_chat_template")
        return "\n\n".join(message["content"] for message in messages)

    def _warn_of_rendered(self, messages: Messages, at: str) -> None:
        """Once, of a text that looks as if it had been through a template already."""
        if self._special and any(m["content"].startswith(self._special) for m in messages):
            logger.warning(
                "%s: a message begins with a special token and goes through the chat template all the "
                "same; where prompts are rendered beforehand, apply_chat_template has to be false",
                at,
            )
            self._special = ()
