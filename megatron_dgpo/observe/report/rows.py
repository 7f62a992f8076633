"""Rows of the credit log as numpy arrays, and as the bytes of `encode.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dgpo.observe.report import encode, steps, weights
from megatron_dgpo.observe.report.encode import Precision

_SAME = 1e-6
"""Weights no farther apart than this, relative to themselves or to 1, differ by float32's rounding."""
_TOKEN_COLUMNS = ("token_id", "token_text", "version", "engine_log_prob", "log_prob", "entropy", "hellinger",
                  "reverse_kl", "weight", "token_advantage", "ratio", "clipped")  # fmt: skip
_SCALARS = ("index", "prompt_id", "prompt", "response", "finish_reason", "prompt_tokens", "answer",
            "extracted", "reward", "advantage")  # fmt: skip


class Pieces:
    """(token id, text) pairs in order of appearance, each with its place."""

    def __init__(self) -> None:
        self.places: dict[tuple[int, str], int] = {}

    def place(self, token_id: int, text: str) -> int:
        return self.places.setdefault((token_id, text), len(self.places))

    def pairs(self) -> list[list[Any]]:
        return [list(pair) for pair in self.places]


class Rows:
    """A table of the credit log (`credit_log.read`) and its settings."""

    def __init__(self, table: Any, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)
        self._columns = {name: table.column(name).combine_chunks() for name in table.schema.names}
        self.count = int(table.num_rows)

    def scalars(self, row: int) -> dict[str, Any]:
        """What is not a list of tokens, and reward_parts as a dictionary."""
        found = {name: self._columns[name][row].as_py() for name in _SCALARS if name in self._columns}
        return {**found, "reward_parts": dict(self._columns["reward_parts"][row].as_py() or ())}

    def length(self, row: int) -> int:
        return len(self._columns["token_id"][row])

    def numbers(self, name: str, row: int) -> NDArray[Any] | None:
        """A token column, (T,); None where it was not recorded."""
        scalar = self._columns[name][row]
        return scalar.values.to_numpy(zero_copy_only=False) if scalar.is_valid else None

    def texts(self, row: int) -> list[str]:
        return list(self._columns["token_text"][row].as_py())

    def credit(self, row: int) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """(distance, entropy) that the weights of this row come from, (T,) each; None where the credit is
        uniform or they were not recorded."""
        if self.settings.get("credit") != "distribution":
            return None
        distance_T = self.numbers(self.settings["distance"], row)
        entropy_T = self.numbers("entropy", row)
        return None if distance_T is None or entropy_T is None else (distance_T, entropy_T)

    def encode(self, row: int, precision: Precision, pieces: Pieces | None = None) -> bytes:
        """A response's bytes. pieces: one table for many responses; None: its own is in the header."""
        texts, ids_T = self.texts(row), self.numbers("token_id", row)
        assert ids_T is not None
        table = Pieces() if pieces is None else pieces
        places = [table.place(int(i), text) for i, text in zip(ids_T, texts, strict=True)]
        one = self.scalars(row)
        header = {
            "count": len(texts),
            "extracted": one["extracted"],
            "reward_parts": one["reward_parts"],
            "versions": _spans(self.numbers("version", row)),
            "steps": {"sentences": steps.sentences(texts), "arithmetic": steps.arithmetic(texts)},
            **({"pieces": table.pairs()} if pieces is None else {}),
        }
        token = encode.integers("token", np.array(places, dtype=np.int64))
        return encode.pack(header, [token, *self._numbers(row, precision, one)])

    def _numbers(
        self, row: int, precision: Precision, one: Mapping[str, Any]
    ) -> list[tuple[dict[str, Any], bytes]]:
        credit, display = self.credit(row), precision.display
        found = []
        if credit is not None:
            found.append(encode.floats("distance", credit[0], precision.distance))
        for name in ("entropy", "log_prob", "ratio", "token_advantage", "hellinger", "reverse_kl"):
            values_T = self.numbers(name, row)
            if values_T is not None and not (credit is not None and name == self.settings["distance"]):
                # An advantage that differs over tokens is a number that training used.
                wanted = {"entropy": precision.entropy, "token_advantage": "f32"}.get(name, display)
                found.append(encode.floats(name, values_T, wanted))
        engine_T, trainer_T = self.numbers("engine_log_prob", row), self.numbers("log_prob", row)
        if engine_T is not None and trainer_T is not None:
            found.append(encode.floats("gap", engine_T.astype(np.float64) - trainer_T, display))
        clipped_T, weight_T = self.numbers("clipped", row), self.numbers("weight", row)
        if clipped_T is not None:
            found.append(encode.integers("clipped", clipped_T.astype(np.uint8)))
        if weight_T is not None and not self._repeats(row, weight_T):
            found.append(encode.floats("weight", weight_T, "f32"))
        return found

    def _repeats(self, row: int, weight_T: NDArray[Any]) -> bool:
        """Whether the formula gives the recorded weights."""
        credit = self.credit(row)
        if credit is None or self.settings.get("tau") is None or self.settings.get("kappa") is None:
            return False
        again_T = weights.weights(*credit, self.settings)
        return bool((np.abs(again_T - weight_T) <= _SAME * np.maximum(1, weight_T)).all())


def _spans(versions_T: NDArray[Any] | None) -> list[list[int]]:
    """[version, start, end] of equal neighbours."""
    if versions_T is None or not versions_T.size:
        return []
    cuts = [0, *(np.flatnonzero(np.diff(versions_T)) + 1).tolist(), versions_T.size]
    return [[int(versions_T[a]), a, b] for a, b in zip(cuts, cuts[1:], strict=False)]
