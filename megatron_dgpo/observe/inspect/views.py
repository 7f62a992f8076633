"""What the server answers about a run, as bytes; everything here reads files, and is called in threads."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import stat
import zlib
from pathlib import Path
from typing import Any

from megatron_dgpo.observe import advisories, credit_log, jsonl, metrics
from megatron_dgpo.observe.inspect import follow, runs
from megatron_dgpo.observe.inspect.runs import Found, Refused, RunsFolder
from megatron_dgpo.observe.inspect.work import Cache, Key
from megatron_dgpo.observe.report import data

log = logging.getLogger(__name__)

_STREAMS = {"metrics": metrics.FILE, "advisories": advisories.FILE}


def encode(answer: Any) -> bytes:
    """Strict JSON; half of a surrogate pair, which JSON can spell, becomes U+FFFD."""
    return jsonl.dump(answer).encode()


def stamp(path: Path) -> str:
    """ "time-size" of a file, which differs when it was written again; "" where it is not there."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_mtime_ns}-{status.st_size}"


class Views:
    """The answers about the runs of a folder. Messages in them name paths below it."""

    def __init__(self, folder: RunsFolder, cache: Cache) -> None:
        self._folder = folder
        self._cache = cache

    def run(self, name: str) -> Found:
        """A run that a client named, with nothing in it that leads elsewhere.

        Raises Refused.
        """
        run = self._folder.run(name)
        for entry in ("config.toml", *_STREAMS.values(), credit_log.FOLDER):
            path = run.folder / entry
            try:
                mode = path.lstat().st_mode
            except OSError:
                continue
            # Neither a link, which may lead anywhere, nor a pipe, whose reader waits for ever.
            if not (stat.S_ISDIR(mode) if entry == credit_log.FOLDER else stat.S_ISREG(mode)):
                raise Refused(403, f"{name}/{entry} is not a plain file or folder; links are not followed")
        return run

    # --- the list of runs ---------------------------------------------------------------------------

    def runs(self) -> bytes:
        """{"folder", "runs": [of `runs.summary`, newest first], "cut": whether not all were looked for}."""
        found, cut = self._folder.search()
        held = runs.held_locks()
        rows = []
        for run in found:
            try:
                rows.append(runs.summary(run, held))
            except OSError as error:  # gone meanwhile, or not ours to read
                log.info("%s is left out of the list: %s", run.name, error)
        rows.sort(key=lambda row: (-row["updated"], row["name"]))
        return encode({"folder": str(self._folder.root), "runs": rows, "cut": cut})

    # --- a run ----------------------------------------------------------------------------------------

    def state_key(self, run: Found) -> Key:
        """What a run's overview depends on."""
        files = (run.folder / name for name in _STREAMS.values())
        return ("overview", run.name, *(stamp(path) for path in files), self._digest(self._listing(run)))

    def overview(self, run: Found) -> bytes:
        """`report.data.overview`, and under "live" from where to follow: {"metrics", "advisories": cursors,
        "files": [[step, replica, stamp]], "digest": of these files}.

        Raises Refused where the run is gone.
        """
        # Before the rest is read: what is written meanwhile then comes twice, and not never.
        live = {name: follow.end(run.folder / file) for name, file in _STREAMS.items()}
        listing = self._listing(run)
        try:
            answer = data.overview(run.folder, index=self._index)
        except (FileNotFoundError, ValueError):
            raise Refused(404, f"run: there is no run {run.name!r} any more") from None
        answer["run"] = run.name if run.name != "." else answer["run"]
        answer["warnings"] = [self._below(text) for text in answer["warnings"]]
        answer["live"] = {**live, "files": listing, "digest": self._digest(listing)}
        return encode(answer)

    def news(self, run: Found, cursors: dict[str, str], digest: str) -> bytes:
        """What a page that has an overview does not have yet.

        Returns:
            {"metrics", "advisories": {"rows", "cursor", "restart", "more", "problems"}, "digest",
            "files": [[step, replica, stamp]] or None where they are those of the digest, "summary"}

        Raises Refused for what is no cursor.
        """
        answer: dict[str, Any] = {}
        for name, file in _STREAMS.items():
            try:
                answer[name] = dataclasses.asdict(follow.read(run.folder / file, cursors[name]))
            except ValueError as error:
                raise Refused(400, f"{name}: {error}") from None
        listing = self._listing(run)
        answer["digest"] = self._digest(listing)
        answer["files"] = listing if answer["digest"] != digest else None
        answer["summary"] = self._summary(run)
        return encode(answer)

    def files(self, run: Found, wanted: list[tuple[int, int]]) -> bytes:
        """{"files": [{"step", "replica", "settings", "prompts", "samples"} of `report.data.FileIndex`],
        "warnings": [text]}: of the (step, replica) that are there; those that cannot be read are named."""
        found, warnings = [], []
        for step, replica in wanted:
            try:
                index = self._index(self._file(run, step, replica))
            except (FileNotFoundError, Refused):
                continue  # thinned out meanwhile
            except ValueError as error:
                warnings.append({"step": step, "replica": replica, "text": self._below(str(error))})
                continue
            found.append(dataclasses.asdict(index))
        return encode({"files": found, "warnings": warnings})

    def sample_key(self, run: Found, step: int, replica: int, row: int) -> Key:
        return ("sample", run.name, step, replica, row, stamp(self._file(run, step, replica)))

    def sample(self, run: Found, step: int, replica: int, row: int) -> bytes:
        """`report.data.sample`. Raises Refused: 404 for what is not there, 422 for a file that cannot be
        read."""
        path = self._file(run, step, replica)
        try:
            return data.sample(run.folder, step, replica, row)
        except (FileNotFoundError, IndexError) as error:
            raise Refused(404, self._below(str(error))) from None
        except Exception as error:
            raise Refused(422, self._below(_damaged(error, path))) from None

    def _summary(self, run: Found) -> dict[str, Any]:
        try:
            return runs.summary(run, runs.held_locks())
        except OSError:
            raise Refused(404, f"run: there is no run {run.name!r} any more") from None

    def _listing(self, run: Found) -> list[list[Any]]:
        """[step, replica, stamp] of the files of the credit log."""
        paths = credit_log.files(run.folder)
        return [[credit_log.step_of(path), data.replica_of(path), stamp(path)] for path in paths]

    def _digest(self, listing: list[list[Any]]) -> str:
        return f"{zlib.crc32(json.dumps(listing).encode()):08x}"

    def _file(self, run: Found, step: int, replica: int) -> Path:
        """A file of the credit log. Raises Refused where it is not there or a link."""
        path = run.folder / credit_log.FOLDER / f"step_{step:06d}-replica{replica}.parquet"
        missing = f"{run.name} has no {credit_log.FOLDER}/{path.name}"
        if not self._folder.inside(path, missing).is_file():  # a pipe's reader waits for ever
            raise Refused(404, missing)
        return path

    def _index(self, path: Path) -> data.FileIndex:
        """`report.data.file_index`, remembered. Raises FileNotFoundError, and ValueError naming the file."""
        try:
            key = ("index", str(path), stamp(self._folder.inside(path)))
            if not path.is_file():
                raise ValueError(f"{path}: not a plain file")
            known = self._cache.get(key)
            if known is not None:
                return data.FileIndex(**json.loads(known))
            index = data.file_index(path)
        except Refused as error:
            if error.status == 404:
                raise FileNotFoundError(path) from None
            raise ValueError(f"{path}: {error}") from None
        except FileNotFoundError:
            raise
        except Exception as error:  # whatever a damaged file leads its reader to
            raise ValueError(_damaged(error, path)) from error
        self._cache.put(key, json.dumps(dataclasses.asdict(index)).encode())
        return index

    def _below(self, text: str) -> str:
        return " ".join(text.replace(f"{self._folder.root}{os.sep}", "").split())


def _damaged(error: Exception, path: Path) -> str:
    if isinstance(error, ValueError) and path.name in str(error):
        return str(error)
    return f"{path}: cannot be read as a credit log: {type(error).__name__}: {error}"
