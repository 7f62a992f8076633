"""What an answer can mean."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_dgpo.rewards.answers.formulas import Tree
from megatron_dgpo.rewards.answers.quantities import Clock, Compound, Number, Numeral, Ratio


@dataclass(frozen=True)
class Formula:
    tree: Tree
    text: str = field(default="", compare=False)


@dataclass(frozen=True)
class Text:
    """Words: in lower case, without punctuation at the ends."""

    words: str


@dataclass(frozen=True)
class Unread:
    """Mathematics in a notation that is not read here."""

    text: str


@dataclass(frozen=True)
class Items:
    """Values in brackets; `left` is "" for a list without any, whose order does not matter, as in a set."""

    left: str
    items: tuple[Value, ...]
    right: str


@dataclass(frozen=True)
class Named:
    """x = 5, AB = 12, f(x) = 2x."""

    name: str
    value: Value
    sides: tuple[Value, Value] | None = None


@dataclass(frozen=True)
class Relation:
    """Two sides or more, between each two of them one of < <= = ≠; > is written as < the other way round."""

    sides: tuple[Value, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """An interval of real numbers; None is infinity on that side."""

    low: Value | None
    high: Value | None
    low_open: bool
    high_open: bool


@dataclass(frozen=True)
class Reals:
    """A union of intervals from left to right."""

    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True)
class Nothing:
    """The empty set, no solution."""


@dataclass(frozen=True)
class False_:
    """A statement that is not true, such as 5 = 4: no answer is equal to it."""

    text: str


Value = (
    Number | Compound | Numeral | Clock | Ratio | Formula | Text | Unread | Items | Named | Relation | Reals
    | Matrix | Nothing | False_
)  # fmt: skip


def tree_of(value: Value | None) -> Tree | None:
    """The formula that a number or a formula is; None for other values."""
    if isinstance(value, Formula):
        return value.tree
    if isinstance(value, Number):
        return ("number", value.value / 100 if value.percent else value.value)
    return None


def written(value: Value) -> str:
    """A value in one spelling: equal numbers are written alike, formulas that differ in more are not."""
    if isinstance(value, Number):
        return str(value.value / 100 if value.percent else value.value)
    if isinstance(value, Named):
        return written(value.value)
    if isinstance(value, (Formula, Unread)):
        return value.text.replace(" ", "")
    if isinstance(value, Text):
        return value.words
    if isinstance(value, (Items, Matrix, Relation, Reals)):
        return _written_parts(value)
    if isinstance(value, Numeral):
        return f"{value.digits}_{value.base}"
    if isinstance(value, Clock):
        time = f"{value.hour}:{value.minute:02}" + (f":{value.second:02}" if value.second else "")
        return f"{time} {value.half}".rstrip()
    if isinstance(value, Ratio):
        return ":".join(map(str, value.parts))
    if isinstance(value, Compound):
        return f"{value.base} {value.dimension}"
    return "nothing" if isinstance(value, Nothing) else value.text


def _written_parts(value: Items | Matrix | Relation | Reals) -> str:
    if isinstance(value, Items):
        items = [written(item) for item in value.items]
        if value.left in ("", "{"):  # in no order
            return ",".join(sorted(items))
        return value.left + ",".join(items) + value.right
    if isinstance(value, Matrix):
        return "[" + ";".join(",".join(map(written, row)) for row in value.rows) + "]"
    if isinstance(value, Relation):
        sides = [written(side) for side in value.sides]
        return "".join(side + sign for side, sign in zip(sides, (*value.signs, ""), strict=True))
    return " or ".join(
        f"{'(' if piece.low_open else '['}{'-oo' if piece.low is None else written(piece.low)},"
        f"{'oo' if piece.high is None else written(piece.high)}{')' if piece.high_open else ']'}"
        for piece in value.pieces
    )
