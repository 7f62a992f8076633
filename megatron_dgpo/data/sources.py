"""Reads rows from .jsonl and .parquet files and from the hub; every complaint names source and row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_dgpo import jsontext
from megatron_dgpo.config.sources import HubDataset, Source


def read_rows(
    source: Source, keys: Iterable[str], malformed: list[str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number, row); the first row is 1.

    In a .jsonl file the row number is the line number, and blank lines and byte order marks are passed
    over; NaN and lone surrogates are values of a row, of which only those that are used matter. From a
    .parquet file or the hub only the columns in which one of the (dotted) `keys` can lie are read.

    Raises FileNotFoundError for a missing file and ValueError for malformed or empty data, or a hub
    data set that cannot be had; where `malformed` is given, complaints of single rows go there instead.
    """
    empty = True
    for number, row in _reader(source)(source, set(keys)):
        empty = False
        if not isinstance(row, ValueError):
            yield number, row
        elif malformed is None:
            raise row
        else:
            malformed.append(str(row))
    if empty:
        raise ValueError(f"data file {source} has no rows")


def _reader(source: Source) -> Any:
    if isinstance(source, HubDataset):
        return _read_hub
    if not source.is_file():
        raise FileNotFoundError(f"data file {source} does not exist")
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if source.suffix not in readers:
        raise ValueError(f"data file {source}: unknown type {source.suffix!r}, expected .jsonl or .parquet")
    return readers[source.suffix]


def _read_jsonl(path: Path, keys: set[str]) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _parse_line(line, where(path, number))


def _parse_line(line: bytes, at: str) -> dict[str, Any] | ValueError:
    try:
        row = jsontext.loads(line)
    except ValueError as error:
        return ValueError(f"{at}: {error}")
    if not isinstance(row, dict):
        return ValueError(f"{at}: expected a JSON object, got {type(row).__name__}")
    return row


def _read_parquet(path: Path, keys: set[str]) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"data file {path}: not a parquet file ({error})") from error
    columns = _columns(file.schema_arrow.names, keys, f"data file {path}")
    number = 0
    try:
        for batch in file.iter_batches(batch_size=4096, columns=columns):
            for row in _python_rows(batch):
                number += 1
                named = isinstance(row, ValueError)
                yield number, ValueError(f"{where(path, number)}: {row}") if named else row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"data file {path}: damaged after row {number} ({error})") from error


def _python_rows(batch: Any) -> Iterator[dict[str, Any] | ValueError]:
    """The rows of an Arrow batch, and what is wrong with those that have no Python value."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, a date beyond Python's
        for at in range(batch.num_rows):
            try:
                yield from batch.slice(at, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield ValueError(f"not UTF-8 ({error.reason})")
            except (ValueError, OverflowError) as error:
                yield ValueError(f"cannot be read ({error})")


def _read_hub(source: HubDataset, keys: set[str]) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{source}: needs the package datasets (pip install datasets)") from None
    try:
        found = datasets.load_dataset(
            source.name, source.config, split=source.split, revision=source.revision
        )
    except Exception as error:  # the hub, the network, the data set's own files: every kind of its own
        first = str(error).strip().splitlines()[:1]
        raise ValueError(f"{source}: {type(error).__name__}: {first[0] if first else ''}") from error
    found = found.select_columns(_columns(found.column_names, keys, str(source)))
    number = 0
    while number < len(found):
        try:
            for row in found.select(range(number, len(found))):
                number += 1
                yield number, row
        except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date beyond Python's
            number += 1
            yield number, ValueError(f"{where(source, number)}: cannot be read ({error})")


def _columns(names: Sequence[str], keys: set[str], what: str) -> list[str]:
    """Those in which one of the keys can lie."""
    wanted = keys | {key.split(".")[0] for key in keys}
    columns = [name for name in names if name in wanted]
    if not columns:
        raise ValueError(f"{what}: none of the columns {sorted(keys)}; it has {list(names)}")
    return columns


def where(source: Source, number: int) -> str:
    return f"{source}, row {number}"
