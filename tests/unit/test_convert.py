"""Checkpoints from Hugging Face's format to Megatron's and back in one process; see
tests/distributed/test_convert_splits.py for splits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import convert_checkpoint
import pytest
import torch
from memory import measured
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, hf_tensors, write_model

from megatron_dgpo.checks import check_all
from megatron_dgpo.mcore.files import METADATA, content_metadata, digests, write_checkpoint, write_digests
from megatron_dgpo.weights.checkpoints import (
    HFFolder,
    MegatronFolder,
    import_hf,
    name_table,
    open_checkpoint,
    pieces,
)
from megatron_dgpo.weights.convert import export_hf, folder_source, write_safetensors
from megatron_dgpo.weights.folders import INDEX_FILE

TOKENIZER = {
    "tokenizer.json": '{"model": {"vocab": {"a": 0}}}',
    "tokenizer_config.json": '{"eos_token": "a"}',
    "chat_template.jinja": "{{ messages }}",
}
CASES = [
    *((family, tied, torch.float32) for family in FAMILIES for tied in (True, False)),
    ("qwen3", False, torch.bfloat16),
    ("llama", True, torch.bfloat16),
]


def write_folder(folder: Path, **how) -> Path:
    write_model(folder, **how)
    for name, text in TOKENIZER.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """`one`: a file. `several`: files and an index."""
    root = tmp_path_factory.mktemp("originals")
    write_folder(root / "one", tied=False, family="qwen3")
    shutil.copytree(root / "one", root / "several")
    (root / "several" / "model.safetensors").unlink()
    write_safetensors(iter(hf_tensors(root / "one").items()), root / "several", shard_bytes=40_000)
    assert len(list((root / "several").glob("*.safetensors"))) > 2
    import_hf(HFFolder(root / "one"), root / "imported")
    return root


def same_tensors(a: Path, b: Path) -> bool:
    one, other = hf_tensors(a), hf_tensors(b)
    return set(one) == set(other) and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n].view(torch.uint8), other[n].view(torch.uint8))
        for n in one
    )


@pytest.mark.parametrize(("family", "tied", "dtype"), CASES)
def test_import_then_export_returns_the_folder_bit_for_bit(tmp_path, family, tied, dtype):
    source = write_folder(tmp_path / "source", tied=tied, family=family, dtype=dtype)
    import_hf(HFFolder(source), tmp_path / "megatron")
    checkpoint = open_checkpoint(tmp_path / "megatron")
    assert checkpoint.dtype == dtype
    export_hf(checkpoint, tmp_path / "back", shard_bytes=1 << 30)
    export_hf(checkpoint, tmp_path / "parts", shard_bytes=20_000)
    for target in (tmp_path / "back", tmp_path / "parts"):
        assert same_tensors(source, target)
        for name in ("config.json", "generation_config.json", *TOKENIZER):
            assert (target / name).read_bytes() == (source / name).read_bytes()
        weights = {p.name for p in target.iterdir() if "safetensors" in p.name}
        assert {p.name for p in target.iterdir()} == {"config.json", "generation_config.json"} | set(
            TOKENIZER
        ) | weights
    assert (tmp_path / "back" / "model.safetensors").is_file()
    index = json.loads((tmp_path / "parts" / INDEX_FILE).read_text())
    assert len(set(index["weight_map"].values())) > 2
    numbers = sum(t.numel() for t in hf_tensors(source).values())
    assert index["metadata"]["total_size"] == numbers * dtype.itemsize


def test_several_files_are_imported_like_one(originals, tmp_path):
    import_hf(HFFolder(originals / "several"), tmp_path / "imported")
    for file in ("__0_0.distcp", "config.json"):
        assert (tmp_path / "imported" / file).read_bytes() == (originals / "imported" / file).read_bytes()


def test_an_imported_folder_is_read_like_the_original(originals):
    names, read = folder_source(originals / "imported")
    want = hf_tensors(originals / "one")
    assert sorted(names) == sorted(want)
    assert all(torch.equal(read(name), want[name]) for name in names)


def test_the_dtype_in_the_exported_config_is_that_of_the_weights(originals, tmp_path):
    """A run in float32 from bfloat16 weights has float32 checkpoints."""
    (tmp_path / "bf16").mkdir()
    config = json.loads((originals / "one" / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "bf16" / "config.json").write_text(json.dumps(config))
    export_hf(open_checkpoint(originals / "imported", tmp_path / "bf16"), tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config | {"dtype": "float32"}
    assert HFFolder(tmp_path / "back").dtype == torch.float32


def test_a_run_may_start_from_an_imported_folder(originals, tmp_path):
    from tiny import config as settings

    problems = check_all(settings(originals / "imported"))
    assert not [p for p in problems if p.startswith("model.")]
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(originals / "imported" / name, tmp_path)
    problems = check_all(settings(tmp_path))
    assert any(p.startswith(f"model.path: {tmp_path} has no safetensors") for p in problems)


# --- memory ---------------------------------------------------------------------------------------------


def test_no_more_is_in_memory_than_a_few_tensors_and_one_output_file(tmp_path):
    shape = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=12, vocab_size=2000)
    one = write_model(tmp_path / "one", tied=False, family="llama", **shape)
    tensors = hf_tensors(one)
    largest = max(t.nbytes for t in tensors.values())
    shard = 4 * largest
    assert sum(t.nbytes for t in tensors.values()) > 20 * largest
    source = tmp_path / "source"
    source.mkdir()
    write_safetensors(iter(tensors.items()), source, shard_bytes=shard)
    shutil.copy(one / "config.json", source)
    # The file that a tensor is read from counts in full here, though no more of it is read.
    _, used = measured(lambda: import_hf(HFFolder(source), tmp_path / "megatron"))
    assert used.peak < shard + 3 * largest and used.kept < largest
    checkpoint = open_checkpoint(tmp_path / "megatron")
    _, used = measured(lambda: export_hf(checkpoint, tmp_path / "back", shard_bytes=shard))
    assert used.peak < shard + 3 * largest and used.kept < largest
    assert same_tensors(source, tmp_path / "back")


# --- what is refused ------------------------------------------------------------------------------------


def edit(name, change):
    """Replace a tensor of the folder's one file; None takes it away."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        new = change(tensors.get(name))
        tensors = {n: t for n, t in tensors.items() if n != name} | ({} if new is None else {name: new})
        save_file(tensors, folder / "model.safetensors")

    return spoil


GONE = object()


def config(**fields):
    def spoil(folder: Path) -> None:
        new = json.loads((folder / "config.json").read_text()) | fields
        new = {name: value for name, value in new.items() if value is not GONE}
        (folder / "config.json").write_text(json.dumps(new))

    return spoil


def index(change):
    def spoil(folder: Path) -> None:
        old = json.loads((folder / INDEX_FILE).read_text())
        change(old["weight_map"])
        (folder / INDEX_FILE).write_text(json.dumps(old))

    return spoil


def cut(name, share=0.5):
    def spoil(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return spoil


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


def refusal(words, capsys) -> str:
    """The one line on stderr of a command that ends with status 2."""
    with pytest.raises(SystemExit) as caught:
        convert_checkpoint.main([str(word) for word in words])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("error: ")
    return line.removeprefix("error: ")


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


def test_a_target_that_is_there_is_kept_without_overwrite(originals, tmp_path, capsys):
    target = tmp_path / "target"
    import_hf(HFFolder(originals / "one"), target)
    for words in (["import", originals / "one"], ["export", originals / "imported"]):
        before = {p: p.read_bytes() for p in target.iterdir()}
        assert refusal([*words, target], capsys) == f"{target} is there already (--overwrite replaces it)"
        assert {p: p.read_bytes() for p in target.iterdir()} == before
    assert convert_checkpoint.main(["export", str(originals / "imported"), str(target), "--overwrite"]) == 0
    assert same_tensors(originals / "one", target) and not (target / "metadata.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    said = capsys.readouterr().out
    assert said.startswith("exported qwen3, ") and str(target) in said


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_what_a_killed_conversion_left_behind_is_cleaned_up(originals, tmp_path):
    """Killed while writing, or while it removed what it had replaced: that goes."""
    target = tmp_path / "target"
    for name in (".target.dgpo-partial", ".target.dgpo-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "junk").write_text("x")
    (tmp_path / "target").mkdir()
    import_hf(HFFolder(originals / "one"), target, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_killed_between_two_renames_the_old_folder_gets_its_name_back(originals, tmp_path, overwrite):
    target, old = tmp_path / "target", tmp_path / ".target.dgpo-old"
    import_hf(HFFolder(originals / "one"), old)
    shutil.copytree(old, tmp_path / ".target.dgpo-partial")
    want = contents(old)
    if overwrite:

        def full_disk(_: int) -> None:
            assert contents(target) == want, "not before there is something to replace it"
            raise OSError(28, "No space left on device")

        with pytest.raises(OSError, match="No space left"):
            import_hf(HFFolder(originals / "one"), target, overwrite=True, on_bytes=full_disk)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["target"]
    else:
        with pytest.raises(FileExistsError, match="target is there already"):
            import_hf(HFFolder(originals / "one"), target)
    assert contents(target) == want and open_checkpoint(target).shape.family == "qwen3"


@pytest.mark.parametrize("kind", ["import", "export"])
@pytest.mark.parametrize("there", [True, False])
def test_folders_of_others_beside_the_target_stay_untouched(originals, tmp_path, capsys, kind, there):
    """A user's own backup is none of the converter's business, whatever it is called."""
    words = [kind, originals / ("one" if kind == "import" else "imported")]
    names = ("model.old", "model.partial", ".model.old", ".model.partial", "model.bak")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text(name)
    target = tmp_path / "model"
    if there:
        target.mkdir()
        (target / "config.json").write_text("{}")
    before = contents(tmp_path)
    if there:
        says = f"{target} is there already (--overwrite replaces it)"
        assert refusal([*words, target], capsys) == says
        assert contents(tmp_path) == before
    flag = ["--overwrite"] if there else []
    assert convert_checkpoint.main([*map(str, words), str(target), *flag]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["model", *names])
    for name in names:
        assert contents(tmp_path / name) == {"precious": name.encode()}


def test_a_target_that_appears_meanwhile_is_kept(originals, tmp_path):
    target = tmp_path / "target"

    def somebody_else(_: int) -> None:
        target.mkdir(exist_ok=True)

    with pytest.raises(FileExistsError, match="target is there already"):
        import_hf(HFFolder(originals / "one"), target, on_bytes=somebody_else)
    assert [p.name for p in tmp_path.iterdir()] == ["target"] and not list(target.iterdir())


def test_of_a_link_what_it_points_to_is_replaced(originals, tmp_path):
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    import_hf(HFFolder(originals / "one"), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["real"]
    assert open_checkpoint(tmp_path / "disk" / "real").shape.family == "qwen3"


def test_an_error_while_writing_leaves_the_old_folder(originals, tmp_path):
    target = tmp_path / "target"
    import_hf(HFFolder(originals / "one"), target)

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        import_hf(HFFolder(originals / "one"), target, overwrite=True, on_bytes=full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_hf(open_checkpoint(target), target, overwrite=True, on_bytes=full_disk)
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    assert open_checkpoint(target).shape.family == "qwen3"


def test_sizes(capsys):
    sizes = {"5GB": 5 * 10**9, "1.5MB": 1_500_000, "2GiB": 2 << 30, "700000": 700_000, "5 kb": 5000}
    assert {t: convert_checkpoint.size(t) for t in sizes} == sizes
    for text in ("5B", "x", "-1GB", "0MB", "1 TB", "0.1"):
        with pytest.raises(SystemExit):
            convert_checkpoint.parse(["export", "a", "b", f"--shard-size={text}"])
        assert f"{text!r} is no size" in capsys.readouterr().err


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
