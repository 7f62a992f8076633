"""Rewards: right, wrong and failed; the worker pool's time limit; canonical answers."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from patience import patience, until

from megatron_dgpo.rewards import Outcome, Reward, build_reward, canonical_answer, register, reward_names
from megatron_dgpo.rewards.answers import canonical, explicit_answer, final_answer, gold_answer
from megatron_dgpo.rewards.pool import ProcessPool
from megatron_dgpo.types import FinishReason, Prompt, Sample

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k_test.jsonl"


def sample(text: str, gold: str, finish_reason: FinishReason = "stop") -> Sample:
    prompt = Prompt(id="p:1", token_ids=(1,), text="", answer=gold)
    return Sample(prompt, 0, [1], [0.0], finish_reason, (), text=text)


def score(name: str, *samples: Sample) -> list[float | None]:
    build_reward(name).score(samples)
    return [sample.reward for sample in samples]


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ValueError, match=r"unknown reward 'mathverify', expected one of \['exact_match',"):
        build_reward("mathverify")
    with pytest.raises(ValueError, match=r"does not take the options \['colour'\]"):
        build_reward("hash_answer", colour="red")
    with pytest.raises(ValueError, match="timeout_seconds is 0"):
        build_reward("hash_answer", timeout_seconds=0)
    assert {"exact_match", "hash_answer", "math_verify"} <= set(reward_names())


def test_hash_answer_takes_the_whole_last_answer():
    cases = [
        ("now e=f*6=9*6=4;#2", 1.0),
        ("#1 no, #2", 1.0),
        ("#2;", 0.0),
        ("#2 ", 0.0),
        ("#12", 0.0),
        ("#2#3", 0.0),
        ("2", 0.0),
        ("#", 0.0),
        ("", 0.0),
    ]
    samples = [sample(text, "2") for text, _ in cases]
    assert score("hash_answer", *samples) == [expected for _, expected in cases]
    assert samples[1].reward_parts == {"answered": 1.0} and samples[6].reward_parts == {"answered": 0.0}
    cut, aborted = sample("#2", "2", "length"), sample("#2", "2", "abort")
    assert score("hash_answer", cut, aborted) == [0.0, None]
    assert aborted.reward_error == "generation was aborted" and cut.reward_error is None


def test_exact_match():
    assert score("exact_match", sample(" yes\n", "yes"), sample("Yes", "yes"), sample("", "yes")) == [1, 0, 0]


MATH_CASES = [
    ("so \\boxed{18}", "16 - 3\n#### 18", 1.0),
    ("It is 18.", "#### 18", 1.0),
    ("#### 18 dollars", "#### 18", 1.0),
    ("#### $1,234.00", "1234", 1.0),
    ("Answer: $\\frac12$", "0.5", 1.0),
    ("**Answer:** 204", "204", 1.0),
    ("\\boxed{x^2+1}", "1+x^2", 1.0),
    ("\\boxed{\\frac{\\sqrt{8}}{2}}", "\\sqrt{2}", 1.0),
    ("\\boxed{x^2+1}", "1+x^3", 0.0),
    ("\\boxed{1e3}", "1000", 1.0),
    ("\\boxed{1e3}", "100", 0.0),
    ("\\boxed{2.5e-1}", "1/4", 1.0),
    ("\\boxed{5} answer: see above", "5", 1.0),
    ("\\boxed{5} answer: see above", "6", 0.0),
    ("\\boxed{5} answer: 6", "5", 1.0),
    ("\\boxed{5}\nanswer: 6", "5", 0.0),
    ("\\boxed{5}\nanswer: 6", "6", 1.0),
    ("first \\boxed{3}, then \\boxed{4}", "3", 0.0),
    ("\\boxed{(2,1)}", "(1,2)", 0.0),
    ("#### ", "3", 0.0),
    ("", "3", 0.0),
]


def test_math_verify_judges_equality():
    samples = [sample(text, gold) for text, gold, _ in MATH_CASES]
    assert score("math_verify", *samples) == [expected for *_, expected in MATH_CASES]
    assert samples[-1].reward_parts == {"answered": 0.0} and samples[0].reward_parts == {"answered": 1.0}


def test_math_verify_takes_no_number_from_a_response_that_was_cut():
    cut = [sample(text, "3", "length") for text in ("so x is 3", "so \\boxed{3", "so \\boxed{3} and")]
    assert score("math_verify", *cut) == [0.0, 0.0, 1.0]


def test_an_unreadable_gold_answer_is_a_failure_not_a_wrong_answer():
    bad = sample("\\boxed{3}", "???")
    assert score("math_verify", bad) == [None]
    assert (
        bad.reward_error == "UnreadableGold: gold answer '???' is not a number, an expression or a few words"
    )
    bad.prompt = sample("", "3").prompt  # scoring again starts afresh
    assert score("math_verify", bad) == [1.0] and bad.reward_error is None


def test_math_verify_works_outside_the_main_thread():
    right = sample("\\boxed{\\frac{2}{4}}", "0.5")
    thread = threading.Thread(target=score, args=("math_verify", right))
    thread.start()
    thread.join(timeout=patience())
    assert right.reward == 1.0


def test_the_pool_judges_as_the_calling_process_does_and_kills_what_hangs():
    samples = [sample(text, gold) for text, gold, _ in MATH_CASES]
    hanging = sample("\\boxed{9^{9^{9^9}}}", "3")
    with build_reward("math_verify", timeout_seconds=patience(), num_workers=2) as reward:
        reward.score(samples)
        assert [one.reward for one in samples] == [expected for *_, expected in MATH_CASES]
        reward._pool.timeout_seconds = 1.0
        reward.score([hanging])
        assert hanging.reward is None and "timed out after 1 s" in str(hanging.reward_error)
        reward._pool.timeout_seconds = patience()
        again = sample("\\boxed{7}", "7")
        reward.score([again] * 3)
        assert again.reward == 1.0


# Functions for the pool's workers, which import this file by name.
def double(number: int) -> dict[str, int]:
    print("a library prints to standard output")
    if number == 1:
        time.sleep(1000)
    if number == 2:
        raise KeyError("two")
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"double": 2 * number, "pid": os.getpid()}


def hold(path: str) -> dict[str, int]:
    """Never ends, and never lets another thread of the worker run: a long computation in C."""
    Path(path).touch()
    return {"slept": ctypes.PyDLL(None).sleep(1000)}


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    made = ProcessPool("test_rewards:double", 2, 3.0)
    yield made
    made.close()


def test_pool_keeps_the_order_and_names_each_failure(pool):
    results = pool.map([{"number": number} for number in range(12)])
    assert [r["double"] for r in results if isinstance(r, dict)] == [0] + [2 * n for n in range(4, 12)]
    assert results[1] == "timed out after 3 s"
    assert results[2] == "KeyError: 'two'"
    assert results[3] == "the worker process died with exit status -9"
    assert pool.map([]) == []


def test_pool_replaces_a_worker_that_died_between_calls(pool):
    results = pool.map([{"number": 5}] * 4)
    for pid in {result["pid"] for result in results}:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert [result["double"] for result in pool.map([{"number": 6}] * 4)] == [12] * 4


def test_pool_says_when_workers_cannot_start():
    with pytest.raises(RuntimeError, match="nowhere:nothing did not start"):
        ProcessPool("nowhere:nothing", 1, 1.0).map([{}])


def test_a_worker_ends_with_the_trainer():
    """Even in the middle of a call that never ends."""
    command = [sys.executable, "-m", "megatron_dgpo.rewards.worker", "test_rewards:double"]
    worker = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert worker.stdin is not None and worker.stdout is not None
    assert json.loads(worker.stdout.readline()) == {"ready": True}
    worker.stdin.write(json.dumps({"number": 1}) + "\n")
    worker.stdin.close()
    try:
        assert worker.wait(timeout=patience()) == 0
    finally:
        worker.kill()
        worker.stdout.close()


def test_workers_outlive_the_thread_that_called_first(monkeypatch: pytest.MonkeyPatch):
    """The kernel ends a worker with the thread that started it, and rollouts score in their own."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    pool, found = ProcessPool("test_rewards:double", 1, patience()), []
    try:
        for number in (4, 5):
            thread = threading.Thread(target=lambda n=number: found.extend(pool.map([{"number": n}])))
            thread.start()
            task = Path(f"/proc/self/task/{thread.native_id}")
            thread.join(timeout=patience())
            until(lambda task=task: not task.exists())  # the kernel has ended its thread as well
        found += pool.map([{"number": 6}])
    finally:
        pool.close()
    assert [r["double"] for r in found] == [8, 10, 12] and len({r["pid"] for r in found}) == 1


def test_workers_end_with_a_trainer_that_is_killed(tmp_path: Path):
    """In the middle of a computation that lets nothing else of the worker run."""
    started = tmp_path / "started"
    script = "import sys; from megatron_dgpo.rewards.pool import ProcessPool; "
    script += "ProcessPool('test_rewards:hold', 1, 1000.0).map([{'path': sys.argv[1]}])"
    trainer = subprocess.Popen(
        [sys.executable, "-c", script, str(started)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    workers: list[psutil.Process] = []
    try:
        until(started.exists)
        workers = psutil.Process(trainer.pid).children()
        trainer.kill()
        trainer.wait(timeout=patience())
        gone, left = psutil.wait_procs(workers, timeout=patience())
        assert len(gone) == 1 and not left
    finally:
        for process in (*workers, trainer):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def test_registering_a_reward():
    @register("test_length")
    class Length(Reward):
        def outcomes(self, samples):
            return [Outcome(float(len(sample.text))) for sample in samples]

        def canonical_answer(self, text):
            return text

    assert score("test_length", sample("abc", "x")) == [3.0]
    with pytest.raises(ValueError, match="registered already"):
        register("test_length")(type("Other", (Length,), {}))
    with pytest.raises(ValueError, match="a value or an error"):
        Outcome()


def test_explicit_answers():
    assert explicit_answer("a \\boxed{\\frac{1}{2}} b") == "\\frac{1}{2}"
    assert explicit_answer("\\boxed{1}\nAnswer: 2\n#### 3 \n") == "3"
    assert explicit_answer("\\boxed{1} Answer: 2\n#### 3 \nmore") == "1"
    assert explicit_answer("Answer: $\\boxed{5}$") == "5"
    assert explicit_answer("Answer: \n\n$$5$$\n\nmore") == "$$5$$"
    assert explicit_answer("Answer: \n") is None
    assert explicit_answer("7") is None
    assert gold_answer("x = 3 so\n#### 1,000") == "1,000" and gold_answer(" 5 ") == "5"


@pytest.mark.parametrize(
    ("forms", "expected"),
    [
        (["0.50", "1/2", "\\frac12", "\\dfrac{1}{2}", "$\\frac{2}{4}$", "50%", "50\\%", ".5"], "1/2"),
        (["1,000", "1e3", "1E+3", "1.0e3", "x = 1000", "1000 dollars", "y=1,000"], "1000"),
        (["1,234", "1234.0", "$1,234", "\\$1234", "1234 dollars", "1234."], "1234"),
        (["-3", "- 3", "\\frac{-6}{2}", "-\\frac{6}{2}"], "-3"),
        (["x^2 + 1", "\\(x^2+1\\)", "$x^2\\!+1$."], "x^2+1"),
        (["\\left(1, 2\\right)", "(1,2)", "$(1,\\,2)$"], "(1,2)"),
        (["\\text{(B)}", "(B)", "B"], "B"),
        (["2 pi"], "2pi"),
        (["1/0"], "1/0"),
    ],
)
def test_equal_answers_are_written_alike(forms, expected):
    assert [canonical(form) for form in forms] == [expected] * len(forms)


def test_canonical_answers_of_responses():
    assert canonical_answer("math_verify", "thus \\boxed{\\frac{4}{8}}") == "1/2"
    assert canonical_answer("math_verify", "so 3 + 4 gives 7.") == "7"
    assert canonical_answer("math_verify", "no idea") is None
    assert canonical_answer("hash_answer", "so;#2") == "2"
    assert canonical_answer("hash_answer", "so") is None and canonical_answer("hash_answer", "#") is None
    assert canonical_answer("exact_match", " yes ") == "yes" and canonical_answer("exact_match", " ") is None
    assert canonical_answer("math_verify", "so x = \\frac{1}{2}") == "1/2"
    assert final_answer("so x = -\\frac{1}{2}.") == "-\\frac{1}{2}" and final_answer("in 3 or 4") == "4"


LONG = 100_000
HOSTILE = {
    "spaces": "1" + " " * LONG + "!",
    "spaces after a dollar": "$" + " " * LONG + "x",
    "white space": "5 \t\n" * (LONG // 4) + "!",
    "words": "1" + " aa" * (LONG // 3) + "!",
    "words after a box": "\\boxed{5}answer:" + " aa" * (LONG // 3) + "!",
    "digits": "9" * LONG,
    "thousands": "1" + ",234" * (LONG // 4) + "!",
    "decimals": "1." * (LONG // 2),
    "a power": "1e" + "9" * LONG,
    "slashes": "1/" * (LONG // 2),
    "fractions": "\\frac{1" * (LONG // 7),
    "a fraction": "\\frac{-1}{" + "1" * LONG + "}",
    "half a fraction": "\\frac" + " " * LONG + "!",
    "texts": "\\text{" * (LONG // 6),
    "braces": "\\boxed{" + "{" * LONG,
    "answers": "answer " * (LONG // 7),
    "an answer": "answer" + " " * LONG,
    "answers' lines": "answer:\n" * (LONG // 8),
    "equations": "x=" * (LONG // 2),
    "hashes": "#" * LONG,
    "lines of hashes": "#### 5\n" * (LONG // 7) + "!",
    "boxes without braces": "\\boxed as " * (LONG // 10),
    "boxes in boxes": "\\boxed{" * (LONG // 7),
    "a list of boxes": "\\boxed{5} and " * (LONG // 14),
    "tags": "<answer>" * (LONG // 8),
    "questions": "\nQuestion: " * (LONG // 11),
    "asterisks": "*" * LONG,
    "emphasis": "**5 " * (LONG // 4),
    "dollars": "$5" * (LONG // 2),
    "verbs": "it is " * (LONG // 6),
    "letters": "(A) or " * (LONG // 7),
    "negations": "not " * (LONG // 4) + "A",
    "a word behind a number": "5 " + "a" * 200 + "1",
    "words behind a number": "5" + " ab" * 90 + "1",
    "a sentence": "It is " + "5 ab, cd " * 300,
    "commas": "5," * (LONG // 2),
    "a short hostile answer": "\\boxed{" + "{(" * 700 + "5}",
    "short powers": "9^" * 700 + "9",
    "short factorials": "9" + "!" * 1000,
    "short products": "9^999*" * 400 + "9",
    "short fractions": "\\frac{1}" * 300,
}
TIMED = """
import json, sys, time
from megatron_dgpo.rewards.answers import canonical, explicit_answer, final_answer, gold_answer
from megatron_dgpo.rewards.answers.choices import choice, chosen
from megatron_dgpo.rewards.answers.statements import answer_in, gold_in, spoken_answer
reads = [canonical, explicit_answer, final_answer, gold_answer, chosen, answer_in, gold_in, spoken_answer]
reads.append(lambda text: choice(text, finished=True))
for name, text in json.load(sys.stdin).items():
    start = time.process_time()
    for read in reads:
        read(text)
    print(json.dumps([name, time.process_time() - start]), flush=True)
"""


def test_hostile_texts_are_read_in_linear_time():
    """They are read in the trainer's process. Quadratic time would be minutes for one of them: it is given
    seconds, of CPU time, in a process that is ended where it takes more."""
    done = subprocess.run(
        [sys.executable, "-c", TIMED],
        input=json.dumps(HOSTILE),
        capture_output=True,
        text=True,
        timeout=patience(),
    )
    assert done.returncode == 0, done.stderr
    seconds = dict(json.loads(line) for line in done.stdout.splitlines())
    assert seconds.keys() == HOSTILE.keys() and max(seconds.values()) < 5, seconds
    assert canonical("9" * LONG) == "9" * LONG  # compared as it stands


@pytest.mark.skipif(not GSM8K.is_file(), reason="no ../shared/data/gsm8k_test.jsonl")
def test_every_gsm8k_gold_answer_is_readable_and_right():
    solutions = [json.loads(line)["answer"] for line in GSM8K.open()]
    others = [f"#### {int(canonical(gold_answer(s))) + 1}" for s in solutions]
    labelled = [s.replace("#### ", "A: ") for s in solutions]
    right = [sample(solution, solution) for solution in solutions]
    right += [sample(text, s) for text, s in zip(labelled, solutions, strict=True)]
    right += [sample(s, text) for text, s in zip(labelled, solutions, strict=True)]
    wrong = [sample(other, s) for other, s in zip(others, solutions, strict=True)]
    wrong += [sample(s, other) for other, s in zip(others, solutions, strict=True)]
    build_reward("math_verify").score(right + wrong)
    assert [one.reward for one in right] == [1.0] * 3 * 1319
    assert [one.reward for one in wrong] == [0.0] * 2 * 1319
