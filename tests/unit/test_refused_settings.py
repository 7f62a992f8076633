"""What is refused before anything is built, and in which words.

One line a problem on stderr, naming the key (or file and row) and what would be right; status 2.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
from place import Place

# --- settings ---------------------------------------------------------------------------------------


@dataclass
class Case:
    words: list[object]
    says: str
    """How the one error line goes on."""
    module: str = "train"
    world_size: int = 1
    local_world_size: int | None = None
    hf: dict[str, Any] = field(default_factory=dict)
    """Fields of the model folder's config.json to change; None takes one away."""
    files: dict[str, str | None] = field(default_factory=dict)
    """Files of the folder to write; None removes one."""


TP, PP, CP = (f"--parallel.{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context"))
BATCH = ["--train.prompts_per_step", 12, "--train.prompts_per_minibatch"]
SGLANG = [
    *("--rollout.engine", "sglang", "--rollout.sglang.launch.python", sys.executable),
    *("--rollout.sglang.launch.startup_timeout_seconds", 50, "--rollout.sglang.request_timeout_seconds", 50),
    *("--sync.timeout_seconds", 50),
]
"""Servers of which nothing is wrong."""
AUTO = ["--parallel.device", "auto"]
"""In place of the quick start's CPU."""
URL = "http://127.0.0.1:30000"
ASYNC = [*SGLANG, "--train.async_steps", 1]
STAGE = "--model.transformer.num_layers_in_first_pipeline_stage"

SETTINGS = {
    # fields of Megatron's that the project sets
    "field of the model": Case(
        ["--model.transformer.layernorm_epsilon", 0.1],
        "model.transformer.layernorm_epsilon: follows from the model's config.json and cannot be set",
    ),
    "field of the loss": Case(
        ["--model.transformer.calculate_per_token_loss", "false"],
        "model.transformer.calculate_per_token_loss: follows from the loss's global denominators and",
    ),
    "field of the optimizer": Case(
        ["--optimizer.megatron.lr", 0.1], "optimizer.megatron.lr: follows from optimizer.lr and cannot be set"
    ),
    "field of the buffers": Case(
        ["--ddp.use_distributed_optimizer", "false"],
        "ddp.use_distributed_optimizer: follows from the checkpoint format and cannot be set",
    ),
    "overlap of the buffers": Case(
        ["--ddp.overlap_param_gather", "true"],
        "ddp.overlap_param_gather: follows from the export of whole parameters after a step and cannot be",
    ),
    "overlap of the optimizer": Case(
        ["--optimizer.megatron.overlap_param_gather_with_optimizer_step", "true"],
        "optimizer.megatron.overlap_param_gather_with_optimizer_step: follows from the export of whole",
    ),
    # names
    "key": Case(["--train.step", 3], "train.step: unknown key (did you mean train.steps?)"),
    "key elsewhere": Case(["--train.lr", 3], "train.lr: unknown key (did you mean optimizer.lr?)"),
    "key without section": Case(["--seed", 3], "seed: unknown key (did you mean run.seed?)"),
    "key like none": Case(["--run.zzz", 3], "run.zzz: unknown key (--help lists all keys)"),
    "key of grpo": Case(["--algorithm.kl_coef", 0.1], "algorithm.kl_coef: not a setting of this algorithm"),
    "section": Case(["--optimiser.lr", 1], "optimiser: unknown section (did you mean optimizer?)"),
    "section like none": Case(["--bogus.key", 1], "bogus: unknown section (did you mean one of run, model, "),
    "key of the other run": Case(
        ["--algorithm.tau", 1], "algorithm: unknown section (did you mean one of run, ", module="sft"
    ),
    "value as section": Case(["--run.seed.x", 1], "run.seed: {'x': 1} is not an integer"),
    "section as value": Case(["--run", 1], "run: 1 is not a table"),
    "algorithm": Case(["--algorithm.name", "ppi"], "algorithm.name: 'ppi' is not one of dgpo, grpo, "),
    "algorithm by path": Case(["--algorithm.name", "mine:"], "algorithm.name: 'mine:'"),
    "algorithm that is not there": Case(
        ["--algorithm.name", "no.such:Thing"],
        "algorithm.name: no.such:Thing: it cannot be imported (No module named 'no')",
    ),
    "algorithm's own setting": Case(
        [
            *("--algorithm.name", "examples.custom_algorithm.cispo:Cispo"),
            *("--algorithm.options", "{ratio_cap = 0.5}"),
        ],
        "algorithm.name: examples.custom_algorithm.cispo:Cispo: options.ratio_cap: 0.5 must be at least 1",
    ),
    "critic of another algorithm": Case(
        ["--algorithm.name", "megatron_dgpo.algorithms.ppo:Ppo"],
        "algorithm.name: megatron_dgpo.algorithms.ppo:Ppo needs a critic, whose settings are those of 'ppo'",
    ),
    "critic's warm-up": Case(
        ["--algorithm.name", "ppo", "--train.steps", 9, "--algorithm.critic_warmup_steps", 9],
        "algorithm.critic_warmup_steps: 9 leaves the policy untrained in train.steps 9; use fewer",
    ),
    "servers on the trainer's GPUs": Case(
        [*SGLANG, *AUTO, "--rollout.sglang.launch.devices", "[1]"],
        "rollout.sglang.launch.devices: 1 is the trainer's, whose 2 ranks on this machine (LOCAL_WORLD_SIZE)",
        world_size=2,
    ),
    "GPUs of servers on a CPU": Case(
        [*SGLANG, "--rollout.sglang.launch.devices", "[1]"],
        "rollout.sglang.launch.devices: names GPUs, and with parallel.device = 'cpu' the servers compute",
    ),
    "devices of colocated servers": Case(
        [*SGLANG, *AUTO, "--rollout.sglang.colocate", "--rollout.sglang.launch.devices", "[1]"],
        "rollout.sglang.launch.devices: rollout.sglang.colocate puts the servers on the trainer's GPUs, from",
    ),
    "tau without credit": Case(
        ["--algorithm.name", "grpo", "--algorithm.tau", 0.5],
        "algorithm.tau: 0.5 has no effect with algorithm.credit = 'uniform'",
    ),
    "end of no schedule": Case(
        ["--algorithm.kappa_final", 0],
        "algorithm.kappa_final: 0.0 has no effect with algorithm.kappa_schedule = 'constant'",
    ),
    "schedule of auto": Case(
        ["--algorithm.tau", "auto", "--algorithm.tau_schedule", "linear"],
        "algorithm.tau_schedule: 'linear' has no effect with algorithm.tau = 'auto'",
    ),
    "auto at updates": Case(
        ["--algorithm.tau", "auto", "--algorithm.credit_timing", "update"],
        "algorithm.credit_timing: 'update' takes other scores than algorithm.tau = 'auto' is found for; use",
    ),
    "fraction of no auto": Case(
        ["--algorithm.effective_fraction", 0.5],
        "algorithm.effective_fraction: 0.5 has no effect with algorithm.tau = 1.0",
    ),
    "word for tau": Case(["--algorithm.tau", "fast"], "algorithm.tau: 'fast' is not a number"),
    "mask below 1": Case(
        ["--algorithm.sequence_mask_cap", 0.5], "algorithm.sequence_mask_cap: 0.5 is below 1"
    ),
    "algorithm as value": Case(["--algorithm", "grpo"], "algorithm: 'grpo' is not a table"),
    "reward": Case(
        ["--reward.name", "length"],
        "reward.name: 'length' is not one of exact_match, hash_answer, math_verify",
    ),
    # types and ranges (more of them in test_config.py)
    "type": Case(["--train.steps", "many"], "train.steps: 'many' is not an integer"),
    "no value": Case(["--optimizer.lr"], "optimizer.lr: True is not a number"),
    "no text": Case(["--run.folder"], "run.folder: needs a value after it"),
    "range": Case(["--rollout.top_p", 1.5], "rollout.top_p: 1.5: input should be less than or equal to 1"),
    "nan": Case(["--optimizer.lr", "nan"], "optimizer.lr: nan: input should be a finite number"),
    "inf": Case(["--algorithm.tau", "inf"], "algorithm.tau: inf: input should be a finite number"),
    # files
    "no file": Case(["{folder}/none.toml"], "{folder}/none.toml: cannot be read (No such file or directory)"),
    "a folder": Case(["{folder}"], "{folder}: cannot be read (Is a directory)"),
    "not TOML": Case(["{folder}/x.toml"], "{folder}/x.toml: not valid TOML (", files={"x.toml": "[train\n"}),
    "not in file": Case(
        ["{folder}/x.toml"], "train.stebs: unknown key (did you", files={"x.toml": "[train]\nstebs = 3"}
    ),
    "two files": Case(
        ["{folder}/x.toml"], "rollout.top_k: 2.5 is not an integer", files={"x.toml": "rollout.top_k=2.5"}
    ),
    # ranks
    "world": Case(
        [TP, 2], "parallel: 3 processes do not divide into replicas of 2 (tensor 2 x", world_size=3
    ),
    "small world": Case(
        [TP, 2, PP, 3], "parallel: 2 processes do not divide into replicas of 6 (", world_size=2
    ),
    "context": Case([CP, 2], "parallel.context_parallel_size: 2 is not supported yet; use 1", world_size=2),
    "sequence": Case(
        ["--parallel.sequence_parallel"],
        "parallel.sequence_parallel: needs parallel.tensor_model_parallel_size above 1",
    ),
    # batches
    "minibatch": Case(
        [*BATCH, 8], "train.prompts_per_step: 12 is not a multiple of train.prompts_per_minibatch 8"
    ),
    "large minibatch": Case(
        [*BATCH, 24], "train.prompts_per_step: 12 is not a multiple of train.prompts_per_mini"
    ),
    "minibatch and replicas": Case(
        [*BATCH, 6],
        "train.prompts_per_minibatch: 6 does not divide by 4 data-parallel replicas",
        world_size=4,
    ),
    "batch and replicas": Case(
        ["--train.batch_size", 9],
        "train.batch_size: 9 does not divide by 2 data-parallel replicas",
        module="sft",
        world_size=2,
    ),
    "warm-up": Case(
        ["--train.steps", 2, "--optimizer.warmup_steps", 9],
        "optimizer.warmup_steps: 9 is more than the run's 8 optimizer steps, ",
    ),
    "sft warm-up": Case(
        ["--train.steps", 19],
        "optimizer.warmup_steps: 20 is more than the run's 19 optimizer steps, ",
        module="sft",
    ),
    "learning rates": Case(["--optimizer.min_lr", 0.5], "optimizer.min_lr: 0.5 is above optimizer.lr 0.0002"),
    "tokens of a prompt": Case(
        ["--rollout.max_new_tokens", 8000, "--train.max_tokens_per_microbatch", 9000],
        "rollout.max_new_tokens: with data.max_prompt_tokens it makes 8064 tokens, and the model has",
    ),
    "tokens of a micro-batch": Case(
        ["--train.max_tokens_per_microbatch", 100],
        "train.max_tokens_per_microbatch: 100 does not hold the longest sequence of 160 tokens",
    ),
    "tokens of an example": Case(
        ["--data.max_tokens", 9000], "data.max_tokens: 9000 is above the model's", module="sft"
    ),
    # rollouts
    "importance cap": Case(
        ["--algorithm.tis_cap", 0.5], "algorithm.tis_cap: 0.5 would also weigh down tokens that engine and"
    ),
    "embedded oversampling": Case(
        ["--rollout.oversampling", 1.5],
        "rollout.oversampling: 1.5 is for an engine that can give samples up, and rollout.engine = ",
    ),
    "undersampling": Case(
        ["--rollout.oversampling", 0.5], "rollout.oversampling: 0.5: input should be greater than or equal"
    ),
    "async, embedded": Case(
        ["--train.async_steps", 1, "--algorithm.tis_cap", 2],
        "train.async_steps: 1 needs an engine beside the trainer, and rollout.engine = 'embedded' computes",
    ),
    "async, colocated": Case(
        [*ASYNC, "--algorithm.tis_cap", 2, "--rollout.sglang.colocate"],
        "train.async_steps: 1 needs engines that draw while the trainer computes, and with rollout.sglang.",
    ),
    "async, uncorrected": Case(
        ASYNC, "train.async_steps: 1 trains on samples of older weights, which algorithm.tis_cap corrects"
    ),
    "async by more": Case(["--train.async_steps", 2], "train.async_steps: 2: input should be 0 or 1"),
    # servers
    "no interpreter": Case(
        [*SGLANG, "--rollout.sglang.launch.python", "no/python"],
        "rollout.sglang.launch.python: no/python is not there; `make sglang` makes it",
    ),
    "too few GPUs": Case(
        [*SGLANG, *AUTO, "--rollout.sglang.launch.count", 2, "--rollout.sglang.launch.devices", "[1]"],
        "rollout.sglang.launch.devices: 1 GPUs for 2 servers of 1, which take 2",
    ),
    "one port for two": Case(
        [*SGLANG, "--rollout.sglang.launch.count", 2, "--rollout.sglang.launch.args.port", 30000],
        "rollout.sglang.launch.args: 2 servers cannot have one port",
    ),
    "argument of the run's": Case(
        [*SGLANG, "--rollout.sglang.launch.args.tp_size", 2],
        "rollout.sglang.launch.args: tp_size follows from rollout.sglang.launch.tensor_parallel_size",
    ),
    "servers and a router": Case(
        [*SGLANG, "--rollout.sglang.urls", f'["{URL}"]', "--rollout.sglang.router", "http://127.0.0.1:1"],
        "rollout.sglang.router: rollout.sglang.urls is set too",
    ),
    "no address": Case(
        [*SGLANG, "--rollout.sglang.urls", '["127.0.0.1:30000"]'],
        "rollout.sglang.urls: '127.0.0.1:30000' is not an address such as",
    ),
    "a server twice": Case(
        [*SGLANG, "--rollout.sglang.urls", f'["{URL}", "{URL}"]'],
        "rollout.sglang.urls: a server occurs twice",
    ),
    "colocated elsewhere": Case(
        [*SGLANG, "--rollout.sglang.urls", f'["{URL}"]', "--rollout.sglang.colocate"],
        "rollout.sglang.colocate: needs servers that the run starts; rollout.sglang.urls is set",
    ),
    "no architectures": Case(
        SGLANG, "model.path: {folder}/model/config.json names no architectures", hf={"architectures": None}
    ),
    "impatience": Case(
        [*SGLANG, "--rollout.sglang.request_timeout_seconds", 61],
        "rollout.sglang.request_timeout_seconds: a sample that took 61 is drawn again, and the other ranks "
        "wait for parallel.timeout_seconds 120; use at most half of that",
    ),
    "long responses": Case(
        [*SGLANG, "--rollout.sglang.request_timeout_seconds", 0, "--rollout.max_new_tokens", 48],
        "rollout.sglang.request_timeout_seconds: a sample that took 64.8 (60 s and rollout.max_new_tokens 48 "
        "at rollout.sglang.min_tokens_per_second 10) is drawn again, and the other ranks wait for "
        "parallel.timeout_seconds 120; use at most half of that, or at least 129.6 there",
    ),
    "colocated servers on several machines": Case(
        [*SGLANG, "--rollout.sglang.colocate", "true"],
        "rollout.sglang.colocate: 1 of the 2 ranks are on other machines, and weights go through the shared "
        "memory of one; give the servers GPUs of their own on each machine, or name servers in",
        world_size=2,
        local_world_size=1,
    ),
    "a server near every rank": Case(
        [*SGLANG, "--rollout.sglang.urls", '["http://localhost:30000"]'],
        "rollout.sglang.urls: 1 of the 2 ranks are on other machines, where http://localhost:30000 is",
        world_size=2,
        local_world_size=1,
    ),
    "weights from the server's own machine": Case(
        [*SGLANG, "--rollout.sglang.urls", f'["{URL}", "http://10.0.0.5:30000"]'],
        "rollout.sglang.address: '127.0.0.1' is where servers ask for weights, and http://10.0.0.5:30000 "
        "would ask its own machine; use 'hostname' or",
    ),
    "weights from the router's machine": Case(
        [*SGLANG, "--rollout.sglang.router", "http://router:30000"],
        "rollout.sglang.address: '127.0.0.1' is where servers ask for weights, and http://router:30000 would",
    ),
    "all of the positions": Case(
        [*SGLANG, "--rollout.max_new_tokens", 256 - 64],
        "rollout.max_new_tokens: with data.max_prompt_tokens it makes 256 tokens; of the model's 256 "
        "positions, SGLang keeps 6 free",
    ),
    "a small cache": Case(
        [*SGLANG, "--rollout.sglang.launch.args.max_total_tokens", 165],
        "rollout.max_new_tokens: with data.max_prompt_tokens it makes 160 tokens; of rollout.sglang.launch."
        "args.max_total_tokens 165, SGLang keeps 6 free",
    ),
    "a small context": Case(
        [*SGLANG, "--rollout.sglang.launch.args.context_length", 165],
        "rollout.max_new_tokens: with data.max_prompt_tokens it makes 160 tokens; of rollout.sglang.launch."
        "args.context_length 165, SGLang keeps 6 free",
    ),
    "patience": Case(
        [*SGLANG, "--sync.timeout_seconds", 6000],
        "sync.timeout_seconds: 6000 must be below parallel.timeout_seconds",
    ),
    # data files
    "no data": Case(["--data.train", "[]"], "data.train: at least one file is needed"),
    "missing data": Case(
        ["--data.train", '["{folder}/a.jsonl"]'], "data.train: {folder}/a.jsonl is not a file"
    ),
    "missing held-out": Case(["--evaluation.data", '["a.jsonl"]'], "evaluation.data: a.jsonl is not a file"),
    "data of a kind": Case(
        ["--data.train", '["{folder}/a.csv"]'],
        "data.train: {folder}/a.csv is neither .jsonl nor .parquet",
        files={"a.csv": "prompt,answer\n"},
    ),
    # the model's folder
    "no model": Case(["--model.path", "{folder}/no"], "model.path: {folder}/no/config.json is not there"),
    "no weights": Case(
        ["--model.init", "weights"],
        "model.path: {folder}/model has no safetensors (model.init = 'random' starts",
    ),
    "config not JSON": Case(
        [], "model.path: {folder}/model/config.json is not valid JSON (", files={"model/config.json": "{"}
    ),
    "config a list": Case(
        [],
        "model.path: {folder}/model/config.json does not hold a JSON object",
        files={"model/config.json": "[]"},
    ),
    "config without heads": Case(
        [],
        "model.path: {folder}/model/config.json has no whole number num_attention_heads",
        hf={"num_attention_heads": None},
    ),
    "config without width": Case(
        [], "model.path: {folder}/model/config.json has no whole number hidden_size", hf={"hidden_size": None}
    ),
    "config with text": Case(
        [], "model.path: {folder}/model/config.json has no whole number vocab_size", hf={"vocab_size": "many"}
    ),
    "family": Case(
        [],
        "model.path: {folder}/model: config.json: model_type 'gpt2' is not supported (supported:",
        hf={"model_type": "gpt2"},
    ),
    "another layout": Case(
        [],
        "model.path: {folder}/model: config.json: model_type 'gpt2' is not supported",
        hf={"model_type": "gpt2", "num_attention_heads": None, "n_head": 4},
    ),
    "activation": Case(
        [],
        "model.path: {folder}/model: config.json: hidden_act 'gelu' is not supported (silu is)",
        hf={"hidden_act": "gelu"},
    ),
    "window": Case(
        [],
        "model.path: {folder}/model: config.json: use_sliding_window True is not supported (false is)",
        hf={"use_sliding_window": True},
    ),
    "rope": Case(
        [],
        "model.path: {folder}/model: config.json: rope type 'yarn' is not supported (default is)",
        hf={"rope_parameters": {"rope_type": "yarn"}},
    ),
    "groups": Case(
        [],
        "model.path: {folder}/model: config.json: num_key_value_heads 3 does not divide num_",
        hf={"num_key_value_heads": 3},
    ),
    "groups with text": Case(
        [],
        "model.path: {folder}/model/config.json has no whole number num_key_value_heads",
        hf={"num_key_value_heads": "many"},
    ),
    "no counterpart": Case(
        [],
        "model.path: {folder}/model: config.json: num_experts 8 has no counterpart",
        hf={"num_experts": 8},
    ),
    "vocabulary": Case([], "model.path: the tokenizer's ids go up to ", hf={"vocab_size": 30}),
    "no tokenizer": Case(
        [], "model.path: {folder}/model/tokenizer.json is not there", files={"model/tokenizer.json": None}
    ),
    "neither tokenizer": Case(
        [],
        "model.path: {folder}/model/tokenizer.json is not there (nor vocab.json with merges.txt or tok",
        files={"model/tokenizer.json": None, "model/vocab.json": "{}"},
    ),
    "vocabulary file": Case(
        [],
        "model.path: the tokenizer's ids go up to 99, but config.json has vocab_size ",
        files={"model/tokenizer.json": None, "model/vocab.json": '{"a": 99}', "model/merges.txt": ""},
    ),
    "vocabulary file not JSON": Case(
        [],
        "model.path: {folder}/model/vocab.json is not valid JSON",
        files={"model/tokenizer.json": None, "model/vocab.json": "{", "model/merges.txt": ""},
    ),
    "ignored field": Case(
        ["--model.ignore_config_fields", '["zzz"]'],
        "model.path: {folder}/model: config.json: there is no zzz, which ignore_config_fields names",
    ),
    "ignored size": Case(
        ["--model.ignore_config_fields", '["vocab_size"]'],
        "model.path: {folder}/model: config.json: vocab_size cannot be ignored (qwen2 models compute with it",
    ),
    # what ends a response
    "stop token": Case(
        ["--rollout.stop_tokens", "[3, 99]"], "rollout.stop_tokens: 99 is no token id below the model's "
    ),
    "negative stop token": Case(["--rollout.stop_tokens", "[-1]"], "rollout.stop_tokens: -1 is no token id"),
    "stop token of another kind": Case(
        ["--rollout.stop_tokens", "[true]"],
        "rollout.stop_tokens.0: True: neither a token id nor the text of one token",
        module="sft",
    ),
    "stop tokens not a list": Case(["--rollout.stop_tokens", "a"], "rollout.stop_tokens: 'a' is not a list"),
    # the model and its split
    "heads": Case(
        [TP, 2],
        "parallel.tensor_model_parallel_size: 2 does not divide the model's 3 key/value heads",
        world_size=2,
        hf={"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16},
    ),
    "KV heads": Case(
        [TP, 4],
        "parallel.tensor_model_parallel_size: 4 does not divide the model's 2 key/value heads",
        world_size=4,
    ),
    "MLP": Case(
        [TP, 2],
        "parallel.tensor_model_parallel_size: 2 does not divide the model's 63 MLP columns",
        world_size=2,
        hf={"intermediate_size": 63},
    ),
    "layers": Case(
        [PP, 2],
        "parallel.pipeline_model_parallel_size: 3 of the model's 3 layers do not divide into 2 stages",
        world_size=2,
    ),
    "first stage": Case(
        [PP, 3, STAGE, 2],
        "parallel.pipeline_model_parallel_size: 1 of the model's 3 layers do not divide into 2",
        world_size=3,
    ),
    "first stage as text": Case(
        [STAGE, "two"], "model.transformer.num_layers_in_first_pipeline_stage: 'two' is not"
    ),
    # what needs Megatron
    "Megatron's model": Case(
        ["--model.transformer.attention_dropuot", 0.1],
        "model.transformer.attention_dropuot: Megatron has no such field (did you mean model.",
    ),
    "Megatron's optimizer": Case(
        ["--optimizer.megatron.loss_scal", 2],
        "optimizer.megatron.loss_scal: Megatron has no such field (did you mean",
    ),
    "Megatron's DDP": Case(["--ddp.zzz", 1], "ddp.zzz: Megatron has no such field"),
    "Megatron's types": Case(
        ["--ddp.overlap_grad_reduce", "yes"], "ddp.overlap_grad_reduce: 'yes' is not true or false"
    ),
    "Megatron's numbers": Case(
        ["--model.transformer.attention_dropout", "low"],
        "model.transformer.attention_dropout: 'low' is not a number",
    ),
    "Megatron's enumerations": Case(
        ["--model.transformer.attention_backend", "flsh"],
        "model.transformer.attention_backend: 'flsh' is not one of flash, fused, unfused, local, auto",
    ),
    "Megatron's precisions": Case(
        ["--optimizer.megatron.exp_avg_dtype", "half"],
        "optimizer.megatron.exp_avg_dtype: 'half' is not one of float32, bfloat16, float16, uint8",
    ),
    "precision of another optimizer": Case(
        ["--optimizer.megatron.exp_avg_dtype", "bfloat16"],
        "optimizer.megatron.exp_avg_dtype: 'bfloat16' needs use_precision_aware_optimizer = true beside it",
    ),
    "virtual pipeline": Case(
        ["--model.transformer.virtual_pipeline_model_parallel_size", 2],
        "model.transformer.virtual_pipeline_model_parallel_size: is not supported: a stage has one block of",
    ),
    "loss scale": Case(
        ["--optimizer.megatron.loss_scale", 2],
        "optimizer.megatron.loss_scale: follows from model.params_dtype and cannot be set",
    ),
    "field of another layer spec": Case(
        ["--model.transformer.attention_backend", "flash"],
        "model.transformer.attention_backend: only Transformer Engine's layers read it, and the layer spec "
        "is 'torch' (parallel.device is 'cpu')",
    ),
    "Transformer Engine": Case(
        ["--model.layer_spec", "transformer_engine", *AUTO],
        "model.layer_spec: 'transformer_engine' needs Transformer Engine and a GPU",
    ),
    "Transformer Engine on a CPU": Case(
        ["--model.layer_spec", "transformer_engine"],
        "model.layer_spec: 'transformer_engine' needs a GPU, and parallel.device is 'cpu'; use 'torch'",
    ),
    # the run's folder
    "used folder": Case(
        [],
        "run.folder: {folder}/run already holds a run (add --resume to go on with it, or",
        files={"run/metrics.jsonl": ""},
    ),
    "folder is a file": Case(
        [], "run.folder: {folder}/run cannot be made, since {folder}/run is a file; choose", files={"run": ""}
    ),
    "folder in a file": Case(
        ["--run.folder", "{folder}/run/a/b"],
        "run.folder: {folder}/run/a/b cannot be made, since {folder}/run is a",
        files={"run": ""},
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(
    name: str, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_dgpo.config import Config, SFTConfig
    from megatron_dgpo.entry import parse

    case = SETTINGS[name]
    if name == "Transformer Engine" and has_transformer_engine():
        pytest.skip("Transformer Engine is there")
    hf = json.loads((place.model / "config.json").read_text()) | case.hf
    (place.model / "config.json").write_text(json.dumps({k: v for k, v in hf.items() if v is not None}))
    for path, text in case.files.items():
        (place.folder / path).parent.mkdir(exist_ok=True)
        (place.folder / path).unlink(missing_ok=True)
        if text is not None:
            (place.folder / path).write_text(text)
    before = sorted(place.folder.rglob("*"))
    monkeypatch.setenv("WORLD_SIZE", str(case.world_size))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(case.local_world_size or case.world_size))
    with pytest.raises(SystemExit) as caught:
        parse(place.words(case.module, *case.words), Config if case.module == "train" else SFTConfig)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: " + case.says.replace("{folder}", str(place.folder))), line
    assert out == "" and sorted(place.folder.rglob("*")) == before


def has_transformer_engine() -> bool:
    from megatron_dgpo.mcore.layers import why_no_transformer_engine

    return not why_no_transformer_engine()


@pytest.mark.parametrize("module", ["train", "sft"])
def test_the_command_line_that_the_cases_change_is_right(module: str, place: Place) -> None:
    from megatron_dgpo.config import Config, SFTConfig
    from megatron_dgpo.entry import parse

    config = parse(place.words(module), Config if module == "train" else SFTConfig)
    assert config.run.folder == place.folder / "run"
    # Nothing that a case turns off is wrong by itself.
    passed_through = ["--model.transformer.attention_dropout", "0", "--ddp.bucket_size", "1000"]
    more = ["--resume", "--optimizer.megatron.exp_avg_dtype", "float32", *passed_through, STAGE, "3"]
    (place.folder / "run").mkdir()
    (place.folder / "run" / "metrics.jsonl").write_text("")
    assert parse(place.words(module, *more), type(config)).ddp == {"bucket_size": 1000}


def test_missing_keys_are_named(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_dgpo.config import Config
    from megatron_dgpo.entry import parse

    path = place.folder / "few.toml"
    path.write_text("[data]\n[train]\nsteps = 3\n[optimizer]\nlr = 1e-3\n[reward]\nname = 'exact_match'")
    with pytest.raises(SystemExit) as caught:
        parse([str(path), "--model.path", "x"], Config)
    assert caught.value.code == 2
    told = [
        line.partition(": missing, and there is no default") for line in capsys.readouterr().err.splitlines()
    ]
    names = [
        "data.train",
        "train.prompts_per_step",
        "train.samples_per_prompt",
        "train.prompts_per_minibatch",
    ]
    assert told == [(f"error: {name}", ": missing, and there is no default", "") for name in names]


def test_the_credit_log_needs_pyarrow(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_dgpo.config import Config
    from megatron_dgpo.entry import parse

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SystemExit):
        parse(place.words("train"), Config)
    assert capsys.readouterr().err.splitlines() == [
        "error: observe.credit_every: the credit log needs the package pyarrow; 0 goes without it"
    ]
    parse(place.words("train", "--observe.credit_every", 0), Config)
