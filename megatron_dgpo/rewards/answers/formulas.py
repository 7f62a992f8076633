"""Formulas read from LaTeX or plain text into trees.

A letter is a variable, and so is a Greek one. Letters in a row are a product in a formula, and no formula
where they stand alone: a word is not a product.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

MAX_CHARACTERS = 2000

MAX_DEPTH = 60

_TOKEN = re.compile(
    r" *(?:(?P<number>\d*\.\d*\\overline ?\{ ?\d+ ?\}|\d+(?:\.\d+)?|\.\d+)"
    r"|(?P<command>\\[A-Za-z]+)|(?P<word>[A-Za-z]+)|(?P<symbol>\\[{}|]|[-+*/^_(){}\[\]|!%°]))"
)

_FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "asin", "acos", "atan", "sinh",
    "cosh", "tanh", "coth", "ln", "log", "lg", "exp", "abs", "sqrt", "cbrt", "arccot", "arcsinh", "arccosh",
    "arctanh", "floor", "ceil", "factorial",
}  # fmt: skip

TRIGONOMETRIC = {"sin", "cos", "tan", "cot", "sec", "csc"}

_GREEK = {
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu",
    "nu", "xi", "rho", "sigma", "tau", "phi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda",
    "Xi", "Pi", "Sigma", "Phi", "Psi", "Omega", "ell", "hbar",
}  # fmt: skip

_CLOSING = {"R", "N", "Z", "Q", "C", "rfloor", "rceil"}
"""Commands that no factor starts with."""

_PRODUCTS = {"xy", "yx", "yz", "zy", "xz", "zx", "xyz"}
"""Letters in a row that are a product even alone; all others are a word then."""


class NoFormula(ValueError):
    """The text is not a formula in the language read here."""


Tree = tuple[Any, ...]
"""("number", Fraction), ("name", text), or (operation, tree, ...)."""


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    spaced: bool
    """White space stands before it."""


def parse(text: str) -> Tree:
    """The tree of a formula in the spelling of `spelling.plain`. Raises NoFormula."""
    if len(text) > MAX_CHARACTERS:
        raise NoFormula("too long")
    tokens, position = [], 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if match is None:
            raise NoFormula(f"no formula has {text[position]!r}")
        kind = str(match.lastgroup)
        tokens.append(_Token(kind, match[kind], match[0][0] == " "))
        position = match.end()
    if all(token.kind == "word" for token in tokens):
        words = [token.text for token in tokens]
        if len(words) > 1 and any(len(word) > 1 for word in words):
            raise NoFormula("words")
        if len(words[0]) > 1 and words[0] not in (*_PRODUCTS, "pi"):
            raise NoFormula("a word")
    parser = _Parser(tokens)
    tree = parser.sum(0)
    if parser.at < len(tokens):
        raise NoFormula(f"{parser.text()!r} is out of place")
    return tree


class _Parser:
    """Recursive descent; every method leaves `at` behind what it has read."""

    def __init__(self, tokens: list[_Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self.in_bars = 0

    def text(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead].text if self.at + ahead < len(self.tokens) else ""

    def kind(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead].kind if self.at + ahead < len(self.tokens) else ""

    def take(self, text: str) -> bool:
        if self.text() != text or self.kind() == "":
            return False
        self.at += 1
        return True

    def need(self, text: str) -> None:
        if not self.take(text):
            raise NoFormula(f"{text!r} is missing")

    def sum(self, depth: int) -> Tree:
        if depth > MAX_DEPTH:
            raise NoFormula("too deep")
        terms = [self.product(depth)]
        while self.text() in ("+", "-"):
            sign = self.text()
            self.at += 1
            term = self.product(depth)
            terms.append(term if sign == "+" else ("neg", term))
        return ("+", *terms) if len(terms) > 1 else terms[0]

    def product(self, depth: int) -> Tree:
        if self.take("-"):
            return ("neg", self.product(depth + 1) if depth < MAX_DEPTH else self.none())
        if self.take("+"):
            return self.product(depth + 1) if depth < MAX_DEPTH else self.none()
        factors = [self.power(depth)]
        while True:
            if self.take("*"):
                factors.append(self.signed(depth))
            elif self.take("/"):
                factors.append(("inverse", self.signed(depth)))
            elif self.starts_factor():
                self.adjacent(factors, depth)
            else:
                return ("*", *factors) if len(factors) > 1 else factors[0]

    def signed(self, depth: int) -> Tree:
        if self.take("-"):
            return ("neg", self.power(depth))
        self.take("+")
        return self.power(depth)

    def adjacent(self, factors: list[Tree], depth: int) -> None:
        """Add a factor without a sign before it: one of a product, or the fraction of a mixed number."""
        before, token = self.tokens[self.at - 1], self.tokens[self.at]
        if before.kind == "number" and "." not in before.text and self.mixed():
            factors[-1] = ("+", factors[-1], self.power(depth))
            return
        if token.kind == "number" and before.text not in (")", "}", "|", "]"):
            raise NoFormula("a number behind a factor")
        if token.kind == "number" and before.kind == "number":
            raise NoFormula("two numbers")
        factors.append(self.power(depth))

    def mixed(self) -> bool:
        r"""Whether a fraction of whole numbers comes: \frac{1}{2} or \frac12."""
        parts = [token.text for token in self.tokens[self.at : self.at + 7]]
        if parts[:1] != ["\\frac"]:
            return False
        braced = len(parts) == 7 and (parts[1], parts[3], parts[4], parts[6]) == ("{", "}", "{", "}")
        numbers = [parts[2], parts[5]] if braced else ["".join(parts[1:2])]
        if braced and all(number.isdigit() for number in numbers):
            return int(numbers[0][-20:]) < int(numbers[1][-20:])
        return not braced and numbers[0].isdigit() and numbers[0][:1] < numbers[0][1:2]

    def starts_factor(self) -> bool:
        text = self.text()
        if self.kind() in ("number", "word"):
            return True
        if self.kind() == "command":
            return text[1:] not in _CLOSING
        return text in ("(", "{", "[") or (text == "|" and not self.in_bars)

    def power(self, depth: int) -> Tree:
        base = self.postfix(self.atom(depth))
        if self.take("^"):
            exponent = self.argument(depth)
            base = self.postfix(("^", base, exponent))
        return base

    def postfix(self, tree: Tree) -> Tree:
        while self.text() in ("!", "%", "°") and self.kind() == "symbol":
            tree = ({"!": "factorial", "%": "percent", "°": "degree"}[self.text()], tree)
            self.at += 1
            if self.text() == "!":
                raise NoFormula("a factorial of a factorial")
        return tree

    def argument(self, depth: int) -> Tree:
        """An exponent or a macro's argument: a group, a signed factor, or one digit of a number."""
        if depth > MAX_DEPTH:
            raise NoFormula("too deep")
        if self.take("-"):
            return ("neg", self.argument(depth + 1))
        self.take("+")
        if self.take("{"):
            return self.until("}", depth)
        if self.kind() == "word" and len(self.text()) > 1 and self.text() not in (*_FUNCTIONS, "pi"):
            return self.first_letter()
        return self.power(depth + 1) if self.text() == "\\frac" else self.atom(depth)

    def first_letter(self) -> Tree:
        word = self.tokens[self.at]
        self.tokens[self.at] = _Token("word", word.text[1:], False)
        return ("name", word.text[0])

    def until(self, close: str, depth: int) -> Tree:
        bars, self.in_bars = self.in_bars, 0
        tree = self.sum(depth + 1)
        self.need(close)
        self.in_bars = bars
        return tree

    def digit_argument(self, depth: int) -> Tree:
        """An argument of \\frac or \\sqrt: without braces, a single digit or letter."""
        token = self.tokens[self.at] if self.at < len(self.tokens) else self.none()
        if token.kind == "number" and len(token.text) > 1 and token.text.isdigit():
            self.tokens[self.at] = _Token("number", token.text[1:], False)
            return ("number", Fraction(int(token.text[0])))
        return self.argument(depth)

    def atom(self, depth: int) -> Tree:
        if self.at >= len(self.tokens) or depth > MAX_DEPTH:
            raise NoFormula("something is missing")
        token = self.tokens[self.at]
        self.at += 1
        if token.kind == "number":
            if self.text() == "_":
                raise NoFormula("a number to a base")
            return ("number", number(token.text))
        if token.kind == "word":
            return self.word(token.text, depth)
        if token.kind == "command":
            return self.command(token.text[1:], depth)
        if token.text in ("(", "[", "{"):
            return self.until({"(": ")", "[": "]", "{": "}"}[token.text], depth)
        if token.text == "|":
            self.in_bars += 1
            tree = self.sum(depth + 1)
            self.need("|")
            self.in_bars -= 1
            return ("abs", tree)
        raise NoFormula(f"{token.text!r} is out of place")

    def word(self, text: str, depth: int) -> Tree:
        if text in _FUNCTIONS:
            return self.function(text, depth)
        if text in ("pi", "Pi", "PI"):
            return ("pi",)
        if text in ("inf", "infinity", "Infinity", "oo"):
            return ("infinity",)
        if text in _GREEK:
            return self.name("\\" + text)
        for name in sorted(_FUNCTIONS | {"pi"}, key=len, reverse=True):
            if text.startswith(name) and self.text() != "" and len(text) - len(name) < 3:
                self.split(text, len(name))
                return self.word(name, depth)
        if len(text) > 3:
            raise NoFormula(f"{text!r} is a word")
        if len(text) > 1:
            self.split(text, 1)
            text = text[0]
        if (
            text in ("f", "g", "h", "P", "F", "G", "Q")
            and self.text() == "("
            and not self.tokens[self.at].spaced
        ):
            raise NoFormula("a function that is not known")
        return self.name(text)

    def split(self, text: str, length: int) -> None:
        """Put what follows the first `length` letters back before what is still to be read."""
        if text[length:]:
            self.tokens.insert(self.at, _Token("word", text[length:], False))

    def name(self, text: str) -> Tree:
        if self.take("_"):
            if self.take("{"):
                parts = []
                while self.at < len(self.tokens) and self.text() != "}":
                    parts.append(self.text())
                    self.at += 1
                self.need("}")
                return ("name", f"{text}_{''.join(parts)}")
            if self.kind() not in ("number", "word", "command"):
                raise NoFormula("an empty subscript")
            self.at += 1
            return ("name", f"{text}_{self.tokens[self.at - 1].text}")
        return ("name", text)

    def command(self, name: str, depth: int) -> Tree:
        if name == "frac":
            above = self.digit_argument(depth + 1)
            return ("*", above, ("inverse", self.digit_argument(depth + 1)))
        if name == "sqrt":
            degree: Tree = ("number", Fraction(2))
            if self.take("["):
                degree = self.until("]", depth)
            return ("root", self.digit_argument(depth + 1), degree)
        if name in ("binom", "dbinom", "tbinom"):
            return ("binom", self.digit_argument(depth + 1), self.digit_argument(depth + 1))
        if name in ("lfloor", "lceil"):
            tree = self.sum(depth + 1)
            self.need("\\rfloor" if name == "lfloor" else "\\rceil")
            return ("floor" if name == "lfloor" else "ceil", tree)
        if name == "pi":
            return ("pi",)
        if name == "infty":
            return ("infinity",)
        if name in _FUNCTIONS:
            return self.function(name, depth)
        if name in _GREEK:
            return self.name("\\" + name)
        raise NoFormula(f"\\{name} is not known")

    def function(self, name: str, depth: int) -> Tree:
        base: Tree | None = None
        if name in ("log", "lg") and self.take("_"):
            base = self.digit_argument(depth + 1)
        exponent = self.argument(depth + 1) if self.take("^") else None
        if exponent == ("neg", ("number", Fraction(1))):
            name, exponent = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}.get(name, ""), None
            if not name:
                raise NoFormula("an inverse that is not known")
        value = self.of(depth, name)
        if name == "sqrt":
            tree: Tree = ("root", value, ("number", Fraction(2)))
        elif name == "cbrt":
            tree = ("root", value, ("number", Fraction(3)))
        elif name in ("log", "lg"):
            tree = ("log", value, base if base is not None else ("number", Fraction(10)))
        else:
            tree = (name, value)
        return ("^", tree, exponent) if exponent is not None else tree

    def of(self, depth: int, name: str) -> Tree:
        """What a function is taken of: brackets, or factors up to the next sign or function."""
        if depth > MAX_DEPTH:
            raise NoFormula("too deep")
        if self.text() in ("(", "{", "["):
            return self.atom(depth + 1)
        if self.take("-"):
            return ("neg", self.of(depth + 1, name))
        factors = [self.power(depth + 1)]
        while self.starts_factor() and self.text() != "(":
            if self.text().lstrip("\\") in _FUNCTIONS:
                break
            self.adjacent(factors, depth + 1)
        if self.text() == "/" and self.kind(1) == "number" and name in TRIGONOMETRIC:
            self.at += 1
            factors.append(("inverse", self.power(depth + 1)))
        return ("*", *factors) if len(factors) > 1 else factors[0]

    def none(self) -> Any:
        raise NoFormula("too deep, or something is missing")


def number(text: str) -> Fraction:
    r"""The value of decimal digits, with a repeating part under \overline."""
    plain, _, repeated = text.partition("\\overline")
    value = Fraction(plain or "0")
    digits = repeated.strip(" {}")
    if digits:
        if "." not in plain:
            raise NoFormula("a repeating whole number")
        places = len(plain.partition(".")[2])
        value += Fraction(int(digits), (10 ** len(digits) - 1) * 10**places)
    return value


def names(tree: Tree) -> set[str]:
    """The variables of a formula."""
    if tree[0] == "name":
        return {tree[1]}
    return set().union(*(names(part) for part in tree[1:] if isinstance(part, tuple)))
