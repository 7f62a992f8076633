"""The quick start's task and model folder, and the GSM8K smoke run's inputs."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from megatron_dgpo.data import load_prompts, load_supervised
from megatron_dgpo.rewards import build_reward
from megatron_dgpo.types import Prompt, Sample

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"


def load_example(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "examples" / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make_data() -> ModuleType:
    return load_example("quickstart/make_data.py")


@pytest.fixture(scope="module")
def folder(make_data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quickstart")
    make_data.make(out, seed=0, traces=6000, train_prompts=1500, heldout_prompts=200)
    return out


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def solve(prompt: str) -> int:
    """A second solver, which knows the task by its text alone."""
    *assignments, question = prompt.split(",")
    values: dict[str, int] = {}
    for assignment in assignments:
        name, expression = assignment.split("=")
        values[name] = eval(expression, {}, values) % 10  # noqa: S307 - our own digits and signs
    return values[question.rstrip("?")]


def test_answers_are_right_and_prompts_have_the_shape(folder):
    shape = re.compile(r"[a-z]=\d(,[a-z]=[a-z][*+-]\d){2,4},[a-z]\?")
    questions = rows(folder / "train.jsonl") + rows(folder / "heldout.jsonl")
    assert all(shape.fullmatch(row["prompt"]) for row in questions)
    assert [int(row["answer"]) for row in questions] == [solve(row["prompt"]) for row in questions]
    signs = Counter(character for row in questions for character in row["prompt"] if character in "*+-")
    total = sum(signs.values())
    assert signs["*"] / total == pytest.approx(0.5, abs=4 * (0.25 / total) ** 0.5)


def test_heldout_prompts_are_seen_nowhere_else(folder):
    heldout = [row["prompt"] for row in rows(folder / "heldout.jsonl")]
    train = [row["prompt"] for row in rows(folder / "train.jsonl")]
    traces = [row["prompt"] for row in rows(folder / "sft.jsonl")]
    assert (len(set(heldout)), len(set(train)), len(set(traces))) == (200, 1500, 6000)
    assert not set(heldout) & (set(train) | set(traces))


def test_equal_seeds_give_equal_files_in_another_process(folder, tmp_path):
    command = [sys.executable, ROOT / "examples" / "quickstart" / "make_data.py", "--out", tmp_path]
    counts = ["--traces", "6000", "--train-prompts", "1500", "--heldout-prompts", "200"]
    subprocess.run([*map(str, command), *counts], check=True, capture_output=True)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes(), path


STEP = re.compile(r"(so|now|then) ([a-z])=([a-z])([*+-])(\d)=(\d)\4\5=(\d);")


@pytest.mark.parametrize("name", ["data", "data.partial"])
def test_a_folder_of_others_is_refused_and_kept(name, make_data, tmp_path, capsys):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("mine")
    few = ["--traces", "2", "--train-prompts", "2", "--heldout-prompts", "2"]
    with pytest.raises(SystemExit):
        make_data.main(["--out", str(tmp_path / "data"), *few])
    assert f"{tmp_path / name} is there and was not written by this script" in capsys.readouterr().err
    assert (tmp_path / name / "thesis.tex").read_text() == "mine"
    (tmp_path / name / "thesis.tex").unlink()
    for _ in range(2):  # what it wrote itself is replaced
        make_data.main(["--out", str(tmp_path / "data"), *few])


def test_the_teacher_errs_as_often_as_it_should(make_data):
    teacher = make_data.Teacher(random.Random(0))
    assert len(teacher.bad_facts) == 100 * make_data.BAD_FACT_SHARE
    assert all(wrong != a * b % 10 for (a, b), wrong in teacher.bad_facts.items())
    guesses = chances = right_guesses = 0
    wrong: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for problem in islice(make_data.problems(random.Random(1), heldout=False), 8000):
        trace = teacher.trace(problem)
        guessed = "guess" in trace
        steps = [match.groups() for match in STEP.finditer(trace)]
        value = problem.start
        for expected, (_, name, source, sign, digit, left, result) in zip(problem.steps, steps, strict=False):
            assert (name, source, sign, int(digit)) == (
                expected.target, expected.source, expected.op, expected.digit,
            )  # fmt: skip
            assert int(left) == value  # it goes on from what it found, right or wrong
            kind = "bad" if sign == "*" and (value, int(digit)) in teacher.bad_facts else sign
            right = {"*": value * int(digit), "+": value + int(digit), "-": value - int(digit)}[sign] % 10
            seen[kind] += 1
            wrong[kind] += int(result) != right
            value = int(result)
        chances += len(steps) + guessed
        guesses += guessed
        ending = STEP.sub("", trace)
        if guessed:
            assert ending[:-1] == "guess #" and ending[-1].isdigit()
            right_guesses += ending[-1] == str(problem.answer)
        else:
            assert ending == f"#{value}"
        assert guessed or len(steps) == len(problem.steps)
    rates = {"bad": make_data.BAD_FACT_RATE, **make_data.SLIP_RATE}
    for kind, rate in rates.items():  # within four standard errors
        error = (rate * (1 - rate) / seen[kind]) ** 0.5
        assert wrong[kind] / seen[kind] == pytest.approx(rate, abs=4 * error)
    rate = make_data.GUESS_RATE
    assert guesses / chances == pytest.approx(rate, abs=4 * (rate * (1 - rate) / chances) ** 0.5)
    rate = make_data.GUESS_RIGHT_RATE + (1 - make_data.GUESS_RIGHT_RATE) / 10
    assert right_guesses / guesses == pytest.approx(rate, abs=4 * (rate * (1 - rate) / guesses) ** 0.5)


def test_worked_answers_have_about_fifty_tokens(make_data):
    rng, lengths = random.Random(3), []
    for problem in islice(make_data.problems(random.Random(2), heldout=False), 4000):
        value, text = problem.start, ""
        for step in problem.steps:
            result = make_data.apply(step.op, value, step.digit)
            text += make_data.worked_step(rng.choice(("so", "now", "then")), step, value, result)
            value = result
        lengths.append(len(f"{text}#{value}") + 1)
    assert 48 < sum(lengths) / len(lengths) < 54


@pytest.mark.parametrize("loader", [AutoTokenizer, PreTrainedTokenizerFast])
def test_the_tokenizer_gives_the_text_back(folder, make_data, loader):
    tokenizer = loader.from_pretrained(folder / "model")
    assert len(tokenizer) == 49
    for text in ("now e=f*6=9*6=4;so c=e*6;#2", "guess #7", " a  b ", make_data.CHARACTERS):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text) and tokenizer.decode(ids) == text
    ids = tokenizer("#2<eos>")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids, skip_special_tokens=True) == "#2"


def test_the_model_folder_builds_the_model_of_the_recipe(folder):
    config = AutoConfig.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_config(config)
    hidden, kv, mlp = 64, 32, 192
    layer = 2 * hidden * hidden + hidden + 2 * (hidden * kv + kv) + 3 * hidden * mlp + 2 * hidden
    assert sum(parameter.numel() for parameter in model.parameters()) == 49 * hidden + 3 * layer + hidden
    assert config.vocab_size == 49 and config.tie_word_embeddings


def test_the_files_go_through_the_loaders_and_the_reward(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    examples = load_supervised(
        folder / "sft.jsonl",
        tokenizer,
        prompt_key="prompt",
        response_key="response",
        apply_chat_template=True,
        max_tokens=256,
    )
    assert len(examples) == 6000
    text = tokenizer.decode(examples[0].prompt_ids)
    assert text == f"<prompt>{rows(folder / 'sft.jsonl')[0]['prompt']}<answer>"
    keys = {"prompt_key": "prompt", "answer_key": "answer"}
    prompts = load_prompts(folder / "heldout.jsonl", tokenizer, **keys, apply_chat_template=True)
    samples = [Sample(p, 0, [1], [0.0], "stop", (), text=f"guess #{p.answer}") for p in prompts]
    assert all(isinstance(p, Prompt) and 0 <= max(p.token_ids) < 49 for p in prompts)
    build_reward("hash_answer").score(samples)
    assert all(one.reward == 1.0 for one in samples)


def test_gsm8k_inputs(tmp_path):
    data = SHARED / "gsm8k_test.jsonl"
    if not data.is_file():
        pytest.skip("no ../shared/data/gsm8k_test.jsonl")
    prepare = load_example("gsm8k_smoke/prepare.py")
    problems = prepare.read_problems(data)
    assert len(problems) == 1319 and all(re.fullmatch(r"-?\d+(\.\d+)?", p["answer"]) for p in problems)
    tokenizer = prepare.train_tokenizer([p["prompt"] for p in problems[:200]], 400)
    prepare.write_model(tmp_path / "model", tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "Héllo — it's $12.50,\n  ok?"
    assert again.decode(again(text)["input_ids"]) == text
    assert len(again) == AutoConfig.from_pretrained(tmp_path / "model").vocab_size == 400
    messages = [{"role": "user", "content": "hi"}]
    ids = again.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert again.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_gsm8k_inputs_are_refused_by_name(tmp_path):
    prepare = load_example("gsm8k_smoke/prepare.py")
    with pytest.raises(FileNotFoundError, match="no GSM8K file at"):
        prepare.find_data(tmp_path / "gone.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"question": "q", "answer": "no mark"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl, row 1: 'answer' does not end in '#### N'"):
        prepare.read_problems(tmp_path / "bad.jsonl")
