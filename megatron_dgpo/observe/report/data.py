"""A run's folder as the data of the page.

`overview(run)` is JSON:

    {"format": 1, "run": name, "settings": {of the last recorded step},
     "metrics": {"train": {"step": [...], name: [... or null]}, "eval": {...}},
     "advisories": [{"step", "name", "message", "suggestion"}], "warnings": [text],
     "files": [{"step", "replica", "settings"}],
     "prompts": [{"id", "text", "answer", "tokens"}],
     "samples": {column: [one entry a response]}}

The columns of `samples`: file (place in `files`), row, prompt (place in `prompts`), index, reward (null: it
failed), right (the answer's own reward is above 0), advantage, length, finish_reason, preview,
effective_fraction, max_weight, top1_share, top10_share.

`sample(run, step, replica, row)` is one response's bytes, in the form that `encode.py` describes. Header:

    {"count": T, "columns": [...], "pieces": [[token id, text], ...], "extracted", "reward_parts": {},
     "versions": [[version, start, end]], "steps": {"sentences": [tokens in each], "arithmetic": [...]}}

Columns: token (place in `pieces`), clipped, and, where they were recorded, distance (the one that credit
uses) and entropy, log_prob, gap (engine's log-prob minus trainer's), ratio, token_advantage, hellinger or
reverse_kl (the one that is not `distance`), weight. The page computes normalised entropy, score and weight
itself; `weight` is there only where these would not give the recorded one (credit that is uniform or was
taken at each update).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dgpo.observe import advisories, credit_log, jsonl, metrics
from megatron_dgpo.observe.report import weights
from megatron_dgpo.observe.report.encode import EXACT
from megatron_dgpo.observe.report.rows import Rows

FORMAT = 1
PREVIEW = 160
"""Characters of a response in the list of samples."""
CORRECT = "correct"
"""The part of a combined reward that the answer's own reward gave (rewards.terms)."""
_MARKS = (metrics.FILE, credit_log.FOLDER, "config.toml", "versions.json", advisories.FILE)
_SAMPLE_COLUMNS = (
    "row", "index", "reward", "right", "advantage", "length", "finish_reason", "preview",
    "effective_fraction", "max_weight", "top1_share", "top10_share",
)  # fmt: skip


@dataclass(frozen=True)
class FileIndex:
    """What the list of samples needs of one file of the credit log."""

    step: int
    replica: int
    settings: dict[str, Any]
    prompts: list[dict[str, Any]]
    """One a response."""
    samples: dict[str, list[Any]]
    """`samples` of the overview, without file and prompt."""


def check_run(run: Path) -> None:
    """Raises FileNotFoundError for a folder that is not there, ValueError for one that no run wrote."""
    if not run.exists():
        raise FileNotFoundError(f"{run}: there is no such run")
    if not run.is_dir() or not any((run / name).exists() for name in _MARKS):
        raise ValueError(f"{run}: not the folder of a run, which would hold {_MARKS[0]} or {_MARKS[1]}/")


def overview(run: Path, *, index: Callable[[Path], FileIndex] | None = None) -> dict[str, Any]:
    """What the top of this file says. Files that cannot be read are left out and named in `warnings`.

    index: `file_index`, or one that remembers (a file of the credit log never changes once it is there).
    Raises as `check_run` does.
    """
    check_run(run)
    warnings: list[str] = []
    found = _readable(run, index or file_index, warnings)
    places: dict[tuple[str, str], int] = {}
    prompts: list[dict[str, Any]] = []
    samples: dict[str, list[Any]] = {name: [] for name in ("file", "prompt", *_SAMPLE_COLUMNS)}
    for place, file in enumerate(found):
        for prompt in file.prompts:
            key = (prompt["id"], prompt["text"])
            if key not in places:
                places[key] = len(prompts)
                prompts.append(prompt)
            samples["prompt"].append(places[key])
            samples["file"].append(place)
        for name in _SAMPLE_COLUMNS:
            samples[name] += file.samples[name]
    return {
        "format": FORMAT,
        "run": run.resolve().name,
        "settings": found[-1].settings if found else {},
        "metrics": _metrics(run, warnings),
        "advisories": _lines(run / advisories.FILE, warnings),
        "warnings": warnings,
        "files": [{"step": f.step, "replica": f.replica, "settings": f.settings} for f in found],
        "prompts": prompts,
        "samples": samples,
    }


def sample(run: Path, step: int, replica: int, row: int) -> bytes:
    """One response, exactly. Raises FileNotFoundError for a file that is not there, IndexError for a row
    that it has not, ValueError for a file that cannot be read."""
    path = log_path(run, step, replica)
    table = credit_log.read(path)
    if not 0 <= row < table.num_rows:
        raise IndexError(f"{path} has {table.num_rows} responses, and no row {row}")
    return Rows(table.slice(row, 1), credit_log.settings(table, path)).encode(0, EXACT)


def log_path(run: Path, step: int, replica: int) -> Path:
    """The credit log's file."""
    return Path(run, credit_log.FOLDER, f"step_{step:06d}-replica{replica}.parquet")


def replica_of(path: Path) -> int:
    """Of a credit log's name."""
    return int(path.stem.rpartition("-replica")[2])


def file_index(path: Path) -> FileIndex:
    """Raises as `credit_log.read` does."""
    columns = ("index", "prompt_id", "prompt", "response", "finish_reason", "prompt_tokens", "answer",
               "reward", "reward_parts", "advantage", "token_id", "weight")  # fmt: skip
    table = credit_log.read(path, columns)
    rows = Rows(table, credit_log.settings(table, path))
    samples: dict[str, list[Any]] = {name: [] for name in _SAMPLE_COLUMNS}
    prompts = []
    for row in range(table.num_rows):
        one = rows.scalars(row)
        prompts.append(
            {
                "id": one["prompt_id"],
                "text": one["prompt"],
                "answer": one["answer"],
                "tokens": one["prompt_tokens"],
            }
        )
        for name, value in {"row": row, **_sample(one, rows, row)}.items():
            samples[name].append(value)
    return FileIndex(credit_log.step_of(path), replica_of(path), rows.settings, prompts, samples)


def _sample(one: dict[str, Any], rows: Rows, row: int) -> dict[str, Any]:
    w_T = rows.numbers("weight", row)
    judged = one["reward_parts"].get(CORRECT, one["reward"])
    return {
        "index": one["index"],
        "reward": one["reward"],
        "right": None if judged is None else judged > 0,
        "advantage": one["advantage"],
        "length": rows.length(row),
        "finish_reason": one["finish_reason"],
        "preview": (one["response"] or "")[:PREVIEW],
        "effective_fraction": None if w_T is None else weights.effective_fraction(w_T),
        "max_weight": None if w_T is None else float(w_T.max(initial=0)),
        "top1_share": None if w_T is None else weights.top_share(w_T, 0.01),
        "top10_share": None if w_T is None else weights.top_share(w_T, 0.1),
    }


def _readable(run: Path, index: Callable[[Path], FileIndex], warnings: list[str]) -> list[FileIndex]:
    found = []
    for path in credit_log.files(run):
        try:
            found.append(index(path))
        except (ValueError, FileNotFoundError) as error:  # not found: a running run has just removed it
            warnings.append(str(error))
    return found


def _metrics(run: Path, warnings: list[str]) -> dict[str, dict[str, list[Any]]]:
    """Columns of metrics.jsonl by phase; null where a step has no such number."""
    rows = _lines(run / metrics.FILE, warnings)
    columns: dict[str, dict[str, list[Any]]] = {"train": {}, "eval": {}}
    for phase, table in columns.items():
        own = [row for row in rows if row.get("phase") == phase and isinstance(row.get("step"), int)]
        names = dict.fromkeys(name for row in own for name in row if name != "phase")
        for name in names:
            table[name] = [row.get(name) for row in own]
    return columns


def _lines(path: Path, warnings: list[str]) -> list[dict[str, Any]]:
    try:
        return jsonl.read(path)
    except FileNotFoundError:
        return []
    except ValueError as error:
        warnings.append(str(error))
        return []
