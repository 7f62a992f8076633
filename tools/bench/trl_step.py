"""Times RL steps of TRL's GRPOTrainer; `vs_trl.py` runs this with the python of TRL's own environment.

One RL step is a rollout batch (all of it generated in one call) and `--minibatches` updates on it. Every
step prints one JSON line, with the field names of this project's metrics.jsonl:
{"step", "phase": "train", "time/step" (seconds), "response_tokens", "memory/peak_rss_bytes"}.
Under torchrun the processes share the batch; tokens and memory are then sums over them.

Chosen in TRL's favour: no gradient checkpointing, logging, saving or data workers; float32 rather than
bfloat16, which CPUs are slow at; no reference model where beta is 0; no second log-prob pass beyond the
one that TRL makes itself.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder with weights and tokenizer")
    parser.add_argument("--data", required=True, help=".jsonl file with prompt and answer")
    # Of an RL step: prompts, samples of each prompt, updates, and backward passes of an update.
    for name in ("steps", "prompts", "samples", "minibatches", "accumulate", "max-new-tokens", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    # beta: coefficient of the KL penalty.
    for name in ("temperature", "beta", "lr", "adam-beta2", "weight-decay", "clip-grad"):
        parser.add_argument(f"--{name}", type=float, required=True)
    return parser.parse_args()


class StepMeter(TrainerCallback):
    """Reports an RL step when the last of its updates is done; the clock never stops in between, so that
    loading data and building batches count."""

    def __init__(self, updates_per_step: int, device: torch.device) -> None:
        self._updates_per_step = updates_per_step
        self._device = device
        self._tokens = 0

    def reward(
        self, completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any
    ) -> list[float]:
        """1 where the text after the last # is the answer; TRL hands over ids without padding."""
        self._tokens += sum(len(ids) for ids in completion_ids)
        return [
            float(text.rpartition("#")[2] == gold) for text, gold in zip(completions, answer, strict=True)
        ]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step % self._updates_per_step:
            return
        seconds = time.perf_counter() - self._start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
        totals = torch.tensor([self._tokens, peak], dtype=torch.int64, device=self._device)
        if dist.is_initialized():
            dist.all_reduce(totals)
        tokens, peak = totals.tolist()
        row = {
            "step": state.global_step // self._updates_per_step,
            "phase": "train",
            "time/step": seconds,
            "response_tokens": tokens,
            "memory/peak_rss_bytes": peak,
        }
        if state.is_world_process_zero:
            print(json.dumps(row), flush=True)
        self._tokens, self._start = 0, time.perf_counter()


def main() -> None:
    arguments = parse_arguments()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    samples = arguments.prompts * arguments.samples
    parts = arguments.minibatches * arguments.accumulate * world
    if samples % parts:
        raise ValueError(f"{samples} samples do not divide into {parts} backward passes over all processes")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)

    def as_text(row: dict[str, Any]) -> dict[str, Any]:
        chat = [{"role": "user", "content": row["prompt"]}]
        return {"prompt": tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)}

    with tempfile.TemporaryDirectory() as folder:
        data = load_dataset("json", data_files=arguments.data, split="train", cache_dir=folder).map(as_text)
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=samples // parts,
            gradient_accumulation_steps=arguments.accumulate,
            steps_per_generation=arguments.minibatches * arguments.accumulate,
            num_generations=arguments.samples,
            num_iterations=1,
            max_steps=arguments.steps * arguments.minibatches,
            max_completion_length=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=0,
            beta=arguments.beta,
            loss_type="grpo",
            learning_rate=arguments.lr,
            lr_scheduler_type="constant",
            adam_beta2=arguments.adam_beta2,
            weight_decay=arguments.weight_decay,
            max_grad_norm=arguments.clip_grad,
            shuffle_dataset=False,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=arguments.seed,
        )
        meter = StepMeter(arguments.minibatches, config.device)
        trainer = GRPOTrainer(
            model,
            meter.reward,
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[meter],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    main()
