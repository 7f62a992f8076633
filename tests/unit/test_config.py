"""The schema: defaults, types and ranges, and that every key says what it is."""

from __future__ import annotations

import math
import tomllib
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from megatron_dgpo.algorithms import ALGORITHMS
from megatron_dgpo.cli import ConfigError, _models_in, dump_toml, keys, validate
from megatron_dgpo.config import Config, SFTConfig

RL: dict[str, Any] = {
    "model": {"path": "m"},
    "data": {"train": ["a.jsonl"]},
    "reward": {"name": "exact_match"},
    "train": {"steps": 3, "prompts_per_step": 4, "samples_per_prompt": 2, "prompts_per_minibatch": 2},
    "optimizer": {"lr": 1e-3},
}
SFT: dict[str, Any] = {
    "model": {"path": "m"},
    "data": {"train": ["a.jsonl"]},
    "train": {"steps": 3, "batch_size": 4},
    "optimizer": {"lr": 1e-3},
}
BOTH = [(Config, RL), (SFTConfig, SFT)]


def given(raw: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """`raw` with one more setting, in dotted form."""
    name, _, rest = key.partition(".")
    return {**raw, name: given(raw.get(name, {}), rest, value) if rest else value}


def problems(raw: dict[str, Any], schema: type[Config] | type[SFTConfig] = Config) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(raw, schema)
    return caught.value.problems


def models(schema: type[BaseModel]) -> list[type[BaseModel]]:
    below = [m for info in schema.model_fields.values() for m in _models_in(info.annotation)]
    return [schema, *(inner for model in below for inner in models(model))]


@pytest.mark.parametrize("schema", [Config, SFTConfig])
def test_every_key_has_a_description(schema: type[BaseModel]) -> None:
    rows = list(keys(schema))
    assert len(rows) > 40
    for key, kind, default, text in rows:
        assert text.endswith(".") and len(text) > 8, key
        assert kind and default, key
    for model in models(schema):  # members of a union too, which share keys
        for name, info in model.model_fields.items():
            if not _models_in(info.annotation):
                assert info.description, f"{model.__name__}.{name}"


@pytest.mark.parametrize("schema", [Config, SFTConfig])
def test_no_section_takes_unknown_keys_or_changes_after_the_check(schema: type[BaseModel]) -> None:
    for model in models(schema):
        assert model.model_config["extra"] == "forbid", model
        assert model.model_config["frozen"], model
        assert model.model_config["strict"], model


PLAIN = dict(
    clip_low=0.2, clip_high=0.2, normalize_by_std=True, aggregation="sequence_mean", credit="uniform"
)
CREDIT = dict(
    tau=1.0,
    kappa=1.0,
    tau_schedule="constant",
    kappa_schedule="constant",
    entropy_normalization="log_vocab",
    distance="hellinger",
    credit_timing="rollout",
    effective_fraction=0.9,
)
SOURCES: dict[str, dict[str, Any]] = {
    # arXiv 2605.03327, section 5.1
    "dgpo": {**PLAIN, "credit": "distribution"},
    # arXiv 2402.03300; its KL term (0.04) is off here, as GRPO's docstring says
    "grpo": {**PLAIN, "kl_coef": 0.0},
    # arXiv 2503.14476, section 4.1
    "dapo": {**PLAIN, "clip_high": 0.28, "aggregation": "token_mean"},
    "dapo_dgpo": {**PLAIN, "clip_high": 0.28, "aggregation": "token_mean", "credit": "distribution"},
    # arXiv 2507.18071, section 5.1
    "gspo": {**PLAIN, "clip_low": 3e-4, "clip_high": 4e-4},
    # arXiv 2503.20783, section 3.2
    "dr_grpo": {**PLAIN, "normalize_by_std": False, "aggregation": "fixed_length"},
    # arXiv 2402.14740, section 3.2
    "reinforce": {**PLAIN, "aggregation": "sequence_sum"},
    # arXiv 1707.06347 and 1506.02438; values as its language-model baselines have them (2503.14476)
    "ppo": {
        **{**PLAIN, "aggregation": "token_mean", "gamma": 1.0, "lam": 0.95, "value_clip": 0.2},
        **{"critic_lr": 1e-5, "critic_warmup_steps": 0},
    },
}


def test_every_algorithm_has_its_sources_defaults() -> None:
    common = {**CREDIT, "advantage_eps": 1e-6, "tis_cap": 0.0, "sequence_mask_cap": 0.0}
    for name in ALGORITHMS:
        config = validate({**RL, "algorithm": {"name": name}}, Config)
        got = config.algorithm.model_dump()
        # Where no schedule runs, its end means nothing.
        assert (got.pop("name"), got.pop("tau_final"), got.pop("kappa_final")) == (name, 1.0, 1.0)
        assert got == common | SOURCES[name], name
        dapo = name.startswith("dapo")
        assert config.rollout.dynamic_sampling is dapo
        assert [(t.name, t.weight) for t in config.reward.terms] == [("overlong", 0.5)] * dapo
        if dapo:  # a fifth of rollout.max_new_tokens: 4,096 of 20,480 there
            assert config.reward.terms[0].model_dump()["buffer_tokens"] == 0


def test_values_cannot_be_changed() -> None:
    config = validate(RL, Config)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 5  # type: ignore[misc]


def test_defaults_are_those_of_the_paper() -> None:
    """Eq. 6 with tau = 1, kappa = 1, normalised entropy, Hellinger; Eq. 7 with clip 0.2, no KL term."""
    config = validate(RL, Config)
    a = config.algorithm
    assert (a.name, a.tau, a.kappa) == ("dgpo", 1.0, 1.0)
    assert (a.distance, a.entropy_normalization, a.aggregation) == ("hellinger", "log_vocab", "sequence_mean")
    assert (a.clip_low, a.clip_high, a.normalize_by_std) == (0.2, 0.2, True)
    assert (config.optimizer.weight_decay, config.optimizer.clip_grad) == (0.1, 1.0)
    assert (config.rollout.temperature, config.rollout.top_p, config.rollout.top_k) == (1.0, 1.0, 0)


@pytest.mark.parametrize(("schema", "raw"), BOTH)
def test_defaults_are_one_process_and_a_run_of_its_own(schema: Any, raw: dict[str, Any]) -> None:
    config = validate(raw, schema)
    p = config.parallel
    sizes = p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size
    assert (*sizes, p.sequence_parallel) == (1, 1, 1, False)
    assert (config.run.seed, config.run.resume, config.run.quiet) == (1, False, False)
    assert config.model.init == "weights" and config.model.params_dtype == "float32"
    assert config.evaluation.data == () and config.ddp == {} and config.model.transformer == {}
    assert config.checkpoint.every == (20 if schema is Config else 0)


def test_the_algorithm_is_chosen_by_name() -> None:
    assert validate(given(RL, "algorithm.tau", 0.5), Config).algorithm.tau == 0.5
    grpo = validate({**RL, "algorithm": {"name": "grpo", "kl_coef": 0.04}}, Config).algorithm
    assert (grpo.name, grpo.kl_coef, grpo.clip_low) == ("grpo", 0.04, 0.2)
    assert grpo.credit == "uniform" and not hasattr(grpo, "options")
    own = validate({**RL, "algorithm": {"name": "mine.algo:Mine", "options": {"a": 1}}}, Config).algorithm
    assert (own.name, own.options) == ("mine.algo:Mine", {"a": 1})


def test_an_algorithm_brings_defaults_for_other_sections() -> None:
    config = validate({**RL, "algorithm": {"name": "dapo_dgpo"}}, Config)
    assert config.rollout.dynamic_sampling and config.algorithm.credit == "distribution"
    assert (config.algorithm.clip_low, config.algorithm.clip_high) == (0.2, 0.28)
    own = validate({**RL, "algorithm": {"name": "dapo"}, "rollout": {"dynamic_sampling": False}}, Config)
    assert not own.rollout.dynamic_sampling and own.algorithm.credit == "uniform"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train.steps", 1.5, "train.steps: 1.5 is not an integer"),
        ("train.steps", "3", "train.steps: '3' is not an integer"),
        ("train.steps", True, "train.steps: True is not an integer"),
        ("optimizer.lr", "fast", "optimizer.lr: 'fast' is not a number"),
        ("run.resume", 1, "run.resume: 1 is not true or false"),
        ("reward.name", 5, "reward.name: 5 is not text"),
        ("run.folder", 5, "run.folder: 5 is not a path"),
        ("data.train", "a.jsonl", "data.train: 'a.jsonl' is not a list"),
        ("data.train", [7], "data.train.0: 7 is not text"),
        ("model.transformer", 3, "model.transformer: 3 is not a table"),
        ("model.init", "zeros", "model.init: 'zeros': input should be 'weights' or 'random'"),
        ("train.steps", 0, "train.steps: 0: input should be greater than or equal to 1"),
        ("train.samples_per_prompt", 1, "train.samples_per_prompt: 1: input should be greater than or equal"),
        ("rollout.temperature", 0.0, "rollout.temperature: 0.0: input should be greater than 0"),
        ("rollout.top_p", 1.01, "rollout.top_p: 1.01: input should be less than or equal to 1"),
        ("rollout.min_p", -0.1, "rollout.min_p: -0.1: input should be greater than or equal to 0"),
        ("algorithm.clip_low", 1.0, "algorithm.clip_low: 1.0: input should be less than 1"),
        ("algorithm.tau", 0, "algorithm.tau: 0: input should be greater than 0"),
        ("algorithm.tau", -1.0, "algorithm.tau: -1.0: input should be greater than 0"),
        ("run.seed", -1, "run.seed: -1: input should be greater than or equal to 0"),
        ("optimizer.adam_beta2", 1.0, "optimizer.adam_beta2: 1.0: input should be less than 1"),
        ("optimizer.lr", math.nan, "optimizer.lr: nan: input should be a finite number"),
        ("optimizer.lr", math.inf, "optimizer.lr: inf: input should be a finite number"),
        ("algorithm.kappa", -math.inf, "algorithm.kappa: -inf: input should be a finite number"),
    ],
)
def test_wrong_types_and_values_are_one_line(key: str, value: Any, said: str) -> None:
    (line,) = problems(given(RL, key, value))
    assert line.startswith(said)


def test_every_number_refuses_what_is_not_finite() -> None:
    numbers = [key for key, kind, *_ in keys(Config) if kind == "number"]
    assert len(numbers) > 15
    union = _models_in(Config.model_fields["algorithm"].annotation)
    for key in numbers:
        owners = [m for m in union if key.partition(".")[2] in m.model_fields]
        raw = given(RL, "algorithm.name", owners[0].model_fields["name"].default) if owners else RL
        for value in (math.nan, math.inf):
            (line,) = problems(given(raw, key, value))
            assert line.startswith(f"{key}: {value}: "), line


@pytest.mark.parametrize(("schema", "raw"), BOTH)
def test_a_config_reads_its_own_output_back(schema: Any, raw: dict[str, Any]) -> None:
    rich = given(raw, "data.system_prompt", 'line\nquote " back\\slash \x7f \t é 漢 #= [x]')
    rich = given(
        rich, "model.transformer", {"num_layers_in_first_pipeline_stage": 1, "attention_dropout": 0.1}
    )
    rich = given(rich, "optimizer.megatron", {"use_precision_aware_optimizer": False, "names": ["a", "b"]})
    rich = given(given(rich, "optimizer.lr", 1e-7), "optimizer.adam_eps", 1e16)
    rich = {**given(rich, "run.folder", 'a b/"c"'), "ddp": {"overlap_grad_reduce": False, "bucket_size": 7}}
    for settings in (raw, rich):
        config = validate(settings, schema)
        text = dump_toml(config)
        assert validate(tomllib.loads(text), schema) == config
    assert config.optimizer.lr == 1e-7 and config.ddp["bucket_size"] == 7


def test_grpo_reads_its_own_output_back() -> None:
    config = validate({**RL, "algorithm": {"name": "grpo", "kl_coef": 1e-3}}, Config)
    assert validate(tomllib.loads(dump_toml(config)), Config) == config
