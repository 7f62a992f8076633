"""One bidirectional table of names: Megatron-Core <-> Hugging Face.

Import, export and broadcast all read it. It is pure: no torch, no Megatron.
Unknown and left-over names raise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Layout = Literal["copy", "vocab", "qkv", "gate_up"]
"""copy: the same tensor. vocab: rows beyond the true vocabulary are padding on Megatron's side.
qkv: q, k and v interleaved by query group. gate_up: gate above up, each split over TP."""


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the Hugging Face tensors that make it."""

    megatron: str
    """May hold `{layer}`, the global number from 0."""
    hf: tuple[str, ...]
    layout: Layout = "copy"
    tp_dim: int | None = None
    """The dimension that tensor parallelism splits; None where every rank holds all of it."""

    def at(self, layer: int | None) -> Entry:
        if layer is None:
            return self
        return Entry(
            self.megatron.format(layer=layer),
            tuple(n.format(layer=layer) for n in self.hf),
            self.layout,
            self.tp_dim,
        )


_L = "decoder.layers.{layer}."
_H = "model.layers.{layer}."
_ATTENTION_HF = tuple(_H + f"self_attn.{x}_proj" for x in "qkv")

_QKV_WEIGHT = Entry(
    _L + "self_attention.linear_qkv.weight", tuple(n + ".weight" for n in _ATTENTION_HF), "qkv", 0
)
_QKV_BIAS = Entry(_L + "self_attention.linear_qkv.bias", tuple(n + ".bias" for n in _ATTENTION_HF), "qkv", 0)
_QK_NORMS = tuple(
    Entry(_L + f"self_attention.{x}_layernorm.weight", (_H + f"self_attn.{x}_norm.weight",)) for x in "qk"
)


def _family(*attention: Entry) -> tuple[Entry, ...]:
    """A decoder with RMS norms, a gated MLP and these parameters from the norm to the attention itself."""
    return (
        Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab", 0),
        Entry(_L + "input_layernorm.weight", (_H + "input_layernorm.weight",)),
        *attention,
        Entry(_L + "self_attention.linear_proj.weight", (_H + "self_attn.o_proj.weight",), "copy", 1),
        Entry(_L + "pre_mlp_layernorm.weight", (_H + "post_attention_layernorm.weight",)),
        Entry(
            _L + "mlp.linear_fc1.weight",
            (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"),
            "gate_up",
            0,
        ),
        Entry(_L + "mlp.linear_fc2.weight", (_H + "mlp.down_proj.weight",), "copy", 1),
        Entry("decoder.final_layernorm.weight", ("model.norm.weight",)),
        Entry("output_layer.weight", ("lm_head.weight",), "vocab", 0),
    )


FAMILIES: dict[str, tuple[Entry, ...]] = {
    "qwen2": _family(_QKV_WEIGHT, _QKV_BIAS),
    "qwen3": _family(_QKV_WEIGHT, *_QK_NORMS),
    "llama": _family(_QKV_WEIGHT),
}

# Transformer Engine folds the norms into the linear layers that follow them.
_ALIASES = {
    ".self_attention.linear_qkv.layer_norm_weight": ".input_layernorm.weight",
    ".mlp.linear_fc1.layer_norm_weight": ".pre_mlp_layernorm.weight",
}


class NameTable:
    """The table of one model: a family, its number of layers, tied embeddings or not.

    Raises:
        KeyError: for a family that is not supported.
    """

    def __init__(self, family: str, num_layers: int, *, tied: bool) -> None:
        if family not in FAMILIES:
            raise KeyError(f"no name table for model family {family!r} (there are: {', '.join(FAMILIES)})")
        self.entries: list[Entry] = []
        per_layer = [e for e in FAMILIES[family] if "{layer}" in e.megatron]
        for entry in FAMILIES[family]:
            if "{layer}" in entry.megatron:
                if entry is per_layer[0]:
                    self.entries += [e.at(layer) for layer in range(num_layers) for e in per_layer]
            elif not (tied and entry.megatron == "output_layer.weight"):
                self.entries.append(entry)
        self.tied = tied
        self._by_megatron = {e.megatron: e for e in self.entries}
        self._by_hf = {name: e for e in self.entries for name in e.hf}

    def from_megatron(self, name: str) -> Entry:
        """The entry of a Megatron parameter (global layer number); with tied embeddings the last
        pipeline stage's copy of the embedding answers to the embedding's entry."""
        for alias, plain in _ALIASES.items():
            if name.endswith(alias):
                name = name[: -len(alias)] + plain
        if self.tied and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        if name not in self._by_megatron:
            raise KeyError(f"no Hugging Face name for the Megatron parameter {name!r}")
        return self._by_megatron[name]

    def from_hf(self, name: str) -> Entry:
        if name not in self._by_hf:
            raise KeyError(f"no Megatron name for the Hugging Face tensor {name!r}")
        return self._by_hf[name]

    def hf_names(self) -> list[str]:
        """Every Hugging Face tensor of the model, in export order."""
        return [name for entry in self.entries for name in entry.hf]

    def check_hf_names(self, names: list[str]) -> None:
        """Raise KeyError unless `names` are exactly this model's tensors.

        A tied model's file may repeat the embedding as lm_head.weight.
        """
        given = set(names) - ({"lm_head.weight"} if self.tied else set())
        wanted = set(self._by_hf)
        if missing := sorted(wanted - given):
            raise KeyError(f"missing from the checkpoint: {some(missing)}")
        if extra := sorted(given - wanted):
            raise KeyError(f"in the checkpoint and without a Megatron name: {some(extra)}")


def some(names: list[str], limit: int = 5) -> str:
    """The first few of many names, and how many there are."""
    shown = ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"


def checkpoint_key(entry: Entry) -> tuple[str, int | None]:
    """The key of a parameter in Megatron's distributed checkpoint, and its layer number.

    Layers share a key there, and their number is the first index of its tensor; norms have Transformer
    Engine's names, so that a checkpoint fits both layer specs.
    """
    name = entry.megatron
    for alias, plain in _ALIASES.items():
        if name.endswith(plain):
            name = name[: -len(plain)] + alias
    if match := re.fullmatch(r"(decoder\.layers\.)(\d+)\.(.+)", name):
        return match[1] + match[3], int(match[2])
    return name, None


def global_name(local_name: str, first_layer: int) -> str:
    """A pipeline stage's parameter name with the layer number counted over all stages."""
    return re.sub(
        r"^decoder\.layers\.(\d+)\.", lambda m: f"decoder.layers.{int(m[1]) + first_layer}.", local_name
    )
