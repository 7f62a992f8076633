"""Values of formulas: exact where they are rational, to many digits elsewhere; and when two are equal.

Formulas are equal where they are exactly, or have the same values to `AGREE` digits wherever they are tried.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from megatron_dgpo.rewards.answers.formulas import TRIGONOMETRIC, Tree, names

DIGITS = 60

AGREE = 40
"""Digits to which values have to agree: the others are for cancellation."""

MAX_BITS = 20_000
"""Of an exact number on the way to a value."""


class NoValue(ArithmeticError):
    """A formula has no value here: it is not rational, not finite, or too large to compute."""


def exact(tree: Tree) -> Fraction:
    """The value of a formula that is rational. Raises NoValue where it is not, or is too large."""
    kind = tree[0]
    if kind == "number":
        return tree[1]
    if kind in ("pi", "infinity", "name"):
        raise NoValue(kind)
    if kind == "degree":
        return exact(tree[1])
    parts = [exact(part) for part in tree[1:]]
    try:
        return _small(_EXACT[kind](*parts))
    except (KeyError, ZeroDivisionError, OverflowError) as error:
        raise NoValue(kind) from error


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        return _exact_power(_exact_root(base, Fraction(exponent.denominator)), Fraction(exponent.numerator))
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent.numerator) * bits > MAX_BITS:
        raise NoValue("too large")
    return base**exponent.numerator


def _exact_root(value: Fraction, degree: Fraction) -> Fraction:
    if degree.denominator != 1 or not 2 <= degree <= 64 or (value < 0 and degree % 2 == 0):
        raise NoValue("root")
    sign = -1 if value < 0 else 1
    parts = [_whole_root(abs(part), int(degree)) for part in (value.numerator, value.denominator)]
    return Fraction(sign * parts[0], parts[1])


def _whole_root(value: int, degree: int) -> int:
    root = math.isqrt(value) if degree == 2 else round(value ** (1 / degree)) if value < 2**1000 else 0
    if root**degree != value:
        raise NoValue("irrational")
    return root


def _exact_factorial(value: Fraction) -> Fraction:
    if value.denominator != 1 or not 0 <= value <= 1000:
        raise NoValue("factorial")
    return Fraction(math.factorial(int(value)))


def _exact_binomial(above: Fraction, below: Fraction) -> Fraction:
    if above.denominator != 1 or below.denominator != 1 or not 0 <= below <= above <= 5000:
        raise NoValue("binomial")
    return Fraction(math.comb(int(above), int(below)))


def _small(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > 4 * MAX_BITS:
        raise NoValue("too large")
    return value


def _exact_sum(*terms: Fraction) -> Fraction:
    found = Fraction(0)
    for term in terms:
        found = _small(found + term)
    return found


def _exact_product(*factors: Fraction) -> Fraction:
    found = Fraction(1)
    for factor in factors:
        found = _small(found * factor)
    return found


_EXACT: dict[str, Any] = {
    "+": _exact_sum,
    "neg": lambda a: -a,
    "*": _exact_product,
    "inverse": lambda a: 1 / a,
    "^": _exact_power,
    "root": _exact_root,
    "factorial": _exact_factorial,
    "binom": _exact_binomial,
    "percent": lambda a: a / 100,
    "abs": abs,
    "floor": lambda a: Fraction(math.floor(a)),
    "ceil": lambda a: Fraction(math.ceil(a)),
}


def value(tree: Tree, point: Mapping[str, Any] | None = None, digits: int = DIGITS) -> Any:
    """The value of a formula as an mpmath number of so many digits, its variables being at `point`.

    Raises NoValue where there is none, or where computing it would take long.
    """
    import mpmath

    with mpmath.workdps(digits):
        try:
            found = _numeric(tree, point or {}, mpmath.mp, False)
        except (ZeroDivisionError, ValueError, OverflowError, TypeError, KeyError) as error:
            raise NoValue(str(error)) from error
    if mpmath.isnan(found):
        raise NoValue("nan")
    return found


def _numeric(tree: Tree, point: Mapping[str, Any], mp: Any, angle: bool) -> Any:
    kind = tree[0]
    if kind == "number":
        return mp.mpf(tree[1].numerator) / tree[1].denominator
    if kind == "pi":
        return +mp.pi
    if kind == "infinity":
        return mp.inf
    if kind == "name":
        constants = {"e": mp.e, "i": mp.mpc(0, 1)}
        return point[tree[1]] if tree[1] in point else +constants[tree[1]]
    angle = angle or kind in TRIGONOMETRIC
    parts = [_numeric(part, point, mp, angle) for part in tree[1:]]
    if kind == "degree":
        return parts[0] * mp.pi / 180 if angle else parts[0]
    if kind == "root":
        return _numeric_root(parts[0], parts[1], mp, bool(point))
    return _function(kind, parts, mp)


def _function(kind: str, parts: list[Any], mp: Any) -> Any:
    if kind in _ARITHMETIC:
        return _ARITHMETIC[kind](*parts)
    if kind == "^":
        return _numeric_power(parts[0], parts[1], mp)
    if kind in ("factorial", "binom"):
        if any(mp.im(part) != 0 or abs(part) > 1e5 for part in parts):
            raise NoValue("too large")
        return mp.factorial(*parts) if kind == "factorial" else mp.binomial(*parts)
    if kind == "exp" and abs(parts[0]) > 1e5:
        raise NoValue("too large")
    if kind == "log":
        return mp.log(parts[0]) / mp.log(parts[1])
    return getattr(mp, _MPMATH.get(kind, kind))(*parts)


_ARITHMETIC: dict[str, Any] = {
    "+": lambda *terms: sum(terms[1:], terms[0]),
    "neg": lambda a: -a,
    "*": lambda *factors: math.prod(factors[1:], start=factors[0]),
    "inverse": lambda a: 1 / a,
    "percent": lambda a: a / 100,
    "abs": abs,
}

_MPMATH = {
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot", "arcsinh": "asinh",
    "arccosh": "acosh", "arctanh": "atanh",
}  # fmt: skip


def _numeric_power(base: Any, exponent: Any, mp: Any) -> Any:
    if mp.isinf(base) or mp.isinf(exponent) or abs(exponent) > 1e5:
        raise NoValue("too large")
    if base == 0 and exponent == 0:
        raise NoValue("0^0")
    return mp.power(base, exponent)


def _numeric_root(value: Any, degree: Any, mp: Any, at_point: bool) -> Any:
    if mp.im(value) == 0 and mp.re(value) < 0 and degree % 2 == 1:
        if at_point:  # as a power it is another root, and either may be meant
            raise NoValue("a root of a negative variable")
        return -mp.root(-mp.re(value), int(degree))
    return mp.power(value, 1 / mp.mpf(degree))


def _agree(a: Tree, b: Tree, point: Mapping[str, Any]) -> bool:
    """Whether two formulas have the same value at a point. Raises NoValue where one has none.

    Values are compared relatively. Where both are next to nothing, what is left of a sum that cancels must
    vanish with more digits; a small number does not.
    """
    import mpmath

    left, right = value(a, point), value(b, point)
    if mpmath.isinf(left) or mpmath.isinf(right):
        return bool(left == right)
    with mpmath.workdps(DIGITS):
        difference, larger = abs(left - right), max(abs(left), abs(right))
        if difference <= larger * mpmath.mpf(10) ** -AGREE:
            return True
        if difference > mpmath.mpf(10) ** -(AGREE // 2):
            return False
    with mpmath.workdps(4 * DIGITS):
        difference = abs(value(a, point, 4 * DIGITS) - value(b, point, 4 * DIGITS))
        return bool(difference < mpmath.mpf(10) ** -(3 * DIGITS))


def points(variables: set[str]) -> list[dict[str, Any]]:
    """Where formulas in these variables are tried: values for each, of several sizes and signs."""
    import mpmath

    with mpmath.workdps(DIGITS):
        return [
            {name: scale * _position(name, index) for name in sorted(variables)}
            for index, scale in enumerate((1, 1, 3, -1, -2, 7))
        ]


def _position(name: str, index: int) -> Any:
    """In [0.5, 1.5), from the name alone: the same in every process."""
    import mpmath

    digest = hashlib.sha256(f"{name} {index}".encode()).digest()
    return mpmath.mpf(int.from_bytes(digest[:16])) / 2**128 + mpmath.mpf(1) / 2


def equal(a: Tree, b: Tree) -> bool:
    """Whether two formulas are equal. Raises NoValue where neither exactness nor values can tell."""
    try:
        return exact(a) == exact(b)
    except NoValue:
        pass
    variables = (names(a) | names(b)) - {"e", "i"}
    compared = False
    for point in points(variables) if variables else [{}]:
        try:
            if not _agree(a, b, point):
                return False
            compared = True
        except NoValue:
            continue
    if not compared:
        raise NoValue("no common value")
    return True
