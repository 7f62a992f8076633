"""The letter that a response chooses: "\\textbf{(C)}", "Option C", "not B but C", "A is wrong, so C"."""

from __future__ import annotations

import itertools
import re

from megatron_dgpo.rewards.answers.marks import announced, own_part
from megatron_dgpo.rewards.answers.spelling import plain

MAX_CHARACTERS = 3000
_NOUN = r"(?:options?|choices?|answers?|letters?|statements?|alternatives?|selections?|response|number)"
_WHOLE = re.compile(
    rf"(?:the )?(?:{_NOUN}[:\s]*)?[(\[{{\"' ]*(?P<letter>[A-Za-z])[)\]}}\"' ]*(?:[.:,;!?]|$)?", re.IGNORECASE
)
_LEADING = re.compile(
    rf"(?:the )?(?:(?:correct |right |final |best )?{_NOUN}(?: is)?[:\s]*)?"
    r"(?:[(\[{\"' ]*(?P<closed>[A-Za-z])[\"' ]*[)\]}]"
    r"|[\"']?(?P<letter>[A-Z])[\"']?(?=\s*(?:$|[.:;,!?]|-\s|because\b|since\b|as\b|is\b|\())"
    r"|(?P<small>[a-z])[.:)](?=\s|$))",
)
"""A choice that a statement begins with."""
_MENTION = re.compile(
    r"\((?P<bracketed>[A-Za-z])\)|\[(?P<square>[A-Z])\]|(?<![A-Za-z0-9'’\\_])(?P<plain>[A-Z])(?![A-Za-z0-9'’_]|\s?[=+*^<>/])"
    r"|(?<![A-Za-z0-9'’\\_])(?P<tight>[A-Z])(?=/[A-Z](?![A-Za-z]))|(?P<slashed>(?<=/)[A-Z](?![A-Za-z0-9]))"
)
_DENIED_BEFORE = re.compile(
    r"(?<![A-Za-z])(?:not|n't|never|neither|nor|rule[sd]? out|ruling out|eliminat\w+|exclud\w+|reject\w*"
    r"|discard\w*|dismiss\w*|instead of|rather than|unlike|against|than|(?:any|every)thing but|all but|except"
    r"|without|cannot be|can't be)(?![A-Za-z])\s*"
    rf"(?:(?:both|the|be|is|choose|pick|choosing|picking|likely|necessarily|{_NOUN}) )*[\"'(]*$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"[)\"'\].]*\s*(?:\?\s*no(?:pe)?(?![A-Za-z])|"
    r"(?:(?:is|are|was|were|can|could|would|does|do|must|seems?|looks?)\s*(?:be\s*)?"
    r"(?:(?:also|both|all|clearly|obviously|therefore|thus|definitely) )*)?"
    r"(?:n't|not|wrong|incorrect|false|untrue|impossible|invalid|eliminated|excluded|ruled out|out|rejected"
    r"|too (?:small|large|big|high|low)|cannot|can't|contradict\w*|fails?|doesn't|isn't)(?![A-Za-z]))",
    re.IGNORECASE,
)
_JOINED = re.compile(r"[)\"'\]]*\s*(?:,|/|&|and|or|nor|, and|, or)\s*[(\"'\[]*$")
_CONJUNCTION = re.compile(r"[/&]|and|or")
_AFFIRMED = re.compile(
    r"[)\"'\].]*\s*(?:(?:is|was|must be|seems|looks)\s+(?:(?:the|clearly|therefore|thus) )*"
    r"(?:better|best|right|correct|true|answer|only|valid|one)|fits|works|holds|matches|remains|follows)(?![A-Za-z])",
    re.IGNORECASE,
)
_CONCLUSION = re.compile(
    r"(?:answer|choice|option|select|choose|pick|chose|go(?:ing)? with|settle on|conclude|correct|must be"
    r"|has to be|it is|it's|is|therefore|thus|hence|so|leaves|leaving|remains|matches|but|:)(?![A-Za-z])",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"\s+[a-z]")
_ARTICLE_VERBS = re.compile(
    r"\s+(?:is|was|are|because|since|as|and|or|seems|looks|follows|matches|fits|must|makes|works|holds|can|would"
    r"|has)(?![A-Za-z])"
)
_NAMED = re.compile(rf"(?:{_NOUN}|answer is|it is|it's|choose|pick|select)[:\s]*[(\"']*$", re.IGNORECASE)
_ANOTHER = re.compile(
    r"[)\"'\].]*\s*(?:,|/|&|and |or )+\s*(?:and |or )?(?:option |choice |not )?[(\"'\[]*"
    r"[A-Z](?:[)\"'\].,;]|$|\s(?:and|or)\s)"
)
_BUT_NOT = re.compile(r"[)\"'\].]*\s*(?:,|and|but|, and|, but) not ")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


def chosen(statement: str) -> str | None:
    """The letter that an announcement chooses, as a capital; None where it chooses none, or several."""
    text = plain(statement[:MAX_CHARACTERS]).replace("$", "").replace('"', "'").strip().lstrip("{").strip()
    text = re.sub(r"<([A-Z])>", r"(\1)", " ".join(text.split()).rstrip("}"))
    whole = _WHOLE.fullmatch(text)
    if whole:
        return whole["letter"].upper()
    found = _mentions(text)
    leading = _LEADING.match(text)
    if leading:
        letter = next(filter(None, leading.groups())).upper()
        end = leading.end()
        if not _DENIED_AFTER.match(text, end) and not _listed(text, end):
            return letter
    return _single(text, found)


def _listed(text: str, end: int) -> bool:
    """Whether another letter follows at once: "A, C", "A and C", "C/D"."""
    return _ANOTHER.match(text, end) is not None and _BUT_NOT.match(text, end) is None


def _mentions(text: str) -> list[tuple[int, int, str]]:
    """Where which letters are named as choices, leaving out denied ones, the pronoun and the article."""
    runs: list[list[re.Match[str]]] = []
    for match in _MENTION.finditer(text):
        if match["plain"] is not None and not _is_choice(text, match):
            continue
        if runs and _JOINED.fullmatch(text, runs[-1][-1].end(), match.start()):
            runs[-1].append(match)
        else:
            runs.append([match])
    return [
        (match.start(), match.end(), next(filter(None, match.groups())).upper())
        for run in runs
        for match in _not_denied(text, run)
    ]


def _not_denied(text: str, run: list[re.Match[str]]) -> list[re.Match[str]]:
    """Of letters in a row, those that are not denied, as in "not A or B" and "A, B and C are wrong"."""
    denied = [
        _DENIED_BEFORE.search(text[max(0, match.start() - 80) : match.start()]) is not None
        or _DENIED_AFTER.match(text, match.end()) is not None
        for match in run
    ]
    joints = [text[a.end() : b.start()] for a, b in itertools.pairwise(run)]
    conjunctions = [i for i, joint in enumerate(joints) if _CONJUNCTION.search(joint)]
    if conjunctions and denied[0] and _DENIED_AFTER.match(text, run[0].end()) is None:
        denied[: conjunctions[-1] + 2] = [True] * (conjunctions[-1] + 2)
    if conjunctions and denied[-1] and conjunctions[-1] == len(joints) - 1:
        denied = [True] * len(run)
    return [match for match, is_denied in zip(run, denied, strict=True) if not is_denied]


def _is_choice(text: str, match: re.Match[str]) -> bool:
    """Whether a capital alone is a choice, and not the pronoun I or the article A."""
    if match[0] not in ("A", "I") or _is_named(text, match.start()):
        return True
    return match[0] == "A" and not (
        _ARTICLE.match(text, match.end()) and not _ARTICLE_VERBS.match(text, match.end())
    )


def _is_named(text: str, at: int) -> bool:
    return _NAMED.search(text[max(0, at - 40) : at]) is not None


def _single(text: str, found: list[tuple[int, int, str]]) -> str | None:
    """The only letter, or else the only one that is called right or stands behind the last conclusion."""
    letters = {letter for *_, letter in found}
    if len(letters) < 2:
        return letters.pop() if letters else None
    affirmed = {letter for _, end, letter in found if _AFFIRMED.match(text, end)}
    if len(affirmed) == 1:
        return affirmed.pop()
    for conclusion in reversed(list(_CONCLUSION.finditer(text))):
        behind = {letter for at, _, letter in found if at >= conclusion.end()}
        if behind:
            return behind.pop() if len(behind) == 1 else None
    return None


def choice(text: str, finished: bool) -> str | None:
    """The letter that a response chooses: by its last mark, or in the last sentence that names one."""
    found = announced(text, finished)
    if found is not None:
        return chosen(found.text) if found.text else None
    if not finished:
        return None
    for sentence in _last_sentences(own_part(text)):
        plain_text = plain(sentence)
        mentions = _mentions(plain_text.replace('"', "'"))
        affirmed = any(_AFFIRMED.match(plain_text, end) for _, end, _ in mentions)
        is_short = len(sentence.split()) <= 3
        if mentions and (affirmed or is_short or "(" in sentence or _CONCLUSION.search(plain_text)):
            return _single(plain_text, mentions)
    return None


def _last_sentences(text: str) -> list[str]:
    return [part for part in _SENTENCE.split(text[-MAX_CHARACTERS:]) if part.strip()][::-1][:8]
