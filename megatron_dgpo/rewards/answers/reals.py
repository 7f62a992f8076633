"""Sets of real numbers: intervals, inequalities, unions, all but some points."""

from __future__ import annotations

from megatron_dgpo.rewards.answers import numerics
from megatron_dgpo.rewards.answers.formulas import names
from megatron_dgpo.rewards.answers.quantities import Clock, Compound, Number, Numeral, Ratio
from megatron_dgpo.rewards.answers.values import (
    Formula,
    Items,
    Matrix,
    Named,
    Piece,
    Reals,
    Relation,
    Value,
    tree_of,
)


def is_constant(side: Value) -> bool:
    if isinstance(side, Formula):
        return not names(side.tree) - {"e", "i"}
    if isinstance(side, Items):
        return all(is_constant(item) for item in side.items)
    return isinstance(side, (Number, Compound, Numeral, Matrix, Clock, Ratio))


def subject(relation: Relation) -> str:
    """The variable that a relation bounds, "" where it is not one variable."""
    for side in relation.sides:
        if isinstance(side, Formula) and side.tree[0] == "name":
            return str(side.tree[1])
    return ""


def as_reals(value: Value | None) -> Reals | None:
    """A value as a set of real numbers, where it is one."""
    if isinstance(value, Named):
        value = value.value
    if isinstance(value, Reals):
        return value
    if isinstance(value, Items) and value.left in ("(", "[") and len(value.items) == 2:
        low, high = value.items
        return Reals((Piece(_finite(low), _finite(high), value.left == "(", value.right == ")"),))
    if isinstance(value, Items) and value.left in ("", "{"):
        parts = [as_reals(item) for item in value.items]
        if all(isinstance(item, (Number, Formula)) for item in value.items):
            return from_left_to_right(tuple(Piece(item, item, False, False) for item in value.items))
        if all(part is not None for part in parts):
            return from_left_to_right(
                tuple(piece for part in parts if part is not None for piece in part.pieces)
            )
    if isinstance(value, (Number, Formula)):
        return Reals((Piece(value, value, False, False),))
    return _bounds(value) if isinstance(value, Relation) else None


def _bounds(relation: Relation) -> Reals | None:
    subject = [
        i for i, side in enumerate(relation.sides) if isinstance(side, Formula) and side.tree[0] == "name"
    ]
    if len(subject) != 1 or not all(is_constant(s) or i in subject for i, s in enumerate(relation.sides)):
        return None
    at, sides, signs = subject[0], relation.sides, relation.signs
    if signs == ("≠",):
        return without(Reals((Piece(None, None, True, True),)), sides[1 - at])
    if any(sign not in ("<", "<=") for sign in signs) or len(sides) > 3 or (len(sides) == 3 and at != 1):
        return None
    low = sides[at - 1] if at > 0 else None
    high = sides[at + 1] if at + 1 < len(sides) else None
    low_open = low is None or signs[at - 1] == "<"
    high_open = high is None or signs[at] == "<"
    low, high = (_finite(side) if side is not None else None for side in (low, high))
    return Reals((Piece(low, high, low_open or low is None, high_open or high is None),))


def _finite(value: Value) -> Value | None:
    if isinstance(value, Formula) and value.tree in (("infinity",), ("neg", ("infinity",))):
        return None
    return value


def height(value: Value | None) -> float | None:
    tree = tree_of(value)
    try:
        return None if tree is None else float(numerics.value(tree).real)
    except (numerics.NoValue, AttributeError, OverflowError):
        return None


def from_left_to_right(pieces: tuple[Piece, ...]) -> Reals:
    """From left to right, where all ends have values."""
    lows = [float("-inf") if piece.low is None else height(piece.low) for piece in pieces]
    if None in lows:
        return Reals(pieces)
    order = sorted(range(len(pieces)), key=lambda i: lows[i])  # type: ignore[arg-type, return-value]
    return Reals(tuple(pieces[i] for i in order))


def both(a: Reals | None, b: Reals | None) -> Reals | None:
    """The interval that a lower and an upper bound leave, in any order; None for other sets."""
    for one, other in ((a, b), (b, a)):
        if one and other and len(one.pieces) == len(other.pieces) == 1:
            low, high = one.pieces[0], other.pieces[0]
            if low.high is None and high.low is None and low.low is not None and high.high is not None:
                return Reals((Piece(low.low, high.high, low.low_open, high.high_open),))
    return None


def without(whole: Reals, points: Value) -> Reals | None:
    """A set of real numbers without single points."""
    if isinstance(points, Named):
        points = points.value
    removed = points.items if isinstance(points, Items) and points.left in ("", "{") else (points,)
    heights = [height(point) for point in removed]
    if None in heights or not all(isinstance(point, (Number, Formula)) for point in removed):
        return None
    pieces = list(whole.pieces)
    for at, point in sorted(zip(heights, removed, strict=True), key=lambda pair: pair[0] or 0.0):
        for index, piece in enumerate(pieces):
            low = float("-inf") if piece.low is None else height(piece.low)
            high = float("inf") if piece.high is None else height(piece.high)
            if low is not None and high is not None and at is not None and low < at < high:
                left = Piece(piece.low, point, piece.low_open, True)
                pieces[index : index + 1] = [left, Piece(point, piece.high, True, piece.high_open)]
                break
    return Reals(tuple(pieces))
