"""Imported checkpoints at every split: loaded, saved by a run and exported again."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from pathlib import Path

import convert_checkpoint
import pytest
import torch
from patience import patience
from spawn import run_ranks
from split_ranks import rank_context
from tiny import FAMILIES, VOCAB, config, hf_model, hf_tensors, sequences, split, write_model

from megatron_dgpo.cli import dump_toml
from megatron_dgpo.weights.checkpoints import HFFolder, import_hf, open_checkpoint
from megatron_dgpo.weights.convert import export_hf

TIED = (True, False)
SPLITS = {"1x1": (1, 1), "2x1": (2, 1), "1x2": (1, 2), "2x2": (2, 2)}
"""TP x PP, each on four ranks."""
CASES = [
    *((family, tied, "float32", name) for family in FAMILIES for tied in TIED for name in SPLITS),
    *((family, tied, "bfloat16", "2x2") for family in FAMILIES for tied in TIED),
]
TRAINED = [("qwen3", False, "2x2"), ("qwen2", True, "1x2")]
"""Saved as a run saves them: with optimizer and all."""


def original(family, tied, dtype="float32"):
    """The name of its folder."""
    return f"{family}{tied}" + ("" if dtype == "float32" else dtype)


def work(rank, world_size, folder):
    """Load each imported folder at its splits, and write a checkpoint of what is there then."""
    from megatron.core import dist_checkpointing

    from megatron_dgpo.mcore.checkpoint import CheckpointStore
    from megatron_dgpo.mcore.files import METADATA, digests, write_digests
    from megatron_dgpo.mcore.hf_config import ModelShape
    from megatron_dgpo.mcore.model import build_model
    from megatron_dgpo.patches import megatron_calls
    from megatron_dgpo.run import DTYPES, build_policy
    from megatron_dgpo.weights.convert import load_folder

    for name, (tp, pp) in SPLITS.items():
        c = config(folder / "unused", tp=tp, pp=pp)
        with split(c) as groups:
            for family, tied, dtype, _ in [case for case in CASES if case[3] == name]:
                imported = folder / f"{original(family, tied, dtype)}-imported"
                model = build_model(
                    ModelShape.from_folder(imported), c.parallel, groups, params_dtype=DTYPES[dtype]
                )
                for parameter in model.parameters():
                    parameter.data.fill_(float("nan"))
                load_folder(model, groups, imported)
                target = folder / f"{original(family, tied, dtype)}-{name}"
                if rank == 0:
                    target.mkdir()
                torch.distributed.barrier()
                with megatron_calls():
                    state = model.sharded_state_dict(metadata=dict(METADATA))
                    dist_checkpointing.save(state, str(target), content_metadata=dict(METADATA))
                if rank == 0:
                    write_digests(target, digests(target))
    for family, tied, name in TRAINED:
        tp, pp = SPLITS[name]
        run = folder / f"{family}{tied}-run"
        c = config(folder / f"{family}{tied}-imported", tp=tp, pp=pp)
        with split(c) as groups:
            policy = build_policy(c, groups, total_updates=1, keep_reference=False)
            CheckpointStore(run / "checkpoints", groups).save(policy, {"step": 7, "world_size": 4})
        if rank == 0:
            (run / "config.toml").write_text(dump_toml(c))
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("convert")
    for family in FAMILIES:
        for tied in TIED:
            for dtype in ("float32", "bfloat16"):
                one = path / original(family, tied, dtype)
                write_model(one, family=family, tied=tied, dtype=getattr(torch, dtype))
                import_hf(HFFolder(one), path / f"{one.name}-imported")
    run_ranks(work, 4, path)
    return path


@pytest.mark.parametrize(("family", "tied", "dtype", "name"), CASES)
def test_through_a_model_at_any_split_and_back_bit_for_bit(folder, tmp_path, family, tied, dtype, name):
    one = folder / original(family, tied, dtype)
    export_hf(open_checkpoint(folder / f"{one.name}-{name}", one), tmp_path / "back")
    want, got = hf_tensors(one), hf_tensors(tmp_path / "back")
    assert set(got) == set(want) and {t.dtype for t in got.values()} == {getattr(torch, dtype)}
    assert all(torch.equal(got[n].view(torch.uint8), want[n].view(torch.uint8)) for n in want)


@pytest.mark.parametrize(("family", "tied", "name"), TRAINED)
def test_a_runs_checkpoint_is_exported_with_its_models_configuration(folder, tmp_path, family, tied, name):
    step = folder / f"{family}{tied}-run" / "checkpoints" / "step_00000007"
    target = tmp_path / "back"
    assert convert_checkpoint.main(["export", str(step), str(target)]) == 0
    want, got = hf_tensors(folder / f"{family}{tied}"), hf_tensors(target)
    assert set(got) == set(want) and all(torch.equal(got[n], want[n]) for n in want)
    assert hf_model(target)(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, VOCAB)
    assert {p.name for p in target.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors")
    }


@pytest.mark.parametrize(("family", "tied", "name"), TRAINED)
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"vocab_size": 40}, "vocab_size is 40 in config.json, and the weights were saved with 45"),
        (
            {"rms_norm_eps": 1e-6},
            "rms_norm_eps is 1e-06 in config.json, and the weights were saved with 1e-05",
        ),
    ],
)
def test_a_runs_checkpoint_says_what_its_weights_are(folder, tmp_path, family, tied, name, fields, says):
    step = folder / f"{family}{tied}-run" / "checkpoints" / "step_00000007"
    config = json.loads((folder / f"{family}{tied}" / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"step_00000007: {says}$"):
        open_checkpoint(step, tmp_path)


# --- verify ---------------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def verify(capsys, *words):
    status = convert_checkpoint.main(["verify", *map(str, words)])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize(("family", "tied", "name"), [("llama", True, "2x2"), ("qwen3", False, "2x1")])
def test_verify_agrees_with_transformers(folder, alone, capsys, tmp_path, family, tied, name):
    (tmp_path / "prompts").write_text("\n".join(json.dumps([*p, *r]) for p, r in sequences()) + "\n\n")
    tp, pp = SPLITS[name]
    status, out, _ = verify(
        capsys,
        *(folder / f"{family}{tied}", folder / f"{family}{tied}-imported"),
        *("--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp),
        *("--prompts", tmp_path / "prompts", "--bound", 1e-5),
    )
    assert status == 0, out
    *rows, total, verdict = out.splitlines()[1:]
    assert len(rows) == len(sequences()) and verdict.startswith("the log-probs agree: ")
    tokens, worst, mean = total.split()[1:]
    assert int(tokens) == sum(len(p) + len(r) - 1 for p, r in sequences())
    assert 0 < float(mean) < float(worst) < 1e-5


def test_verify_finds_another_models_weights(folder, alone, capsys, tmp_path):
    write_model(tmp_path / "other", tied=False, seed=2)
    status, out, _ = verify(capsys, tmp_path / "other", folder / "qwen2False-imported")
    assert status == 1 and "DIFFER" in out and float(out.splitlines()[-2].split()[2]) > 0.1


def one_of_torchruns(rank: int, port: int, words: list[str], said: Path) -> None:
    """What torchrun starts, but for the minutes that imports take."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    with said.open("w") as file, contextlib.redirect_stdout(file):
        status = convert_checkpoint.main(["verify", *words])
    sys.exit(status)


@pytest.mark.parametrize(("seed", "statuses", "verdict"), [(1, [0, 0], "agree"), (2, [1, 0], "DIFFER")])
def test_verify_on_torchruns_ranks(folder, tmp_path, seed, statuses, verdict):
    """Both compute and the first compares, speaks and has the status."""
    source = write_model(tmp_path / "source", tied=False, seed=seed)
    words = [str(source), str(folder / "qwen2False-imported"), "--tensor-model-parallel-size", "2"]
    held = socket.socket()  # while it is open nobody else gets the port; the ranks' store shares it
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port = held.getsockname()[1]
    ranks = [
        rank_context().Process(target=one_of_torchruns, args=(rank, port, words, tmp_path / f"said{rank}"))
        for rank in range(2)
    ]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(patience())
        assert [process.exitcode for process in ranks] == statuses
    finally:
        held.close()
        for process in ranks:
            process.kill()
            process.join()
    assert (tmp_path / "said0").read_text().splitlines()[-1].startswith(f"the log-probs {verdict}: ")
    assert (tmp_path / "said1").read_text() == ""


def test_verify_refuses_another_number_of_torchruns_ranks(folder, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit) as caught:
        verify(
            capsys, *(folder / "qwen2True", folder / "qwen2True-imported"), "--tensor-model-parallel-size", 2
        )
    (error,) = capsys.readouterr().err.splitlines()
    says = "error: torchrun has started 3 processes, and the split takes 2"
    assert caught.value.code == 2 and error == says


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[1]", "line 1: 1 tokens; the model takes 2 to 64"),
        ("[1, 45]", "line 1: 45 is no token id below 45"),
        ("[1, true]", "line 1: True is no token id below 45"),
        ("\n\n" + json.dumps([3] * 65), "line 3: 65 tokens"),
        ("", "there are no prompts"),
    ],
)
def test_wrong_prompts_are_refused_by_line(folder, alone, capsys, tmp_path, line, says):
    (tmp_path / "prompts").write_text(line)
    with pytest.raises(SystemExit) as caught:
        verify(capsys, folder / "qwen2True", folder / "qwen2True-imported", "--prompts", tmp_path / "prompts")
    (error,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and says in error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--tensor-model-parallel-size", 4],
            "--tensor-model-parallel-size 4 does not divide the model's 2",
        ),
        (
            ["--pipeline-model-parallel-size", 3],
            "--pipeline-model-parallel-size 3 does not divide the",
        ),
        (["--tensor-model-parallel-size", 0], "parallel sizes are at least 1"),
    ],
)
def test_a_split_that_the_model_does_not_have_is_refused(folder, alone, capsys, words, says):
    with pytest.raises(SystemExit) as caught:
        verify(capsys, folder / "qwen2True", folder / "qwen2True-imported", *words)
    (error,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and error.startswith(f"error: {says}")
