"""Makes the inputs of the GSM8K smoke run: normalised problems and a tiny model to train on them.

The model folder holds a Qwen2 config and a byte-level BPE tokenizer trained on the problems, but no
weights: training starts from random ones. So the run shows that every stage works on real problems
and with a real tokenizer; it does not learn mathematics.

Written to the output folder: train.jsonl and heldout.jsonl (prompt, answer) and model/.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dgpo.data.rows import require
from megatron_dgpo.data.sources import read_rows, where

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

DEFAULT_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "gsm8k_test.jsonl"
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def find_data(given: Path | None) -> Path:
    """The file given, or $GSM8K, or the default place; FileNotFoundError where it is not there."""
    if given is None and os.environ.get("GSM8K"):
        given = Path(os.environ["GSM8K"])
    path = given or DEFAULT_DATA
    if not path.is_file():
        raise FileNotFoundError(
            f"no GSM8K file at {path}; give one with --data or GSM8K=, as lines of "
            '{"question": ..., "answer": "... #### N"}'
        )
    return path


def read_problems(path: Path) -> list[dict[str, str]]:
    """Rows of prompt, final answer and worked solution. Raises ValueError, naming the row, for bad ones."""
    problems = []
    for number, row in read_rows(path, ["question", "answer"]):
        at = where(path, number)
        question, solution = require(row, "question", at), require(row, "answer", at)
        answer = solution.rpartition("####")[2].strip() if "####" in solution else ""
        if not answer:
            raise ValueError(f"{at}: 'answer' does not end in '#### N'")
        problems.append({"prompt": question, "answer": answer.replace(",", ""), "solution": solution})
    return problems


def train_tokenizer(texts: list[str], vocab_size: int) -> Qwen2Tokenizer:
    """Qwen2's kind of tokenizer with a small vocabulary of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer  # takes seconds to import

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    specials = [PAD, START, END]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        pad_token=PAD,
        eos_token=END,
        unk_token=None,
        extra_special_tokens=[START],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_model(folder: Path, tokenizer: Qwen2Tokenizer) -> None:
    """The folder as `from_pretrained` reads it, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 192,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "torch_dtype": "float32",
        **special,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")


def write_jsonl(path: Path, problems: list[dict[str, str]]) -> None:
    rows = ({"prompt": problem["prompt"], "answer": problem["answer"]} for problem in problems)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help=f"GSM8K .jsonl file (default: $GSM8K, or {DEFAULT_DATA})")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--heldout", type=int, default=64, help="problems kept for evaluation, from the end")
    parser.add_argument("--vocab-size", type=int, default=512)
    arguments = parser.parse_args()
    try:
        problems = read_problems(find_data(arguments.data))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if not 0 < arguments.heldout < len(problems):
        parser.error(f"--heldout is {arguments.heldout}, expected 1 to {len(problems) - 1}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(arguments.out / "train.jsonl", problems[: -arguments.heldout])
    write_jsonl(arguments.out / "heldout.jsonl", problems[-arguments.heldout :])
    texts = [problem["prompt"] + "\n" + problem["solution"] for problem in problems]
    tokenizer = train_tokenizer(texts, arguments.vocab_size)
    write_model(arguments.out / "model", tokenizer)
    print(
        f"{arguments.out}: {len(problems) - arguments.heldout} training and {arguments.heldout} held-out "
        f"problems, vocabulary {len(tokenizer)}"
    )


if __name__ == "__main__":
    main()
