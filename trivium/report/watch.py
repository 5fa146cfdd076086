"""Live report of a run, served on loopback only.

The server has two addresses: ``/`` is the page and ``/data.json`` is its data. No part of a request
becomes a file path. The Host header must name this machine, so that a web page cannot read a run
through a DNS name that resolves to 127.0.0.1. There is no encryption.
"""

from __future__ import annotations

import json
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from trivium.errors import ConfigurationError, TriviumError, escaped
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
    """Server of the report of the run at ``run`` on 127.0.0.1; port 0 selects a free port.

    Raises:
        DataError: the directory is not that of a run.
        ConfigurationError: the port cannot be used.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, run: Path, port: int = 0) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._cached: tuple[str, dict[str, Any]] = self._collect()
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise ConfigurationError(
                f"--port {port}: cannot be used: {error.strerror}; name another port, or 0 for a "
                "free one"
            ) from None

    @property
    def address(self) -> str:
        """Address of the page."""
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore browsers that close the connection during a response."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def hosts(self) -> set[str]:
        """Return the allowed values of the Host header."""
        names = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}
        return names | ({"127.0.0.1", "localhost"} if self.server_port == 80 else set())

    def current(self) -> tuple[str, dict[str, Any]]:
        """Return an ETag that changes with the run's files, and the current data of the page."""
        with self._lock:
            if self._etag() != self._cached[0]:
                self._cached = self._collect()
            return self._cached

    def _collect(self) -> tuple[str, dict[str, Any]]:
        etag = self._etag()
        return etag, collect(self._run)

    def _etag(self) -> str:
        parts = []
        for name in _FILES:
            try:
                status = (self._run / name).stat()
            except OSError:
                continue
            parts.append(f"{status.st_size:x}.{status.st_mtime_ns:x}")
        return f'"{"-".join(parts)}"'


class _Handler(BaseHTTPRequestHandler):
    server: Watch  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version = "trivium"
    sys_version = ""
    timeout = 30

    def do_GET(self) -> None:
        if self.headers.get("Host", "").lower() not in self.server.hosts():
            self._answer(HTTPStatus.FORBIDDEN, "this page is available on this machine only\n")
        elif self.path in ("/", "/data.json"):
            self._show()
        else:
            self._answer(HTTPStatus.NOT_FOUND, "the server has / and /data.json only\n")

    def __getattr__(self, name: str) -> Any:
        # http.server looks up do_<METHOD>; every HTTP method except GET is refused.
        if name.startswith("do_"):
            return self._refuse
        raise AttributeError(name)

    def _refuse(self) -> None:
        self._answer(HTTPStatus.METHOD_NOT_ALLOWED, "GET only\n", {"Allow": "GET"})

    def _show(self) -> None:
        try:
            etag, data = self.server.current()
        except TriviumError as error:
            text = json.dumps({"error": str(error)})
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, text, {"Content-Type": _JSON})
            return
        if self.path == "/":
            self._answer(HTTPStatus.OK, page(data, live=True), {"Content-Type": _HTML})
        elif self.headers.get("If-None-Match") == etag:
            self._answer(HTTPStatus.NOT_MODIFIED, "", {"ETag": etag})
        else:
            self._answer(HTTPStatus.OK, encode(data), {"Content-Type": _JSON, "ETag": etag})

    def _answer(self, status: HTTPStatus, text: str, headers: dict[str, str] | None = None) -> None:
        body = text.encode()
        self.send_response(status)
        required = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body))}
        for name, value in (_HEADERS | required | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing, because the text of a request is untrusted."""


def watch(run: Path, port: int = 0) -> None:
    """Serve the live report of the run at ``run`` until Ctrl-C, and print the address."""
    with Watch(run, port) as server:
        try:
            print(f"{server.address} shows {escaped(str(run))}; press Ctrl-C to stop", flush=True)
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print()
