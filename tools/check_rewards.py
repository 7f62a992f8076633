"""Scores a data set's gold answers, as if a policy had given each: whatever is not right would train wrong.

    python tools/check_rewards.py SOURCE... [--reward math_verify] [--response 'Answer: {}']

Every row whose own gold answer scores below 1 is named, as is every row on which the reward fails; then the
status is 1; it is 2 where the check itself ends early. --response is the text around an answer, {} standing
for it; by default each reward has its own.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from megatron_dgpo.data.problems import Problem, read_problems
from megatron_dgpo.evaluation import is_correct
from megatron_dgpo.observe.console import set_up_logging
from megatron_dgpo.progress import progress
from megatron_dgpo.rewards import Reward, build_reward
from megatron_dgpo.rewards.answers import gold_answer
from megatron_dgpo.types import Prompt, Sample

CHUNK = 256


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    parser.add_argument("--prompt-key", default="prompt")
    parser.add_argument("--answer-key", default="answer")
    parser.add_argument("--reward", default="math_verify", help="a reward's name, or package.module:function")
    parser.add_argument("--reward-timeout-seconds", type=float, default=10.0)
    parser.add_argument("--reward-workers", type=int, default=2)
    parser.add_argument("--response", help="the text of a response, with {} for the answer")
    options = parser.parse_args(argv)
    if options.response is not None and "{}" not in options.response:
        parser.error(f"--response {options.response!r} has no {{}} for the answer")
    return options


def as_sample(problem: Problem, reward: Reward, form: str | None) -> Sample:
    """The response that gives the gold answer."""
    gold = gold_answer(problem.answer)
    text = reward.response_with(gold) if form is None else form.replace("{}", gold)
    metadata = {"data_source": problem.data_source} if problem.data_source else {}
    prompt = Prompt(problem.id, (), problem.messages[-1]["content"], problem.answer, metadata)
    return Sample(prompt, 0, [], [], "stop", (), text=text)


def complaint(problem: Problem, sample: Sample) -> str | None:
    """What is wrong with a row; None where nothing is."""
    if sample.reward is None:
        return f"{problem.at}: FAILED, {sample.reward_error}"
    if not is_correct(sample.reward):
        text, gold = sample.text[-100:], problem.answer[-100:]
        return f"{problem.at}: scores {sample.reward:g}: {text!r} against gold {gold!r}"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    set_up_logging(False, 0)
    malformed: list[str] = []
    keys = {"prompt_key": options.prompt_key, "answer_key": options.answer_key}
    try:
        problems = list(read_problems(options.sources, **keys, malformed=malformed))
        reward = build_reward(
            options.reward,
            timeout_seconds=options.reward_timeout_seconds,
            num_workers=options.reward_workers,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    bad = list(malformed)
    try:
        with reward, progress("rewards", len(problems), "rows") as bar:
            for start in range(0, len(problems), CHUNK):
                part = problems[start : start + CHUNK]
                samples = [as_sample(problem, reward, options.response) for problem in part]
                reward.score(samples)
                bad += filter(None, map(complaint, part, samples))
                bar.update(len(part))
    except Exception as error:  # an uncaught one's status is 1 too
        traceback.print_exc()
        print(f"error: the check ended early: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    for line in bad:
        print(line)
    rows = len(problems) + len(malformed)
    print(f"{rows - len(bad)} of {rows} gold answers are right by the reward {options.reward}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
