"""A Hugging Face config.json becomes the numbers that a model is built from, or is refused by field.

A field is translated, must have the value that this project computes with, or says nothing about the
computation. Others are refused, since a model that ignores them is another model, but for those that
`hf_fields` tells to change nothing and those that the user says to ignore: `remarks` names these. This module
imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dgpo.mcore.hf_fields import NEVER_IGNORED, class_fields, explain, passed_over

if TYPE_CHECKING:
    from megatron_dgpo.config import ModelConfig

from megatron_dgpo import jsontext


@dataclass(frozen=True)
class Family:
    """What is particular to one model_type."""

    architecture: str
    """The one name that `architectures` may hold: with another head it is another model."""
    qkv_bias: bool = False
    qk_norm: bool = False
    """Queries and keys are normed head by head before they are rotated."""
    rope_types: tuple[str, ...] = ("default",)
    required: tuple[str, ...] = ()
    """Whole numbers whose default, where the field is absent, is no function of the others."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields that may be absent or have this value."""
    harmless: frozenset[str] = frozenset()
    """Fields of this family alone that say nothing about the computation."""


_FULL = {"layer_types": "full_attention"}
FAMILIES: dict[str, Family] = {
    "qwen2": Family(
        "Qwen2ForCausalLM",
        qkv_bias=True,
        required=("num_key_value_heads",),
        fixed=_FULL,
        harmless=frozenset({"sliding_window", "max_window_layers"}),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qk_norm=True,
        required=("num_key_value_heads", "head_dim"),
        fixed={**_FULL, "attention_bias": False},
        harmless=frozenset({"sliding_window", "max_window_layers"}),
    ),
    "llama": Family(
        "LlamaForCausalLM",
        rope_types=("default", "llama3"),
        fixed={"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    ),
}
"""model_type -> what is particular to it."""

REQUIRED = (
    "num_attention_heads",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
"""Whole numbers that every family's config.json gives."""
_OPTIONAL_NUMBERS = ("num_key_value_heads", "head_dim")
_TRANSLATED = {
    *REQUIRED,
    *_OPTIONAL_NUMBERS,
    *("model_type", "architectures", "rms_norm_eps", "initializer_range", "tie_word_embeddings"),
    *("rope_parameters", "rope_scaling", "rope_theta"),
}
IDENTITY = {
    "family": "model_type",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
"""What `ModelShape.identity` holds of a shape, and config.json's names for it. The others follow from the
family, or do not change what given weights compute."""
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
    "cross_attention_hidden_size": None,
}
_HARMLESS = {
    # how the file came about
    *("_name_or_path", "name_or_path", "transformers_version", "_commit_hash"),
    # how weights are stored, and how transformers runs
    *("torch_dtype", "dtype", "use_bfloat16", "torchscript", "use_cache", "return_dict", "output_attentions"),
    *("output_hidden_states", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation"),
    *("experts_implementation", "_experts_implementation"),
    # tokens and generation
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    *("tokenizer_class", "prefix", "task_specific_params"),
    # heads that these architectures do not have
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task"),
}


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the rotary angles: wavelengths above `original_positions /
    low_freq_factor` are `factor` times as long, those below `original_positions / high_freq_factor`
    stay, and in between the inverse frequencies are interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True)
class ModelShape:
    """What an HF config says, in one place, checked."""

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    init_std: float
    tied: bool
    qkv_bias: bool
    qk_norm: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], ignore: Collection[str] = ()) -> ModelShape:
        """From the parsed config.json, without the fields that `ignore` names. Raises ValueError naming every
        field that has no counterpart or cannot be ignored."""
        name = config.get("model_type")
        if not isinstance(name, str) or name not in FAMILIES:
            supported = ", ".join(FAMILIES)
            raise ValueError(f"config.json: model_type {name!r} is not supported (supported: {supported})")
        family = FAMILIES[name]
        if problems := [*_numbers(config, family), *_fields(config, name, family, ignore)]:
            raise ValueError("config.json: " + "; ".join(problems))
        heads = int(config["num_attention_heads"])
        return cls(
            family=name,
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=int(config["hidden_size"]),
            num_heads=heads,
            num_query_groups=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            ffn_hidden_size=int(config["intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
            max_positions=int(config["max_position_embeddings"]),
            rope_theta=float(_rope(config).get("rope_theta", 10000.0)),
            rope_scaling=_rope_scaling(_rope(config)),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            init_std=float(config.get("initializer_range", 0.02)),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
        )

    @classmethod
    def from_folder(cls, folder: Path, ignore: Collection[str] = ()) -> ModelShape:
        """Raises OSError where there is no config.json, and ValueError naming it and what is wrong in it."""
        try:
            return cls.from_hf(_read(folder), ignore)
        except ValueError as error:
            raise ValueError(f"{folder}/{error}") from error

    @classmethod
    def of(cls, model: ModelConfig) -> ModelShape:
        """Of a run's settings. Raises what `from_folder` raises."""
        return cls.from_folder(model.path, model.ignore_config_fields)

    def identity(self) -> dict[str, Any]:
        """What decides the meaning of weights of this shape, by config.json's names and as plain values,
        which a checkpoint can keep."""
        values = dataclasses.asdict(self)
        return {name: values[own] for own, name in IDENTITY.items()}

    def differences(self, kept: Mapping[str, Any]) -> list[str]:
        """What another shape's `identity` has otherwise, a text for each field. Fields that it lacks, since
        it was kept by a version that knew fewer, are passed over."""
        own = self.identity()
        return [
            f"{name} is {own.get(name)!r} in config.json, and the weights were saved with {value!r}"
            for name, value in kept.items()
            if own.get(name) != value
        ]

    def padded_vocab_size(self, tp: int) -> int:
        """Vocabulary rows held over all TP ranks; those beyond vocab_size are padding.

        The multiple does not change with TP up to 8 (128 for real vocabularies), so that a
        checkpoint fits another split.
        """
        multiple = math.lcm(tp, 128 if self.vocab_size >= 4096 else 8)
        return math.ceil(self.vocab_size / multiple) * multiple


# --- what is refused ----------------------------------------------------------------------------------


def _whole(value: Any) -> bool:
    return type(value) is int and value > 0


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _numbers(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    """Problems of the sizes, each by itself and together."""
    wrong = [n for n in (*REQUIRED, *family.required) if not _whole(config.get(n))]
    wrong += [n for n in _OPTIONAL_NUMBERS if config.get(n) is not None and not _whole(config[n])]
    yield from (f"{name} is {config.get(name)!r}, not a whole number" for name in dict.fromkeys(wrong))
    for name in ("rms_norm_eps", "initializer_range"):
        if name in config and not _number(config[name]):
            yield f"{name} is {config[name]!r}, not a number above 0"
    if wrong:
        return
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads")
    if groups and heads % groups:
        yield f"num_key_value_heads {groups} does not divide num_attention_heads {heads}"
    if not config.get("head_dim") and config["hidden_size"] % heads:
        yield f"num_attention_heads {heads} does not divide hidden_size {config['hidden_size']}"
    elif (config.get("head_dim") or config["hidden_size"] // heads) % 2:
        yield "head_dim is odd, and rotary embeddings take pairs"


def _fields(config: Mapping[str, Any], name: str, family: Family, ignore: Collection[str]) -> Iterator[str]:
    architectures = config.get("architectures")
    if architectures not in (None, [family.architecture]):
        yield f"architectures {architectures!r} is not supported ({family.architecture} is)"
    if not isinstance(config.get("tie_word_embeddings", False), bool):
        yield f"tie_word_embeddings is {config['tie_word_embeddings']!r}, not true or false"
    fixed, unknown = _fixed(family), []
    for key, value in config.items():
        if key in ignore:
            continue
        if key in fixed and not _has_value(key, value, fixed[key]):
            yield f"{key} {value!r} is not supported ({_as_json(fixed[key])} is)"
        elif not _is_known(key, family) and not passed_over(key, value, name):
            yield f"{key} {_short(value)} has no counterpart here ({name} models are built without it)"
            unknown.append(key)
    yield from _rope_problems(config, family)
    yield from _ignored_problems(config, name, family, ignore)
    if names := [key for key in unknown if _cannot_be_ignored(key, name, family) is None]:
        yield (
            f"model.ignore_config_fields = {json.dumps(names)} (of tools: --ignore-config-fields "
            f"{' '.join(names)}) passes over what you know to change nothing"
        )
    if unknown and class_fields(name) is None:
        yield "the installed transformers, which knows more fields, could not be asked for them"


def _fixed(family: Family) -> dict[str, Any]:
    return {**_FIXED, **family.fixed}


def _is_known(key: str, family: Family) -> bool:
    return key in _TRANSLATED | _HARMLESS | family.harmless or key in _fixed(family)


def _cannot_be_ignored(key: str, name: str, family: Family) -> str | None:
    """Why, if so."""
    if key in NEVER_IGNORED:
        return "its weights are not read"
    if key in _HARMLESS | family.harmless:
        return None
    if key in _TRANSLATED or key in (class_fields(name) or ()):
        return f"{name} models compute with it"
    return None


def _ignored_problems(
    config: Mapping[str, Any], name: str, family: Family, ignore: Collection[str]
) -> Iterator[str]:
    for key in ignore:
        if key not in config:
            yield f"there is no {key}, which ignore_config_fields names"
        elif why := _cannot_be_ignored(key, name, family):
            yield f"{key} cannot be ignored ({why}), and ignore_config_fields names it"


def remarks(folder: Path, ignore: Collection[str] = ()) -> list[str]:
    """What a user is warned of where `ModelShape.from_folder` takes the folder: the fields that it passes
    over, and the user's own choice of them."""
    config = _read(folder)
    name = config["model_type"]
    family = FAMILIES[name]
    left = {key: value for key, value in config.items() if key not in ignore and not _is_known(key, family)}
    lines = list(explain(left, name))
    if ignore:
        given = ", ".join(f"{key} = {_short(config[key])}" for key in ignore if key in config)
        lines.append(f"config.json: ignored, as ignore_config_fields asks for: {given}")
    return [f"{folder}/{line}" for line in lines]


def _read(folder: Path) -> dict[str, Any]:
    try:
        config = jsontext.loads((folder / "config.json").read_bytes())
    except ValueError as error:
        raise ValueError(f"config.json is {error}") from error
    if not isinstance(config, dict):
        raise ValueError("config.json does not hold a JSON object")
    return config


def _has_value(key: str, value: Any, wanted: Any) -> bool:
    if value is None:  # "not used", which an activation cannot be
        return key != "hidden_act"
    if key == "layer_types":
        return isinstance(value, list) and all(kind == wanted for kind in value)
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _as_json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


# --- rotary embeddings --------------------------------------------------------------------------------

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 writes rope_parameters, earlier releases rope_theta and rope_scaling."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if config.get("rope_theta") is not None:
        rope.setdefault("rope_theta", config["rope_theta"])
    return rope


def _rope_type(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    if _rope_type(rope) == "default":
        return None
    factor, low, high, positions = (rope[name] for name in _LLAMA3)
    return RopeScaling(float(factor), float(low), float(high), int(positions))


def _rope_problems(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    sources = [name for name in ("rope_parameters", "rope_scaling") if config.get(name)]
    if wrong := [name for name in sources if not isinstance(config[name], Mapping)]:
        yield f"{wrong[0]} is {_short(config[wrong[0]])}, not an object"
        return
    if len(sources) == 2:
        yield "rope_parameters and rope_scaling are both given; one of them has to go"
    rope = _rope(config)
    theta = config.get("rope_theta")
    if theta is not None and theta != rope["rope_theta"]:
        yield f"rope_theta {theta!r} is not the {rope['rope_theta']!r} of {sources[0]}"
    kind = _rope_type(rope)
    if kind not in family.rope_types:
        yield f"rope type {kind!r} is not supported ({' or '.join(family.rope_types)} is)"
        return
    where = sources[0] if sources else "rope"
    if "rope_theta" in rope and not _number(rope["rope_theta"]):
        yield f"rope_theta is {rope['rope_theta']!r}, not a number above 0"
    wanted = _LLAMA3 if kind == "llama3" else ()
    for name in wanted:
        if not _number(rope.get(name)) or (name == _LLAMA3[-1] and not _whole(rope[name])):
            yield f"{where}.{name} is {rope.get(name)!r}, and rope type {kind!r} takes a number above 0"
            return
    if wanted and not rope["high_freq_factor"] > rope["low_freq_factor"]:
        yield f"{where}.high_freq_factor {rope['high_freq_factor']} is not above low_freq_factor"
    for name in sorted(rope.keys() - {"rope_type", "type", "rope_theta", *wanted}):
        if name != "partial_rotary_factor" or rope[name] not in (None, 1.0):
            yield f"{where}.{name} {_short(rope[name])} is not supported with rope type {kind!r}"
