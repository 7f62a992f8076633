"""One response's numbers as the bytes that the page decodes.

    uint32 little-endian: length of the header
    header: UTF-8 JSON {"count": T, "columns": [...], "pieces": ..., "versions": ..., "steps": ..., ...}
    the columns' data, one after the other, in the header's order

A column is {"name", "kind", ...} and T numbers:

| kind | data |
|---|---|
| const | none: every number is "value" |
| u8, u16, u32 | byte planes of T unsigned integers: all lowest bytes first (planes compress better apart) |
| f32, f16 | byte planes of T floats |
| fixed | "planes" byte planes of z; the number is "step" * z / 2, and -"step" * (z + 1) / 2 where z is odd |

Shape suffix: T tokens of a response.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Encoding = Literal["f32", "f16"] | float
"""float32, half precision, or fixed point with this step."""


@dataclass(frozen=True)
class Precision:
    """How exactly the numbers of a page are kept."""

    distance: Encoding
    """With the entropy, what the page computes weights from."""
    entropy: Encoding
    display: Encoding
    """What is only shown: log-probs, ratio, the distance that credit does not use."""

    @property
    def half_steps(self) -> tuple[float, float]:
        """How far distance and entropy may be from the recorded ones, but for float32 itself."""
        d, h = self.distance, self.entropy
        return d / 2 if isinstance(d, float) else 0.0, h / 2 if isinstance(h, float) else 0.0

    def describe(self) -> str:
        return (
            f"distance in {_words(self.distance)}, entropy in {_words(self.entropy)}, "
            f"numbers only shown (log-probs, ratio) in {_words(self.display)}"
        )


EXACT = Precision("f32", "f32", "f32")
LADDER = (
    Precision("f32", "f32", "f16"),
    Precision(2.0**-24, 2.0**-21, 2.0**-10),
    Precision(2.0**-20, 2.0**-17, 2.0**-10),
    Precision(2.0**-17, 2.0**-14, 2.0**-8),
    Precision(2.0**-16, 2.0**-13, 2.0**-7),
    Precision(2.0**-15, 2.0**-12, 2.0**-6),
    Precision(2.0**-14, 2.0**-11, 2.0**-6),
    Precision(2.0**-13, 2.0**-10, 2.0**-6),
)
"""From exact to coarse: a report takes the first one with which it keeps to its size. A score is d (H / ln V)
to a power, and ln V is about 12: an entropy's steps may be eight times a distance's."""


def _words(encoding: Encoding) -> str:
    if encoding == "f32":
        return "float32"
    if encoding == "f16":
        return "half precision"
    return f"steps of {encoding:.2g}"


def pack(header: Mapping[str, Any], columns: list[tuple[dict[str, Any], bytes]]) -> bytes:
    """Header and columns, as the top of this file says."""
    text = json.dumps({**header, "columns": [column for column, _ in columns]}, ensure_ascii=False)
    head = text.encode("utf-8", "surrogatepass")
    return b"".join([len(head).to_bytes(4, "little"), head, *(data for _, data in columns)])


def integers(name: str, values_T: NDArray[Any]) -> tuple[dict[str, Any], bytes]:
    """Numbers from 0 to 2^32 - 1."""
    if values_T.size and (values_T == values_T[0]).all():
        return {"name": name, "kind": "const", "value": int(values_T[0])}, b""
    top = int(values_T.max(initial=0))
    kind, dtype = ("u8", "u1") if top < 2**8 else ("u16", "<u2") if top < 2**16 else ("u32", "<u4")
    return {"name": name, "kind": kind}, _planes(values_T.astype(dtype), np.dtype(dtype).itemsize)


def floats(name: str, values_T: NDArray[Any], encoding: Encoding) -> tuple[dict[str, Any], bytes]:
    """Numbers in an encoding. Those that it cannot hold (NaN, infinities, too large) make the column
    float32."""
    if values_T.size and (values_T == values_T[0]).all() and np.isfinite(values_T[0]):
        return {"name": name, "kind": "const", "value": float(values_T[0])}, b""
    if isinstance(encoding, float):
        fixed = _fixed(name, values_T, encoding)
        if fixed is not None:
            return fixed
    elif encoding == "f16" and np.abs(values_T).max(initial=0) < 65504:
        return {"name": name, "kind": "f16"}, _planes(values_T.astype("<f2"), 2)
    return {"name": name, "kind": "f32"}, _planes(values_T.astype("<f4"), 4)


def _fixed(name: str, values_T: NDArray[Any], step: float) -> tuple[dict[str, Any], bytes] | None:
    scaled_T = np.rint(values_T.astype(np.float64) / step)
    if not np.isfinite(scaled_T).all() or np.abs(scaled_T).max(initial=0) >= 2**31:
        return None
    z_T = scaled_T.astype(np.int64)
    z_T = np.where(z_T < 0, -2 * z_T - 1, 2 * z_T)
    planes = max(1, (int(z_T.max(initial=0)).bit_length() + 7) // 8)
    column = {"name": name, "kind": "fixed", "step": step, "planes": planes}
    return column, _planes(z_T.astype("<u4"), planes)


def _planes(values_T: NDArray[Any], planes: int) -> bytes:
    width = values_T.dtype.itemsize
    return values_T.view(np.uint8).reshape(-1, width).T[:planes].tobytes()
