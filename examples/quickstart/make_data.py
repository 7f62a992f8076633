"""Makes everything the quick start needs: a task, noisy teaching for it, and a tiny model folder.

The task is arithmetic modulo 10 along a chain of variables. A prompt and its worked answer:

    f=9,e=f*6,c=e*6,d=c+9,a=d*8,a?
    now e=f*6=9*6=4;so c=e*6=4*6=4;then d=c+9=4+9=3;so a=d*8=3*8=4;#4

The teacher of the supervised traces is unreliable in ways that reinforcement learning can repair: it
often guesses instead of working, and it has learnt a part of the multiplication table wrong.

Written to the output folder: sft.jsonl (prompt, response), train.jsonl and heldout.jsonl (prompt,
answer), and model/ (a Qwen2 config without weights, and a character-level tokenizer).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

NAMES = string.ascii_lowercase
CONNECTORS = ("so", "now", "then")
GUESS = "guess "
CHARACTERS = string.digits + string.ascii_lowercase + " +-*=,;?#"
PAD, EOS, PROMPT, ANSWER = "<pad>", "<eos>", "<prompt>", "<answer>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<answer>' + message['content'] + eos_token }}"
    "{% else %}{{ '<prompt>' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<answer>' }}{% endif %}"
)

GUESS_RATE = 0.3  # before each step, the teacher gives up and states an answer
GUESS_RIGHT_RATE = 0.6  # which is then right; otherwise it is any digit
BAD_FACT_SHARE = 0.5  # of the hundred products of two digits
BAD_FACT_RATE = 0.55  # how often one of those is taught wrong
SLIP_RATE = {"*": 0.10, "+": 0.03, "-": 0.03}  # how often any other step goes wrong
HELDOUT_SHARE = 0.1


@dataclass(frozen=True)
class Step:
    """target = source op digit, modulo 10."""

    target: str
    source: str
    op: str
    digit: int


@dataclass(frozen=True)
class Problem:
    first: str
    start: int
    steps: tuple[Step, ...]

    @property
    def prompt(self) -> str:
        chain = "".join(f",{step.target}={step.source}{step.op}{step.digit}" for step in self.steps)
        return f"{self.first}={self.start}{chain},{self.steps[-1].target}?"

    @property
    def answer(self) -> int:
        value = self.start
        for step in self.steps:
            value = apply(step.op, value, step.digit)
        return value


def apply(op: str, a: int, b: int) -> int:
    """a op b modulo 10."""
    return {"*": a * b, "+": a + b, "-": a - b}[op] % 10


def draw_problem(rng: random.Random) -> Problem:
    """Two to four steps; half the operations are products."""
    names = rng.sample(NAMES, rng.randint(2, 4) + 1)
    steps = tuple(
        Step(target, source, rng.choice("**+-"), rng.randrange(10))
        for source, target in zip(names, names[1:], strict=False)
    )
    return Problem(names[0], rng.randrange(10), steps)


def is_heldout(prompt: str) -> bool:
    """The split: a hash of the prompt that is the same on every machine and in every run."""
    return hashlib.sha256(prompt.encode()).digest()[0] < 256 * HELDOUT_SHARE


def problems(rng: random.Random, *, heldout: bool) -> Iterator[Problem]:
    """Distinct problems of one side of the split."""
    seen: set[str] = set()
    while True:
        problem = draw_problem(rng)
        if problem.prompt not in seen and is_heldout(problem.prompt) == heldout:
            seen.add(problem.prompt)
            yield problem


class Teacher:
    """Writes worked answers, some of them wrong."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        facts = [(a, b) for a in range(10) for b in range(10)]
        # What it takes a bad fact for is always the same wrong digit, as in someone who learnt it wrong.
        bad = rng.sample(facts, int(BAD_FACT_SHARE * len(facts)))
        self.bad_facts = {fact: self._wrong(apply("*", *fact)) for fact in bad}

    def trace(self, problem: Problem) -> str:
        """A worked answer. After a wrong step it goes on from the wrong value and says what it found."""
        text, value = "", problem.start
        for step in problem.steps:
            if self._rng.random() < GUESS_RATE:
                knows = self._rng.random() < GUESS_RIGHT_RATE
                return f"{text}{GUESS}#{problem.answer if knows else self._rng.randrange(10)}"
            result = self._compute(step.op, value, step.digit)
            text += worked_step(self._rng.choice(CONNECTORS), step, value, result)
            value = result
        return f"{text}#{value}"

    def _compute(self, op: str, a: int, b: int) -> int:
        right = apply(op, a, b)
        if op == "*" and (a, b) in self.bad_facts:
            return self.bad_facts[a, b] if self._rng.random() < BAD_FACT_RATE else right
        return self._wrong(right) if self._rng.random() < SLIP_RATE[op] else right

    def _wrong(self, right: int) -> int:
        return (right + self._rng.randint(1, 9)) % 10


def worked_step(connector: str, step: Step, value: int, result: int) -> str:
    """One step of a worked answer, such as "so c=e*6=4*6=4;"."""
    sides = f"{step.source}{step.op}{step.digit}={value}{step.op}{step.digit}"
    return f"{connector} {step.target}={sides}={result};"


def build_tokenizer() -> Qwen2Tokenizer:
    """One token a character; decoding gives the text back exactly.

    `AutoTokenizer` reads the tokenizer of every Qwen2 folder as Qwen2's byte-level BPE, whatever else
    the folder says, so this is one: without merges each character of the vocabulary is a token. Other
    characters would vanish; the task has none.
    """
    from transformers import Qwen2Tokenizer  # takes seconds to import

    specials = [PAD, EOS, PROMPT, ANSWER]
    byte_level = CHARACTERS.replace(" ", "\u0120")  # the byte-level alphabet's sign for a space
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(specials + list(byte_level))},
        merges=[],
        pad_token=PAD,
        eos_token=EOS,
        unk_token=None,
        extra_special_tokens=[PROMPT, ANSWER],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_model(folder: Path) -> None:
    """A folder as `from_pretrained` reads it, but without weights: training starts from random ones."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 192,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.08,  # at 0.02 a model this small needs far more steps
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "torch_dtype": "float32",
        **special,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(out: Path, *, seed: int, traces: int, train_prompts: int, heldout_prompts: int) -> None:
    """Write all files into `out`, which appears once they are complete; equal arguments give equal
    files. What this wrote before is replaced.

    Raises ValueError for a folder that holds anything else.
    """
    final, out = out, out.with_name(out.name + ".partial")
    for old in (out, final):
        if old.exists() and any(old.iterdir()) and not (old / "sft.jsonl").is_file():
            raise ValueError(f"{old} is there and was not written by this script; choose another folder")
        shutil.rmtree(old, ignore_errors=True)
    out.mkdir(parents=True)
    teacher = Teacher(random.Random(f"{seed} teacher"))
    taught = islice(problems(random.Random(f"{seed} traces"), heldout=False), traces)
    rows = [{"prompt": problem.prompt, "response": teacher.trace(problem)} for problem in taught]
    write_jsonl(out / "sft.jsonl", rows)
    for name, heldout, count in (("train", False, train_prompts), ("heldout", True, heldout_prompts)):
        chosen = islice(problems(random.Random(f"{seed} {name}"), heldout=heldout), count)
        write_jsonl(out / f"{name}.jsonl", [{"prompt": p.prompt, "answer": str(p.answer)} for p in chosen])
    write_model(out / "model")
    out.rename(final)
    mean = sum(len(row["response"]) + 1 for row in rows) / max(len(rows), 1)
    print(
        f"{final}: {traces} traces (mean {mean:.1f} tokens with <eos>), {train_prompts} training and "
        f"{heldout_prompts} held-out prompts, vocabulary {len(build_tokenizer())}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--traces", type=int, default=20_000, help="supervised traces")
    parser.add_argument("--train-prompts", type=int, default=4_096)
    parser.add_argument("--heldout-prompts", type=int, default=256)
    arguments = parser.parse_args(argv)
    for name in ("traces", "train_prompts", "heldout_prompts"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, expected at least 1")
    try:
        make(
            arguments.out,
            seed=arguments.seed,
            traces=arguments.traces,
            train_prompts=arguments.train_prompts,
            heldout_prompts=arguments.heldout_prompts,
        )
    except (ValueError, OSError) as error:
        parser.error(f"--out: {error}")


if __name__ == "__main__":
    main()
