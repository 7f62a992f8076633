"""A run's metrics on Weights & Biases, for those who ask for it."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FILE = "wandb.json"
_LOGIN_SECONDS = 60.0
_FINISH_SECONDS = 60.0
"""What is not sent by then stays in the folder, for `wandb sync`."""


class WandbRun:
    """Sends rows of metrics to a W&B run; for one rank only.

    The W&B run has the folder's name, and an id that is kept in `wandb.json` there: a resumed run goes on in
    it. Steps that it does again are there twice, at the same `step`, which is the axis of all metrics (W&B's
    own counter only rises). How and where to is up to W&B's environment variables: WANDB_MODE=offline writes
    below the folder, for `wandb sync`.

    Whatever goes wrong between the start and the end is a warning, and nothing more is sent: the run goes on.

    Raises:
        ImportError: naming the package, where it is not installed.
        ValueError: where W&B cannot be used as it is set up, such as without a key.
    """

    def __init__(self, folder: str | Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("W&B was asked for: install the wandb package") from error
        folder = Path(folder).resolve()
        self._run: Any = None
        try:
            # Unless somebody chose a limit, it would ask for a key on a terminal for ever.
            limited = "WANDB_LOGIN_TIMEOUT" in os.environ
            setup = wandb.setup(None if limited else wandb.Settings(login_timeout=_LOGIN_SECONDS))
            switched_off = setup.settings.mode == "disabled"
            self._run = wandb.init(
                project=project,
                id=_run_id(folder, project),
                name=folder.name,
                dir=str(folder),
                config=dict(config),
                resume="allow",
                # The terminal and the code are none of its business.
                settings=wandb.Settings(
                    console="off", quiet=True, disable_git=True, finish_timeout=_FINISH_SECONDS
                ),
            )
            if self._run.disabled and not switched_off:
                raise wandb.errors.UsageError("no key was entered; set WANDB_API_KEY")
            for phase in ("train", "eval"):
                self._run.define_metric(f"{phase}/*", step_metric="step")
        except wandb.errors.UsageError as error:
            raise ValueError(
                f"observe.wandb_project: {str(error).rstrip('.')}, or set WANDB_MODE=offline to send it later"
            ) from error
        except Exception as error:
            self._give_up(error)

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Hand one row over to W&B's own process."""
        self._guarded(lambda run: run.log({"step": step} | {f"{phase}/{k}": v for k, v in values.items()}))

    def close(self) -> None:
        """Wait for what is not sent yet, for a minute at most."""
        self._guarded(lambda run: run.finish())
        self._run = None

    def _guarded(self, call: Any) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:  # whatever W&B raises, the run is worth more
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        text = " ".join(str(error).split())
        log.warning("W&B gets nothing more of this run, metrics.jsonl has it all: %s", text)


def _run_id(folder: Path, project: str) -> str:
    """The id of the folder's run in this project: the folder's name and some random letters, made once."""
    path = folder / FILE
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["project"] == project:
            return str(known["id"])
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.name)[:64]
    made = {"project": project, "id": f"{name}-{secrets.token_hex(4)}"}
    path.write_text(json.dumps(made) + "\n", encoding="utf-8")
    return made["id"]
