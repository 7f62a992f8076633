"""From what a response says to the answer in it: "There are 13 apples, since 26/2 = 13" answers 13."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_dgpo.rewards.answers.reading import readings, trimmed
from megatron_dgpo.rewards.answers.spelling import fold_symbols, plain, without_markdown
from megatron_dgpo.rewards.answers.values import Items, Relation, Text, Unread, Value

MAX_CHARACTERS = 3000
MAX_SENTENCES = 8
VERB = re.compile(
    r"(?<![A-Za-z])(?<!\bto )(?:is|are|was|were|be|equals?(?: to)?|gives?|gave|gets?|got|have|has|had|makes?"
    r"|made|takes?|took|costs?|totals?|yields?|becomes?|needs?|remains?|earns?|pays?|paid|spends?|spent|sells?|sold"
    r"|saves?|obtain|find|means?|contains?|requires?|receives?|ends? up with|comes? (?:out )?to|amounts? to)"
    r"(?![A-Za-z])|=|:(?!\d)|是|为|等于|有|共"
)
"""What an answer stands behind."""
COMMENT = re.compile(
    r" \((?![^()]*\\)|; |\. |! | - |, (?=[a-z]{3})|\.$|,$|!$|,? (?:since|because|as|so|where|which|when|if"
    r"|that|after|but|for|in|with|at|by|from|per|on|before|until|while|during|than|into|among|more than"
    r"|to(?= [a-z]{2})|therefore|thus|meaning|i\.e\.|e\.g\.)(?![A-Za-z])"
)
"""What stands behind an answer and is no part of it."""
ANSWER_IS = re.compile(
    r"(?:answer|result|solution)s?(?: (?:to|of) [^.\n:]{0,80})?"
    r"(?:'s| is| are| was| =| equals| would be| should be| must be| will be| comes out to be)"
    r"(?: therefore| thus| then| simply| just| indeed)?:?\s*(?P<rest>[^\n]*)",
    re.IGNORECASE,
)
WITHDRAWN = re.compile(
    r"(?<![A-Za-z])(?:wait|actually|no,|sorry|correction|mistake|incorrect|scratch that|hold on)(?![A-Za-z])",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"(?:(?<=[.?。])|(?<=[^\\]!))(?:\s+|$)|\n+|(?<=。)")
PREFIX = re.compile(r"(?:(?:[^\W\d_]{2,}+|[aAI](?= [a-z])|['’-])++[,:]?\s*+)++")
SPAN = re.compile(r"\$\$?([^$\n]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
RUN = re.compile(
    r"(?<![\w.])[-+]?(?:\\?[$€£]|\\[dt]?frac|\\sqrt|\\pi|[\d.({])(?:\\[a-z]+|[\d.,/^{}()+*%:=-])*"
)
BECAUSE = re.compile(
    r"[,;:.(]+\s*(?:because|since|as|so|it|they|he|she|we|this|that|these|there|which|the)(?![A-Za-z])"
    r"|\s(?:because|since)\s",
    re.IGNORECASE,
)
OPENING = re.compile(
    r"(?:at|for|in|with|since|because|if|when|after|before|by|on|given|from|as|of|while|adding|using|out of"
    r"|during|once)(?![A-Za-z])[^,]*,(?!\d) *",
    re.IGNORECASE,
)
NAMED_LIST = re.compile(r"(?<!\w)[A-Za-z]\w{0,3}\$? ?= ?[^\s=]+,? (?:and|or) \$?[A-Za-z]\w{0,3} ?=")
WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}|[一-鿿]")
NOT_PREFIX = frozenset(
    "pi sin cos tan cot sec csc ln log exp sqrt arcsin arccos arctan infinity not neither than least most"
    " between below above under".split()
)
NEGATION = re.compile(
    r"\s*(?:not|never|no longer|n't)(?![A-Za-z])\s*(?:[^,;]{0,60}\bbut(?: rather)? (?P<but>.+))?"
)


def answer_in(statement: str, is_box: bool = False) -> str:
    """The answer in what was announced as one: a value, a sentence with a value, or words.

    Where no value is understood the statement comes back as it is.
    """
    statement = statement.strip()
    if len(statement) > MAX_CHARACTERS or (is_box and not WORDS.search(statement)):
        return statement
    for candidate in _candidates(statement):
        if _is_value(candidate):
            return candidate
    return _words(statement)


def gold_in(gold: str) -> str | None:
    """The answer in a gold answer, whole or behind a verb ("The answer is 34"); None in another sentence."""
    if len(gold) > MAX_CHARACTERS or _is_value(gold):
        return gold
    folded = without_markdown(fold_symbols(gold)).strip()
    match = ANSWER_IS.search(folded)
    sentences = _sentences(match["rest"] if match else folded)
    if not sentences:
        return None
    candidates = (
        [sentences[0]]
        if match
        else [sentences[0][verb.end() :] for verb in list(VERB.finditer(sentences[0]))[-6:]]
    )
    if len(sentences) == 1 or match:
        found = _first_value(iter(candidates))
        if found is not None:
            return found
    return gold


def _is_value(text: str) -> bool:
    found = readings(text)
    return bool(found) and _understood(found[0])


def _understood(value: Value) -> bool:
    if isinstance(value, Items):
        return all(_understood(item) for item in value.items)
    if isinstance(value, Relation):
        return all(_understood(side) for side in value.sides)
    return not isinstance(value, (Text, Unread))


def _candidates(statement: str) -> Iterator[str]:
    yield statement
    folded = without_markdown(fold_symbols(statement)).strip()
    match = ANSWER_IS.search(folded)
    if match and match["rest"].strip():
        yield from _in_sentence(_sentences(match["rest"])[0])
    spans = [_inside_of(span) for span in SPAN.finditer(folded)]
    sentences = _sentences(folded)
    if sentences:
        first = PREFIX.match(sentences[0])
        ordered = sentences if first is None else [sentences[0], *sentences[:0:-1]]
        for sentence in ordered[:MAX_SENTENCES]:
            yield from _in_sentence(sentence)
    if len(set(spans)) == 1:
        yield spans[0]


def _sentences(text: str) -> list[str]:
    return [part.strip() for part in SENTENCE_END.split(text) if part and part.strip()]


def _in_sentence(sentence: str) -> Iterator[str]:
    """Readings of one sentence: all of it, what a comment leaves of it, what follows its last verbs."""
    negated = NEGATION.match(sentence)
    if negated:
        sentence = negated["but"] or ""
    yield from _cuts(sentence)
    verbs = list(VERB.finditer(sentence))
    for verb in reversed(verbs[-6:]):
        tail = sentence[verb.end() :].strip()
        negated = NEGATION.match(tail)
        if negated:
            tail = negated["but"] or ""
        yield from _cuts(tail)
        yield from _cuts(_without_prefix(tail))
    yield from _cuts(_without_prefix(_main_clause(sentence)))


def _main_clause(sentence: str) -> str:
    """A sentence without the clause that it opens with: "At 60 km/h for 3 hours, the train covers 180 km"."""
    match = OPENING.match(sentence)
    return sentence[match.end() :] if match else sentence


def _cuts(text: str) -> Iterator[str]:
    """The text, and what stands before its comments, longest first."""
    if not text:
        return
    yield text
    for match in list(COMMENT.finditer(text))[:6][::-1]:
        if match.start() > 0:
            yield text[: match.start()]


def _without_prefix(sentence: str) -> str:
    """A sentence from its first number or formula on."""
    match = PREFIX.match(sentence)
    if match is None or NOT_PREFIX & set(match[0].lower().replace(",", " ").split()):
        return sentence
    return sentence[match.end() :]


def _words(statement: str) -> str:
    """An answer in words: the statement, or its first clause where it goes on."""
    text = trimmed(plain(statement))
    text = BECAUSE.split(text, maxsplit=1)[0].strip()
    if len(text.split()) <= 4:
        return text
    clause = re.split(r"[,;:(]|\.(?:\s|$)|\s(?:because|since|as)\s", text, maxsplit=1)[0].strip()
    return clause if len(clause.split()) <= 4 and not re.search(r"\d", text) else statement


def spoken_answer(text: str) -> str | None:
    """The answer of a response that marks none: what "the answer is" introduces, or the last value in it."""
    tail = text[-20_000:]
    spoken = list(ANSWER_IS.finditer(tail))
    if spoken:
        first = next(iter(_sentences(spoken[-1]["rest"])), "")
        rest = _sentences(without_markdown(fold_symbols(first)))
        if rest and not WITHDRAWN.search(tail, spoken[-1].start("rest") + len(first)):
            return _first_value(_in_sentence(rest[0])) or answer_in(rest[0])
    for sentence in _last_sentences(tail):
        found = _value_in(sentence)
        if found is not None:
            return found
    last = next(_last_sentences(tail), "")
    verbs = list(VERB.finditer(last))
    words = trimmed(plain(last[verbs[-1].end() :])) if verbs else ""
    return words if 0 < len(words.split()) <= 3 else None


def _last_sentences(text: str) -> Iterator[str]:
    """From the last one back; headings come last."""
    sentences = _sentences(text[-4000:])[::-1][: 4 * MAX_SENTENCES]
    yield from (one for one in sentences if not one.startswith("#"))
    yield from (one for one in sentences if one.startswith("#"))


def _first_value(candidates: Iterator[str]) -> str | None:
    return next((candidate for candidate in candidates if _is_value(candidate)), None)


def _value_in(sentence: str) -> str | None:
    """The value that a sentence ends with; a list only where a verb introduces it."""
    folded = without_markdown(fold_symbols(sentence)).strip().rstrip("!")[-MAX_CHARACTERS:]
    if not re.search(r"[\d\\]", folded):
        return None
    spans = list(SPAN.finditer(folded))
    if spans and not folded[spans[-1].end() :].strip(" .") and _is_value(_inside_of(spans[-1])):
        return _inside_of(spans[-1])
    verbs = list(VERB.finditer(folded))[-6:]
    if NAMED_LIST.search(folded):  # x = 3 or x = 4
        found = _first_value(_cuts(_without_prefix(folded)))
        if found is not None:
            return found
    for verb in reversed(verbs):
        tail = folded[verb.end() :].strip()
        negated = NEGATION.match(tail)
        tail = (negated["but"] or "") if negated else tail
        found = _first_value(iter((*_cuts(tail), *_cuts(_without_prefix(tail)))))
        if found is not None and not _is_letter(found):
            return found
    if spans and _is_value(_inside_of(spans[-1])):
        return _inside_of(spans[-1])
    runs = [run.rstrip(".,:;=") for run in RUN.findall(folded)]
    runs = [run for run in runs if re.search(r"\d|pi", run)]
    return runs[-1].lstrip(".,") if runs else None


def _inside_of(span: re.Match[str]) -> str:
    return next(filter(None, span.groups()))


def _is_letter(text: str) -> bool:
    return len(text.strip(" .$*")) == 1 and text.strip(" .$*").isalpha()
