"""Finds the final answer in a text and writes equal answers alike; pure string work, in linear time."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_dgpo import jsontext
from megatron_dgpo.rewards.answers.spelling import without_markdown

BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])")
BARE = re.compile(r"-?\d+(?:[.,/]\d+)*|-?\\[dt]?frac ?(?:\{[^{}]*\} ?\{[^{}]*\}|\d\d)|[A-Z](?![A-Za-z])")
"""What a box without braces may hold: a number, a fraction, a capital."""
HASHES = re.compile(r"####(?!#)[ \t]*(.*)")
NUMBER_LINE = re.compile(r"^####(?!#)[ \t]*([-+]?\$?\d[\d,./]*%?)[ \t]*$", re.MULTILINE)
TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
ANSWER_LABEL = re.compile(
    r"[\s>#*_`+•\\\[($-]{0,40}(?:\\(?:text|textbf|mathbf|mathrm|underline|emph)\s?\{\s?)?[*_]{0,3}"
    r"(?:(?:so|thus|hence|therefore|the|my|our|your|final|correct|short|numerical|right),?\s)*"
    r"(?:final\s)?answer(?:s|\(s\))?(?:\s(?:is|choice))?\s?[*_`}]*\s?"
    r"(?:[:=]|[-–—](?=\s)|$)(?P<rest>.*)",
    re.IGNORECASE,
)
CHINESE_LABEL = re.compile(
    r"[\s>#*_`]{0,20}(?:因此|所以)?[,，]?(?:最终|正确)?答案(?:是|为)?[:：]?(?P<rest>.*)"
)
CONTINUED = re.compile(
    r"^[ \t>#*]{0,10}(?:(?:next |new )?(?:question|problem|exercise)(?: ?#?\d+)?|q\d*|user|human|instruction)"
    r"[*]{0,2} ?[:.](?!\d)",
    re.IGNORECASE | re.MULTILINE,
)
END_OF_TURN = re.compile(
    r"<\|(?:im_end|endoftext|eot_id|end_of_text|end|im_start|start_header_id)\|>|</s>|<end_of_turn>|<eos>"
)
GLUE = re.compile(r"\$|\\(?:quad|qquad|text|mbox|[()\[\],; ])|[{}]|\s")
CONNECTIVE = re.compile(r"(?:,?(?:and|or)?)(?:[A-Za-z](?:_\d)?=)?")
HEADINGS = frozenset(
    "step check checking conclusion verification verify explanation explain remark remarks solution result"
    " note notes summary reasoning analysis part case answer final question problem example proof".split()
)
LABELLED = re.compile(r"^[^\n]{0,100}?(?:answer|答案)[^\n]{0,2000}", re.IGNORECASE | re.MULTILINE)
SENTENCE_LABEL = re.compile(
    r"(?<=[.!?])[ \t]{1,4}[*_]{0,3}(?P<label>The (?:final )?answer|Final [Aa]nswer|Answer)[*_]{0,3}:"
    r"[*_]{0,3}(?P<rest>[^\n]+)"
)
LABELLED_END = re.compile(r"(?:A|Answer|Final answer):[ \t]*(\S.*)", re.IGNORECASE)
MAX_GAP = 60
"""Between two boxes that are a list."""


@dataclass(frozen=True)
class Announced:
    """An answer that a response marks as its final one."""

    at: int
    text: str
    """As it is written; "" where the mark takes back what was announced before."""
    kind: str
    """box, tag, line or hashes."""
    end: int = 0


def gold_answer(text: str) -> str:
    """The gold answer of a data row: what its last box, tags or last line ``####`` hold, or all of it."""
    found = [
        one
        for one in (_last_box(text), _last_tag(text, True), _last_hashes(text), _last_labelled_line(text))
        if one is not None and one.text
    ]
    if not found:
        return text.strip()
    return _latest(found).text


def explicit_answer(text: str, finished: bool = True) -> str | None:
    r"""What the last mark in a response announces, as it is written; None where nothing is announced.

    Marks are ``\boxed{...}`` and its kin, ``<answer>...</answer>``, ``#### ...`` as the last line, and a line
    that begins with ``Answer:``. A last box that is empty or never closed announces nothing, and takes back
    what came before. Words behind ``Answer:`` or ``####`` do not beat a box.
    """
    found = announced(text, finished)
    return found.text if found is not None and found.text else None


def announced(text: str, finished: bool = True) -> Announced | None:
    """`explicit_answer` with its place in `own_part` of the text; an empty one where it was taken back."""
    text = own_part(text)
    found = [_last_box(text), _last_tag(text, finished), _last_hashes(text), _last_line(text)]
    sentence = _last_sentence(text)
    if sentence is not None and (sentence.kind == "line" or found[:2] == [None, None]):
        found.append(sentence)
    kept = [one for one in found if one is not None]
    return _latest(kept) if kept else _early_hashes(text)


def own_part(text: str) -> str:
    """The response without what follows its own end: another turn, or a next question with its answer."""
    thought = text.rfind("</think>")
    if thought >= 0 and text[thought + len("</think>") :].strip():
        text = text[thought + len("</think>") :]
    end = END_OF_TURN.search(text)
    if end and text[: end.start()].strip():
        text = text[: end.start()]
    for match in CONTINUED.finditer(text):
        before = text[: match.start()]
        if before.strip() and any(
            one is not None and one.text
            for one in (_last_box(before), _last_hashes(before), _last_line(before))
        ):
            return before
        break  # the others come later, and would cut what this one should have
    return text


def _latest(found: list[Announced]) -> Announced:
    """The last one; words do not beat mathematics, nor what was taken back by an empty box."""
    strong = [one for one in found if one.kind in ("box", "tag") or _is_mathematical(one.text)]
    return max(strong or found, key=lambda one: one.at)


def _is_mathematical(text: str) -> bool:
    """Whether an announcement has a number, a formula or a letter that stands alone, and is no heading."""
    words = without_markdown(text).split()
    if words and words[0].lower().strip(".:") in HEADINGS:
        return False
    return (
        any(character.isdigit() or character in "\\$" for character in text)
        or len(text.strip(" *_`().:$")) == 1
    )


def _last_box(text: str) -> Announced | None:
    """The last box; two that "and", "or" or a comma connects are a list."""
    last = _boxes(text)
    if last is None or not last.text:
        return last
    parts, first = [last.text], last
    for _ in range(20):
        before = _boxes(text[: first.at])
        gap = text[before.end : first.at] if before is not None else ""
        if before is None or not before.text or not _connects(gap):
            break
        parts, first = [before.text, *parts], before
    return Announced(last.at, ", ".join(parts), "box", last.end)


def _connects(gap: str) -> bool:
    """Whether what stands between two boxes makes them one list: nothing, a comma, "and", "or"."""
    if len(gap) > MAX_GAP or "\n\n" in gap or ("\n" in gap and not gap.strip()):
        return False
    return CONNECTIVE.fullmatch(GLUE.sub("", gap)) is not None


def _boxes(text: str) -> Announced | None:
    """The last box of a text; words such as "with \\boxed as told" are none."""
    for match in reversed(list(BOX.finditer(text))):
        position, start = match.start(), match.end()
        while text[start : start + 1].isspace():
            start += 1
        if text.startswith("{", start):
            end = _closing(text, start)
            inside = "" if end is None else text[start + 1 : end].strip()
            return Announced(position, inside, "box", (end or len(text)) + 1)
        bare = BARE.match(text, start)
        if bare and (start > match.end() or not bare[0].isalpha()):
            return Announced(position, bare[0], "box", bare.end())
    return None


def _closing(text: str, start: int) -> int | None:
    """Where the brace at `start` is closed; None where it is not."""
    depth = 0
    for match in re.compile(r"\\[{}\\]|[{}]").finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None


def _last_tag(text: str, finished: bool) -> Announced | None:
    """The last <answer>; without an end it counts where the response ended by itself."""
    opening = closing = None
    for match in TAG.finditer(text):
        if not match[1]:
            opening, closing = match, None
        elif closing is None:
            closing = match
    if opening is None or (closing is None and not finished):
        return None
    end = closing.start() if closing else len(text)
    return Announced(opening.start(), text[opening.end() : end].strip(), "tag", end)


def _last_hashes(text: str) -> Announced | None:
    """``#### ...`` where it is the last line, and neither a heading nor empty."""
    stripped = text.rstrip()
    start = stripped.rfind("\n") + 1
    match = HASHES.fullmatch(stripped, start)
    if match is None or not match[1].strip():
        return None
    words = match[1].split()
    if words[0].lower().strip(".:*") in HEADINGS or (len(words) > 6 and not _is_mathematical(match[1])):
        return None
    return Announced(start, match[1].strip(), "hashes", len(stripped))


def _early_hashes(text: str) -> Announced | None:
    """The last ``####`` with nothing but a number, where the response announces nothing else."""
    matches = list(NUMBER_LINE.finditer(text))
    match = matches[-1] if matches else None
    if match is None or text.count("```", 0, match.start()) % 2:  # in a block of code it is a comment
        return None
    return Announced(match.start(), match[1], "hashes", match.end())


def _last_line(text: str) -> Announced | None:
    """What follows a label such as ``**Answer:**`` at the beginning of a line, or stands below it."""
    found = None
    for line in LABELLED.finditer(text):
        match = ANSWER_LABEL.match(line[0]) or CHINESE_LABEL.match(line[0])
        if match:
            rest = match["rest"].strip()
            if not rest.strip(" *_`}{:$\\[]"):
                rest = _paragraph(text, line.end())
            if rest:
                found = Announced(line.start(), rest, "line", line.end())
    return found


def _last_labelled_line(text: str) -> Announced | None:
    """``A: 18`` or ``Answer: 18`` as the last of several lines: how worked solutions end."""
    stripped = text.rstrip()
    start = stripped.rfind("\n") + 1
    match = LABELLED_END.fullmatch(stripped, start)
    return Announced(start, match[1], "line", len(stripped)) if match and start else None


def _last_sentence(text: str) -> Announced | None:
    """What follows ``Answer:`` at the beginning of a sentence: a weaker mark than any box."""
    found = None
    for match in SENTENCE_LABEL.finditer(text):
        kind = "line" if "inal" in match["label"] else "sentence"
        found = Announced(match.start(), match["rest"].strip(), kind, match.end())
    return found


def _paragraph(text: str, start: int) -> str:
    """The lines that follow, up to an empty one: an answer that stands below its label."""
    lines = text[start : start + 2000].lstrip().split("\n\n", 1)[0]
    words = lines.split()
    if not words or (len(words) > 12 and "$" not in lines and "\\" not in lines):
        return ""
    return lines.strip()


LAST_NUMBER = re.compile(r"-?(?:\\[dt]?frac\{-?\d+\}\{\d+\}|\d[\d,]*(?:\.\d+)?(?:/\d+)?)")


def final_answer(text: str) -> str | None:
    """`explicit_answer`, or else the last number of the text, a \\frac{}{} being one."""
    found = announced(text)
    if found is not None:
        return found.text or None
    numbers = LAST_NUMBER.findall(text)
    return numbers[-1] if numbers else None


def json_answers(gold: str) -> list[str] | None:
    """The alternatives of a gold answer that is a JSON list of strings; None where it is none."""
    if not gold.lstrip().startswith('["'):
        return None
    try:
        found = jsontext.loads(gold)
    except ValueError:
        return None
    return found if isinstance(found, list) and all(isinstance(one, str) for one in found) and found else None
