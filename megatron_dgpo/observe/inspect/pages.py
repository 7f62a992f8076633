"""The inspector's two pages: the list of runs, and the report's page on data that the server hands out.

They are put together when the server starts, so that no request's path ever meets the file system here.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

from megatron_dgpo.observe.report import html as report

LIST = "runs.html"
RUN = "run.html"
_REPORTS_SOURCE = "source.js"


@dataclass(frozen=True)
class Asset:
    content: bytes
    kind: str


def assets() -> dict[str, Asset]:
    """Name -> asset."""
    # The report's scripts, with the server in the place of the data that a report embeds.
    scripts = [_own("start.js")]
    for name in report.SCRIPTS:
        scripts.append(_own("source.js") if name == _REPORTS_SOURCE else report.asset(name))
    scripts.append(_own("live.js"))
    return {
        LIST: _page("Runs", _own(LIST), "runs.js"),
        RUN: _page("Run", report.asset("page.html"), "run.js"),
        "runs.js": _script([report.asset("dom.js"), _own("runs.js")]),
        "run.js": _script(scripts),
        "page.css": Asset((report.asset("page.css") + _own("inspect.css")).encode(), "text/css"),
    }


def _own(name: str) -> str:
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _script(parts: list[str]) -> Asset:
    return Asset(f'"use strict";\n(() => {{\n{"".join(parts)}}})();\n'.encode(), "text/javascript")


def _page(title: str, body: str, script: str) -> Asset:
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f'<title>{title}</title>\n<link rel="stylesheet" href="/assets/page.css">\n</head>\n<body>\n{body}\n'
        f'<script src="/assets/{script}"></script>\n</body>\n</html>\n'
    )
    return Asset(text.encode(), "text/html")
