"""A folder of runs to inspect, and the inspector in a process of its own."""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import pyarrow as pa
import pyarrow.parquet as pq
from patience import patience

from megatron_dgpo.observe import credit_log, jsonl

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "algorithm": "dgpo",
    "credit": "distribution",
    "tau": 0.05,
    "kappa": 1.0,
    "entropy_normalization": "log_vocab",
    "distance": "hellinger",
    "credit_timing": "rollout",
    "vocab_size": 64,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "temperature": 1.0,
}


def response(step: int, index: int, text: str = "Six times nine is 54. So a=54 ;done") -> dict[str, Any]:
    """A row of the credit log, without step; its weights are the formula's."""
    pieces = re.findall(r"\s*\S+|\s+$", text)
    n = range(len(pieces))
    distance = [0.001 + 0.2 * ((7 * t + step + index) % 11 == 0) for t in n]
    entropy = [0.05 + 0.9 * ((5 * t + index) % 7 == 0) for t in n]
    e = [math.exp(d * h / math.log(64) / SETTINGS["tau"]) for d, h in zip(distance, entropy, strict=True)]
    weight = [len(pieces) * x / sum(e) for x in e]
    right = index % 2 == 0
    return {
        "index": index,
        "prompt_id": f"p{step % 3}",
        "prompt": f"What is {step % 3 + 6} times 9?",
        "response": text,
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "answer": "54",
        "extracted": "54" if right else None,
        "reward": float(right),
        "reward_parts": [("correct", float(right))],
        "advantage": 1.0 if right else -1.0,
        "token_id": [ord(piece[-1]) % 64 for piece in pieces],
        "token_text": pieces,
        "version": [step - 1 for _ in n],
        "engine_log_prob": [-0.1 for _ in n],
        "log_prob": [-0.11 for _ in n],
        "entropy": entropy,
        "entropy_normalized": [h / math.log(64) for h in entropy],
        "hellinger": distance,
        "reverse_kl": [2 * d for d in distance],
        "score": [d * h / math.log(64) for d, h in zip(distance, entropy, strict=True)],
        "weight": weight,
        "token_advantage": [1.0 if right else -1.0 for _ in n],
        "ratio": [1.01 for _ in n],
        "clipped": [False for _ in n],
    }


def write_credit(
    run: Path, step: int, rows: Sequence[dict[str, Any]] | None = None, replica: int = 0
) -> Path:
    """A file of the credit log, which appears complete as a run's does."""
    form = credit_log.schema({**SETTINGS, "step": step})
    rows = [response(step, index) for index in range(4)] if rows is None else rows
    columns = [pa.array([{**row, "step": step}[field.name] for row in rows], field.type) for field in form]
    path = run / credit_log.FOLDER / f"step_{step:06d}-replica{replica}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    pq.write_table(pa.Table.from_arrays(columns, schema=form), partial)
    os.replace(partial, path)
    return path


def metrics_row(step: int, phase: str = "train") -> dict[str, Any]:
    if phase == "eval":
        return {"step": step, "phase": "eval", "avg@8": 0.5 + 0.01 * step}
    return {
        "step": step, "phase": "train", "reward": round(1 - 0.8**step, 4), "entropy": 0.2 / step,
        "credit_effective_fraction": 0.9, "response_length": 30.0 + step, "grad_norm": 0.3, "time/step": 0.5,
    }  # fmt: skip


def write_run(folder: Path, *, steps: int = 4, wanted: int = 4, credit: Sequence[int] = (1, 4)) -> Path:
    """A run that made `steps` of the `wanted` ones."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f'[run]\nfolder = "runs/x"\n\n[train]\nsteps = {wanted}\n')
    (folder / "versions.json").write_text("{}")
    rows = [metrics_row(step) for step in range(1, steps + 1)]
    jsonl.write(folder / "metrics.jsonl", [*rows, metrics_row(steps, "eval")])
    for step in credit:
        write_credit(folder, step)
    return folder


def append(path: Path, *rows: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(jsonl.dump(row))


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The sentence of a refusal."""
        return str(self.json["error"]) if self.body.startswith(b"{") else self.body.decode()


class Server:
    """An inspector that was started, on whatever port was free."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url
        self.port = int(url.rstrip("/").rpartition(":")[2])

    def get(
        self, path: str, query: dict[str, Any] | None = None, *, method: str = "GET", **headers: str
    ) -> Answer:
        """The path is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=patience())
        try:
            connection.putrequest(
                method, path + (f"?{urlencode(query)}" if query else ""), skip_host="Host" in headers
            )
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            connection.endheaders()
            got = connection.getresponse()
            return Answer(got.status, {k.lower(): v for k, v in got.getheaders()}, got.read())
        finally:
            connection.close()

    def end(self, number: int = signal.SIGINT) -> tuple[int, str]:
        """(exit status, what it wrote to stderr)."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=patience())
        return self.process.returncode, errors


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "megatron_dgpo.observe.inspect", *map(str, arguments)]


@contextmanager
def inspector(folder: Path, *arguments: str) -> Iterator[Server]:
    process = subprocess.Popen(
        command(folder, "--port", "0", *arguments),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], patience())
        line = process.stdout.readline() if ready else ""
        match = re.search(r"http://\S+/", line)
        if match is None:
            process.kill()
            raise RuntimeError(f"the inspector did not start: {line!r} {process.communicate()[1]}")
        yield Server(process, match[0])
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
