"""Numbers with what stands around them: currency, per cent, units, bases, times of day and ratios.

All functions read the spelling of `spelling.plain`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 200
"""Longer digit strings are compared as they stand: turning them into numbers costs quadratic time."""
MAX_CHARACTERS = 300
"""Of a number with its unit."""

_POWER_OF_TEN = (
    r"(?: ?[*xX] ?10 ?\^ ?(?:\{ ?(?P<ten>[+-]? ?\d{1,3}) ?\}|(?P<bare_ten>[+-]?\d{1,3}))"
    r"|[eE](?P<e>[+-]?\d{1,3})(?![\d.]))?"
)
_MIXED = (
    r"(?P<whole>\d{1,3}(?: \d{3})+|\d+)"
    r"(?: ?\\frac ?(?:\{ ?(?P<top>\d+) ?\} ?\{ ?(?P<bottom>\d+) ?\}|(?P<tight>\d\d))"
    r"|(?: and | )(?P<part>\d+ ?/ ?\d+))"
)
_GROUPED = (
    r"(?P<grouped>\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d{1,2}(?:,\d{2})+,\d{3}(?![\d,])(?:\.\d+)?"
    r"|\d{1,3}(?: \d{3})+(?! ?[\d/])(?:\.\d+)?|\d{1,3}(?:['_]\d{3})+(?!\d))"
)
_EUROPEAN = r"(?P<european>\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}(?!\d)|0,\d+)"
_DECIMAL = r"(?P<decimal>\d+(?:\.\d+)?|\.\d+|\d+\.(?!\d))(?: ?/ ?(?P<below>\d+(?:\.\d+)?))?"
_NUMBER = re.compile(
    r"(?P<sign>[+-] ?)?(?P<currency>(?:US|C|A|HK|NZ)?\$ ?|[€£¥₹₩] ?|(?:USD|EUR|GBP|Rs\.?) ?)?"
    rf"(?P<inner>[+-] ?)?(?:{_MIXED}|{_GROUPED}|{_EUROPEAN}|{_DECIMAL}){_POWER_OF_TEN}"
)
_PERCENT = re.compile(r" ?(?:%|(?:percent|per cent|pct)(?:age)?(?![A-Za-z]))(?P<rest>.*)")
_POINTS = re.compile(r" ?points?\b.*", re.IGNORECASE)
_UNIT = re.compile(r"(?:[ -]?(?:(?P<w>[^\W\d_]++['’.]?)|°|[$€£¥]|[/*·]|\^ ?\{? ?-?\d ?\}?|[{}()]))*")
_UNIT_FRACTION = re.compile(r" ?\\frac ?\{ ?(?P<w>[A-Za-z]+)[^{}]*\} ?\{ ?[A-Za-z][^{}]*\}")
_WORD = re.compile(r"[^\W\d_]+")
_NOT_UNITS = frozenset(
    "pi sqrt or least most than plus minus under between to through sin cos tan ln log "
    "exp squared modulo mod not infinity inf choose".split()
) - {"squared"}
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound_sterling", "¥": "yen", "₹": "rupee", "₩": "won"}
_SCALES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
}  # fmt: skip
_ORDINAL = re.compile(r"(?:st|nd|rd|th)(?![A-Za-z])")


def _table(dimension: str, **factors: str | int | Fraction) -> dict[str, tuple[str, Fraction]]:
    """Unit -> (dimension, factor), from factor="name name name"."""
    return {
        name: (dimension, Fraction(key[1:].replace("_", ".").replace("d", "/")))
        for key, names in factors.items()
        for name in str(names).split()
    }


_UNITS = {
    **_table(
        "length", f0_001="mm millimeter millimetre", f0_01="cm centimeter centimetre", f1="m meter metre",
        f1000="km kilometer kilometre", f0_0254="in inch inche", f0_3048="ft foot feet", f0_9144="yd yard",
        f1609_344="mi mile",
    ),
    **_table("time", f1="s sec second", f60="min minute", f3600="h hr hour", f86400="day", f604800="week"),
    **_table("years", f1="year yr", f1d12="month"),
    **_table("mass", f0_001="mg milligram", f1="g gram", f1000="kg kilogram", f1000000="tonne"),
    **_table("volume", f0_001="ml milliliter millilitre mL", f1="l L liter litre"),
    **_table("dollar", f1="dollar usd buck", f0_01="cent"),
    **_table("euro", f1="euro eur"),
    **_table("pound_sterling", f1="pound_sterling gbp"),
    **_table("speed in km/h", f1="kmh kmph"),
    **_table("speed in mph", f1="mph"),
}  # fmt: skip
_TIGHT = set(_UNITS) | {
    "C",
    "F",
    "K",
    "J",
    "N",
    "W",
    "V",
    "A",
    "Hz",
    "kHz",
    "MHz",
    "kJ",
    "kW",
    "kPa",
    "Pa",
    "rpm",
}
_TIGHT |= {"mol", "cal", "kcal", "dB", "kmh", "km", "ms", "sqft", "x"} - {"x"}
_LETTERS = {"m", "s", "g", "h", "l", "L", "C", "F", "K", "J", "N", "W", "V", "A", "a", "d", "I"}


@dataclass(frozen=True)
class Number:
    """A rational number as it was written."""

    value: Fraction
    percent: bool = False
    """Written with a per cent sign; `value` is what stands before it."""
    unit: str = ""
    """One of the units known here; "" where there is none or another one."""
    decimals: int | None = None
    """Digits behind the point and the number of significant ones, where it was written as a decimal."""
    significant: int = 0

    def base(self) -> Fraction:
        """The value in its dimension's base unit."""
        return self.value * (_UNITS[self.unit][1] if self.unit else 1)

    def dimension(self) -> str:
        return _UNITS[self.unit][0] if self.unit else ""


@dataclass(frozen=True)
class Compound:
    """A quantity in several units, such as 2 hours 30 minutes, in its dimension's base unit."""

    dimension: str
    base: Fraction


@dataclass(frozen=True)
class Numeral:
    """Digits to a base."""

    digits: str
    base: int


@dataclass(frozen=True)
class Clock:
    """A time of day; `half` is "am", "pm" or "" where it is not said."""

    hour: int
    minute: int
    second: int
    half: str


@dataclass(frozen=True)
class Ratio:
    parts: tuple[Fraction, ...]


def number(text: str) -> Number | None:
    """A number with its currency, per cent sign or unit; None where the text is anything else."""
    if len(text) > MAX_CHARACTERS:
        return None
    match = _NUMBER.match(text)
    if match is None or (match["sign"] and match["inner"]):
        return None
    read = _value(match)
    if read is None:
        return None
    value, decimals, significant = read
    if "-" in (match["sign"] or match["inner"] or ""):
        value = -value
    rest = text[match.end() :]
    percent = _PERCENT.fullmatch(rest)
    if percent:
        rest = percent["rest"]
        if _POINTS.fullmatch(rest):
            rest = ""
    tail = _scaled(rest)
    if tail is None:
        return None
    scale, unit = tail
    if match["currency"]:
        sign = match["currency"].strip(" .")
        unit = {"USD": "dollar", "EUR": "euro", "GBP": "pound_sterling"}.get(
            sign, _CURRENCIES.get(sign[-1:], "")
        )
    return Number(value * scale, bool(percent), unit if unit in _UNITS else "", decimals, significant)


def _value(match: re.Match[str]) -> tuple[Fraction, int | None, int] | None:
    """The value of what `_NUMBER` has matched, its decimals and its significant digits."""
    if sum(character.isdigit() for character in match[0]) > MAX_DIGITS:
        return None
    try:
        if match["whole"]:
            top, bottom = match["top"], match["bottom"]
            if match["tight"]:
                top, bottom = match["tight"][0], match["tight"][1]
            if match["part"]:
                top, bottom = match["part"].split("/")
            if int(top) >= int(bottom):
                return None
            value = int(match["whole"].replace(" ", "")) + Fraction(int(top), int(bottom))
            return value * _ten(match), None, 0
        if match["european"]:
            plain = match["european"].replace(".", "").replace(",", ".")
        else:
            plain = re.sub(r"[, '_]", "", match["grouped"] or match["decimal"])
        value = Fraction(plain) / Fraction(match["below"] or 1) * _ten(match)
    except ZeroDivisionError:
        return None
    point = plain.partition(".")
    decimals = len(point[2]) if point[2] and not match["below"] else None
    return value, decimals, len((point[0] + point[2]).lstrip("0"))


def _ten(match: re.Match[str]) -> Fraction:
    exponent = match["ten"] or match["bare_ten"] or match["e"]
    return Fraction(10) ** int(exponent.replace(" ", "")) if exponent else Fraction(1)


def _scaled(rest: str) -> tuple[int, str] | None:
    """What the words behind a number multiply it by, and its unit; None where they are no unit."""
    ordinal = _ORDINAL.match(rest)
    if ordinal:
        rest = rest[ordinal.end() :]
    scale = 1
    words = rest.split(None, 1)
    while words and rest.startswith((" ", "-")) and words[0].lower() in _SCALES:
        scale *= _SCALES[words[0].lower()]
        rest = " " + words[1] if len(words) > 1 else ""
        words = rest.split(None, 1)
    unit = unit_name(rest)
    return None if unit is None else (scale, unit)


def unit_name(rest: str) -> str | None:
    """The name of a unit that follows a number, "" for one that is not known, None where it is no unit."""
    if not rest.strip(" .,?"):
        return ""
    rest = rest.rstrip(" .,?")
    if rest.strip() == "\\Omega":
        return ""
    fraction = _UNIT_FRACTION.fullmatch(rest)
    if fraction:
        return "" if known_unit(fraction["w"]) else None
    if not _UNIT.fullmatch(rest) or rest.count("{") != rest.count("}") or rest.count("(") != rest.count(")"):
        return None
    words = _WORD.findall(rest)
    if any(word.lower() in _NOT_UNITS for word in words):
        return None
    if not words and not any(sign in rest for sign in "°$€£¥"):
        return None
    if any(len(word) == 1 and word.isascii() and word not in _LETTERS for word in words):
        return None
    tight = rest[0].isascii() and rest[0].isalpha()
    if tight and not (
        words[0] in _TIGHT or words[0].lower() in ("a", "p") and rest.replace(".", "") in ("am", "pm")
    ):
        return None
    if len(words) != 1 or any(sign in rest for sign in "^/*°"):
        return _CURRENCIES.get(rest.strip(), "")
    return known_unit(words[0])


def known_unit(word: str) -> str:
    """The name in the table of units of a word for one; "" where it has none."""
    for name in (word, word.lower(), word.lower().removesuffix("s")):
        if name in _UNITS:
            return name
    return ""


_PAIR = re.compile(
    r"(?P<number>\d+(?:\.\d+)?(?:/\d+)?| ?\d+ \d+/\d+) ?(?P<unit>[A-Za-z]+)\.?(?:,? and |, | )?"
)


def compound(text: str) -> Compound | None:
    """2 hours (and) 30 minutes: at least two numbers, each with a known unit of one dimension."""
    if len(text) > MAX_CHARACTERS:
        return None
    position, total, found = 0, Fraction(0), []
    while position < len(text):
        match = _PAIR.match(text, position)
        unit = known_unit(match["unit"]) if match else ""
        amount = number(match["number"].strip()) if match else None
        if match is None or amount is None or not unit:
            return None
        found.append(_UNITS[unit][0])
        total += amount.value * _UNITS[unit][1]
        position = match.end()
    return Compound(found[0], total) if len(found) > 1 and len(set(found)) == 1 else None


_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_BASES |= {"eleven": 11, "twelve": 12, "sixteen": 16}
_NUMERAL = re.compile(
    r"(?P<open>\( ?)?(?P<digits>[0-9A-Za-z]{1,100}(?:\.[0-9A-Za-z]{1,50})?)(?(open) ?\))"
    r"(?: ?_ ?(?:\{ ?(?:base ?)?(?P<braced>\w+) ?\}|(?P<bare>\d\d?)) ?"
    r"|,? \(?(?:in )?base[ -](?P<words>\w+)\)?)"
)


def numeral(text: str) -> Numeral | None:
    """1011_2, (1011)_{two} or "1011 base 2"; None where the text is anything else."""
    match = _NUMERAL.fullmatch(text) if len(text) <= MAX_CHARACTERS else None
    if match is None:
        return None
    name = (match["braced"] or match["bare"] or match["words"]).lower()
    base = _BASES.get(name, int(name) if name.isdigit() and len(name) < 3 else 0)
    digits = match["digits"].upper()
    if not 2 <= base <= 36 or not match["digits"][0].isdigit() and base <= 10:
        return None
    try:
        if any(int(digit, 36) >= base for digit in digits.replace(".", "")):
            return None
    except ValueError:
        return None
    if not any(digit.isdigit() for digit in digits) and not (base == 16 and len(digits) > 1):
        return None  # a letter with an index
    return Numeral(digits.lstrip("0") or "0", base)


_CLOCK = re.compile(
    r"(?P<hour>\d{1,2})(?: ?: ?(?P<minute>\d{2})(?: ?: ?(?P<second>\d{2}))?)?"
    r" ?(?P<half>[aApP]\.? ?[mM]\.?|noon|o'clock|hours|hrs|h)?"
    r"(?P<zone> [A-Z]{2,4}| in the (?:morning|afternoon|evening))?"
)
_RATIO = re.compile(r"\d+(?:\.\d+)?(?: ?: ?\d+(?:\.\d+)?)+")


def clock(text: str) -> Clock | None:
    """A time of day such as 9:30, 9:30 a.m., 21:30 or 3 pm; None where the text is anything else."""
    match = _CLOCK.fullmatch(text) if len(text) <= 40 else None
    if match is None:
        return None
    half = re.sub(r"[^amp]", "", (match["half"] or "").lower()) if match["half"] else ""
    half = half if half in ("am", "pm") else ""
    if match["zone"] and "in the" in match["zone"]:
        half = "am" if "morning" in match["zone"] else "pm"
    if match["minute"] is None and not half and (match["half"] or "") != "o'clock":
        return None
    hour, minute, second = int(match["hour"]), int(match["minute"] or 0), int(match["second"] or 0)
    if hour > 24 or minute > 59 or second > 59 or (half and not 1 <= hour <= 12):
        return None
    if not half and (hour > 12 or hour == 0):
        half, hour = ("am", 12) if hour in (0, 24) else ("pm", hour - 12)
    return Clock(hour, minute, second, half)


def ratio(text: str) -> Ratio | None:
    """1:2 or 1:2:3; None where the text is anything else."""
    if len(text) > MAX_CHARACTERS or not _RATIO.fullmatch(text):
        return None
    return Ratio(tuple(Fraction(part.strip()) for part in text.split(":")))


_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
)
_SMALL += " seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBER_WORDS = {word: i for i, word in enumerate(_SMALL.split())}
_NUMBER_WORDS |= {word: 20 + 10 * i for i, word in enumerate(_TENS.split())}


def number_in_words(text: str) -> Number | None:
    """Thirteen, forty-two, three hundred (and) five; None where the text is anything else."""
    words = text.lower().replace("-", " ").split()
    if not 1 <= len(words) <= 12:
        return None
    total, part, last = 0, 0, ""
    for word in words:
        if word == "and" and last in _SCALES:
            continue
        if word in _NUMBER_WORDS:
            if (
                last
                and last not in _SCALES
                and not (part % 100 in range(20, 100, 10) and _NUMBER_WORDS[word] < 10)
            ):
                return None
            part += _NUMBER_WORDS[word]
        elif word == "hundred" and 0 < part < 100:
            part *= 100
        elif word in _SCALES and word != "hundred" and part:
            total, part = total + part * _SCALES[word], 0
        else:
            return None
        last = word
    return Number(Fraction(total + part))
