"""The name table and the layout arithmetic, without a process group (see test_model.py for the rest)."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file

from megatron_dgpo.mcore import hf_config
from megatron_dgpo.mcore.hf_config import ModelShape
from megatron_dgpo.weights.convert import folder_source, name_table
from megatron_dgpo.weights.names import FAMILIES, NameTable, global_name
from megatron_dgpo.weights.shards import from_full, join, lay, shard, to_full

LAYERS = 3
HF = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 24,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 45,
    "max_position_embeddings": 64,
    "head_dim": 6,
}
H, D, FFN, V, N, G = 24, 6, 40, 45, 12, 4
CASES = [(family, tied) for family in ("qwen2", "qwen3", "llama") for tied in (True, False)]


def hf_shapes(family: str, tied: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor of such a model, written out from its architecture."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,)}
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        shapes |= {p + "input_layernorm.weight": (H,), p + "post_attention_layernorm.weight": (H,)}
        for x, heads in (("q", N), ("k", G), ("v", G)):
            shapes[p + f"self_attn.{x}_proj.weight"] = (heads * D, H)
            if family == "qwen2":
                shapes[p + f"self_attn.{x}_proj.bias"] = (heads * D,)
        if family == "qwen3":
            shapes |= {p + "self_attn.q_norm.weight": (D,), p + "self_attn.k_norm.weight": (D,)}
        shapes[p + "self_attn.o_proj.weight"] = (H, N * D)
        shapes |= {p + "mlp.gate_proj.weight": (FFN, H), p + "mlp.up_proj.weight": (FFN, H)}
        shapes[p + "mlp.down_proj.weight"] = (H, FFN)
    return shapes if tied else shapes | {"lm_head.weight": (V, H)}


def shape_of(family: str, tied: bool) -> ModelShape:
    return ModelShape.from_hf({**HF, "model_type": family, "tie_word_embeddings": tied})


def tensors_of(family: str, tied: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Distinct values everywhere: a count, which float32 holds exactly, or for bfloat16 its bits."""
    out, start = {}, 0
    for name, size in hf_shapes(family, tied).items():
        count = torch.arange(start, start := start + torch.Size(size).numel())
        values = count.float() if dtype == torch.float32 else (count % 30_000).short().view(torch.bfloat16)
        out[name] = values.reshape(size)
    return out


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_the_table_knows_each_tensor_once_and_both_ways(family, tied):
    table = name_table(shape_of(family, tied))
    assert sorted(table.hf_names()) == sorted(hf_shapes(family, tied))
    assert len({e.megatron for e in table.entries}) == len(table.entries)
    for entry in table.entries:
        assert table.from_megatron(entry.megatron) is entry
        assert all(table.from_hf(name) is entry for name in entry.hf)
    table.check_hf_names(list(hf_shapes(family, tied)))


def test_every_family_whose_config_is_translated_has_its_table():
    assert set(FAMILIES) == set(hf_config.FAMILIES)


def test_a_few_names_as_they_are():
    table = NameTable("qwen2", LAYERS, tied=False)
    pairs = {
        "decoder.layers.2.self_attention.linear_qkv.bias": [
            f"model.layers.2.self_attn.{x}_proj.bias" for x in "qkv"
        ],
        "decoder.layers.1.mlp.linear_fc1.weight": [
            "model.layers.1.mlp.gate_proj.weight",
            "model.layers.1.mlp.up_proj.weight",
        ],
        "decoder.layers.0.pre_mlp_layernorm.weight": ["model.layers.0.post_attention_layernorm.weight"],
        "output_layer.weight": ["lm_head.weight"],
    }
    for megatron, hf in pairs.items():
        assert list(table.from_megatron(megatron).hf) == hf
    norm = NameTable("qwen3", LAYERS, tied=False).from_hf("model.layers.1.self_attn.k_norm.weight")
    assert norm.megatron == "decoder.layers.1.self_attention.k_layernorm.weight" and norm.tp_dim is None
    folded = table.from_megatron("decoder.layers.1.mlp.linear_fc1.layer_norm_weight")
    assert folded.hf == ("model.layers.1.post_attention_layernorm.weight",)
    assert (
        global_name("decoder.layers.1.mlp.linear_fc1.weight", 10) == "decoder.layers.11.mlp.linear_fc1.weight"
    )
    assert global_name("decoder.final_layernorm.weight", 10) == "decoder.final_layernorm.weight"


def test_the_last_stage_of_a_tied_model_holds_the_embedding():
    entry = NameTable("qwen2", LAYERS, tied=True).from_megatron("output_layer.weight")
    assert entry.hf == ("model.embed_tokens.weight",)


LLAMA = list(hf_shapes("llama", False))


@pytest.mark.parametrize(
    ("family", "call", "names"),
    [
        ("qwen2", lambda t: t.from_megatron("decoder.layers.3.mlp.linear_fc1.weight"), ["layers.3.mlp"]),
        ("qwen2", lambda t: t.from_hf("model.layers.0.self_attn.q_norm.weight"), ["self_attn.q_norm"]),
        ("qwen3", lambda t: t.from_hf("model.layers.0.self_attn.q_proj.bias"), ["self_attn.q_proj.bias"]),
        ("llama", lambda t: t.from_megatron("decoder.layers.0.self_attention.linear_qkv.bias"), ["qkv.bias"]),
        ("llama", lambda t: t.from_megatron("decoder.layers.0.self_attention.q_layernorm.weight"), ["q_la"]),
        (
            "llama",
            lambda t: t.check_hf_names([*LLAMA, "model.rotary.inv_freq", "a"]),
            ["without a Megatron name: 2 tensors", "a, model.rotary.inv_freq"],
        ),
        ("llama", lambda t: t.check_hf_names(LLAMA[:-1]), ["missing from", "1 tensor", "lm_head.weight"]),
        # qwen3's own norms are missing and llama has none: more than are listed, so they are counted
        (
            "qwen3",
            lambda t: t.check_hf_names(LLAMA),
            ["6 tensors", "layers.0.self_attn.k_norm.weight", "..."],
        ),
        ("llama", lambda _: NameTable("gpt2", 2, tied=False), ["gpt2", "qwen2, qwen3, llama"]),
    ],
)
def test_unknown_and_missing_names_raise(family, call, names):
    with pytest.raises(KeyError) as caught:
        call(NameTable(family, LAYERS, tied=False))
    assert all(name in str(caught.value) for name in names), caught.value


def test_a_tied_file_may_repeat_the_embedding():
    NameTable("qwen2", LAYERS, tied=True).check_hf_names(list(hf_shapes("qwen2", False)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("family", "tied"), CASES)
def test_import_and_export_are_inverse_bit_for_bit(family, tied, size, dtype):
    shape, tensors = shape_of(family, tied), tensors_of(family, tied, dtype)
    padded = shape.padded_vocab_size(size)
    assert padded > V and padded % size == 0
    back = {}
    for entry in name_table(shape).entries:
        full = to_full(entry, [tensors[n] for n in entry.hf], shape, padded)
        shards = [shard(entry, full, rank, size) for rank in range(size)]
        assert torch.equal(bits(join(entry, shards)), bits(full))
        found = from_full(entry, join(entry, shards), shape)
        back.update(zip(entry.hf, found, strict=True))
        laid = [torch.zeros_like(t) for t in found]
        lay(entry, shards, shape, laid)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(laid, found, strict=True)), entry
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype and torch.equal(bits(back[name]), bits(tensor)), name


def bits(x: torch.Tensor) -> torch.Tensor:
    """Some of the bfloat16 bit patterns are no numbers, which are not equal to themselves."""
    return x.contiguous().view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_rank_holds_its_own_heads_and_rows(size):
    """Megatron's layout, written out by index: per query group its q heads, then k, then v."""
    shape, t = shape_of("qwen2", False), tensors_of("qwen2", False, torch.float32)
    table = name_table(shape)
    p = "model.layers.1."
    q, k, v = (t[p + f"self_attn.{x}_proj.weight"] for x in "qkv")
    rows = []
    for g in range(G):
        rows += [q[g * 3 * D : (g + 1) * 3 * D], k[g * D : (g + 1) * D], v[g * D : (g + 1) * D]]
    whole = torch.cat(rows)
    gate, up = t[p + "mlp.gate_proj.weight"], t[p + "mlp.up_proj.weight"]
    o, embedding = t[p + "self_attn.o_proj.weight"], t["model.embed_tokens.weight"]
    padding = torch.zeros(shape.padded_vocab_size(size) - V, H)
    cuts = {
        "decoder.layers.1.self_attention.linear_qkv.weight": slices(whole, size),
        "decoder.layers.1.mlp.linear_fc1.weight": [
            torch.cat(pair) for pair in zip(slices(gate, size), slices(up, size), strict=True)
        ],
        "decoder.layers.1.self_attention.linear_proj.weight": [x.t() for x in slices(o.t(), size)],
        "embedding.word_embeddings.weight": slices(torch.cat((embedding, padding)), size),
        "decoder.layers.1.input_layernorm.weight": [t[p + "input_layernorm.weight"]] * size,
    }
    for name, want in cuts.items():
        entry = table.from_megatron(name)
        full = to_full(entry, [t[n] for n in entry.hf], shape, shape.padded_vocab_size(size))
        for rank in range(size):
            assert torch.equal(shard(entry, full, rank, size), want[rank]), (name, rank)


def slices(x: torch.Tensor, size: int) -> list[torch.Tensor]:
    edges = [len(x) * i // size for i in range(size + 1)]
    return [x[a:b] for a, b in pairwise(edges)]


def test_a_folder_is_read_from_one_file_or_several(tmp_path):
    tensors = tensors_of("llama", False, torch.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    names, read = folder_source(tmp_path)
    assert sorted(names) == sorted(tensors)
    assert all(torch.equal(read(n), tensors[n]) for n in names)

    split = tmp_path / "split"
    split.mkdir()
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, split / file)
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    names, read = folder_source(split)
    assert sorted(names) == sorted(tensors)
    assert all(torch.equal(read(n), tensors[n]) for n in names)
    (split / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-1.safetensors"):
        folder_source(split)
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        folder_source(tmp_path / "nothing")
