"""When two answers are equal: by what they mean, not by how they are written."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from megatron_dgpo.rewards.answers import numerics
from megatron_dgpo.rewards.answers.formulas import Tree, names
from megatron_dgpo.rewards.answers.quantities import Clock, Compound, Number, Numeral, Ratio
from megatron_dgpo.rewards.answers.reals import as_reals
from megatron_dgpo.rewards.answers.values import (
    False_,
    Formula,
    Items,
    Matrix,
    Named,
    Nothing,
    Reals,
    Relation,
    Text,
    Unread,
    Value,
    tree_of,
)

Judge = Callable[[str, str], bool]


def same(gold: Value, answer: Value, judge: Judge | None = None) -> bool:
    """Whether an answer is the gold answer. `judge` compares the texts of what is not read here."""
    if isinstance(gold, False_) or isinstance(answer, False_):
        return False
    if isinstance(gold, Unread) or isinstance(answer, Unread):
        return _same_unread(gold, answer, judge)
    for compare in (_same_numbers, _same_named, _same_reals, _same_items, _same_matrix):
        verdict = compare(gold, answer, judge)
        if verdict is not None:
            return verdict
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return _same_relations(gold, answer, judge)
    if type(gold) is not type(answer):
        return False
    if isinstance(gold, Clock) and isinstance(answer, Clock):
        times = (gold.hour, gold.minute, gold.second), (answer.hour, answer.minute, answer.second)
        return times[0] == times[1] and (gold.half == answer.half or "" in (gold.half, answer.half))
    if isinstance(gold, Formula) and isinstance(answer, Formula):
        return _same_trees(gold.tree, answer.tree)
    return gold == answer


def _same_unread(gold: Value, answer: Value, judge: Judge | None) -> bool:
    texts = [value.text if isinstance(value, Unread) else None for value in (gold, answer)]
    if texts[0] is not None and texts[1] is not None:
        if texts[0].replace(" ", "") == texts[1].replace(" ", ""):
            return True
        return judge is not None and judge(texts[0], texts[1])
    return False


def _same_numbers(gold: Value, answer: Value, judge: Judge | None) -> bool | None:
    del judge
    if isinstance(gold, Ratio) and len(gold.parts) == 2 and isinstance(answer, Number):
        return gold.parts[1] != 0 and gold.parts[0] / gold.parts[1] == answer.value
    if isinstance(gold, Ratio) and isinstance(answer, Ratio):
        a, b = gold.parts, answer.parts
        return (
            len(a) == len(b)
            and all(a[0] * y == b[0] * x for x, y in zip(a, b, strict=True))
            and any(a) == any(b)
        )
    if isinstance(gold, Number) and isinstance(answer, Number):
        return _same_quantities(gold, answer) or rounded(gold, answer) or rounded(answer, gold)
    for one, other in ((gold, answer), (answer, gold)):
        if isinstance(one, Compound):
            if isinstance(other, Number):
                return other.dimension() == one.dimension and other.base() == one.base
            return one == other
        if isinstance(one, Numeral) and isinstance(other, Number):
            return one.base == 10 and Fraction(one.digits) == other.value
    trees = tree_of(gold), tree_of(answer)
    if trees[0] is None or trees[1] is None:
        return None
    return _same_trees(trees[0], trees[1]) or rounded(gold, answer) or rounded(answer, gold)


def _same_trees(a: Tree, b: Tree) -> bool:
    return a == b or numerics.equal(a, b)


def _same_quantities(gold: Number, answer: Number) -> bool:
    """Per cent are hundredths or stand for themselves; a unit counts where both have one that is known."""
    if gold.unit and answer.unit:
        if gold.dimension() != answer.dimension():
            return False
        return gold.base() == answer.base()
    if gold.percent != answer.percent:
        share, other = (gold, answer) if gold.percent else (answer, gold)
        return other.value in (share.value, share.value / 100)
    return gold.value == answer.value


def rounded(exact: Value, decimal: Value) -> bool:
    """Whether a decimal of six significant digits or more is the other, exact value, rounded or cut there."""
    if (
        not isinstance(decimal, Number)
        or decimal.decimals is None
        or decimal.significant < 6
        or decimal.percent
    ):
        return False
    if isinstance(exact, Number) and exact.decimals is not None:
        return False
    tree = tree_of(exact)
    if tree is None or names(tree) - {"e"}:
        return False
    try:
        found = numerics.value(tree)
    except numerics.NoValue:
        return False
    behind, last = abs(found) - abs(_mp(decimal.value)), _mp(Fraction(1, 10**decimal.decimals))
    return bool(found * _mp(decimal.value) > 0 and -last * 0.5 <= behind < last)


def _mp(value: Fraction) -> Any:
    return numerics.value(("number", value))


def _same_named(gold: Value, answer: Value, judge: Judge | None) -> bool | None:
    if isinstance(gold, Named) and isinstance(answer, Named):
        if gold.name == answer.name or _function_names(gold.name, answer.name):
            return same(gold.value, answer.value, judge)
        return (
            gold.sides is not None and answer.sides is not None and _same_equations(gold.sides, answer.sides)
        )
    for one, other in ((gold, answer), (answer, gold)):
        if isinstance(one, Named):
            if isinstance(other, Relation):
                return one.sides is not None and _same_equations(one.sides, other.sides)
            if isinstance(other, (Text, Items)) and isinstance(one.value, Items) != isinstance(other, Items):
                return False
            return same(one.value, other, judge) if one is gold else same(other, one.value, judge)
    return None


def _function_names(a: str, b: str) -> bool:
    """y and f(x) are names of the same."""
    return {a, b} & {"y"} != set() and any(re.fullmatch(r"[fgh]\(x\)", name) for name in (a, b))


def _same_equations(gold: Sequence[Value], answer: Sequence[Value]) -> bool:
    """Whether two equations differ by a constant factor."""
    trees = [tree_of(side) for side in (*gold, *answer)]
    if len(trees) != 4 or None in trees:
        return False
    first, second = (("+", trees[i], ("neg", trees[i + 1])) for i in (0, 2))
    return _proportional(first, second, positive=False)


def _proportional(first: Tree, second: Tree, positive: bool) -> bool:
    variables = (names(first) | names(second)) - {"e"}
    if not variables:
        return False
    ratios = []
    for point in numerics.points(variables):
        try:
            a, b = numerics.value(first, point), numerics.value(second, point)
        except numerics.NoValue:
            continue
        if abs(b) < 1e-30 or abs(a) < 1e-30:
            return False
        ratios.append(a / b)
    if not ratios or any(abs(r - ratios[0]) > abs(ratios[0]) * 1e-30 for r in ratios):
        return False
    return not positive or bool(ratios[0].real > 0)


def _same_reals(gold: Value, answer: Value, judge: Judge | None) -> bool | None:
    if isinstance(gold, Nothing) or isinstance(answer, Nothing):
        return isinstance(gold, Nothing) and isinstance(answer, Nothing)
    kinds = (Reals, Relation)
    if not isinstance(gold, kinds) and not isinstance(answer, kinds):
        return None
    a, b = as_reals(gold), as_reals(answer)
    if a is None or b is None:
        return None
    return len(a.pieces) == len(b.pieces) and all(
        (x.low_open, x.high_open) == (y.low_open, y.high_open)
        and _same_ends(x.low, y.low, judge)
        and _same_ends(x.high, y.high, judge)
        for x, y in zip(a.pieces, b.pieces, strict=True)
    )


def _same_ends(a: Value | None, b: Value | None, judge: Judge | None) -> bool:
    return a is b if a is None or b is None else same(a, b, judge)


def _same_relations(gold: Relation, answer: Relation, judge: Judge | None) -> bool:
    if gold.signs != answer.signs:
        return False
    if all(same(a, b, judge) for a, b in zip(gold.sides, answer.sides, strict=True)):
        return True
    if gold.signs == ("=",):
        if same(gold.sides[0], answer.sides[1]) and same(gold.sides[1], answer.sides[0]):
            return True
        return _same_equations(gold.sides, answer.sides)
    trees = [tree_of(side) for side in (*gold.sides, *answer.sides)]
    if len(trees) != 4 or None in trees:
        return False
    first, second = (("+", trees[i], ("neg", trees[i + 1])) for i in (0, 2))
    return _proportional(first, second, positive=gold.signs != ("≠",))


def _same_items(gold: Value, answer: Value, judge: Judge | None) -> bool | None:
    if not isinstance(gold, Items) and not isinstance(answer, Items):
        return None
    if isinstance(gold, Items) and isinstance(answer, Matrix):
        answer = _vector(answer) or answer
    if isinstance(answer, Items) and isinstance(gold, Matrix):
        gold = _vector(gold) or gold
    if not isinstance(gold, Items) or not isinstance(answer, Items):
        return False
    named = _same_assignments(gold, answer, judge)
    if named is not None:
        return named
    kinds = {gold.left, answer.left}
    if "(" in kinds or "[" in kinds:
        if "{" in kinds or not _same_brackets(gold, answer):
            return False
        return _in_order(gold.items, answer.items, judge)
    return _in_any_order(gold.items, answer.items, judge)


def _same_brackets(gold: Items, answer: Items) -> bool:
    if gold.left == "" or answer.left == "":
        return (gold.left, gold.right) != ("(", "]") and (answer.left, answer.right) != ("(", "]")
    if (
        len(gold.items) > 2
        and gold.left + gold.right in ("()", "[]")
        and answer.left + answer.right in ("()", "[]")
    ):
        return True
    return (gold.left, gold.right) == (answer.left, answer.right)


def _same_assignments(gold: Items, answer: Items, judge: Judge | None) -> bool | None:
    """x = 1, y = 2 and the pair (1, 2), or the same names in another order."""
    named = [all(isinstance(item, Named) for item in value.items) for value in (gold, answer)]
    if not any(named):
        return None
    if all(named):
        return _in_any_order(gold.items, answer.items, judge)
    one, other = (gold, answer) if named[0] else (answer, gold)
    values = tuple(item.value for item in one.items if isinstance(item, Named))
    names = {re.sub(r"_.*|\d|'", "", item.name) for item in one.items if isinstance(item, Named)}
    if len(names) == 1 and other.left in ("", "{"):
        return _in_any_order(values, other.items, judge)
    return other.left != "{" and _in_order(values, other.items, judge)


def _vector(matrix: Matrix) -> Items | None:
    cells = [cell for row in matrix.rows for cell in row]
    return Items("(", tuple(cells), ")") if len(matrix.rows) in (1, len(cells)) else None


def _in_order(gold: Sequence[Value], answer: Sequence[Value], judge: Judge | None) -> bool:
    return len(gold) == len(answer) and all(same(a, b, judge) for a, b in zip(gold, answer, strict=True))


def _in_any_order(gold: Sequence[Value], answer: Sequence[Value], judge: Judge | None) -> bool:
    """As sets: what occurs twice counts once."""
    if _in_order(gold, answer, judge):
        return True
    if max(len(gold), len(answer)) > 60:
        return False
    return all(any(same(a, b, judge) for b in answer) for a in gold) and all(
        any(same(a, b, judge) for a in gold) for b in answer
    )


def _same_matrix(gold: Value, answer: Value, judge: Judge | None) -> bool | None:
    if not isinstance(gold, Matrix) or not isinstance(answer, Matrix):
        return None
    return len(gold.rows) == len(answer.rows) and all(
        _in_order(a, b, judge) for a, b in zip(gold.rows, answer.rows, strict=True)
    )
