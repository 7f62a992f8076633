"""What happens before a run starts: its settings and its folder are checked, and what it reads is loaded.

Everything that is refused here ends the process with one line a problem and status 2 (see `cli.refusals`).
torch, transformers and Megatron take seconds to import, and whoever mistyped a setting should not wait for
them: a check imports them only where a setting asks for what they alone know, and `start` once all settings
are right.
"""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import os
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from megatron_dgpo import torchrun
from megatron_dgpo.checks import (
    Absent,
    AnyConfig,
    gpus_of_servers,
    local_world_size,
    missing_number,
    read_json,
)
from megatron_dgpo.cli import C, ConfigError, dump_toml, load_or_exit, parse_toml, refusals, validate
from megatron_dgpo.config import Config
from megatron_dgpo.mcore.fields import PASSED_THROUGH, low_precision_states, not_of_torch
from megatron_dgpo.mcore.hf_config import FAMILIES, ModelShape
from megatron_dgpo.observe.console import set_up_logging
from megatron_dgpo.rewards import build_reward, build_term, reward_names

if TYPE_CHECKING:
    from megatron_dgpo.platform import Groups

D = TypeVar("D")
log = logging.getLogger(__name__)

_LOCK = ".lock"
"""In a run's folder: locked by the run that writes to it, and names its launch (see `torchrun.launch`)."""
_LEAVING_SECONDS = 30.0
"""How long the processes of a start that failed may hold the lock after their rank has ended."""


def parse(argv: Sequence[str], schema: type[C]) -> C:
    """Config from the command line, with the checks that need more than the config itself.

    Where torchrun starts again what it started without --resume, the run goes on as with it.
    Ends the process with status 2 and one line a problem, printed by one rank, when it is refused.
    """
    config = load_or_exit(
        argv,
        schema,
        extra_checks=(*MODEL_CHECKS, _used_folder, _resumed_run, _reward, _algorithm, _wandb, _credit_log),
        inspect=_data_there,
    )
    if not _goes_on(config):
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"resume": True})})


def _goes_on(config: AnyConfig) -> bool:
    """Whether a run that is in the folder goes on."""
    return config.run.resume or torchrun.began_here(config.run.folder / _LOCK)


def _megatron_fields(config: AnyConfig) -> Iterator[str]:
    given = {
        "model.transformer": config.model.transformer,
        "ddp": config.ddp,
        "optimizer.megatron": config.optimizer.megatron,
    }
    found = [problem for of in PASSED_THROUGH for problem in of.problems(given[of.section])]
    yield from found
    if not found:
        yield from low_precision_states(config.optimizer.megatron)
        if why := _torch_for_sure(config):
            yield from not_of_torch(config.model.transformer, why)


def _torch_for_sure(config: AnyConfig) -> str:
    """Why the layer spec is 'torch' on every machine; empty where that depends on the machine."""
    if config.model.layer_spec == "torch":
        return "model.layer_spec"
    return "parallel.device is 'cpu'" if config.parallel.device == "cpu" else ""


def _used_folder(config: AnyConfig) -> Iterator[str]:
    folder = config.run.folder
    if files := [path for path in (folder, *folder.parents) if path.is_file()]:
        yield f"run.folder: {folder} cannot be made, since {files[0]} is a file; choose another folder"
    elif (folder / "metrics.jsonl").exists() and not _goes_on(config):
        yield (
            f"run.folder: {folder} already holds a run (add --resume to go on with it, "
            "or choose another folder)"
        )


_MAY_CHANGE = {"run", "parallel", "ddp", "checkpoint", "observe", "sync"}
_MAY_CHANGE_KEYS = {
    *("train.steps", "train.max_tokens_per_microbatch", "evaluation.every", "rollout.max_batch_size"),
    *("rollout.engine", "rollout.sglang"),
    *("reward.timeout_seconds", "reward.num_workers", "model.layer_spec", "model.transformer"),
    "model.ignore_config_fields",
}


def _resumed_run(config: AnyConfig) -> Iterator[str]:
    """A resumed run is the same run: its data, model, algorithm and schedule may not change."""
    old = config.run.folder / "config.toml"
    if not _goes_on(config) or not old.is_file():
        return
    if not any((config.run.folder / "checkpoints").glob("step_*")):
        return  # nothing is resumed
    now = tomllib.loads(dump_toml(config))
    schema: Any = type(config)
    try:
        # Settings that the file does not have yet are at their defaults: as the run was.
        written = validate(parse_toml(old.read_bytes()), schema)
    except ConfigError as error:
        yield f"run.folder: {old} is not of this release ({'; '.join(error.problems)})"
        return
    except ValueError as error:
        yield f"run.folder: {old} is {error}"
        return
    before = tomllib.loads(dump_toml(written))
    if before["run"]["seed"] != config.run.seed:
        yield f"run.seed: the run in {config.run.folder} has {before['run']['seed']}"
    for section in sorted((before.keys() | now.keys()) - _MAY_CHANGE):
        was, new = before.get(section, {}), now.get(section, {})
        for key in sorted(was.keys() | new.keys()):
            name = f"{section}.{key}"
            if was.get(key) != new.get(key) and name not in _MAY_CHANGE_KEYS:
                yield (
                    f"{name}: the run in {config.run.folder} has {was.get(key)!r}, not {new.get(key)!r}; "
                    "resume it with the same, or choose another folder"
                )


def _model_family(config: AnyConfig) -> Iterator[str]:
    hf = read_json(config.model.path / "config.json")
    if isinstance(hf, str) or (hf.get("model_type") in FAMILIES and missing_number(hf)):
        return  # megatron_dgpo.checks says so
    try:
        ModelShape.from_hf(hf, config.model.ignore_config_fields)
    except (ValueError, KeyError) as error:
        yield f"model.path: {config.model.path}: {error}"


def _layer_spec(config: AnyConfig) -> Iterator[str]:
    if config.model.layer_spec != "transformer_engine":
        return
    if config.parallel.device == "cpu":
        yield "model.layer_spec: 'transformer_engine' needs a GPU, and parallel.device is 'cpu'; use 'torch'"
    elif missing := _why_no_transformer_engine():
        yield Absent(
            "model.layer_spec: 'transformer_engine' needs Transformer Engine and a GPU, and "
            f"{missing}; 'auto' and 'torch' do without"
        )


def _why_no_transformer_engine() -> str:
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    from megatron_dgpo import platform  # noqa: F401 - Megatron's warnings are filtered before it is imported
    from megatron_dgpo.mcore.layers import why_no_transformer_engine

    return why_no_transformer_engine()


def _algorithm(config: AnyConfig) -> Iterator[str]:
    """One of the user's own is imported, and says itself what is wrong with its settings."""
    if not isinstance(config, Config) or ":" not in config.algorithm.name:
        return
    from megatron_dgpo.algorithms import build_algorithm  # imports torch, as the user's own does

    try:
        built = build_algorithm(config.algorithm, vocab_size=2, max_response_tokens=1)
    except ValueError as error:
        yield f"algorithm.name: {config.algorithm.name}: {error}"
        return
    if built.needs_critic:
        yield (
            f"algorithm.name: {config.algorithm.name} needs a critic, whose settings are those of 'ppo' "
            "alone; set needs_critic = False, or use 'ppo'"
        )


def _wandb(config: AnyConfig) -> Iterator[str]:
    if config.observe.wandb_project and importlib.util.find_spec("wandb") is None:
        yield "observe.wandb_project: needs the package wandb (pip install wandb)"


def _credit_log(config: AnyConfig) -> Iterator[str]:
    if isinstance(config, Config) and config.observe.credit_every:
        if importlib.util.find_spec("pyarrow") is None:
            yield "observe.credit_every: the credit log needs the package pyarrow; 0 goes without it"


MODEL_CHECKS = (_megatron_fields, _model_family, _layer_spec)
"""Of what a model is built and trained with; the others are of the run around it."""


def _reward(config: AnyConfig) -> Iterator[str]:
    c = config.reward
    if ":" in c.name:
        try:
            build_reward(c.name)
        except ValueError as error:
            yield f"reward.name: {c.name}: {error}"
    elif c.name not in reward_names():
        yield (
            f"reward.name: {c.name!r} is not one of {', '.join(reward_names())}, or 'package.module:function'"
        )
    elif c.name == "math_verify" and importlib.util.find_spec("math_verify") is None:
        yield "reward.name: 'math_verify' needs the package math-verify"
    if isinstance(config, Config):
        yield from _reward_terms(config)


def _reward_terms(config: Config) -> Iterator[str]:
    terms = config.reward.terms
    for k, term in enumerate(terms):
        try:
            build_term(term, max_new_tokens=config.rollout.max_new_tokens)
        except ValueError as error:
            yield f"reward.terms.{k}: {term.name}: {error}"
        if term.name in [t.name for t in terms[:k]]:
            yield f"reward.terms.{k}: {term.name} occurs twice"


def _data_there(config: AnyConfig) -> Iterator[str]:
    from megatron_dgpo.inputs import data_there

    return data_there(config)


# --- the run ----------------------------------------------------------------------------------------


def start(config: C, load: Callable[[C], D], run: Callable[[C, Groups, D], None]) -> None:
    """This rank's part of a run: read the data, claim the folder, build the process groups, call `run`.

    What is wrong with data or folder ends the process as `parse` does; an exception is told to torchrun too.
    """
    from torch.distributed.elastic.multiprocessing.errors import record

    record(_start)(config, load, run)


def _start(config: C, load: Callable[[C], D], run: Callable[[C, Groups, D], None]) -> None:
    from megatron_dgpo import platform

    set_up_logging(config.run.quiet, int(os.environ.get("RANK", "0")))
    with refusals():
        ranks = local_world_size(int(os.environ.get("WORLD_SIZE", 1)))
        platform.use_device(config.parallel.device, ranks)
        _require_gpus_for_servers(config, ranks)
        data = load(config)
        _require_megatrons_consent(config)
        lock = claim(config.run.folder)
        # Rank 0 has forgotten what was noted of another launch; other ranks may be before it.
        if (lock or torchrun.number()) and (why := torchrun.ended(config.run.folder)):
            raise ConfigError([why])

    def on_error(error: BaseException) -> None:
        _rank_ends(config.run.folder, error)

    with (
        lock or nullcontext(),
        platform.distributed(config.parallel, seed=config.run.seed, on_error=on_error) as groups,
    ):
        run(config, groups, data)


def _rank_ends(folder: Path, error: BaseException) -> None:
    """Note the error, and prevent a start that would end in the same way."""
    lost, rank = _lost_ranks(error), int(os.environ.get("RANK", "0"))
    why = torchrun.note_failure(folder, rank, error, lost=lost)
    if lost and not why:  # the rank that knows has said so before it ended
        why = torchrun.ended(folder)
    if why:
        print(f"error: {f'[rank {rank}] ' if rank else ''}{why}", file=sys.stderr, flush=True)
        torchrun.end_agent()


def _lost_ranks(error: BaseException) -> bool:
    """Whether the error is that of a collective or of the store, which fail when other ranks are gone."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):  # NCCL's, the store's and the network's
        return True
    return isinstance(error, RuntimeError | TimeoutError) and "gloo" in str(error).lower()


def _require_gpus_for_servers(config: AnyConfig, ranks: int) -> None:
    """Raises ConfigError where this machine lacks GPUs for the servers that the run starts on it."""
    from megatron_dgpo import platform

    if not isinstance(config, Config) or not platform.has_gpu():
        return
    needed, there = gpus_of_servers(config, ranks), platform.number_of_gpus()
    if needed > there:
        raise ConfigError(
            [
                f"rollout.sglang.launch: with the servers this machine needs {needed} GPUs, and has {there}; "
                "use fewer servers or ranks, or rollout.sglang.colocate"
            ]
        )


def _require_megatrons_consent(config: AnyConfig) -> None:
    """Raises ConfigError where Megatron's own checks refuse the settings together."""
    from megatron_dgpo.mcore.settings import refused_by_megatron

    if problems := list(refused_by_megatron(config)):
        raise ConfigError(problems)


def claim(folder: Path) -> IO[str] | None:
    """Lock a run's folder for this process, on the rank that writes it; held until the file is closed.

    A new launch's claim removes what is noted there of an earlier one's failures.

    Raises:
        ConfigError: another run holds it, such as one that has not ended yet.
    """
    if os.environ.get("RANK", "0") != "0":
        return None
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / _LOCK).open("a+")
    # The count alone does not tell: torchrun does not count a start that another machine's failure caused.
    again = torchrun.number() > 0 or torchrun.began_here(folder / _LOCK)
    deadline = time.monotonic() + (_LEAVING_SECONDS if again else 0)
    while not _locked(file, folder):
        if time.monotonic() >= deadline:
            file.close()
            raise ConfigError([f"run.folder: another run is writing to {folder}; wait until it ends"])
        time.sleep(0.1)
    if not torchrun.began_here(folder / _LOCK):
        torchrun.forget(folder)
        file.truncate(0)
        file.write(torchrun.launch())
        file.flush()
    return file


def _locked(file: IO[str], folder: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems have no locks
        log.warning("%s is not locked against a second run: %s", folder, error)
    return True
