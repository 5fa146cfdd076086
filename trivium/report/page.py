"""One self-contained HTML page: our scripts and style, the vendored ones, and data, in one text.

Every page is built here, whatever it shows. Data travels as JSON in a script element that never
runs; a policy in the page forbids every script but the ones whose hashes it names, and every
request. Left out: what the data is, and how it is drawn (``templates/``).
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from trivium.errors import ConfigurationError, TrainingError
from trivium.monitoring.progress import printable
from trivium.runs.store import json_line

_VENDORED = ("d3.min.js", "plot.min.js")
_SHARED = ("common.js", "refresh.js", "chart.js")
_MARKUP = re.compile("[<>&\u2028\u2029]")


def build_components(
    title: str, data: Mapping[str, Any], scripts: Sequence[str], *, live: bool = False
) -> str:
    """Return a page as one HTML text.

    Args:
        title: of the window; any text.
        data: what ``scripts`` draw; text in it is untrusted. Numbers that are not finite become
            the texts "NaN", "Infinity" and "-Infinity".
        scripts: names in ``templates/``, run in this order after the vendored scripts and the
            shared ones, common.js, refresh.js and chart.js. The last of them calls ``start``.
        live: whether the page asks its own server for newer data.
    """
    sources = [_text("assets", name) for name in _VENDORED]
    sources += [_text("templates", name) for name in (*_SHARED, *scripts)]
    return Template(_text("templates", "page.html")).substitute(
        policy=html.escape(policy(sources, live=live)),
        title=html.escape(printable(title)),
        style=_text("templates", "style.css"),
        live="live" if live else "still",
        data=encode(data),
        scripts="\n".join(f"<script>{source}</script>" for source in sources),
    )


def encode(data: Mapping[str, Any]) -> str:
    """Return strict JSON that may stand inside a script element: no sign in it can end one."""
    return _MARKUP.sub(lambda match: f"\\u{ord(match[0]):04x}", json_line(data))


def clip(text: str, most: int) -> str:
    """Return the longest beginning of a text that takes at most ``most`` bytes in a page."""

    def size(length: int) -> int:
        return len(encode({"": text[:length]}).encode()) - len(encode({"": ""}))

    lengths = range(min(len(text), most) + 1)
    return text[: bisect_right(lengths, most, key=size) - 1]


def policy(sources: Sequence[str], *, live: bool) -> str:
    """Return the Content-Security-Policy of a page that runs exactly these inline scripts."""
    allowed = {
        "default-src": "'none'",
        "script-src": " ".join(_hash(source) for source in sources),
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "connect-src": "'self'" if live else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in allowed.items())


def require_free(output: Path | None, overwrite: bool) -> None:
    """Refuse a file that the user named, that exists, and that may not be replaced."""
    if output is not None and output.exists() and not overwrite:
        raise ConfigurationError(
            f"--output {output}: exists already; name another file, or write --overwrite to "
            "replace it"
        )


def write_page(target: Path, text: str) -> Path:
    """Write a page whole or not at all; TrainingError if it cannot be."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise TrainingError(
            f"{target}: the report cannot be written: {error.strerror}; name another file "
            "with --output"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return target


def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


@cache
def _text(folder: str, name: str) -> str:
    """A file of the package, which must not hold what would end the element it is put in."""
    text = (files("trivium.report") / folder / name).read_text(encoding="utf-8")
    assert name == "page.html" or not re.search("</(script|style)|<!--", text), name
    return text.removesuffix("\n")
