"""What a run will do, from its settings and the model's config.json alone.

Who computes what, how many samples and tokens, what weights and checkpoints take. A dry run prints it; it
needs neither torch nor a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_dgpo.config import Config

GIB = 1 << 30
BYTES = {"float32": 4, "bfloat16": 2}
"""Of a number, by its precision."""


def plan(config: Config, world_size: int, hf: Mapping[str, Any] | None, *, local: int) -> list[str]:
    """Lines of text; `hf`: the model's config.json, None where it is not there; `local`: ranks of a
    machine."""
    p = config.parallel
    replica = p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size
    dp = max(1, world_size // replica)
    lines = [
        f"ranks: {world_size} = tensor {p.tensor_model_parallel_size} x pipeline "
        f"{p.pipeline_model_parallel_size} x context {p.context_parallel_size} x data {dp}",
        *_step(config, world_size, dp),
        *_engines(config, local, max(1, world_size // local)),
    ]
    if hf is not None:
        lines += _weights(config, replica, dp, hf)
        lines += _reference(config, replica, dp, local, hf)
        lines += _checkpoints(config, replica, dp, local, hf)
    return lines


def _step(config: Config, world_size: int, dp: int) -> Iterator[str]:
    t, r = config.train, config.rollout
    samples = t.prompts_per_step * t.samples_per_prompt
    updates = t.epochs_per_rollout * math.ceil(t.prompts_per_step / t.prompts_per_minibatch)
    longest = config.data.max_prompt_tokens + r.max_new_tokens
    drawn = config.prompts_per_draw * t.samples_per_prompt
    more = f", of {drawn:,} drawn" if drawn > samples else ""
    more += f", in up to {r.max_rounds} draws until enough groups differ" if r.dynamic_sampling else ""
    yield (
        f"step: {t.prompts_per_step:,} prompts x {t.samples_per_prompt} = {samples:,} samples{more}; "
        f"{samples // dp:,} a replica, {samples / world_size:,.4g} a rank"
    )
    minibatch = t.prompts_per_minibatch * t.samples_per_prompt
    yield (
        f"update: {t.prompts_per_minibatch:,} prompts = {minibatch:,} samples, {minibatch // dp:,} a "
        f"replica; {updates} updates a step, {updates * t.steps:,} in {t.steps:,} steps"
    )
    yield (
        f"tokens: at most {longest:,} a sample, {samples * longest:,} a step, {samples // dp * longest:,} a "
        f"replica; a micro-batch holds up to {t.max_tokens_per_microbatch:,}"
    )


def _engines(config: Config, local: int, machines: int) -> Iterator[str]:
    s = config.rollout.sglang
    if config.rollout.engine == "embedded":
        yield "engine: in every training process"
    elif s.router:
        yield f"engine: the SGLang servers behind {s.router}"
    elif s.urls:
        yield f"engine: SGLang servers at {', '.join(s.urls)}"
    else:
        n = s.launch.count * s.launch.tensor_parallel_size
        first = 0 if s.colocate else local  # the trainer's ranks have the first GPUs
        gpus = ", ".join(map(str, s.launch.devices or range(first, first + n)))
        shared = ", which the trainer uses too" if s.colocate else ""
        where = "this machine" if machines == 1 else f"each of {machines} machines"
        yield (
            f"engine: {s.launch.count} SGLang servers of {s.launch.tensor_parallel_size} GPUs, started on "
            f"{where} on GPUs {gpus}{shared}"
        )


def _weights(config: Config, replica: int, dp: int, hf: Mapping[str, Any]) -> Iterator[str]:
    count = num_parameters(hf)
    size = BYTES[config.model.params_dtype]
    local = count / replica
    # Gradients are summed in float32; Adam has two averages, and a float32 copy of 2-byte weights.
    adam = 8 if size == 4 else 12
    parts = [_models(config) * local * n / GIB for n in (size, 4, adam / dp)]
    yield (
        f"weights: {count / 1e9:,.4g} billion in {config.model.params_dtype}; a rank holds about "
        f"{parts[0]:,.3g} GiB of weights, {parts[1]:,.3g} of gradients and {parts[2]:,.3g} of Adam's state: "
        f"{sum(parts):,.3g} GiB and the activations"
    )


def _models(config: Config) -> int:
    """How many are trained."""
    return 2 if config.algorithm.name == "ppo" else 1


def _reference(config: Config, replica: int, dp: int, local: int, hf: Mapping[str, Any]) -> Iterator[str]:
    """What the reference takes, and of host memory what it takes on a machine of `local` ranks."""
    a, size = config.algorithm, BYTES[config.model.params_dtype]
    if a.credit != "distribution" and not getattr(a, "kl_coef", 0.0):
        return
    weights = num_parameters(hf) / replica * size / GIB
    # Those that are in the model's place have the other ones beside them.
    in_host = f"{2 * weights:,.3g} GiB of host memory a rank, {2 * weights * local:,.3g} a machine"
    if config.parallel.device == "cpu" or config.model.reference_placement == "device":
        yield f"reference: {weights:,.3g} GiB more a rank, beside the weights"
    elif config.model.reference_placement == "host":
        yield f"reference: {in_host}"
    else:
        yield (
            f"reference: {weights:,.3g} GiB more a rank on GPUs of {math.ceil(16 * weights):,} GiB and more, "
            f"else {in_host}"
        )
    if a.credit_timing == "update":
        t, longest = config.train, config.data.max_prompt_tokens + config.rollout.max_new_tokens
        tokens = t.prompts_per_step * t.samples_per_prompt // dp * longest
        kept = tokens * hf["hidden_size"] * size / config.parallel.tensor_model_parallel_size / GIB
        yield (
            f"reference: up to {kept:,.3g} GiB of its hidden states wait for the updates on a rank of the "
            "last stage (algorithm.credit_timing = 'rollout' keeps none)"
        )


def _checkpoints(config: Config, replica: int, dp: int, local: int, hf: Mapping[str, Any]) -> Iterator[str]:
    """Disk, time and host memory of a save: the weights, and in float32 their copy and Adam's averages."""
    c, t = config.checkpoint, config.train
    each = _models(config) * num_parameters(hf) * (BYTES[config.model.params_dtype] + 12)
    saves = math.ceil(t.steps / c.every) if c.every else 1
    kept = c.keep_last + (c.keep_best and bool(config.evaluation.data)) + 1 if c.keep_last else saves
    often = f"every {c.every} steps" if c.every else "at the end"
    at_once = min(saves, kept)
    yield (
        f"checkpoints: {each / 1e9:,.3g} GB {often}, at most {at_once} at a time: "
        f"{at_once * each / 1e9:,.4g} GB of disk; where all ranks together write 1 GB/s a save takes "
        f"{each / 1e9:,.0f} s, and reads it once for checksums; a rank may write for "
        f"{c.timeout_seconds:,} s (checkpoint.timeout_seconds)"
    )
    if config.parallel.device != "cpu":
        copy = each / replica / dp / GIB
        yield (
            f"host memory of a save: what a rank writes, {copy:,.3g} GiB, and {copy * local:,.3g} on a "
            f"machine with {local} ranks"
        )


def num_parameters(hf: Mapping[str, Any]) -> int:
    """Of a model with this config.json (the families of mcore.hf_config)."""
    hidden, heads, layers = hf["hidden_size"], hf["num_attention_heads"], hf["num_hidden_layers"]
    head_dim = hf.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, (hf.get("num_key_value_heads") or heads) * head_dim
    family = hf.get("model_type")
    bias = q + 2 * kv if family == "qwen2" or hf.get("attention_bias") else 0
    norms = 2 * hidden + (2 * head_dim if family == "qwen3" else 0)
    layer = hidden * (2 * q + 2 * kv) + bias + 3 * hidden * hf["intermediate_size"] + norms
    tables = 1 if hf.get("tie_word_embeddings") else 2
    return tables * hf["vocab_size"] * hidden + layers * layer + hidden
