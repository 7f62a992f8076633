"""Fields of a config.json that have no counterpart here: which may be passed over, told by their kind.

A model that ignores a field that its computation depends on is another model. A field may be passed over
where the configuration class of the installed transformers does not define it, so that transformers' model
ignores it as well, and its name does not look like a change of the computation. This module imports nothing
heavy: it reads that class's source, and only where a file has such a field.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

NEVER_IGNORED = frozenset({"quantization_config"})
"""What is refused whatever a user says: the weights are not what this project reads."""
KNOWN_TO_ENGINES = {
    "dual_chunk_attention_config": "an engine may switch to another attention by it, which the trainer does "
    "not compute; take it out of config.json to be sure that none does",
}
"""Fields that the trainer passes over and an engine may not, and what that means."""

_RUNTIME = re.compile(r"(^|_)flash_att|_implementation$")
_TOKENS = re.compile(r"(^|_)token(_ids?|_index)?$")
_ALWAYS = re.compile(r"bias|norm")
_GENERATION = frozenset(
    {"encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "num_beam_groups"}
)
"""Settings of generation whose names look like something else."""
_STEMS = (
    # positions and attention
    *("rope", "rota", "yarn", "alibi", "posit", "theta", "interleav", "attn", "attent", "mask", "causal"),
    *("window", "sliding", "head", "query", "cross", "sink", "chunk", "latent"),
    # layers and what is in them
    *("layer", "block", "depth", "width", "hidden", "intermed", "dimen", "rank", "group", "emb", "proj"),
    *("norm", "epsilon", "bias", "activ", "gelu", "silu", "relu", "swi", "glu", "mlp", "ffn", "feed", "gate"),
    *("gating", "drop", "resid", "conv", "mamba", "recur", "state", "memor", "pool", "kernel", "parallel"),
    *("expert", "moe", "rout", "adapt", "lora", "mtp", "nextn", "draft"),
    # numbers that scale, and what comes out
    *("scal", "multipl", "factor", "coef", "alpha", "beta", "gamma", "mup", "clip", "logit", "soft", "vocab"),
    *("pad", "share", "untie", "tied"),
    # how weights are kept
    *("quant", "awq", "gptq", "spars", "prun", "compress"),
    # other inputs
    *("vision", "visual", "image", "video", "audio", "speech", "modal", "encod", "decod"),
)
_WORDS = frozenset(
    {"act", "cap", "dim", "eps", "fp8", "int4", "int8", "key", "kv", "map", "pos", "qk", "qkv"}
)
_WORDS |= {"4bit", "8bit", "bits", "fn", "text", "tie", "value"}


def passed_over(name: str, value: Any, family: str) -> bool:
    """Whether a field that has no counterpart may be passed over. Null says that something is not used, which
    is so here but for biases and norms that some families always have."""
    if name.startswith("_") or name in KNOWN_TO_ENGINES or (value is None and not _ALWAYS.search(name)):
        return True
    if name in NEVER_IGNORED or looks_like_computation(name):
        return False
    defined = class_fields(family)
    return defined is not None and name not in defined


def looks_like_computation(name: str) -> bool:
    """Whether a name says that the model computes something else with the field than without it."""
    if name in _GENERATION or _RUNTIME.search(name) or _TOKENS.search(name):
        return False
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    words = re.findall(r"[a-z0-9]+", spaced)
    return any(word in _WORDS or word.startswith(_STEMS) for word in words)


def explain(accepted: Mapping[str, Any], family: str) -> Iterator[str]:
    """Warnings that name the fields that were passed over and have a value."""
    used = [name for name, value in accepted.items() if value is not None]
    for name in used:
        if name in KNOWN_TO_ENGINES:
            yield f"config.json: {name} is passed over: {KNOWN_TO_ENGINES[name]}"
    if plain := sorted(name for name in used if name not in KNOWN_TO_ENGINES):
        yield (
            f"config.json: passed over, since transformers' {family} models have no such fields and their "
            f"names do not look like a change of the computation: {', '.join(plain)}"
        )


@functools.cache
def class_fields(family: str) -> frozenset[str] | None:
    """Names that the configuration class of a model_type in the installed transformers takes, its base
    class's among them; None where the package or its sources are not there."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(spec.submodule_search_locations[0])
    found: set[str] = set()
    for path in (f"models/{family}/configuration_{family}.py", "configuration_utils.py"):
        try:
            tree = ast.parse((root / path).read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            return None
        names = {name for node in tree.body if isinstance(node, ast.ClassDef) for name in _names(node)}
        if not names:
            return None
        found |= names
    return frozenset(found)


def _names(node: ast.ClassDef) -> Iterator[str]:
    """Fields of a configuration class: annotated ones, parameters of its initialisers, and what these take
    out of their keywords."""
    if not node.name.endswith("Config"):
        return
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            if "ClassVar" not in ast.unparse(part.annotation):
                yield part.target.id
        elif isinstance(part, ast.FunctionDef) and part.name in ("__init__", "__post_init__"):
            yield from (a.arg for a in (*part.args.args, *part.args.kwonlyargs) if a.arg != "self")
            for call in ast.walk(part):
                if isinstance(call, ast.Call) and ast.unparse(call.func) in ("kwargs.pop", "kwargs.get"):
                    if call.args and isinstance(call.args[0], ast.Constant):
                        yield str(call.args[0].value)
