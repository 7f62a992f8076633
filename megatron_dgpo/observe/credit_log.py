"""Where the credit of some responses went, token by token: `credit/step_000012-replica0.parquet`.

A file is one recorded step and data-parallel replica; a row is one response, whose token columns are lists
with one entry a response token. `SETTINGS` of the file's metadata say what the weights were made with.
pyarrow is imported where it is used.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dgpo import jsontext

log = logging.getLogger(__name__)

FOLDER = "credit"
SETTINGS = b"credit"
"""Key of the schema's metadata: JSON {"format", "step", "algorithm", "credit": "uniform" | "distribution",
"tau", "kappa" (those in force at that step; null with uniform credit), "entropy_normalization", "distance",
"credit_timing", "vocab_size", "clip_low", "clip_high", "temperature"}."""
FORMAT = 1
_NAME = re.compile(r"step_(\d{6,})-replica(\d+)\.parquet")
_PARTIAL = ".partial"
_WAITING_STEPS = 2
_PATIENCE_SECONDS = 2.0

COLUMNS: dict[str, str] = {
    "step": "int32",
    "index": "int32",  # place in its group
    "prompt_id": "string",
    "prompt": "string",
    "response": "string",
    "finish_reason": "string",
    "prompt_tokens": "int32",  # how many
    "answer": "string",  # the gold answer
    "extracted": "string",  # what the reward took for the answer; null where it took none
    "reward": "float64",
    "reward_parts": "map",
    "advantage": "float32",  # of the response
    "token_id": "list int32",
    "token_text": "list string",  # end to end the decoded response, special tokens included
    "version": "list int32",  # of the weights that drew the token
    "engine_log_prob": "list float32",  # nats, at the sampling temperature
    "log_prob": "list float32",  # the same, by the trainer at the start of the rollout batch (pi_old)
    "entropy": "list float32",  # nats
    "entropy_normalized": "list float32",  # over ln V, in [0, 1]
    "hellinger": "list float32",  # squared distance to the reference; null without a reference
    "reverse_kl": "list float32",  # nats; null without a reference
    "score": "list float32",  # s = d Hn^kappa; null with uniform credit
    "weight": "list float32",  # w; null with credit taken at updates in a step without one
    "token_advantage": "list float32",  # before its weight; differs over tokens with a value model
    "ratio": "list float32",  # at the last update of the step; null in a step without one
    "clipped": "list bool",  # likewise
}
"""Name -> type. Distances and entropies are those that the weights come from."""


def schema(settings: Mapping[str, Any] | None = None) -> Any:
    """pyarrow's schema of a file, with its settings."""
    import pyarrow as pa

    kinds = {"int32": pa.int32(), "float32": pa.float32(), "float64": pa.float64(), "bool": pa.bool_()}
    kinds |= {"string": pa.string(), "map": pa.map_(pa.string(), pa.float64())}
    fields = []
    for name, kind in COLUMNS.items():
        outer, _, inner = kind.rpartition(" ")
        fields.append(pa.field(name, pa.list_(kinds[inner]) if outer else kinds[inner]))
    metadata = None if settings is None else {SETTINGS: json.dumps({"format": FORMAT, **settings})}
    return pa.schema(fields, metadata=metadata)


# --- reading ------------------------------------------------------------------------------------------


def files(run: str | Path) -> list[Path]:
    """The complete files of a run, by step and replica; none where there is no log."""
    found = [(place, path) for path in _entries(run) if (place := _place(path))]
    return [path for _, path in sorted(found)]


def _entries(run: str | Path) -> list[Path]:
    """Not `Path.glob`, which raises where the folder goes while it is looked at."""
    folder = Path(run, FOLDER)
    try:
        return [folder / name for name in os.listdir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def step_of(path: Path) -> int:
    """Of a file's name. Raises ValueError for another name."""
    place = _place(path)
    if place is None:
        raise ValueError(f"{path}: not the name of a credit log, such as step_000012-replica0.parquet")
    return place[0]


def read(path: str | Path, columns: Sequence[str] | None = None) -> Any:
    """The file's pyarrow.Table, of these columns or all.

    Raises FileNotFoundError, and ValueError naming the file where it is damaged or no credit log.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            table = file.read(columns=None if columns is None else list(columns), use_threads=False)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error
    found = settings(table, path)
    wanted = schema()
    for name in columns or COLUMNS:
        if name not in table.schema.names or table.schema.field(name).type != wanted.field(name).type:
            raise ValueError(f"{path}: has no column {name} of type {wanted.field(name).type}")
    if found.get("format") != FORMAT:
        raise ValueError(f"{path}: is of format {found.get('format')}, and this release reads {FORMAT}")
    return table


def settings(table: Any, path: str | Path = "the table") -> dict[str, Any]:
    """What the weights were made with (`SETTINGS`). Raises ValueError where it does not say so."""
    try:
        found = jsontext.loads((table.schema.metadata or {})[SETTINGS])
    except (KeyError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a credit log (its schema has no {SETTINGS.decode()!r} metadata)")
    return found


def rows(run: str | Path, steps: Collection[int] | None = None) -> Iterator[dict[str, Any]]:
    """Every response of a run (of these steps) as {column: value}. Raises what `read` does."""
    for path in files(run):
        if steps is None or step_of(path) in steps:
            for row in read(path).to_pylist():
                yield row | {"reward_parts": dict(row["reward_parts"] or ())}


def truncate_after(run: str | Path, step: int) -> None:
    """Remove what a run that resumes from `step` writes again: files of later steps, and those that a
    killed writer left unfinished. Safe to call on several ranks."""
    for path in _entries(run):
        place = _place(path.with_name(path.name.removesuffix(_PARTIAL)))
        if place is not None and (place[0] > step or path.name.endswith(_PARTIAL)):
            path.unlink(missing_ok=True)


def _place(path: Path) -> tuple[int, int] | None:
    """(step, replica) of a file's name."""
    found = _NAME.fullmatch(path.name)
    return None if found is None else (int(found[1]), int(found[2]))


# --- writing ------------------------------------------------------------------------------------------

Rows = list[dict[str, Any]]


class CreditWriter:
    """Writes a replica's files in a thread of its own; for one rank of the replica.

    A step is handed over by `put`, which does not wait for the disk. The thread's errors are logged, the
    first of a kind only, and end nothing: a full disk costs the recording, not the run.

    Args:
        pieces: token ids to their texts, for the column token_text; called in the thread only.
        max_bytes: bound of the whole folder, all replicas together; None: another replica keeps it.

    Raises ImportError where pyarrow is missing.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        replica: int,
        pieces: Callable[[Sequence[int]], list[str]],
        max_bytes: int | None,
    ) -> None:
        import pyarrow.parquet  # noqa: F401 (here, rather than in a thread while ranks fork)

        self._folder = Path(run, FOLDER)
        self._replica = replica
        self._pieces = pieces
        self._max_bytes = max_bytes
        self._said: set[str] = set()
        self._behind = False
        self._queue: queue.Queue[tuple[int, Mapping[str, Any], Callable[[], Rows]] | None]
        self._queue = queue.Queue(maxsize=_WAITING_STEPS)
        # A daemon: a disk that hangs does not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="credit log", daemon=True)
        self._thread.start()

    def put(self, step: int, settings: Mapping[str, Any], rows: Callable[[], Rows]) -> bool:
        """Have a step written: `rows` is called in the thread for its responses, {column: value} without
        token_text and step.

        Returns False where the step is left out, as the thread is two steps behind and stays so for two
        seconds: a recording is not worth more of a run's time, but a step faster than the disk for once is
        no reason to lose one.
        """
        try:
            # Once it was too slow nothing is waited for until it has caught up.
            self._queue.put((step, settings, rows), timeout=0 if self._behind else _PATIENCE_SECONDS)
            self._behind = False
        except queue.Full:
            self._behind = True
            self._say_once("slow", f"{self._folder} takes longer than the steps do; step {step} is left out")
            return False
        return True

    def close(self, timeout: float = 60.0) -> None:
        """Wait until everything is written, at most so many seconds."""
        end = time.monotonic() + timeout
        try:
            self._queue.put(None, timeout=timeout)
        except queue.Full:
            pass
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            self._say_once("close", f"{self._folder} is not complete: still writing after {timeout:g} s")

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            step, settings, rows = item
            try:
                self._write(step, settings, rows())
                if self._max_bytes is not None:
                    self._thin(self._max_bytes)
            except Exception as error:
                self._say_once("error", f"step {step} is not written: {type(error).__name__}: {error}")
            del item, rows  # the tensors in it

    def _say_once(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            log.warning("credit log: %s (said once)", message)

    def _write(self, step: int, settings: Mapping[str, Any], rows: Rows) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        form = schema(settings)
        for row in rows:
            row["step"] = step
            row["token_text"] = self._pieces(row["token_id"])
        columns = [pa.array([_plain(row[f.name]) for row in rows], f.type) for f in form]
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step_{step:06d}-replica{self._replica}.parquet"
        partial = path.with_name(path.name + _PARTIAL)
        try:
            with partial.open("wb") as file:
                pq.write_table(pa.Table.from_arrays(columns, schema=form), file, compression="zstd")
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _thin(self, max_bytes: int) -> None:
        """Remove every second recorded step, of all replicas, until the folder is within its bound; the first
        and the newest stay."""
        while True:
            sizes = {path: path.stat().st_size for path in files(self._folder.parent)}
            steps = sorted({step_of(path) for path in sizes})
            if sum(sizes.values()) <= max_bytes or len(steps) < 3:
                return
            self._say_once(
                "size",
                f"{self._folder} is larger than {max_bytes:,} bytes (observe.credit_max_bytes); every "
                "second recorded step is removed",
            )
            removed = set(steps[1:-1:2])
            for path in sizes:
                if step_of(path) in removed:
                    path.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    return list(value.items()) if isinstance(value, dict) else value
