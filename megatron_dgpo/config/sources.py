"""How a config names data: files, and data sets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

SCHEME = "hub://"


@dataclass(frozen=True)
class HubDataset:
    """``hub://owner/name[/config][?split=train&revision=main]``, read through `datasets`."""

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None

    @property
    def stem(self) -> str:
        """What its rows' ids begin with."""
        return "-".join(x for x in (self.name.rpartition("/")[2], self.config, self.split) if x)

    def __str__(self) -> str:
        config = f"/{self.config}" if self.config else ""
        revision = f"&revision={self.revision}" if self.revision else ""
        return f"{SCHEME}{self.name}{config}?split={self.split}{revision}"


Source = Path | HubDataset


def parse_source(text: str | Path) -> Source:
    """A path, or a hub data set. Raises ValueError for a hub name that is not of `HubDataset`'s form."""
    if not str(text).startswith(SCHEME):
        return Path(text)
    parts = urlsplit(str(text))
    names = [parts.netloc, *(n for n in parts.path.split("/") if n)]
    query = parse_qs(parts.query, keep_blank_values=True)
    one_each = all(len(values) == 1 and values[0] for values in query.values())
    if not 2 <= len(names) <= 3 or not names[0] or not query.keys() <= {"split", "revision"} or not one_each:
        raise ValueError(f"{text}: expected {SCHEME}owner/name[/config][?split=train&revision=main]")
    given = {key: values[0] for key, values in query.items()}
    return HubDataset("/".join(names[:2]), names[2] if len(names) == 3 else None, **given)


def parse_sources(given: Sequence[str | Path] | str | Path) -> list[Source]:
    """Each of them. Their stems become part of each row's id, so they must differ."""
    listed = [parse_source(x) for x in ([given] if isinstance(given, str | Path) else given)]
    if not listed:
        raise ValueError("no data files given")
    stems: dict[str, Source] = {}
    for source in listed:
        if source.stem in stems:
            raise ValueError(
                f"data files {stems[source.stem]} and {source} share the stem {source.stem!r}; rename one"
            )
        stems[source.stem] = source
    return listed
