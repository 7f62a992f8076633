"""Finds the final answer in a text and writes equal answers alike; pure string work."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

HASHES = "####"
BOXED = "\\boxed{"
ANSWER_LINE = re.compile(r"\banswer\s*:[ \t]*([^\n]*)", re.IGNORECASE)
LAST_NUMBER = re.compile(r"-?(?:\\[dt]?frac\{-?\d+\}\{\d+\}|\d[\d,]*(?:\.\d+)?(?:/\d+)?)")
# A sign, digits (with or without thousands separators), decimals, a denominator or a power of ten, then per
# cent or a unit; spaces are single ones.
NUMBER = re.compile(
    r"\\?\$? ?(?P<number>[+-]? ?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:/\d+|[eE][+-]?\d{1,2})?)"
    r"(?P<percent> ?\\?%)?(?P<unit> [A-Za-z]{2,}(?: [A-Za-z]+)*)?"
)
WORDS = re.compile(r"[A-Za-z]{2,}(?: [A-Za-z]+)+[.!]?")
EQUATION = re.compile(r"[A-Za-z]=([^=]+)")
FRACTION = re.compile(r"(-?)\\frac\{(-?\d+)\}\{(\d+)\}")
NOT_UNITS = {"pi", "sqrt", "or", "and", "to", "degrees"}
MAX_DIGITS = 200
"""Longer digit strings are compared as they stand: turning them into numbers costs quadratic time."""
MAX_NUMBER_CHARACTERS = 1000
"""Of a number with its unit."""


def gold_answer(text: str) -> str:
    """The gold answer of a data row: what stands after GSM8K's ####, in a \\boxed{}, or all of it."""
    found = explicit_answer(text) if HASHES in text or BOXED in text else None
    return found if found is not None else text.strip()


def explicit_answer(text: str) -> str | None:
    """What the last of these announces: ``\\boxed{...}``, ``#### ...`` and a line ``Answer: ...``."""
    candidates: list[tuple[int, str]] = []
    boxed = _last_boxed(text)
    if boxed is not None:
        candidates.append(boxed)
    at = text.rfind(HASHES)
    if at >= 0:
        candidates.append((at, text[at + len(HASHES) :].lstrip().split("\n", 1)[0]))
    marked = any(answer.strip() for _, answer in candidates)
    for match in ANSWER_LINE.finditer(text):
        answer = match.group(1).replace("**", "")
        # "\boxed{5} Answer: see above" announces 5.
        if not (marked and WORDS.fullmatch(answer.strip())):
            candidates.append((match.start(), answer))
    given = [(at, answer.strip()) for at, answer in candidates if answer.strip()]
    if not given:
        return None
    # "Answer: $\boxed{5}$" announces one answer twice; the inner one starts later and wins.
    return max(given)[1]


def final_answer(text: str) -> str | None:
    """`explicit_answer`, or else the last number of the text, a \\frac{}{} being one."""
    answer = explicit_answer(text)
    if answer is None:
        numbers = LAST_NUMBER.findall(text)
        answer = numbers[-1] if numbers else None
    return answer


def _last_boxed(text: str) -> tuple[int, str] | None:
    start = text.rfind(BOXED)
    if start < 0:
        return None
    depth = 1
    for position in range(start + len(BOXED), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return start, text[start + len(BOXED) : position]
    return None  # cut off inside the box


def strip_wrapping(answer: str) -> str:
    """The answer without math delimiters, a full stop at its end and space around it."""
    answer = answer.strip().removesuffix(".").rstrip()
    for left, right in (("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$"), ("$", "$")):
        if answer.startswith(left) and answer.endswith(right) and len(answer) > len(left) + len(right):
            answer = answer[len(left) : -len(right)].strip()
            break
    return answer.removesuffix(".").rstrip()


def plain_number(answer: str) -> str | None:
    """The number in an answer such as "18", "$1,234.50", "-3/4", "1e3" or "18 dollars": digits, point, slash.

    None where the answer is anything else. A percentage keeps its sign: 50% is not 50.
    """
    # White space that two parts of a pattern may share costs quadratic time.
    plain = " ".join(strip_wrapping(answer).split())
    match = NUMBER.fullmatch(plain) if len(plain) <= MAX_NUMBER_CHARACTERS else None
    if match is None or not any(character.isdigit() for character in match["number"]):
        return None
    if match["unit"] and NOT_UNITS & set(match["unit"].lower().split()):
        return None
    number = re.sub(r"[, ]|(?<![eE])\+", "", match["number"])
    if "e" in number.lower():
        if not number.lstrip("+-.")[:1].isdigit():
            return None
        number = f"{Decimal(number):f}"
    return number + ("%" if match["percent"] else "")


def canonical(answer: str) -> str:
    """One spelling for answers that differ in form only: 0.50, 1/2 and \\frac12 all give "1/2"."""
    number = plain_number(answer)
    if number is not None and len(number) <= MAX_DIGITS:
        try:
            value = Fraction(number.rstrip("%"))
            return str(value / 100 if number.endswith("%") else value)
        except ZeroDivisionError:
            return number
    text = strip_wrapping(answer)
    text = re.sub(r"\\(?:left|right|!|,|;|:|quad|qquad)(?![A-Za-z])", "", text)
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\s+", "", text)
    match = FRACTION.fullmatch(text)
    if match and len(text) <= MAX_DIGITS and int(match[3]) != 0:
        return str(Fraction(int(match[1] + "1") * int(match[2]), int(match[3])))
    equation = EQUATION.fullmatch(text)  # math-verify too takes x = 5 for 5
    return canonical(equation[1]) if equation else text
