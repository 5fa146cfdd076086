"""Live page: allowed hosts, paths and HTTP methods, and updates while the run continues."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.browser import browser, chromium

from trivium.cli import main
from trivium.errors import ConfigurationError, DataError
from trivium.report.watch import Watch


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    (path / "run.json").write_text('{"kind": "grpo"}')
    (path / "secret.txt").write_text("secret")
    log(path, 1)
    return path


def log(run: Path, step: int) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "elapsed": float(step), "loss": 1.0 / step}) + "\n")


def add_sample(run: Path, step: int) -> None:
    row = {"step": step, "drawn": "greedy", "index": 0, "prompt": "ask", "response": "words"}
    with (run / "samples.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


@pytest.fixture
def server(run: Path) -> Iterator[Watch]:
    with Watch(run) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def request(
    server: Watch, path: str = "/", method: str = "GET", **headers: str
) -> tuple[http.client.HTTPResponse, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response, text


def test_server_listens_on_loopback_only(server: Watch) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.address == f"http://127.0.0.1:{server.server_port}/"


def test_page_may_request_its_own_server_only(server: Watch) -> None:
    response, html = request(server)
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
    assert "connect-src &#x27;self&#x27;" in html
    assert 'data-mode="live"' in html


def test_data_follows_the_run_and_unchanged_data_is_not_sent(server: Watch, run: Path) -> None:
    response, text = request(server, "/data.json")
    assert json.loads(text)["headline"]["step"] == 1
    etag = response.headers["ETag"]
    again, nothing = request(server, "/data.json", If_None_Match=etag)
    assert (again.status, nothing) == (304, "")
    log(run, 2)
    response, text = request(server, "/data.json", If_None_Match=etag)
    assert (response.status, json.loads(text)["headline"]["step"]) == (200, 2)


PATHS = "/secret.txt /run.json /../run/run.json /data.json/ /? /%2e%2e/ //etc/passwd /data.json?x=1"


@pytest.mark.parametrize("path", [*PATHS.split(), "/favicon.ico", "*"])
def test_other_paths_are_not_found(server: Watch, path: str) -> None:
    response, text = request(server, path)
    assert response.status == 404
    assert "secret" not in text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "FOO"])
def test_http_methods_other_than_get_are_refused(server: Watch, method: str) -> None:
    response, _ = request(server, "/data.json", method)
    assert (response.status, response.headers["Allow"]) == (405, "GET")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "", "[::1]"])
def test_other_host_names_are_refused(server: Watch, host: str) -> None:
    response, text = request(server, "/data.json", Host=host.format(port=server.server_port))
    assert response.status == 403
    assert "loss" not in text


@pytest.mark.parametrize("host", ["localhost:{port}", "127.0.0.1:{port}", "LOCALHOST:{port}"])
def test_names_of_this_machine_are_served(server: Watch, host: str) -> None:
    response, _ = request(server, "/data.json", Host=host.format(port=server.server_port))
    assert response.status == 200


def test_a_request_without_host_is_refused(server: Watch) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        connection.sendall(b"GET /data.json HTTP/1.0\r\n\r\n")
        assert b" 403 " in connection.recv(100)


def test_a_damaged_file_is_reported_and_the_server_continues(server: Watch, run: Path) -> None:
    original = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("{]\n")
    response, text = request(server, "/data.json")
    assert response.status == 500
    assert "metrics.jsonl:1: is damaged" in json.loads(text)["error"]
    (run / "metrics.jsonl").write_text(original)
    assert request(server, "/data.json")[0].status == 200


def test_server_writes_no_files(server: Watch, run: Path) -> None:
    before = sorted(path.name for path in run.iterdir())
    request(server)
    assert sorted(path.name for path in run.iterdir()) == before


def test_a_taken_port_and_a_missing_run_are_refused(server: Watch, run: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"--port {server.server_port}: cannot be used"):
        Watch(run, server.server_port)
    with pytest.raises(DataError, match="is not the directory of a run"):
        Watch(run / "none")


@pytest.mark.parametrize("port", ["-1", "65536", "x", "٣"])
def test_an_invalid_port_is_refused(
    run: Path, port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["watch", str(run), f"--port={port}"])
    assert "is not a port: write a number from 0 to 65535" in capsys.readouterr().err


def test_a_browser_that_disconnects_during_a_response_is_no_error(
    server: Watch, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.server_port)) as left:
            left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            left.sendall(b"GET / HTTP/1.0\r\nHost: 127.0.0.1:%d\r\n\r\n" % server.server_port)
    assert urllib.request.urlopen(server.address).status == 200
    assert capfd.readouterr().err == ""


def reset_sigint() -> None:
    """Restore the default SIGINT handler, because shells ignore SIGINT in background jobs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_stops_the_server_cleanly(run: Path) -> None:
    command = [sys.executable, "-m", "trivium", "watch", str(run)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=reset_sigint,
    )
    assert process.stdout
    assert process.stdout.readline().startswith("http://127.0.0.1:")
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=20)
    assert (process.returncode, complaints) == (0, "")


@pytest.mark.skipif(chromium() is None, reason="no Chromium is installed")
def test_live_page_updates_and_keeps_the_readers_choices(server: Watch, run: Path) -> None:
    for step in range(2, 40):
        log(run, step)
        add_sample(run, step)
    with browser() as tab:
        tab.resize(1280, 600)
        tab.open(server.address)
        tab.run("document.querySelector('[data-key=\"x:elapsed\"]').click()")
        tab.run("document.querySelector('[data-key=\"view:all\"]').click()")
        search = "document.querySelector('[data-key=search]')"
        tab.run(f"{search}.value = 'wor'; {search}.dispatchEvent(new Event('input'))")
        tab.wait(0.4)
        tab.run(f"{search}.focus({{preventScroll: true}}); {search}.setSelectionRange(1, 2)")
        tab.run("scrollTo({top: 500, behavior: 'instant'})")
        log(run, 40)
        add_sample(run, 40)
        tab.wait(3.0)
        assert "step 40" in tab.run("document.querySelector('#outcome').innerText")
        assert "39 responses" in tab.run("document.querySelector('#samples h2 + .note').innerText")
        pressed = "[...document.querySelectorAll('[aria-pressed=true]')].map(n => n.dataset.key)"
        assert tab.run(pressed) == ["x:elapsed", "view:all"]
        kept = f"[{search}.value, {search}.selectionStart, {search}.selectionEnd, "
        assert tab.run(kept + f"document.activeElement === {search}]") == ["wor", 1, 2, True]
        assert abs(tab.run("scrollY") - 500) < 40
        assert set(tab.requests) == {server.address, server.address + "data.json"}
        assert tab.messages == []
