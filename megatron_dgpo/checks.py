"""Settings that are right each by itself and wrong together, or wrong for the model they name.

Each check yields problems as "key: what is wrong and what would be right"; none needs torch.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_dgpo import jsontext
from megatron_dgpo.config import RESERVED_POSITIONS, Config, LaunchConfig, SFTConfig
from megatron_dgpo.config.algorithms import AlgorithmConfig, CreditConfig, PPOConfig
from megatron_dgpo.config.sources import parse_source

AnyConfig = Config | SFTConfig


class Absent(str):
    """A problem that a machine with the files would not have: a dry run only notes it."""


def check_all(config: AnyConfig, world_size: int | None = None) -> list[str]:
    """All problems; `world_size` None means as many processes as one replica takes."""
    replica = replica_size(config)
    world_size = replica if world_size is None else world_size
    problems = [*_parallel(config, world_size, replica), *_files(config)]
    if world_size % replica == 0:
        problems += _batches(config, world_size // replica)
    problems += _model(config)
    if isinstance(config, Config) and config.rollout.engine == "sglang":
        problems += _sglang(config, world_size)
    if isinstance(config, Config):
        problems += [*_policies(config), *_server_devices(config, local_world_size(world_size))]
    return problems


def local_world_size(world_size: int) -> int:
    """Ranks of this machine: all of them, where torchrun (or who asks for a dry run) does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def replica_size(config: AnyConfig) -> int:
    """Processes of one replica."""
    p = config.parallel
    return p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size


def _parallel(config: AnyConfig, world_size: int, replica: int) -> Iterator[str]:
    p = config.parallel
    if p.context_parallel_size > 1:
        yield f"parallel.context_parallel_size: {p.context_parallel_size} is not supported yet; use 1"
    if world_size % replica:
        yield (
            f"parallel: {world_size} processes do not divide into replicas of {replica} "
            f"(tensor {p.tensor_model_parallel_size} x pipeline {p.pipeline_model_parallel_size} "
            f"x context {p.context_parallel_size}); start a multiple of {replica}"
        )
    if p.sequence_parallel and p.tensor_model_parallel_size == 1:
        yield "parallel.sequence_parallel: needs parallel.tensor_model_parallel_size above 1"


def _batches(config: AnyConfig, dp: int) -> Iterator[str]:
    t, updates = config.train, config.train.steps
    if isinstance(config, SFTConfig):
        if config.train.batch_size % dp:
            size = config.train.batch_size
            yield f"train.batch_size: {size} does not divide by {dp} data-parallel replicas"
    else:
        t = config.train
        if t.prompts_per_step % t.prompts_per_minibatch:
            yield (
                f"train.prompts_per_step: {t.prompts_per_step} is not a multiple of "
                f"train.prompts_per_minibatch {t.prompts_per_minibatch}"
            )
        if t.prompts_per_minibatch % dp:
            yield (
                f"train.prompts_per_minibatch: {t.prompts_per_minibatch} does not divide by "
                f"{dp} data-parallel replicas"
            )
        updates *= t.epochs_per_rollout * max(1, t.prompts_per_step // t.prompts_per_minibatch)
    if config.optimizer.warmup_steps > updates:
        yield (
            f"optimizer.warmup_steps: {config.optimizer.warmup_steps} is more than the run's {updates} "
            "optimizer steps, so none would have the full optimizer.lr; use fewer"
        )
    if config.optimizer.min_lr > config.optimizer.lr:
        yield f"optimizer.min_lr: {config.optimizer.min_lr} is above optimizer.lr {config.optimizer.lr}"


def _sglang(config: Config, world_size: int) -> Iterator[str]:
    c, given = config.rollout.sglang, []
    if c.urls:
        given.append("rollout.sglang.urls")
    if c.router:
        given.append("rollout.sglang.router")
    if len(given) > 1:
        yield f"{given[1]}: rollout.sglang.urls is set too; the workers are asked of the router"
    for url in (*c.urls, *([c.router] if c.router else [])):
        if not url.startswith("http") or url.endswith("/"):
            yield f"{given[0]}: {url!r} is not an address such as 'http://127.0.0.1:30000'"
    if len(set(c.urls)) < len(c.urls):
        yield "rollout.sglang.urls: a server occurs twice"
    if given and c.colocate:
        yield f"rollout.sglang.colocate: needs servers that the run starts; {given[0]} is set"
    hf = read_json(config.model.path / "config.json")
    if isinstance(hf, dict) and not hf.get("architectures"):
        yield f"model.path: {config.model.path / 'config.json'} names no architectures, which SGLang asks for"
    yield from _launch(c.launch, managed=not given)
    yield from _places(config, given, world_size)
    limit = config.parallel.timeout_seconds
    if 2 * (taken := c.sample_timeout(config.rollout.max_new_tokens)) > limit:
        follows = (
            ""
            if c.request_timeout_seconds
            else (
                f" (60 s and rollout.max_new_tokens {config.rollout.max_new_tokens} at "
                f"rollout.sglang.min_tokens_per_second {c.min_tokens_per_second:g})"
            )
        )
        yield (
            f"rollout.sglang.request_timeout_seconds: a sample that took {taken:g}{follows} is drawn again, "
            f"and the other ranks wait for parallel.timeout_seconds {limit}; use at most half of that, or at "
            f"least {2 * taken:g} there"
        )
    for key, seconds in (
        ("sync.timeout_seconds", config.sync.timeout_seconds),
        ("rollout.sglang.launch.startup_timeout_seconds", 0 if given else c.launch.startup_timeout_seconds),
    ):
        if seconds >= limit:
            yield (
                f"{key}: {seconds:g} must be below parallel.timeout_seconds {limit}, or the ranks that wait "
                "for this one give up first"
            )


def _places(config: Config, given: list[str], world_size: int) -> Iterator[str]:
    """Who can reach whom: `given` are the keys that name servers, none where the run starts them."""
    c = config.rollout.sglang
    on_this = local_world_size(world_size)
    urls = [url for url in (*c.urls, c.router) if url.startswith("http")]
    near = [url for url in urls if _is_loopback(urlsplit(url).hostname or "")]
    far = [url for url in urls if url not in near]
    if on_this < world_size:
        reach = f"{world_size - on_this} of the {world_size} ranks are on other machines"
        if c.colocate:
            yield (
                f"rollout.sglang.colocate: {reach}, and weights go through the shared memory of one; give "
                "the servers GPUs of their own on each machine, or name servers in rollout.sglang.urls"
            )
        elif near:
            yield f"{given[0]}: {reach}, where {near[0]} is another server; use a name that all can reach"
    if far and _is_loopback(c.address):
        yield (
            f"rollout.sglang.address: {c.address!r} is where servers ask for weights, and {far[0]} would ask "
            "its own machine; use 'hostname' or this machine's address (or 127.0.0.1 in the URL of a server "
            "on this one)"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _launch(launch: LaunchConfig, *, managed: bool) -> Iterator[str]:
    if not managed:
        return
    if not launch.python.is_file():
        yield Absent(
            f"rollout.sglang.launch.python: {launch.python} is not there; `make sglang` makes it for "
            "machines without a GPU, or name the interpreter of an environment that has SGLang"
        )
    needed = launch.count * launch.tensor_parallel_size
    if launch.devices and len(launch.devices) != needed:
        yield (
            f"rollout.sglang.launch.devices: {len(launch.devices)} GPUs for {launch.count} servers of "
            f"{launch.tensor_parallel_size}, which take {needed}"
        )
    if launch.count > 1 and "port" in launch.args:
        yield f"rollout.sglang.launch.args: {launch.count} servers cannot have one port"
    for name, key in (("tp_size", "tensor_parallel_size"), ("dtype", ""), ("host", ""), ("model_path", "")):
        if name in launch.args:
            follows = f"rollout.sglang.launch.{key}" if key else "the run"
            yield f"rollout.sglang.launch.args: {name} follows from {follows} and cannot be set"


def _server_devices(config: Config, ranks: int) -> Iterator[str]:
    """The trainer's ranks have the first GPUs of their machine, where the servers are as well."""
    c = config.rollout.sglang
    if config.rollout.engine != "sglang" or not c.managed:
        return
    taken = [device for device in c.launch.devices if device < ranks]
    if c.launch.devices and config.parallel.device == "cpu":
        yield (
            "rollout.sglang.launch.devices: names GPUs, and with parallel.device = 'cpu' the servers compute "
            "on the CPU too; set one of the two"
        )
    elif c.colocate and c.launch.devices:
        yield (
            "rollout.sglang.launch.devices: rollout.sglang.colocate puts the servers on the trainer's GPUs, "
            "from 0 up; set one of the two"
        )
    elif taken:
        yield (
            f"rollout.sglang.launch.devices: {taken[0]} is the trainer's, whose {ranks} ranks on this "
            f"machine (LOCAL_WORLD_SIZE) have the GPUs below {ranks}; use others, fewer ranks, or "
            "rollout.sglang.colocate"
        )


def gpus_of_servers(config: Config, ranks: int) -> int:
    """How many GPUs, counted from 0, a machine needs for the servers that the run starts beside its
    `ranks` ranks; 0 where it starts none."""
    c = config.rollout.sglang
    if config.rollout.engine != "sglang" or not c.managed:
        return 0
    if c.launch.devices:
        return max(c.launch.devices) + 1
    return (0 if c.colocate else ranks) + c.launch.count * c.launch.tensor_parallel_size


def _algorithm(a: AlgorithmConfig, steps: int) -> Iterator[str]:
    if 0 < a.tis_cap < 1:
        yield (
            f"algorithm.tis_cap: {a.tis_cap} would also weigh down tokens that engine and trainer agree on; "
            "use at least 1, or 0 to turn it off"
        )
    if 0 < a.sequence_mask_cap < 1:
        yield f"algorithm.sequence_mask_cap: {a.sequence_mask_cap} is below 1; 0 turns it off"
    if a.credit == "distribution" and a.tau == "auto" and a.credit_timing != "rollout":
        yield (
            f"algorithm.credit_timing: {a.credit_timing!r} takes other scores than algorithm.tau = 'auto' is "
            "found for; use 'rollout', or a number for tau"
        )
    if isinstance(a, PPOConfig) and a.critic_warmup_steps >= steps:
        yield (
            f"algorithm.critic_warmup_steps: {a.critic_warmup_steps} leaves the policy untrained in "
            f"train.steps {steps}; use fewer"
        )
    dead: dict[str, str] = {}
    if a.credit == "uniform":
        dead |= dict.fromkeys(CreditConfig.model_fields, "algorithm.credit = 'uniform'")
    if a.tau == "auto":
        dead["tau_schedule"] = "algorithm.tau = 'auto'"
    else:
        dead["effective_fraction"] = f"algorithm.tau = {a.tau}"
    for name in ("tau", "kappa"):
        if getattr(a, f"{name}_schedule") == "constant":
            dead[f"{name}_final"] = f"algorithm.{name}_schedule = 'constant'"
    for name, reason in dead.items():
        if (value := getattr(a, name)) != CreditConfig.model_fields[name].default and name != "credit":
            yield f"algorithm.{name}: {value!r} has no effect with {reason}"


def _policies(config: Config) -> Iterator[str]:
    """Settings of how rollouts are drawn and corrected."""
    yield from _algorithm(config.algorithm, config.train.steps)
    r = config.rollout
    if r.oversampling > 1 and r.engine == "embedded" and not r.dynamic_sampling:
        yield (
            f"rollout.oversampling: {r.oversampling} is for an engine that can give samples up, and "
            "rollout.engine = 'embedded' cannot; use 1, or rollout.dynamic_sampling as well"
        )
    if config.train.async_steps:
        yield from _async(config)


def _async(config: Config) -> Iterator[str]:
    """Drawing samples while the trainer computes."""
    if config.rollout.engine == "embedded":
        yield (
            "train.async_steps: 1 needs an engine beside the trainer, and rollout.engine = 'embedded' "
            "computes in its processes; use 0, or rollout.engine = 'sglang'"
        )
    elif config.rollout.sglang.colocate:
        yield (
            "train.async_steps: 1 needs engines that draw while the trainer computes, and with "
            "rollout.sglang.colocate they share its GPUs; use one of the two"
        )
    if config.algorithm.tis_cap == 0:
        yield (
            "train.async_steps: 1 trains on samples of older weights, which algorithm.tis_cap corrects for; "
            "set a cap, such as 2.0"
        )


def _files(config: AnyConfig) -> Iterator[str]:
    for key, sources in (("data.train", config.data.train), ("evaluation.data", config.evaluation.data)):
        for text in sources:
            try:
                source = parse_source(text)
            except ValueError as error:
                yield f"{key}: {error}"
                continue
            if not isinstance(source, Path):
                continue
            if not source.is_file():
                yield Absent(f"{key}: {source} is not a file")
            elif source.suffix not in (".jsonl", ".parquet"):
                yield f"{key}: {source} is neither .jsonl nor .parquet"
    if not config.data.train:
        yield "data.train: at least one file is needed"


def _model(config: AnyConfig) -> Iterator[str]:
    folder = config.model.path
    hf = read_json(folder / "config.json")
    if isinstance(hf, str):
        yield f"model.path: {hf}"
        return
    if config.model.init == "weights" and not _has_weights(folder):
        yield Absent(f"model.path: {folder} has no safetensors (model.init = 'random' starts without)")
    if missing := missing_number(hf):
        yield f"model.path: {folder / 'config.json'} has no whole number {missing}"
        return
    yield from _split(config, hf)
    yield from _tokenizer(folder, hf["vocab_size"])
    for token in config.rollout.stop_tokens:
        if isinstance(token, int) and not 0 <= token < hf["vocab_size"]:
            yield f"rollout.stop_tokens: {token} is no token id below the model's {hf['vocab_size']}"
    longest = hf["max_position_embeddings"]
    if isinstance(config, Config):
        wanted = config.data.max_prompt_tokens + config.rollout.max_new_tokens
        if wanted > longest:
            yield (
                f"rollout.max_new_tokens: with data.max_prompt_tokens it makes {wanted} tokens, "
                f"and the model has {longest} positions"
            )
        elif config.rollout.engine == "sglang":
            yield from _room(config, wanted, longest)
        if wanted > config.train.max_tokens_per_microbatch:
            yield (
                f"train.max_tokens_per_microbatch: {config.train.max_tokens_per_microbatch} does not hold "
                f"the longest sequence of {wanted} tokens"
            )
    elif config.data.max_tokens > min(longest, config.train.max_tokens_per_microbatch):
        yield (
            f"data.max_tokens: {config.data.max_tokens} is above the model's {longest} positions or "
            f"train.max_tokens_per_microbatch {config.train.max_tokens_per_microbatch}"
        )


def _room(config: Config, wanted: int, positions: int) -> Iterator[str]:
    """Whether the servers' context and cache, as far as they are known, hold the longest sequence."""
    c = config.rollout.sglang
    limits = {f"the model's {positions} positions": positions}
    if c.managed:
        for name in ("context_length", "max_total_tokens"):
            if type(value := c.launch.args.get(name)) is int:
                limits[f"rollout.sglang.launch.args.{name} {value}"] = value
    what = min(limits, key=limits.__getitem__)
    if wanted > limits[what] - RESERVED_POSITIONS:
        yield (
            f"rollout.max_new_tokens: with data.max_prompt_tokens it makes {wanted} tokens; of {what}, "
            f"SGLang keeps {RESERVED_POSITIONS} free"
        )


def _has_weights(folder: Path) -> bool:
    """Hugging Face's, or those of an imported checkpoint."""
    return any(folder.glob("*.safetensors")) or (folder / "metadata.json").is_file()


def missing_number(hf: Mapping[str, Any]) -> str | None:
    """The first of the sizes that every family's config.json gives, and this one does not (two may be
    absent)."""
    names = ["num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size"]
    names += ["vocab_size", "max_position_embeddings"]
    names += [name for name in ("num_key_value_heads", "head_dim") if hf.get(name) is not None]
    return next((name for name in names if type(hf.get(name)) is not int), None)


def _split(config: AnyConfig, hf: dict[str, Any]) -> Iterator[str]:
    tp = config.parallel.tensor_model_parallel_size
    pp = config.parallel.pipeline_model_parallel_size
    heads, layers = hf["num_attention_heads"], hf["num_hidden_layers"]
    for what, count in (  # attention heads are a multiple of key/value heads
        ("key/value heads", hf.get("num_key_value_heads") or heads),
        ("MLP columns", hf["intermediate_size"]),
    ):
        if count % tp:
            yield f"parallel.tensor_model_parallel_size: {tp} does not divide the model's {count} {what}"
    yield from _stages(config.model.transformer, layers, pp)


def _stages(transformer: dict[str, Any], layers: int, pp: int) -> Iterator[str]:
    """Layers over pipeline stages; Megatron's two settings for uneven ones are taken off first."""
    uneven = [f"num_layers_in_{end}_pipeline_stage" for end in ("first", "last")]
    given = {name: transformer[name] for name in uneven if transformer.get(name) is not None}
    if wrong := [name for name, n in given.items() if type(n) is not int or n < 1]:
        yield f"model.transformer.{wrong[0]}: {given[wrong[0]]!r} is not a number of layers"
        return
    left, stages = layers - sum(given.values()), pp - len(given)
    if left % stages if stages > 0 else left != 0 or stages < 0:
        yield (
            f"parallel.pipeline_model_parallel_size: {left} of the model's {layers} layers do not divide "
            f"into {stages} stages (for uneven ones see model.transformer.{uneven[0]} and {uneven[1]})"
        )


TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
"""What a folder may hold its tokenizer in; the first that is there counts."""


def tokenizer_files(folder: Path) -> tuple[str, ...]:
    """Those of the folder's tokenizer; none where it has no tokenizer."""
    complete = (names for names in TOKENIZER_FILES if all((folder / name).is_file() for name in names))
    return next(complete, ())


def _tokenizer(folder: Path, vocab_size: int) -> Iterator[str]:
    files = tokenizer_files(folder)
    if not files:
        others = " or ".join(" with ".join(names) for names in TOKENIZER_FILES[1:])
        yield Absent(f"model.path: {folder / 'tokenizer.json'} is not there (nor {others})")
    if not files or files == ("tokenizer.model",):
        return  # which ids a tokenizer.model has, its package knows
    tokenizer = read_json(folder / files[0])
    if isinstance(tokenizer, str):
        yield f"model.path: {tokenizer}"
        return
    if files[0] == "vocab.json":
        tokenizer = {"model": {"vocab": tokenizer}}
    yield from beyond_vocabulary(_token_ids(tokenizer), vocab_size)


def beyond_vocabulary(token_ids: Iterable[int], vocab_size: int) -> Iterator[str]:
    """The problem of a tokenizer with ids that the model has not, if there are any."""
    highest = max(token_ids, default=-1)
    if highest >= vocab_size:
        yield (
            f"model.path: the tokenizer's ids go up to {highest}, but config.json has "
            f"vocab_size {vocab_size}; it must be at least {highest + 1}"
        )


def _token_ids(tokenizer: dict[str, Any]) -> Iterator[int]:
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    # Unigram models list [piece, score]; the others map piece to id.
    yield from vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    yield from (token["id"] for token in tokenizer.get("added_tokens", []))


def read_json(path: Path) -> dict[str, Any] | str:
    """The parsed object, or what is wrong with the file."""
    if not path.is_file():
        return f"{path} is not there"
    try:
        value = jsontext.loads(path.read_bytes())
    except ValueError as error:
        return f"{path} is {error}"
    return value if isinstance(value, dict) else f"{path} does not hold a JSON object"
