"""Self-contained HTML pages: scripts, style and data in one text.

This module builds every page; other modules provide the data, and ``templates/`` draws it. The data
is JSON in a script element that does not run. A content security policy in the page allows only
scripts with the listed hashes, and no requests.
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
from trivium.runs.files import write_bytes
from trivium.runs.store import json_line

_VENDORED = ("d3.min.js", "plot.min.js")
_SHARED = ("common.js", "refresh.js", "chart.js")
_MARKUP = re.compile("[<>&\u2028\u2029]")


def render_page(
    title: str, data: Mapping[str, Any], scripts: Sequence[str], *, live: bool = False
) -> str:
    """Return a page as one HTML text.

    Args:
        title: title of the window; can be any text.
        data: data for the scripts; its strings are untrusted. Numbers that are not finite become
            the strings "NaN", "Infinity" and "-Infinity".
        scripts: file names in ``templates/``. They run in this order, after the vendored scripts
            and common.js, refresh.js and chart.js. The last script calls ``start``.
        live: whether the page requests newer data from its own server.
    """
    sources = [_package_file("assets", name) for name in _VENDORED]
    sources += [_package_file("templates", name) for name in (*_SHARED, *scripts)]
    return Template(_package_file("templates", "page.html")).substitute(
        policy=html.escape(security_policy(sources, live=live)),
        title=html.escape(printable(title)),
        style=_package_file("templates", "style.css"),
        live="live" if live else "still",
        data=encode(data),
        scripts="\n".join(f"<script>{source}</script>" for source in sources),
    )


def encode(data: Mapping[str, Any]) -> str:
    """Return strict JSON that is safe inside a script element: no character can end the element."""
    return _MARKUP.sub(lambda match: f"\\u{ord(match[0]):04x}", json_line(data))


def clip(text: str, max_bytes: int) -> str:
    """Return the longest prefix of a text that takes at most ``max_bytes`` bytes in a page."""

    def size(length: int) -> int:
        return len(encode({"": text[:length]}).encode()) - len(encode({"": ""}))

    lengths = range(min(len(text), max_bytes) + 1)
    return text[: bisect_right(lengths, max_bytes, key=size) - 1]


def security_policy(sources: Sequence[str], *, live: bool) -> str:
    """Return the Content-Security-Policy of a page that allows exactly these inline scripts."""
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


def require_new_output(output: Path | None, overwrite: bool) -> None:
    """Raise a ConfigurationError if ``output`` exists and ``overwrite`` is False."""
    if output is not None and output.exists() and not overwrite:
        raise ConfigurationError(
            f"--output {output}: the file exists already; name another file, or add --overwrite to "
            "replace it"
        )


def write_page(target: Path, text: str) -> Path:
    """Write a page atomically.

    Raises:
        TrainingError: the file cannot be written.
    """
    try:
        write_bytes(target, text.encode())
    except OSError as error:
        raise TrainingError(
            f"{target}: cannot write the report: {error.strerror}; name another file with --output"
        ) from None
    return target


def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


@cache
def _package_file(folder: str, name: str) -> str:
    """Return the text of a package file, which must not contain the end of its HTML element."""
    text = (files("trivium.report") / folder / name).read_text(encoding="utf-8")
    assert name == "page.html" or not re.search("</(script|style)|<!--", text), name
    return text.removesuffix("\n")
