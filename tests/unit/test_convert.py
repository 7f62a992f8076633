"""Checkpoints from Hugging Face's format to Megatron's and back in one process; see
tests/distributed/test_convert_splits.py for splits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import convert_checkpoint
import pytest
import torch
from converting import TOKENIZER, refusal, same_tensors, write_folder
from memory import measured
from tiny import FAMILIES, hf_tensors, write_model

from megatron_dgpo.checks import check_all
from megatron_dgpo.weights.checkpoints import HFFolder, import_hf, open_checkpoint
from megatron_dgpo.weights.convert import export_hf, folder_source, write_safetensors
from megatron_dgpo.weights.folders import INDEX_FILE

CASES = [
    *((family, tied, torch.float32) for family in FAMILIES for tied in (True, False)),
    ("qwen3", False, torch.bfloat16),
    ("llama", True, torch.bfloat16),
]


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


# --- targets --------------------------------------------------------------------------------------------


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
