"""The report of a run that goes on, served live on loopback.

Two addresses and nothing else: ``/`` is the page, ``/data.json`` what it shows. No part of a
request ever becomes a path. A request must name this machine as its host, so that no web page
can read a run through a name that points here. Left out: encryption, and other machines.
"""

from __future__ import annotations

import json
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from trivium.errors import ConfigurationError, TriviumError
from trivium.report.page import encode
from trivium.report.run import collect, page

_FILES = ("run.json", "config.yaml", "metrics.jsonl", "evaluation.jsonl", "samples.jsonl")
_FILES += ("events.jsonl",)
_HTML = "text/html; charset=utf-8"
_JSON = "application/json; charset=utf-8"
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Watch(ThreadingHTTPServer):
    """Serves the report of the run at ``run`` on 127.0.0.1; port 0 takes a free one.

    Raises DataError if the directory is no run, ConfigurationError if the port is taken.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, run: Path, port: int = 0) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._seen: tuple[str, dict[str, Any]] = self._collect()
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise ConfigurationError(
                f"--port {port}: cannot be used: {error.strerror}; name another, or 0 for a free "
                "one"
            ) from None

    @property
    def address(self) -> str:
        """Where the page is found."""
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that left in the middle of an answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def hosts(self) -> set[str]:
        """The hosts that a request may name."""
        names = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}
        return names | ({"127.0.0.1", "localhost"} if self.server_port == 80 else set())

    def current(self) -> tuple[str, dict[str, Any]]:
        """What the run's files say now, and a mark that changes when they do."""
        with self._lock:
            if self._mark() != self._seen[0]:
                self._seen = self._collect()
            return self._seen

    def _collect(self) -> tuple[str, dict[str, Any]]:
        mark = self._mark()
        return mark, collect(self._run)

    def _mark(self) -> str:
        found = []
        for name in _FILES:
            try:
                status = (self._run / name).stat()
            except OSError:
                continue
            found.append(f"{status.st_size:x}.{status.st_mtime_ns:x}")
        return f'"{"-".join(found)}"'


class _Handler(BaseHTTPRequestHandler):
    server: Watch
    server_version = "trivium"
    sys_version = ""
    timeout = 30

    def do_GET(self) -> None:
        if self.headers.get("Host", "").lower() not in self.server.hosts():
            self._answer(HTTPStatus.FORBIDDEN, "this page is served to this machine only\n")
        elif self.path in ("/", "/data.json"):
            self._show()
        else:
            self._answer(HTTPStatus.NOT_FOUND, "there is / and /data.json\n")

    def __getattr__(self, name: str) -> Any:
        # http.server looks up do_<METHOD>; every method but GET is refused in one way.
        if name.startswith("do_"):
            return self._refuse
        raise AttributeError(name)

    def _refuse(self) -> None:
        self._answer(HTTPStatus.METHOD_NOT_ALLOWED, "GET only\n", {"Allow": "GET"})

    def _show(self) -> None:
        try:
            mark, data = self.server.current()
        except TriviumError as error:
            text = json.dumps({"error": str(error)})
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, text, {"Content-Type": _JSON})
            return
        if self.path == "/":
            self._answer(HTTPStatus.OK, page(data, live=True), {"Content-Type": _HTML})
        elif self.headers.get("If-None-Match") == mark:
            self._answer(HTTPStatus.NOT_MODIFIED, "", {"ETag": mark})
        else:
            self._answer(HTTPStatus.OK, encode(data), {"Content-Type": _JSON, "ETag": mark})

    def _answer(self, status: HTTPStatus, text: str, headers: dict[str, str] | None = None) -> None:
        body = text.encode()
        self.send_response(status)
        own = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body))}
        for name, value in (_HEADERS | own | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: a request's text is untrusted, and the terminal is the user's."""


def watch(run: Path, port: int = 0) -> None:
    """Serve the report of the run at ``run`` live, until Ctrl-C; prints where."""
    with Watch(run, port) as server:
        try:
            print(f"{server.address} shows {run}; Ctrl-C ends it", flush=True)
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print()
