"""The page: one HTML document from the files in assets/, and data in inert script elements.

Nothing in it can load or run what is not in it: its content security policy allows this one style and this
one script by their hashes, and text of a run only enters through `textContent` after decoding.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from typing import Any

SCRIPTS = ("decode.js", "credit.js", "source.js", "dom.js", "charts.js", "list.js", "heat.js", "whatif.js",
           "sample.js", "page.js")  # fmt: skip
"""In order; together they are one script."""


@cache
def asset(name: str) -> str:
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


@cache
def script() -> str:
    return '"use strict";\n(() => {\n' + "\n".join(map(asset, SCRIPTS)) + "})();\n"


def policy() -> str:
    """The content security policy."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src '{_hash(script())}'",
            f"style-src '{_hash(asset('page.css'))}'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def document(title: str, source: Mapping[str, Any], chunks: Iterable[str] = ()) -> Iterable[str]:
    """The document in pieces.

    Args:
        source: {"kind": "embedded", "runs": [{}, ...]}; one run or two.
        chunks: what `chunk` made. The run's key in the page is "a", that of the run beside it "b".
    """
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    yield f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy(), quote=True)}">\n'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    yield '<meta name="referrer" content="no-referrer">\n<link rel="icon" href="data:,">\n'
    yield f"<title>{html.escape(title)}</title>\n<style>{asset('page.css')}</style>\n</head>\n<body>\n"
    yield asset("page.html")
    yield f'<script type="application/json" id="source">{_json(source)}</script>\n'
    yield from chunks
    yield f"<script>{script()}</script>\n</body>\n</html>\n"


def chunk(name: str, data: bytes) -> str:
    """Bytes that the page decodes when it wants them; base64 has no character that HTML minds."""
    text = base64.b64encode(gzip.compress(data, 6, mtime=0)).decode("ascii")
    return f'<script type="application/octet-stream" id="{name}">{text}</script>\n'


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _json(value: Any) -> str:
    """JSON that cannot end its element or begin another."""
    text = json.dumps(value, ensure_ascii=True)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
