"""What is slow to import is not imported before it is needed. Modules are counted, not seconds."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launch import ROOT
from patience import patience
from place import EXAMPLES, TORCHRUN

from megatron_dgpo import patches
from megatron_dgpo.mcore import field_types, fields

SLOW = ("torch", "transformers", "tokenizers", "megatron.core", "triton", "sympy", "scipy", "nltk")
SLOW += ("pandas", "pyarrow", "datasets", "wandb", "math_verify", "aiohttp", "matplotlib", "tensorboard")
TRAIN, SFT = "megatron_dgpo.train", "megatron_dgpo.sft"
LARGE = ROOT / "examples" / "qwen2.5-32b"
RECIPE = [str(LARGE / "dgpo.toml"), "--model.path", str(LARGE / "model")]
NAMES = ("evaluate", "convert_checkpoint", "check_split_invariance", "check_rewards", "preprocess_data")
TOOLS = [str(ROOT / "tools" / f"{name}.py") for name in (*NAMES, "credit_report")]

CALL = """
import contextlib, io, json, runpy, sys
slow, calls = json.load(sys.stdin)
for name, words in calls:
    sys.argv, out, err, status = [name, *words], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            (runpy.run_path if name.endswith(".py") else runpy.run_module)(name, run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    there = [name for name in slow if name in sys.modules]
    print(json.dumps([status, out.getvalue(), err.getvalue(), there, len(sys.modules)]))
"""


def python(code: str, given: Any) -> list[Any]:
    """The lines of JSON that the code prints in a process of its own, which has `given` as JSON on stdin."""
    environment = {k: v for k, v in os.environ.items() if k not in TORCHRUN} | {"WORLD_SIZE": "32"}
    given_paths = filter(None, [os.environ.get("PYTHONPATH")])  # another megatron-core may be there
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tools"), *given_paths])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], input=json.dumps(given), capture_output=True, text=True,
        timeout=patience(), env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def run(*calls: tuple[str, list[str]]) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of each module or script in turn, of which none imports what is slow."""
    answers = python(CALL, [SLOW, calls])
    for (name, words), (*_, slow, modules) in zip(calls, answers, strict=True):
        assert slow == [] and modules < 900, (name, words, slow, modules)
    return [(status, out, err) for status, out, err, *_ in answers]


def test_entry_points(tmp_path: Path) -> None:
    """Help, refused settings, a dry run of the recipe for 32 GPUs, and a row that is wrong before any is
    cut into tokens."""
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "a", "answer": "1"}\n{"prompt": "a"}\n')
    here = ["--model.init", "random", "--data.train", f'["{data}"]', "--evaluation.data", "[]"]
    misspelt = ["--model.transformer.recompute_metod", "x", "--ddp.nccl_ub", "1"]
    answers = run(
        (TRAIN, ["--help"]),
        (TRAIN, [*RECIPE, "--train.stebs", "3"]),
        (TRAIN, [*RECIPE, "--dry-run"]),
        (TRAIN, [*RECIPE, *misspelt]),
        (TRAIN, [*RECIPE, *here, "--dry-run"]),
        (SFT, ["--help"]),
        (SFT, [str(EXAMPLES / "sft.toml"), "--model.path", "nowhere"]),
    )
    help_, unknown, dry, fields_, row, sft_help, sft_model = answers
    assert help_[0] == 0 and "--train.steps  <integer>" in help_[1]
    assert unknown[0] == 2 and unknown[2] == "error: train.stebs: unknown key (did you mean train.steps?)\n"
    assert dry[0] == 0 and "# ranks: 32 = tensor 8 x pipeline 2 x context 1 x data 2" in dry[1]
    assert "# weights: 32.76 billion in bfloat16" in dry[1] and "# not there yet: data.train: " in dry[1]
    # What Megatron's dataclasses have is known without them, and told together with the rest.
    assert fields_[0] == 2
    for said in (
        "error: model.transformer.recompute_metod: Megatron has no such field (did you mean ",
        "error: ddp.nccl_ub: 1 is not true or false\n",
        "error: data.train: data/dapo-math-17k.parquet is not a file\n",
    ):  # fmt: skip
        assert said in fields_[2]
    assert row == (2, "", f"error: {data}, row 2: no key 'answer'; the row has ['prompt']\n")
    assert sft_help[0] == 0 and "--data.response_key" in sft_help[1]
    assert sft_model[0] == 2 and "error: model.path: nowhere/config.json is not there\n" in sft_model[2]


def test_tools() -> None:
    split = TOOLS[2]
    answers = run(
        *((tool, ["--help"]) for tool in TOOLS),
        *((tool, []) for tool in TOOLS),
        (split, ["--config", *RECIPE, "--model.transformer.no_such", "1"]),
    )
    for status, out, err in answers[: len(TOOLS)]:
        assert (status, err) == (0, "") and out.startswith("usage: ")
    for status, out, err in answers[len(TOOLS) : -1]:
        assert (status, out) == (2, "") and "the following arguments are required" in err
    assert answers[-1][0] == 2
    assert "error: model.transformer.no_such: Megatron has no such field\n" in answers[-1][2]


# --- what is imported when it is needed ---------------------------------------------------------------

RANK = """
import dataclasses, importlib, json, sys
import torch
compile = torch.compile
import megatron_dgpo.trainer, megatron_dgpo.coldstart
slow, classes = json.load(sys.stdin)
print(json.dumps([name for name in slow if name in sys.modules]))
print(json.dumps([torch.compile is compile, importlib.util.find_spec("wandb") is not None]))
for module, cls in classes:
    of = dataclasses.fields(getattr(importlib.import_module(module), cls))
    types = [f.type if type(f.type) is str else getattr(f.type, "__name__", "") for f in of]
    print(json.dumps([[f.name, type_] for f, type_ in zip(of, types)]))
"""
OF_ONE_RELEASE = {
    *("tensor_parallel_num_weight_shards", "gtp_weight_remat_size", "use_mup", "nccl_all_reduce_for_prefill"),
    *("use_grouped_gemm_for_dense_mlp", "use_grouped_gemm_for_shared_expert", "fp4_param_gather"),
    *("overlap_dispatch_backward_with_experts_wgrad", "use_layer_wise_distributed_optimizer"),
    *("preserve_fp32_weights", "delay_offload_until_cuda_graph", "delta_offload_bytes_across_pp_ranks"),
    *("activation_offload_fraction", "fine_grained_offloading_max_inflight_offloads"),
}
"""Fields that users may not set, of some supported releases of Megatron and not of others."""
LATER = {"mup_", "lion_", "soap_", "adaptive_muon_", "megatron_fsdp_"}
NOT_OF_A_RANK = ("torch._inductor.compile_fx", "wandb", "pandas", "pyarrow", "datasets", "math_verify")
NOT_OF_A_RANK += ("aiohttp", "scipy", "nltk", "matplotlib")


def test_a_rank() -> None:
    """Neither torch's compiler nor W&B, which Megatron would load; and its dataclasses have the fields that
    were read from their source."""
    of = fields.PASSED_THROUGH
    slow, after, *classes = python(RANK, [NOT_OF_A_RANK, [(p.module, p.cls) for p in of]])
    assert slow == []
    assert after == [True, importlib.util.find_spec("wandb") is not None]
    plain = {"bool", "int", "float", "str"}
    for p, found in zip(of, classes, strict=True):
        read = dict(field_types.fields_in_source(p.module, p.cls))
        assert list(read) == [name for name, _ in found]
        assert {k: t for k, t in read.items() if t in plain} == {k: t for k, t in found if t in plain}
        assert p.owned.keys() - read.keys() <= OF_ONE_RELEASE
        assert all(
            any(name.startswith(prefix) for name in read) for prefix in p.owned_prefixes.keys() - LATER
        )


THING = "@dataclass\nclass Thing(Base):\n    b: bool = False"
STRANGE = {
    "a condition": THING.replace("    b:", "    if True:\n        b:"),
    "a base from elsewhere": "from collections import UserDict\n" + THING.replace("Base", "UserDict, Base"),
    "a base by another name": "Other = Base\n" + THING.replace("Base", "Other"),
    "a base with arguments": THING.replace("Base", "Base, option=True"),
    "a decorator": "def same(cls):\n    return cls\n@same\n" + THING,
    "a class variable": THING + "\n    c: ClassVar[int] = 3",
    "made by a function": "Thing = make_dataclass('Thing', [('b', bool, False)], bases=(Base,))",
}
USES = "from dataclasses import *\nfrom typing import ClassVar\nfrom .base import Base\n"


@pytest.mark.parametrize("name", STRANGE)
def test_a_source_that_does_not_tell_the_fields_is_imported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = f"strange_{list(STRANGE).index(name)}"
    folder = tmp_path / package / "core"
    folder.mkdir(parents=True)
    (folder / "base.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Base:\n    'It has a.'\n    a: int = 0\n"
        "    def __init_subclass__(cls, **_: object) -> None: ...\n"
    )
    (folder / "things.py").write_text(f"{USES}{STRANGE[name]}\n")
    (folder / "plain.py").write_text(f"{USES}{THING}\n")
    monkeypatch.syspath_prepend(tmp_path)
    want = {"a": "int", "b": "bool"}
    assert field_types.field_types(f"{package}.core.plain", "Thing") == want
    assert not [module for module in sys.modules if module.startswith(package)]
    assert field_types.field_types(f"{package}.core.things", "Thing") == want
    assert f"{package}.core.things" in sys.modules
    with pytest.raises(ImportError, match="has no Nothing"):
        field_types.field_types(f"{package}.core.things", "Nothing")


def test_a_function_is_compiled_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def compile_(fn: Any, **options: Any) -> Any:
        calls.append((fn.__name__, options))
        return lambda *words: ("compiled", *words)

    monkeypatch.setattr(patches, "_compile", compile_)

    @patches._compile_when_called
    def one(x: int) -> int:
        return x

    @patches._compile_when_called(dynamic=True)
    def two(x: int) -> int:
        return x

    assert calls == [] and one.__name__ == "one"
    assert [one(1), one(2), two(3)] == [("compiled", 1), ("compiled", 2), ("compiled", 3)]
    assert calls == [("one", {}), ("two", {"dynamic": True})]


def test_what_is_no_function_is_compiled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "_compile", lambda model, **_: ("compiled", model))
    assert patches._compile_when_called(len) == ("compiled", len)
