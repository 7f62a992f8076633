"""Answers: where a response announces one (`marks`), which it is (`statements`, `choices`), what it means
(`reading`) and when two are equal (`comparison`). Pure Python, in time linear in a response's length.

Where plain math-verify says otherwise, the reasons are these:

- A word is not the product of its letters: ABC is not BAC, and x2 is not 2x.
- A list, a range or a quantity in two units is not one of its numbers.
- Numbers that are known exactly are compared exactly, at any size; a decimal stands for another exact number
  only where it agrees with it in all its digits, six or more of them significant.
- A number keeps its base: 1011 in base 2 is neither 1011 nor 11.
- A chain of numbers that are not equal, such as 5 = 4, says nothing.
- Values in units that are known are compared in them: 5 cm is not 5 m, and is 50 mm.
- Letters with commas and no spaces between them are an order, as B,A,C; with spaces they are a list.
"""

from __future__ import annotations

from megatron_dgpo.rewards.answers.marks import explicit_answer, final_answer, gold_answer
from megatron_dgpo.rewards.answers.reading import canonical

__all__ = ["canonical", "explicit_answer", "final_answer", "gold_answer"]
