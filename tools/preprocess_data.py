"""Turns data sets into one clean file of prompts and gold answers.

    python tools/preprocess_data.py SOURCE... --out problems.parquet [--tokenizer MODEL --max-prompt-tokens N]

A SOURCE is a .jsonl or .parquet file or hub://owner/name[/config][?split=train], in the layout of
DAPO-Math-17k or GSM8K, or plain (prompt, answer). Malformed rows, repeated prompts, prompts that occur with
different answers and prompts that are too long are left out; each reason is counted, and --rejected names
the rows. What is written has the columns prompt (chat messages), answer, data_source and id.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dgpo.data.problems import Problem, final, read_problems
from megatron_dgpo.data.rows import Renderer
from megatron_dgpo.data.tokenizer import encode, load_tokenizer
from megatron_dgpo.observe.console import set_up_logging
from megatron_dgpo.progress import watched

QUANTILES = (("shortest", 0.0), ("median", 0.5), ("95%", 0.95), ("99%", 0.99), ("longest", 1.0))


@dataclass
class Rejected:
    """Rows that are left out, by reason, in order."""

    rows: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, row: str) -> None:
        self.rows.setdefault(reason, []).append(row)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    parser.add_argument("--out", type=Path, required=True, help=".jsonl or .parquet")
    parser.add_argument("--rejected", type=Path, help="jsonl: reason and row of whatever was left out")
    parser.add_argument("--prompt-key", default="prompt")
    parser.add_argument("--answer-key", default="answer")
    parser.add_argument(
        "--final-answers", action="store_true", help="cut worked solutions to what follows ####"
    )
    parser.add_argument("--keep-duplicates", action="store_true")
    parser.add_argument("--strict", action="store_true", help="end at malformed rows, naming all of them")
    parser.add_argument("--tokenizer", type=Path, help="a model folder: lengths are tokens, not characters")
    parser.add_argument("--no-chat-template", action="store_true", help="for --tokenizer")
    parser.add_argument("--max-prompt-tokens", type=int, help="needs --tokenizer")
    options = parser.parse_args(argv)
    if options.out.suffix not in (".jsonl", ".parquet"):
        parser.error(f"--out {options.out}: expected .jsonl or .parquet")
    if options.max_prompt_tokens is not None and options.tokenizer is None:
        parser.error("--max-prompt-tokens needs --tokenizer, which says what a token is")
    return options


def read(options: argparse.Namespace, rejected: Rejected) -> list[Problem]:
    malformed: list[str] = []
    rows = read_problems(
        options.sources, prompt_key=options.prompt_key, answer_key=options.answer_key, malformed=malformed
    )
    problems = list(rows)
    for complaint in malformed:
        rejected.add("malformed", complaint)
    if malformed and options.strict:
        raise ValueError("\n".join(malformed))
    return problems


def distinct(problems: Sequence[Problem], rejected: Rejected) -> list[Problem]:
    """The first of each prompt; none of a prompt that occurs with different answers, since it cannot be
    told which is right."""
    by_prompt: dict[str, list[Problem]] = {}
    for problem in problems:
        by_prompt.setdefault(json.dumps(problem.messages), []).append(problem)
    kept = []
    for same in by_prompt.values():
        answers = sorted({final(problem.answer) for problem in same})
        if len(answers) > 1:
            for problem in same:
                rejected.add("different answers", f"{problem.at}: {problem.answer!r} among {answers}")
            continue
        kept.append(same[0])
        for problem in same[1:]:
            rejected.add("repeated", f"{problem.at}: as {same[0].at}")
    return kept


def lengths(options: argparse.Namespace, problems: Sequence[Problem]) -> list[int]:
    """Of the prompts: tokens where there is a tokenizer, else characters."""
    if options.tokenizer is None:
        return [sum(len(message["content"]) for message in problem.messages) for problem in problems]
    tokenizer = load_tokenizer(options.tokenizer)
    template = not options.no_chat_template
    render = Renderer(tokenizer, template)
    watch = watched(problems, "rendering", len(problems), "rows")
    texts = [render(problem.messages, problem.at) for problem in watch]
    return [len(ids) for ids in encode(tokenizer, texts, add_special_tokens=not template)]


def within(
    problems: Sequence[Problem], sizes: Sequence[int], most: int, rejected: Rejected
) -> tuple[list[Problem], list[int]]:
    kept, sizes_kept = [], []
    for problem, size in zip(problems, sizes, strict=True):
        if size <= most:
            kept.append(problem)
            sizes_kept.append(size)
        else:
            rejected.add("too long", f"{problem.at}: {size} tokens, at most {most}")
    return kept, sizes_kept


def as_row(problem: Problem, *, final_answer: bool) -> dict[str, Any]:
    return {
        "prompt": problem.messages,
        "answer": final(problem.answer) if final_answer else problem.answer,
        "data_source": problem.data_source or problem.id.rpartition(":")[0],
        "id": problem.id,
    }


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The file appears once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), partial)
    else:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(partial, path)


def report(options: argparse.Namespace, kept: int, sizes: Sequence[int], rejected: Rejected) -> None:
    print(f"{options.out}: {kept} problems")
    for reason, rows in rejected.rows.items():
        print(f"left out, {reason}: {len(rows)}, such as {rows[0]}")
    values = np.quantile(sizes, [q for _, q in QUANTILES])
    unit = "tokens" if options.tokenizer else "characters"
    spread = ", ".join(f"{name} {value:.0f}" for (name, _), value in zip(QUANTILES, values, strict=True))
    print(f"prompts' {unit}: mean {np.mean(sizes):.1f}, {spread}")


def main(argv: Sequence[str] | None = None) -> int:
    options, rejected = parse(argv), Rejected()
    set_up_logging(False, 0)
    try:
        problems = read(options, rejected)
        if not options.keep_duplicates:
            problems = distinct(problems, rejected)
        sizes = lengths(options, problems)
        if options.max_prompt_tokens is not None:
            problems, sizes = within(problems, sizes, options.max_prompt_tokens, rejected)
        if not problems:
            raise ValueError(f"no problem is left of {', '.join(options.sources)}")
        write(options.out, [as_row(p, final_answer=options.final_answers) for p in problems])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.rejected:
        rows = [{"reason": why, "row": row} for why, of in rejected.rows.items() for row in of]
        write(options.rejected.with_suffix(".jsonl"), rows)
    report(options, len(problems), sizes, rejected)
    return 0


if __name__ == "__main__":
    sys.exit(main())
