"""Every recipe loads with the schema of its entry point, and can be started as it stands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import psutil
import pytest
from patience import patience, until
from tiny import write_model, write_tokenizer

from megatron_dgpo.cli import compose, keys, load, validate
from megatron_dgpo.config import Config, SFTConfig

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
FOLDERS = sorted(path for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__")
QUICKSTART = EXAMPLES / "quickstart"
FILES = sorted(EXAMPLES.rglob("*.toml"))


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(EXAMPLES)) for path in paths]


def schema_of(file: Path) -> Any:
    return SFTConfig if "sft" in file.stem else Config


def leaves(raw: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of a TOML file."""
    return [
        key
        for name, value in raw.items()
        for key in (leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"])
    ]


def test_there_are_recipes() -> None:
    assert {"quickstart", "gsm8k_smoke"} <= {path.name for path in FOLDERS}
    assert len(FILES) >= 3


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_every_file_loads(file: Path) -> None:
    schema = schema_of(file)
    raw = tomllib.loads(file.read_text())
    # One without a model is a layer, which goes on top of the recipe's own.
    recipe = file.with_name("dgpo.toml")
    layers = [file] if "model" in raw else [recipe if recipe.exists() else QUICKSTART / "dgpo.toml", file]
    composed, problems = compose([str(layer) for layer in layers], schema)
    assert not problems
    validate(composed, schema)
    known = {key for key, *_ in keys(schema)}
    passed_through = (
        *("model.transformer.", "optimizer.megatron.", "ddp."),
        *("rollout.sglang.launch.args.", "algorithm.options."),
    )
    assert [k for k in leaves(raw) if k not in known and not k.startswith(passed_through)] == []


@pytest.mark.parametrize("folder", FOLDERS, ids=names(FOLDERS))
def test_every_folder_has_what_it_takes(folder: Path) -> None:
    assert len((folder / "README.md").read_text().split()) > 20
    assert list(folder.glob("*.toml"))
    subprocess.run(["bash", "-n", str(folder / "run.sh")], check=True, timeout=patience())
    script = (folder / "run.sh").read_text()
    assert script.startswith("#!/usr/bin/env bash") and "set -euo pipefail" in script
    # What the script and the README name is there.
    for text in (script, (folder / "README.md").read_text()):
        for name in re.findall(rf"examples/{folder.name}/([\w.]+)", text):
            assert (folder / name).is_file(), name


@pytest.mark.parametrize("folder", FOLDERS, ids=names(FOLDERS))
def test_overrides_in_scripts_and_readmes_are_known(folder: Path) -> None:
    known = {key for schema in (Config, SFTConfig) for key, *_ in keys(schema)}
    for file in (folder / "run.sh", folder / "README.md"):
        for key in re.findall(r"--([a-z_]+\.[a-z_.]+)", file.read_text()):
            assert key in known, f"{file.name}: {key}"


def test_the_steps_around_the_math_recipes(tmp_path: Path) -> None:
    """Data, import and evaluation as the recipes' scripts do them, on a tiny model and rows of our own."""
    write_tokenizer(write_model(tmp_path / "model", tied=True))
    rows = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(8)]
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0], {"prompt": "no answer"}]))
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    names = {"DATA": "train.parquet", "HELDOUT": "heldout.jsonl", "MEGATRON": "megatron", "OUT": "evaluation"}
    environment = {
        **os.environ,
        **{key: str(tmp_path / name) for key, name in names.items()},
        **{"SOURCE": str(source), "SOURCE_HELDOUT": str(source), "MODEL": str(tmp_path / "model")},
        **{"ENGINE": "embedded", "DTYPE": "float32", "MAX_NEW_TOKENS": "8"},
    }

    def run(script: str, *words: str) -> str:
        command = ["bash", str(EXAMPLES / script), *words]
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=patience(),
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = run("prepare_math.sh")
    assert said.count("8 problems") == 2 and said.count("8 of 8 gold answers are right") == 2
    assert "left out, malformed: 1" in said and "left out, repeated: 1" in said
    assert (tmp_path / "train.rejected.jsonl").is_file() and (tmp_path / "megatron").is_dir()
    assert "is there" in run("prepare_math.sh")
    said = run("evaluate_math.sh", "--k", "2")
    assert "8 problems, 2 samples each" in said
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["num_samples"] == 16


def stubs(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment in which these commands are ours."""
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "HERE": str(folder)}


def bash(script: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(EXAMPLES / script)]
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=patience()
    )


@pytest.mark.parametrize("recipe", ["qwen2.5-math-7b", "qwen2.5-32b"])
@pytest.mark.parametrize("heldout", ["", "one.parquet", "one.parquet two.jsonl"])
def test_recipes_take_several_heldout_files(recipe: str, heldout: str, tmp_path: Path) -> None:
    environment = stubs(tmp_path / "bin", python='printf "%s\\n" "$@"') | {"DRY_RUN": "1", "HELDOUT": heldout}
    words = bash(f"{recipe}/run.sh", environment).stdout.splitlines()
    given = json.loads(words[words.index("--evaluation.data") + 1])
    assert given == (heldout.split() or ["data/aime-2024.parquet"])


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (0, ""),
        (1, "the rows above would train or count as wrong"),
        (2, "its gold answers could not be checked"),
    ],
)
def test_a_check_that_crashed_is_not_called_bad_rows(status: int, says: str, tmp_path: Path) -> None:
    """And each source has its file and its key."""
    python = """echo "$@" >> "$HERE/calls"; case "$1" in *check_rewards.py) exit "$STATUS";; esac"""
    words = {
        **{"SOURCE": "s", "DATA": str(tmp_path / "d.parquet"), "STATUS": str(status)},
        **{"SOURCE_HELDOUT": "x hub://a/y", "PROMPT_KEY_HELDOUT": "prompt problem"},
        "HELDOUT": f"{tmp_path}/x.parquet {tmp_path}/y.parquet",
    }
    environment = stubs(tmp_path / "bin", python=python) | words
    done = bash("prepare_math.sh", environment)
    assert done.returncode == (2 if status == 2 else 0)
    assert says in done.stderr and bool(done.stderr) == bool(status)
    calls = (tmp_path / "bin" / "calls").read_text().splitlines()
    made = [line.split()[1] for line in calls if "preprocess" in line]
    assert made == (["s"] if status == 2 else ["s", "x", "hub://a/y"])
    if status != 2:
        (last,) = [line for line in calls if "hub://a/y" in line]
        assert f"--out {tmp_path}/y.parquet" in last and "--prompt-key problem" in last
    done = bash("prepare_math.sh", environment | {"HELDOUT": "only.parquet"})
    assert done.returncode == 2 and "names 2 sources and HELDOUT 1 files" in done.stderr


def slurm_job(folder: Path, machines: int, **variables: str) -> subprocess.CompletedProcess[str]:
    """The job's script; what it starts is in the files `calls` and `pid` of folder `bin`."""
    srun = """
    case "$*" in *launch_server*) echo "$@" >> "$HERE/calls"; echo $$ > "$HERE/pid"; exec sleep 3600;; esac
    echo "$@" "NNODES=$NNODES SERVERS=${SERVERS:-}" >> "$HERE/calls"
    exit "${STATUS:-0}"
    """
    environment = stubs(
        folder / "bin",
        srun=srun,
        scontrol=f'printf "n%d\\n" $(seq {machines})',
        curl='for _ in $(seq 6000); do [ -s "$HERE/pid" ] && exit 0; sleep 0.1; done; exit 1',
        scancel='echo scancel >> "$HERE/calls"',
    )
    return bash("qwen2.5-32b/slurm.sh", environment | {"SLURM_JOB_NODELIST": "n[1-6]"} | variables)


@pytest.mark.parametrize("status", [0, 7])
def test_the_slurm_job_has_the_trainers_status_and_ends_the_servers(status: int, tmp_path: Path) -> None:
    """`scancel` would end them too, but then the job counts as cancelled, whatever came of it."""
    done = slurm_job(tmp_path, 6, STATUS=str(status))
    assert done.returncode == status, done.stderr
    calls = (tmp_path / "bin" / "calls").read_text()
    assert "--nodelist=n1,n2 " in calls and "--nodelist=n3,n4,n5,n6 " in calls and "scancel" not in calls
    assert "NNODES=4 SERVERS=http://n1:30000,http://n2:30000\n" in calls
    until(lambda: has_ended(int((tmp_path / "bin" / "pid").read_text())), "the server's end")


@pytest.mark.parametrize(
    ("machines", "serving", "trainers"), [(3, "", 2), (16, "", 8), (6, "4", 2), (4, "0", 4), (16, "0", 16)]
)
def test_the_machines_of_a_slurm_job_divide(
    machines: int, serving: str, trainers: int, tmp_path: Path
) -> None:
    done = slurm_job(tmp_path, machines, SERVER_NODES=serving)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "bin" / "calls").read_text()
    given = ",".join(f"http://n{n + 1}:30000" for n in range(machines - trainers))
    assert f" NNODES={trainers} SERVERS={given}\n" in calls
    assert ("launch_server" in calls) == bool(given)


@pytest.mark.parametrize(
    ("machines", "serving", "says"),
    [
        (2, "", "2 machines are too few for servers of their own"),
        (6, "1", "5 machines of 8 ranks do not divide into replicas of 16"),
        (16, "2", "14 machines of 8 ranks do not divide"),
        (6, "0", "6 machines of 4 ranks do not divide into replicas of 8"),
    ],
)
def test_machines_of_a_slurm_job_that_do_not_divide_are_refused_at_once(
    machines: int, serving: str, says: str, tmp_path: Path
) -> None:
    done = slurm_job(tmp_path, machines, SERVER_NODES=serving)
    assert done.returncode == 2 and says in done.stderr
    assert not (tmp_path / "bin" / "calls").exists()


def test_one_torchrun_a_machine_is_the_32b_run(tmp_path: Path) -> None:
    """Where no servers are given it starts them; all machines are started again together."""
    environment = stubs(tmp_path / "bin", torchrun='printf "%s\\n" "$@"')
    environment |= {"MASTER_ADDR": "n1", "NNODES": "4"}
    words = bash("qwen2.5-32b/run.sh", environment | {"NODE_RANK": "2"}).stdout.splitlines()
    for option, value in {
        **{"--nnodes": "4", "--nproc-per-node": "4", "--max-restarts": "3", "--rdzv-backend": "c10d"},
        **{"--rdzv-endpoint": "n1:29500", "--rdzv-conf": "is_host=0"},
    }.items():
        assert words[words.index(option) + 1] == value
    assert "--resume" in words and "examples/qwen2.5-32b/managed.toml" in words
    given = environment | {"NODE_RANK": "0", "SERVERS": "http://a:1,http://b:2"}
    words = bash("qwen2.5-32b/run.sh", given).stdout.splitlines()
    assert words[words.index("--rollout.sglang.urls") + 1] == '["http://a:1","http://b:2"]'
    assert "is_host=1" in words and words[words.index("--nproc-per-node") + 1] == "8"


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # where nobody collects orphans
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart")
    words = ["--out", out, "--traces", 50, "--train-prompts", 40, "--heldout-prompts", 10]
    command = [sys.executable, EXAMPLES / "quickstart" / "make_data.py", *words]
    subprocess.run([str(word) for word in command], check=True, timeout=patience())
    return out


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_quick_start_passes_every_check(data: Path, tmp_path: Path, world_size: int) -> None:
    """As run.sh starts it, on the data and the model folder that make_data.py writes."""
    common = ["--run.folder", str(tmp_path), "--model.path", str(data / "model")]
    heldout = ["--evaluation.data", f'["{data}/heldout.jsonl"]']
    sft = ["--data.train", f'["{data}/sft.jsonl"]', *common, *heldout]
    load([str(EXAMPLES / "quickstart/sft.toml"), *sft], SFTConfig, world_size=world_size)
    rl = ["--data.train", f'["{data}/train.jsonl"]', *common, *heldout, "--model.init", "random"]
    config = load([str(EXAMPLES / "quickstart/dgpo.toml"), *rl], Config, world_size=world_size)
    assert config.parallel.tensor_model_parallel_size == 2
    for extra in (["--algorithm.name", "grpo"], ["--algorithm.tau", "0.05"], ["--reward.shuffle", "true"]):
        load([str(EXAMPLES / "quickstart/dgpo.toml"), *rl, *extra], Config, world_size=world_size)


def test_the_cold_start_and_the_run_after_it_fit_together() -> None:
    raw, problems = compose([str(EXAMPLES / "quickstart/sft.toml")], SFTConfig)
    sft = validate(raw, SFTConfig)
    rl = validate(tomllib.loads((EXAMPLES / "quickstart/dgpo.toml").read_text()), Config)
    assert problems == []
    assert rl.model.path == sft.run.folder / "hf"
    assert rl.reward.name == sft.reward.name
    assert rl.rollout.max_new_tokens == sft.rollout.max_new_tokens
