"""From the text of one answer to what it means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from megatron_dgpo.rewards.answers import formulas, numerics
from megatron_dgpo.rewards.answers.brackets import is_closed_by_its_end, split
from megatron_dgpo.rewards.answers.comparison import rounded, same
from megatron_dgpo.rewards.answers.quantities import (
    Clock,
    Number,
    clock,
    compound,
    known_unit,
    number,
    number_in_words,
    numeral,
    ratio,
    unit_name,
)
from megatron_dgpo.rewards.answers.reals import (
    as_reals,
    both,
    from_left_to_right,
    height,
    is_constant,
    subject,
    without,
)
from megatron_dgpo.rewards.answers.spelling import plain
from megatron_dgpo.rewards.answers.values import (
    False_,
    Formula,
    Items,
    Matrix,
    Named,
    Nothing,
    Piece,
    Reals,
    Relation,
    Text,
    Unread,
    Value,
    written,
)

MAX_CHARACTERS = 3000
"""Longer answers are compared as they stand."""
MAX_ITEMS = 300
MAX_DEPTH = 6
"""Of brackets in brackets."""
_APPROXIMATELY = re.compile(
    r"(?:(?:about|approximately|approx\.?|around|roughly|nearly|almost|exactly|only|just|precisely|circa|some"
    r"|it's|it is|is|are|(?:is |are )?equal to|equals|a total of|the number"
    r"|(?:the |my )?(?:final |correct )?answer(?: is)?)(?![A-Za-z])|≈|~|=|:)\s*",
    re.IGNORECASE,
)
"""What stands before an answer and does not change it."""
_END = " \t.,;:"
_ALL_REALS = re.compile(
    r"(?:the set of )?(?:all )?reals?(?: numbers?)?"
    r"(?:,? (?:except|other than|but|excluding)(?: for)? (?P<but>.+))?|\\R|\( ?-\\infty ?, ?\+?\\infty ?\)",
    re.IGNORECASE,
)
_NOTHING = re.compile(
    r"(?:there (?:is|are) )?no (?:real |such )?(?:solutions?|values?|roots?)(?: exists?)?|\\emptyset"
    r"|(?:the )?empty set|\\\{ ?\\\}|\{ ?\}",
    re.IGNORECASE,
)
_MATRIX = re.compile(
    r"\\begin ?\{ ?([bpBvV]?(?:small)?matrix|array)\*? ?\}(?: ?\{[clr| ]*\})?(.*)\\end ?\{ ?\1\*? ?\}",
    re.DOTALL,
)
_SIGNS = re.compile(r"<=|>=|:=|[<>=≠≈]")
_AND = re.compile(r",? (?:and|or) |;|,| & ")
_ABOUT = re.compile("≈")
_NAME = re.compile(
    r"\\?[A-Za-z]+(?: ?_ ?(?:\{[^{}]*\}|\w))?'*(?: ?\( ?[A-Za-z0-9](?: ?, ?[A-Za-z0-9])* ?\))?"
)
_UNIT_BEHIND = re.compile(
    r"(?P<formula>.*[\d})\]!|]|.*\\pi)(?P<unit> [^\d\\].*| \\\w.*|\{? ?[A-Za-z]{2,} ?\}?.*)"
)
_FIGURE = re.compile(
    r"\\(triangle|angle|overline|odot|square|vec|overrightarrow|overleftrightarrow|arc|widehat) ?(?=[{A-Z])"
)
_NO_BRACES = str.maketrans("", "", "{}")
_COMMENT = re.compile(
    r"(?:because|since|so|which|as|where|but|then|that|therefore|thus|hence|for|if|when|due|given|after|who|not)(?![A-Za-z])",
    re.IGNORECASE,
)
_GROUPED = re.compile(r",? (?:and|or) |;|,(?<!\d,)|,(?!\d{3}(?!\d))| & ")
"""Splits a list whose commas have spaces behind them: the others may group digits."""
_DECIMAL_COMMA = re.compile(r"[+-]? ?[^\d,]{0,3}\d+,(?:\d\d?|\d{4,})(?![\d,])[^,]{0,40}")
_LABEL = re.compile(r"[A-Za-z]{1,10}\d{1,10}[A-Za-z\d]{0,10}|\d{1,10}[A-Za-z]{1,10}")


def readings(answer: str) -> list[Value]:
    """What an answer may mean, likelier first: "100,200" is a number, and a list."""
    if len(answer) > MAX_CHARACTERS:
        return []
    return _readings(trimmed(plain(answer)), 0)


def trimmed(text: str) -> str:
    """Without dollar signs around mathematics, full stops and words such as "about"."""
    text = _without_dollars(text).strip()
    while True:
        before = text
        text = text.strip()
        if not text.endswith("..."):
            text = text.rstrip(_END + "?\\*").strip()
        text = text.strip('"').strip()
        text = text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] == "'" else text
        match = _APPROXIMATELY.match(text)
        if match:
            text = text[match.end() :]
        if text == before:
            return text


def _without_dollars(text: str) -> str:
    """Dollar signs in pairs are delimiters; one alone, before or behind a number, is the currency."""
    return text.replace("$", "") if text.count("$") % 2 == 0 else text.replace("$$", "")


def _readings(text: str, depth: int) -> list[Value]:
    if not text:
        return []
    if depth > MAX_DEPTH:
        return [Unread(text)]
    found = _approximated(text, depth)
    if found:
        return found
    simple = _simple(text)
    if simple is not None:
        found.append(simple)
    if isinstance(simple, Clock):
        found += filter(None, [ratio(text), number(text)])
    if simple is None or (isinstance(simple, Number) and "," in text):  # digits in groups may be a list
        found += filter(None, [_structured(text, depth)])
    if _DECIMAL_COMMA.fullmatch(text):
        found += filter(None, [number(text.replace(",", "."))])
    return found or _formulas(text) or [_text(text)]


def _approximated(text: str, depth: int) -> list[Value]:
    """Of "10/3 ≈ 3.33" the exact value, or the decimal where that is what is asked for."""
    pieces, signs = split(text, _ABOUT)
    if len(signs) != 1 or not all(piece.strip() for piece in pieces) or _NAME.fullmatch(pieces[0].strip()):
        return []
    exact, rounded = (_inside(piece, depth) for piece in pieces)
    value = exact.value if isinstance(exact, Named) else exact
    heights = height(value), height(rounded)
    if heights[0] is None or heights[1] is None:
        return []
    if abs(heights[0] - heights[1]) > 0.1 * abs(heights[0]):
        return [False_(text)]
    return [exact, rounded]


def _inside(text: str, depth: int) -> Value:
    found = _readings(trimmed(text), depth + 1)
    return found[0] if found else Unread(text)


def _simple(text: str) -> Value | None:
    for reader in (numeral, clock, number, compound, ratio):
        value = reader(text)
        if value is not None:
            return value
    if _NOTHING.fullmatch(text):
        return Nothing()
    return None


def _structured(text: str, depth: int) -> Value | None:
    for reader in (_all_reals, _unwrapped, _matrix, _union, _relation_or_list, _plus_minus):
        value = reader(text, depth)
        if value is not None:
            return value
    return None


def _formulas(text: str) -> list[Value]:
    """A formula, with and without what may be a unit behind it."""
    match = _UNIT_BEHIND.fullmatch(text)
    unit = match["unit"].strip(" {}") if match else ""
    with_unit = [match["formula"]] if match and unit_name(f" {unit}") is not None else []
    word = re.split(r"[^A-Za-z]", unit, maxsplit=1)[0]
    likely = len(word) > 3 or (len(word) > 1 and known_unit(word) != "")
    found = []
    for formula in (*with_unit, text) if likely else (text, *with_unit):
        try:
            found.append(_as_number(formula))
        except formulas.NoFormula:
            continue
    return found


def _text(text: str) -> Value:
    in_words = number_in_words(text)
    if in_words is not None:
        return in_words
    if _LABEL.fullmatch(text):
        return Text(text.lower())
    named = _FIGURE.sub(r"\1 ", text).translate(_NO_BRACES)
    words = named.strip(" .,!?;:'\"()[]").lower()
    if any(character.isalpha() for character in words) and not re.search(r"[\\^_=<>+*]|\d", named):
        return Text(" ".join(words.replace("-", " ").split()))
    return Unread(text)


def _as_number(text: str) -> Value:
    """A formula, or the rational number that it is. Raises formulas.NoFormula."""
    tree = formulas.parse(text)
    try:
        return Number(numerics.exact(tree))
    except numerics.NoValue:
        return Formula(tree, text)


def _all_reals(text: str, depth: int) -> Value | None:
    match = _ALL_REALS.fullmatch(text)
    if match is None:
        return None
    whole = Reals((Piece(None, None, True, True),))
    return whole if not match["but"] else without(whole, _inside(match["but"], depth))


def _unwrapped(text: str, depth: int) -> Value | None:
    """Brackets around all of it: a set, a tuple, an interval, or one value."""
    opening, closing = text[:1], text[-1:]
    is_set = text.startswith("\\{") and text.endswith("\\}")
    if is_set:
        inner = text[2:-2]
    elif opening in ("(", "[", "{") and closing in (")", "]", "}") and is_closed_by_its_end(text):
        inner = text[1:-1]
    else:
        return None
    if not inner.strip():
        return None
    if is_set:
        return _set(inner, depth)
    if opening == "{":
        return _inside(inner, depth)
    pieces, signs = split(inner, re.compile("[,;]"))
    if not signs:
        return _inside(inner, depth) if (opening, closing) in (("(", ")"), ("[", "]")) else None
    if len(pieces) > MAX_ITEMS or not all(piece.strip() for piece in pieces):
        return None
    return Items(opening, tuple(_inside(piece, depth) for piece in pieces), closing)


def _set(inner: str, depth: int) -> Value:
    pieces, signs = split(inner, re.compile(r"[|:]"))
    if len(signs) == 1 and _NAME.fullmatch(pieces[0].split("\\in")[0].strip()):
        return _inside(pieces[1], depth)
    value = _inside(inner, depth)
    if isinstance(value, Items) and value.left == "":
        return Items("{", value.items, "}")
    return value


def _matrix(text: str, depth: int) -> Value | None:
    match = _MATRIX.fullmatch(text)
    if match is None or match[1].startswith(("v", "V")) or "\\begin" in match[2]:
        return None
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", match[2]) if row.strip()]
    if not rows or len(rows) > 50:
        return None
    return Matrix(tuple(tuple(_inside(cell, depth) for cell in row.split("&")) for row in rows))


def _plus_minus(text: str, depth: int) -> Value | None:
    if "\\pm" not in text and "\\mp" not in text:
        return None
    both = [
        re.sub(r"\\mp(?![A-Za-z])", minus, re.sub(r"\\pm(?![A-Za-z])", plus, text))
        for plus, minus in ("+-", "-+")
    ]
    return Items("", tuple(_inside(one, depth) for one in both), "")


def _union(text: str, depth: int) -> Value | None:
    """Unions of intervals and differences of sets."""
    pieces, signs = split(text, re.compile(r"\\cup(?![A-Za-z])| U (?=[(\[])"))
    if signs:
        parts = [as_reals(_inside(piece, depth)) for piece in pieces]
        if any(part is None for part in parts):
            return None
        return from_left_to_right(tuple(piece for part in parts if part is not None for piece in part.pieces))
    pieces, signs = split(text, re.compile(r"\\(?:setminus|backslash)(?![A-Za-z])|(?<=R )-|\\(?= ?\\\{)"))
    if len(signs) == 1:
        whole = as_reals(_inside(pieces[0], depth))
        return None if whole is None else without(whole, _inside(pieces[1], depth))
    return None


def _relation_or_list(text: str, depth: int) -> Value | None:
    named, _, last = text.rpartition("=")
    if named and "," in last and "," not in named and number(last.strip()) is not None:
        return _relation(text, depth)  # y = 1,000
    pieces, signs = split(text, _GROUPED if ", " in text else _AND)
    pieces = [piece.strip() for piece in pieces]
    if signs and not pieces[-1]:
        pieces.pop()
    pieces = [
        p for p, sign in zip(pieces, [",", *signs], strict=False) if p or sign.strip() not in (",", ";")
    ]
    if len(pieces) < 2:
        return _relation(text, depth)
    if len(pieces) > MAX_ITEMS or not all(pieces) or _is_prose(pieces):
        return None
    bounded = _bounded(text, depth)
    if bounded is not None:
        return bounded
    return _named_items([value for piece in pieces for value in _flat(_inside(piece, depth))])


def _is_prose(pieces: Sequence[str]) -> bool:
    """Whether commas and conjunctions are those of a sentence: a piece has many words and no mathematics."""
    return any(
        _COMMENT.match(piece) or (len(piece.split()) > 5 and not re.search(r"[\d\\=]", piece))
        for piece in pieces
    )


def _bounded(text: str, depth: int) -> Value | None:
    """x > 2 and x < 5; x < 2 or x > 5; x is real and x is not 3."""
    pieces, signs = split(text, re.compile(r",? (?:and|or) |,"))
    parts = [_inside(piece, depth) for piece in pieces]
    if not all(isinstance(part, Relation) and any(s != "=" for s in part.signs) for part in parts):
        return None
    reals = [as_reals(part) for part in parts]
    if len({subject(part) for part in parts if isinstance(part, Relation)}) > 1 or None in reals:
        return None
    if len(reals) == 2 and "and" in signs[0]:
        return both(*reals)
    if all("or" in sign for sign in signs):
        return from_left_to_right(tuple(piece for part in reals if part is not None for piece in part.pieces))
    return None


def _flat(value: Value) -> tuple[Value, ...]:
    """The items of a list inside a list."""
    return value.items if isinstance(value, Items) and value.left == "" else (value,)


def _named_items(items: list[Value]) -> Value:
    """A list; of x = 1, 2 the value of x; of x = 3, x = 4 too."""
    first = items[0]
    if isinstance(first, Named) and not any(isinstance(item, (Named, Relation)) for item in items[1:]):
        return Named(first.name, Items("", (first.value, *items[1:]), ""))
    if all(isinstance(item, Named) for item in items):
        names = {item.name for item in items if isinstance(item, Named)}
        if len(names) == 1:
            values = tuple(value for item in items if isinstance(item, Named) for value in _flat(item.value))
            return Named(next(iter(names)), Items("", values, ""))
    return Items("", tuple(items), "")


def _relation(text: str, depth: int) -> Value | None:
    pieces, signs = split(text, re.compile(r"\\in(?![A-Za-z])"))
    if len(signs) == 1 and _NAME.fullmatch(pieces[0].strip()):
        return _inside(pieces[1], depth)
    pieces, signs = split(text, _SIGNS)
    signs = [{":=": "="}.get(sign, sign) for sign in signs]
    if not signs or not all(piece.strip() for piece in pieces):
        return None
    sides = [_inside(piece, depth) for piece in pieces]
    if all(sign in "=≈" for sign in signs):
        return _equation(pieces, sides, signs)
    if any(sign == ">" or sign == ">=" for sign in signs):
        if any(sign in ("<", "<=") for sign in signs):
            return Unread(text)
        sides, signs = sides[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
    return Relation(tuple(sides), tuple(signs))


def _equation(pieces: list[str], sides: list[Value], signs: list[str]) -> Value:
    """What a chain of equal sides says: the value of its name, its number, or an equation."""
    numbers = [side for side in sides if is_constant(side)]
    others = [i for i, side in enumerate(sides) if not is_constant(side)]
    for before, after in zip(numbers, numbers[1:], strict=False):
        if not (same(before, after) or rounded(before, after) or rounded(after, before)):
            return False_("=".join(piece.strip() for piece in pieces))
    if not others:
        return sides[-1]
    if numbers:
        name, value = _name(pieces[others[0]]), numbers[-1]
        plainly_named = all(_plain_name(pieces[i], sides[i]) for i in others)
        if value == Number(Fraction(0)) and not _NAME.fullmatch(pieces[others[0]].strip()):
            plainly_named = False  # an equation in its normal form
        if len(sides) > 2 or plainly_named:
            return Named(name, value, (sides[0], sides[-1]))
        return Relation(tuple(sides), tuple(signs))
    if len(sides) == 2 and _NAME.fullmatch(pieces[0].strip()) and _plain_name(pieces[0], sides[0]):
        return Named(_name(pieces[0]), sides[1], (sides[0], sides[1]))
    return Relation(tuple(sides), tuple("=" for _ in signs))


def _name(piece: str) -> str:
    return re.sub(r"[\s{}\\]", "", piece)


def _plain_name(piece: str, side: Value) -> bool:
    """Whether this side names what the other one is: x, AB, f(x), a+b, "the area"; not 2x + 4y."""
    if isinstance(side, Items):
        return all(_plain_name("", item) for item in side.items)
    if isinstance(side, Text) or _NAME.fullmatch(piece.strip()):
        return True
    if isinstance(side, Formula):
        return not re.search(r"\d", re.sub(r"\^ ?\{?\d|_ ?\{?\d+", "", piece)) and " - " not in piece
    return isinstance(side, Unread)


def canonical(answer: str) -> str:
    """One spelling for equal answers: 0.50, 1/2 and \\frac12 all give "1/2".

    Formulas that differ in more than spelling stay different.
    """
    found = readings(answer)
    if not found:
        return answer.strip()
    value = found[0]
    if isinstance(value, Relation) or (isinstance(value, Items) and "\\infty" in answer):
        value = as_reals(value) or value
    return written(value)
