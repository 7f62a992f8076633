"""What the converter refuses, by name and before anything is written."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from converting import GONE, config, cut, edit, index, refusal, same_tensors, write_folder
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_dgpo.mcore.files import METADATA, content_metadata, digests, write_checkpoint, write_digests
from megatron_dgpo.weights.checkpoints import (
    HFFolder,
    MegatronFolder,
    import_hf,
    name_table,
    open_checkpoint,
    pieces,
)
from megatron_dgpo.weights.convert import export_hf, folder_source
from megatron_dgpo.weights.folders import INDEX_FILE

K_NORM, UP = "model.layers.1.self_attn.k_norm.weight", "model.layers.2.mlp.up_proj.weight"
PART = "model-00002-of-00005.safetensors"
SOURCES = {
    "file cut off": ("one", cut("model.safetensors"), "{source}/model.safetensors is cut off or damaged"),
    "file cut in its header": ("one", cut("model.safetensors", 0.001), "{source}/model.safetensors is cut"),
    "part cut off": ("several", cut(PART, 0.9), f"{{source}}/{PART} is cut off or damaged"),
    "part missing": (
        "several",
        lambda f: (f / PART).unlink(),
        f"{{source}}: {PART} is listed in the index but is not there",
    ),
    "index not JSON": ("several", cut(INDEX_FILE), f"{{source}}/{INDEX_FILE} is damaged"),
    "index empty": (
        "several",
        lambda f: (f / INDEX_FILE).write_text("{}"),
        f"{{source}}/{INDEX_FILE} is",
    ),
    "index lists too much": (
        "several",
        index(lambda m: m.update({"model.extra.weight": PART})),
        f"{{source}}: the index has model.extra.weight in {PART}, which does not hold it",
    ),
    "index lists another file": (
        "several",
        index(lambda m: m.update({"model.embed_tokens.weight": PART})),
        "{source}: the index has model.embed_tokens.weight in",
    ),
    "index lists too little": (
        "several",
        index(lambda m: m.pop("model.embed_tokens.weight")),
        "{source}: model-00001-of-00005.safetensors holds model.embed_tokens.weight, which the index",
    ),
    "no weights": (
        "one",
        lambda f: (f / "model.safetensors").unlink(),
        "{source}: neither model.safetensors nor model.safetensors.index.json is there",
    ),
    "no folder": ("one", shutil.rmtree, "[Errno 2] No such file or directory: '{source}/config.json'"),
    "tensor missing": (
        "one",
        edit(UP, lambda _: None),
        f"{{source}}: missing from the checkpoint: 1 tensor ({UP}",
    ),
    "tensor too many": (
        "one",
        edit("model.layers.0.self_attn.q_proj.bias", lambda _: torch.zeros(48)),
        "{source}: in the checkpoint and without a Megatron name: 1 tensor (model.layers.0.self_attn.q_proj.",
    ),
    "shape": (
        "one",
        edit(UP, lambda t: t[:-1]),
        f"{{source}}: {UP} has shape (47, 32), config.json makes it (48, 32)",
    ),
    "integers": ("one", edit(UP, lambda t: t.int()), f"{{source}}: {UP} is I32; weights are F32 or BF16"),
    "half precision": ("one", edit(UP, lambda t: t.half()), f"{{source}}: {UP} is F16; weights are"),
    "mixed": (
        "one",
        edit(UP, lambda t: t.bfloat16()),
        "{source}: lm_head.weight is F32 and " + UP + " is BF16",
    ),
    "dtype of the config": (
        "one",
        config(dtype="bfloat16"),
        "{source}: config.json says bfloat16, and lm_head.weight is F32",
    ),
    "tied with a head of its own": (
        "one",
        config(tie_word_embeddings=True),
        "{source}: lm_head.weight differs from model.embed_tokens.weight",
    ),
    "field": (
        "one",
        config(attention_bias=True),
        "{source}/config.json: attention_bias True is not supported",
    ),
    "layers": (
        "one",
        config(num_hidden_layers=3),
        "{source}: in the checkpoint and without a Megatron name: 11",
    ),
    "architecture": (
        "one",
        config(model_type="gpt2"),
        "{source}/config.json: model_type 'gpt2' is not",
    ),
    "config not JSON": ("one", cut("config.json"), "{source}/config.json is not valid JSON ("),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_wrong_source_is_refused_before_anything_is_written(name, originals, tmp_path, capsys):
    original, spoil, says = SOURCES[name]
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(originals / original, source)
    spoil(source)
    before = sorted(tmp_path.rglob("*"))
    assert refusal(["import", source, target], capsys).startswith(says.replace("{source}", str(source)))
    assert sorted(tmp_path.rglob("*")) == before


def biggest(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda p: p.stat().st_size)


def flip(folder: Path) -> None:
    data = bytearray(biggest(folder).read_bytes())
    data[len(data) // 2] ^= 0x5A
    biggest(folder).write_bytes(bytes(data))


CHECKPOINTS = {
    "numbers changed": (flip, "{source}: __0_0.distcp is missing or not what was saved"),
    "file cut off": (cut("__0_0.distcp"), "{source}: __0_0.distcp is missing or not what was saved"),
    "file missing": (lambda f: (f / "__0_0.distcp").unlink(), "{source}: __0_0.distcp is missing or not"),
    "index cut off": (cut(".metadata"), "{source}: .metadata is missing or not what was saved"),
    "list missing": (lambda f: (f / "files.json").unlink(), "{source}: .metadata is missing or not what was"),
    "list not JSON": (cut("files.json"), "{source}/files.json is damaged"),
    "unfinished": (lambda f: (f / ".metadata").unlink(), "{source}: no distributed checkpoint"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "{source}: neither config.json in it nor "),
    "another model": (
        config(hidden_size=64, head_dim=16),
        "{source}: hidden_size is 64 in config.json, and the weights were saved with 32; head_dim is 16 in "
        "config.json, and the weights were saved with 12",
    ),
    "lists cut off": (cut("common.pt"), "{source}: common.pt is missing or not what was saved"),
    "a field": (config(hidden_act="gelu"), "{source}/config.json: hidden_act 'gelu' is not supported"),
    "another family": (
        config(model_type="qwen2", architectures=["Qwen2ForCausalLM"], attention_bias=None),
        "{source}/config.json: attention_bias None has no counterpart",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_wrong_checkpoint_is_refused_before_anything_is_written(name, originals, tmp_path, capsys):
    spoil, says = CHECKPOINTS[name]
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(originals / "imported", source)
    spoil(source)
    before = sorted(tmp_path.rglob("*"))
    assert refusal(["export", source, target], capsys).startswith(says.replace("{source}", str(source)))
    assert sorted(tmp_path.rglob("*")) == before


ROPE = {"rope_type": "default", "rope_theta": 500.0}
FIELDS = {
    "fewer words": ({"vocab_size": 40}, "vocab_size is 40", "45"),
    "padding as words": ({"vocab_size": 47}, "vocab_size is 47", "45"),
    "more words": ({"vocab_size": 49}, "vocab_size is 49", "45"),
    "layers": ({"num_hidden_layers": 5}, "num_hidden_layers is 5", "4"),
    "heads": ({"num_attention_heads": 2}, "num_attention_heads is 2", "4"),
    "key/value heads": ({"num_key_value_heads": 4}, "num_key_value_heads is 4", "2"),
    "size of heads": ({"head_dim": 6}, "head_dim is 6", "12"),
    "MLP": ({"intermediate_size": 64}, "intermediate_size is 64", "48"),
    "norm": ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06", "1e-05"),
    "rope": ({"rope_parameters": {**ROPE, "rope_theta": 1e4}}, "rope_theta is 10000.0", "500.0"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings is True", "False"),
    "family": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "use_sliding_window": GONE}
        | dict.fromkeys(("sliding_window", "max_window_layers", "layer_types"), GONE),
        "model_type is 'llama'",
        "'qwen3'",
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_config_that_the_weights_were_not_saved_with_is_refused_by_field(name, originals, tmp_path, capsys):
    fields, says, saved = FIELDS[name]
    shutil.copytree(originals / "imported", tmp_path / "source")
    config(**fields)(tmp_path / "source")
    before = sorted(tmp_path.rglob("*"))
    said = refusal(["export", tmp_path / "source", tmp_path / "target"], capsys)
    assert said == (f"{tmp_path / 'source'}: {says} in config.json, and the weights were saved with {saved}")
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match=says):
        folder_source(tmp_path / "source")


def test_fields_that_do_not_change_what_weights_compute_may_change(originals, tmp_path):
    shutil.copytree(originals / "imported", tmp_path / "source")
    config(max_position_embeddings=128, initializer_range=0.1)(tmp_path / "source")
    export_hf(open_checkpoint(tmp_path / "source"), tmp_path / "target")
    assert same_tensors(tmp_path / "target", originals / "one")


def test_heads_that_make_the_same_sizes_are_refused(tmp_path):
    """8 heads of 4 are as wide as 4 heads of 8, and no tensor shows it."""
    source = write_folder(tmp_path / "source", tied=False, family="llama")
    import_hf(HFFolder(source), tmp_path / "imported")
    config(num_attention_heads=8, num_key_value_heads=4, head_dim=4)(tmp_path / "imported")
    with pytest.raises(ValueError, match="num_attention_heads is 8 .* with 4; .* head_dim is 4 .* with 8"):
        open_checkpoint(tmp_path / "imported")


def earlier(folder: Path) -> None:
    """Make it a checkpoint of a version that did not keep the shape."""
    torch.save({"content_metadata": METADATA}, folder / "common.pt")
    write_digests(folder, digests(folder))


def test_a_checkpoint_of_a_later_megatron_says_so(originals, tmp_path):
    """From 0.19 on there is no common.pt; versions before that cannot load the checkpoint."""
    shutil.copytree(originals / "imported", tmp_path / "source")
    (tmp_path / "source" / "common.pt").unlink()
    index = tmp_path / "source" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    metadata.state_dict_metadata["common_state/shard_0_1"] = BytesStorageMetadata()
    index.write_bytes(pickle.dumps(metadata))
    write_digests(tmp_path / "source", digests(tmp_path / "source"))
    with pytest.raises(ValueError, match=r"source: saved by megatron-core 0\.19 or later, .*; upgrade "):
        open_checkpoint(tmp_path / "source")


EARLIER = {
    "another model": ({"hidden_size": 64}, "embedding.word_embeddings.weight has shape (48,"),
    "more words": ({"vocab_size": 49}, "embedding.word_embeddings.weight has shape (48,"),
    "more layers": ({"num_hidden_layers": 5}, "decoder.layers.self_attention.linear_qkv"),
    "tied": (
        {"tie_word_embeddings": True},
        "in the checkpoint and without a Hugging Face name: 1 tensor (output_layer.weight)",
    ),
}


def test_a_checkpoint_that_does_not_say_its_shape_still_converts(originals, tmp_path):
    shutil.copytree(originals / "imported", tmp_path / "source")
    earlier(tmp_path / "source")
    export_hf(open_checkpoint(tmp_path / "source"), tmp_path / "target")
    assert same_tensors(tmp_path / "target", originals / "one")


@pytest.mark.parametrize("name", EARLIER)
def test_then_its_tensors_say_what_does_not_fit(name, originals, tmp_path, capsys):
    fields, says = EARLIER[name]
    source = tmp_path / "source"
    shutil.copytree(originals / "imported", source)
    earlier(source)
    config(**fields)(source)
    before = sorted(tmp_path.rglob("*"))
    said = refusal(["export", source, tmp_path / "target"], capsys)
    assert said.startswith(f"{source}: {says}")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_with_other_parameters_is_refused_by_name(originals, tmp_path):
    model = HFFolder(originals / "one")
    everything = list(pieces(model))
    norm = "decoder.layers.self_attention.k_layernorm.weight"
    lacking = [p for p in everything if p.key != norm]
    gap = [p for p in everything if (p.key, p.offsets[0]) != (norm, 1)]
    other = replace(everything[0], key="decoder.layers.mlp.router.weight")
    for name, written, kind, says in (
        ("lacking", lacking, KeyError, "missing from the checkpoint: 1 tensor .*k_layernorm.weight"),
        ("gap", gap, ValueError, "parts of decoder.layers.self_attention.k_layernorm.weight are missing"),
        ("other", [*everything, other], KeyError, "without a Hugging Face name: 1 tensor .*router.weight"),
    ):
        (tmp_path / name).mkdir()
        write_checkpoint(tmp_path / name, written, content_metadata(model.shape))
        with pytest.raises(kind, match=says):
            MegatronFolder(tmp_path / name, model.shape)


def test_the_list_of_files_comes_last(originals, tmp_path):
    """Without it the checkpoint is refused, so a folder cut off while it was written never loads."""
    shutil.copytree(originals / "imported", tmp_path / "copy")
    (tmp_path / "copy" / "files.json").unlink()
    with pytest.raises(ValueError, match="not what was saved"):
        open_checkpoint(tmp_path / "copy")
    write_digests(tmp_path / "copy", {})
    with pytest.raises(ValueError, match="not what was saved"):
        open_checkpoint(tmp_path / "copy")
    assert name_table(open_checkpoint(originals / "imported").shape).hf_names()
