"""The reward ``server`` over real loopback connections, with working and faulty servers."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from trivium.data.prompts import Prompt
from trivium.data.response import Response
from trivium.errors import ConfigurationError, RewardError
from trivium.rewards import server
from trivium.rewards.functions import time_left
from trivium.rewards.reward import RewardConfig, Rewards
from trivium.rewards.server import retry_after

Answer = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    """Replies to each request with the next entry of the server's script; the last repeats."""

    server: ScriptedServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((body, dict(self.headers)))
            script = self.server.script
            answer = script.pop(0) if len(script) > 1 else script[0]
        try:
            answer(self, body)
        except OSError:
            self.close_connection = True

    def reply(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""


class ScriptedServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.script: list[Answer] = [reply_lengths]
        self.requests: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.open = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score"


def rewards_of(values: Callable[[dict[str, Any]], Any]) -> Answer:
    return lambda handler, body: handler.reply(200, json.dumps({"rewards": values(body)}).encode())


def reply_with(status: int, content: bytes = b"no", **headers: str) -> Answer:
    return lambda handler, body: handler.reply(status, content, **headers)


reply_lengths = rewards_of(lambda body: [float(len(r)) for r in body["responses"]])


def hang(handler: Handler, body: dict[str, Any]) -> None:
    handler.server.open.wait(60)


def drop(handler: Handler, body: dict[str, Any]) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def send_part(handler: Handler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"rewards": [1')
    drop(handler, body)


def trickle(handler: Handler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    while not handler.server.open.wait(0.02):
        handler.wfile.write(b" ")


def flood(handler: Handler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    while not handler.server.open.is_set():
        handler.wfile.write(b"[" * 65536)


@pytest.fixture
def scripted_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    server = ScriptedServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.open.set()
    server.shutdown()
    server.server_close()
    thread.join()


TEXTS = ["a", "bb", "ccc", "dddd", "eeeee"]


def reward(
    url: str, *, limit: float | None = 20.0, fallback: float | None = None, **arguments: Any
) -> Rewards:
    all_arguments = {"url": url, "backoff": 0.01, **arguments}
    config = RewardConfig(
        function="server", arguments=all_arguments, timeout=limit, fallback=fallback
    )
    return Rewards([config])


def score(rewards: Rewards, **columns: list[Any]):
    prompts = [
        Prompt(tokens=[1], text="p", columns={k: v[i] for k, v in columns.items()}, index=10 + i)
        for i in range(5)
    ]
    responses = [Response(tokens=[1], logprobs=[0.0], finish_reason="eos", text=t) for t in TEXTS]
    return rewards.score(prompts, responses)


# --- A working server ----------------------------------------------------------------------------


def test_this_machine_is_reached_without_the_proxy_of_the_environment(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    port = scripted_server.server_address[1]
    for host in ("127.0.0.1", "localhost"):
        scores = reward(f"http://{host}:{port}/score", retries=0)
        assert score(scores).outcomes == [1.0, 2.0, 3.0, 4.0, 5.0]
    with pytest.raises(RewardError):  # any other address goes to the proxy, which is not there
        score(reward(f"http://127.0.0.1.example.invalid:{port}/score", retries=0))


def test_values_keep_the_order_of_responses_for_any_batch_size(
    scripted_server: ScriptedServer,
) -> None:
    for batch_size in (1, 2, 32):
        for concurrency in (1, 3):
            scores = reward(scripted_server.url, batch_size=batch_size, concurrency=concurrency)
            assert score(scores).outcomes == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert len(scripted_server.requests) == 2 * (5 + 3 + 1)


def test_request_holds_prompts_responses_and_the_selected_columns(
    scripted_server: ScriptedServer,
) -> None:
    columns = {"answer": list("vwxyz"), "notes": [[1], {}, None, 2.5, "ä\ud800"]}
    score(reward(scripted_server.url, batch_size=3, concurrency=1), **columns)
    score(reward(scripted_server.url, send=["answer"]), **columns)
    bodies = [body for body, _ in scripted_server.requests]
    assert bodies[1] == {
        "prompts": ["p", "p"], "responses": TEXTS[3:], "answer": ["y", "z"],
        "notes": [2.5, "ä\ud800"],
    }  # fmt: skip
    assert set(bodies[2]) == {"prompts", "responses", "answer"}


def test_steps_are_scored_like_those_of_a_function(scripted_server: ScriptedServer) -> None:
    scripted_server.script = [rewards_of(lambda b: [[[[0, len(r)], 0.5]] for r in b["responses"]])]
    assert score(reward(scripted_server.url)).steps == [[(n, 0.5)] for n in range(1, 6)]


def test_secret_comes_from_the_environment_and_appears_nowhere_else(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_AUTHORIZATION", "Bearer s3cret")
    rewards = reward(
        scripted_server.url, headers_from_env={"Authorization": "REWARD_AUTHORIZATION"}
    )
    score(rewards)
    assert scripted_server.requests[0][1]["Authorization"] == "Bearer s3cret"
    scripted_server.script = [reply_with(403)]
    with pytest.raises(RewardError) as error:
        score(rewards)
    assert "s3cret" not in str(error.value)


def test_requests_run_in_parallel_up_to_concurrency(scripted_server: ScriptedServer) -> None:
    busy, most = 0, 0
    both = threading.Event()

    def slow(handler: Handler, body: dict[str, Any]) -> None:
        nonlocal busy, most
        with scripted_server.lock:
            busy += 1
            most = max(most, busy)
        if busy == 2:
            both.set()
        both.wait(20)  # the first request is answered once a second one is there
        with scripted_server.lock:
            busy -= 1
        reply_lengths(handler, body)

    scripted_server.script = [slow]
    score(reward(scripted_server.url, batch_size=1, concurrency=2))
    assert both.is_set() and most == 2


# --- A faulty server -----------------------------------------------------------------------------

FAULTS: dict[str, tuple[Answer, str]] = {
    "500": (reply_with(500, b"boom \x1b[31m"), "replied 500 Internal Server Error: 'boom \\\\x1b"),
    "429": (reply_with(429, Retry_After="0"), "replied 429"),
    "502": (reply_with(502), "replied 502"),
    "drops": (drop, "closed the connection or cannot be reached"),
    "part of a reply": (send_part, "closed the connection or cannot be reached"),
    "hangs": (hang, r"did not reply within 1 s"),
    "trickles": (trickle, r"did not reply within 1 s"),
    "garbage": (reply_with(200, b"<html>"), "replied with invalid JSON: '<html>'"),
    "deep garbage": (reply_with(200, b"[" * 200000), "replied with invalid JSON"),
    "no text": (reply_with(200, b"\xff\xfe{"), "replied with invalid JSON"),
    "nothing": (reply_with(200, b""), "replied with invalid JSON: ''"),
}


SLOW = ("hangs", "trickles")


@pytest.mark.parametrize("fault", FAULTS)
def test_temporary_fault_is_retried_and_a_lasting_one_is_an_error(
    scripted_server: ScriptedServer, fault: str
) -> None:
    answer, reason = FAULTS[fault]
    scripted_server.script = [answer, answer, reply_lengths]
    rewards = reward(scripted_server.url, timeout=1.0 if fault in SLOW else 10.0, retries=2)
    assert score(rewards).outcomes == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert len(scripted_server.requests) == 3
    scripted_server.script = [answer]
    with pytest.raises(RewardError, match=reason) as error:
        score(rewards)
    message = str(error.value)
    assert "'server'" in message and f"{scripted_server.url} " in message
    assert "(after 3 attempts)" in message and "fallback" in message
    assert "\x1b" not in message
    assert len(scripted_server.requests) == 6, "single responses are not scored again"


PERMANENT_FAULTS: dict[str, tuple[Answer, str]] = {
    "404": (reply_with(404, b"no such page"), "replied 404 Not Found: 'no such page'"),
    "redirect": (
        reply_with(307, Location="http://elsewhere.example/steal"),
        "redirects to 'http://elsewhere.example/steal': redirects are not followed",
    ),
    "wrong count": (rewards_of(lambda b: [1.0]), "replied with 1 rewards for 5 responses"),
    "a list": (reply_with(200, b"[1, 2, 3, 4, 5]"), 'without a list "rewards"'),
    "no list": (rewards_of(lambda b: 1.0), 'without a list "rewards"'),
    "flood": (flood, "sent more than 393216 bytes"),
}


@pytest.mark.parametrize("fault", PERMANENT_FAULTS)
def test_permanent_fault_is_not_retried(scripted_server: ScriptedServer, fault: str) -> None:
    answer, reason = PERMANENT_FAULTS[fault]
    scripted_server.script = [answer]
    with pytest.raises(RewardError) as error:
        score(reward(scripted_server.url))
    assert reason in str(error.value)
    assert len(scripted_server.requests) == 1


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", '"1.0"', "[1]", "{}"])
def test_error_of_an_invalid_value_names_its_response(
    scripted_server: ScriptedServer, value: str
) -> None:
    scripted_server.script = [reply_with(200, f'{{"rewards": [1, 2, {value}, 4, 5]}}'.encode())]
    with pytest.raises(RewardError, match=r"response 2 of 5 \(prompt row 12\), 'ccc': "):
        score(reward(scripted_server.url))
    scores = score(reward(scripted_server.url, fallback=-1.0))
    assert (scores.outcomes, scores.fallbacks) == ([1.0, 2.0, -1.0, 4.0, 5.0], {"server": 1})


def test_null_of_a_server_says_that_the_reward_does_not_apply(
    scripted_server: ScriptedServer,
) -> None:
    scripted_server.script = [reply_with(200, b'{"rewards": [1, 2, null, 4, 5]}')] * 2
    with pytest.raises(RewardError, match=r"response 2 of 5 \(prompt row 12\): every reward"):
        score(reward(scripted_server.url, fallback=-1.0))
    server = RewardConfig(function="server", arguments={"url": scripted_server.url})
    length = RewardConfig(function="length", arguments={"limit": 9, "buffer": 3})
    assert score(Rewards([server, length])).outcomes == [1.0, 2.0, 0.0, 4.0, 5.0]


def test_fallback_applies_only_to_the_failed_batch(scripted_server: ScriptedServer) -> None:
    def picky(handler: Handler, body: dict[str, Any]) -> None:
        (reply_with(500) if "ccc" in body["responses"] else reply_lengths)(handler, body)

    scripted_server.script = [picky]
    rewards = reward(scripted_server.url, batch_size=2, retries=1, fallback=-1.0)
    scores = score(rewards)
    assert scores.outcomes == [1.0, 2.0, -1.0, -1.0, 5.0]
    assert scores.fallbacks == {"server": 2}
    with pytest.raises(RewardError, match=r"response 2 of 5 .* \(1 more failed\)"):
        score(reward(scripted_server.url, batch_size=2, retries=0))


def test_error_reports_that_nothing_listens(scripted_server: ScriptedServer) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RewardError, match="cannot be reached: ConnectError"):
        score(reward(f"http://127.0.0.1:{port}/", retries=1))


# --- Time ----------------------------------------------------------------------------------------


def test_waits_double_and_retry_after_is_respected(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_server.script = [
        reply_with(503),
        reply_with(503),
        reply_with(429, Retry_After="100"),
        reply_lengths,
    ]
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(server, "asyncio", SimpleNamespace(**(vars(asyncio) | {"sleep": sleep})))
    score(reward(scripted_server.url, backoff=8.0, limit=1000.0))
    first, second, third = waits
    # Each wait is drawn between half of its bound and its bound, which doubles.
    assert 4.0 <= first <= 8.0 and 8.0 <= second <= 16.0 and third >= 100.0
    assert len(scripted_server.requests) == 4


def test_retry_after_beyond_the_timeout_ends_the_retries(scripted_server: ScriptedServer) -> None:
    scripted_server.script = [reply_with(429, Retry_After="600")]
    with pytest.raises(RewardError, match=r"a retry in 600 s would exceed .*'timeout'"):
        score(reward(scripted_server.url, limit=60.0))
    assert len(scripted_server.requests) == 1


def test_replies_within_the_rewards_timeout_count(scripted_server: ScriptedServer) -> None:
    def hang_for_one(handler: Handler, body: dict[str, Any]) -> None:
        (hang if "dddd" in body["responses"] else reply_lengths)(handler, body)

    scripted_server.script = [hang_for_one]
    rewards = reward(scripted_server.url, limit=4.0, fallback=0.0, batch_size=1, concurrency=1)
    scores = score(rewards)
    # The last request waits behind the hanging one until the timeout.
    assert scores.outcomes == [1.0, 2.0, 3.0, 0.0, 0.0]
    scripted_server.script = [hang]
    # How much of the limit is left to the request depends on how soon it was sent.
    with pytest.raises(RewardError, match=r"did not reply within \S+ s.*'timeout' has expired"):
        score(reward(scripted_server.url, limit=1.5))


def test_requests_time_out_without_a_timeout_of_the_reward(scripted_server: ScriptedServer) -> None:
    scripted_server.script = [hang]
    with pytest.raises(RewardError, match=r"did not reply within 0\.1 s \(after 2 attempts\)"):
        score(reward(scripted_server.url, limit=None, timeout=0.1, retries=1))
    assert time_left() is None


def test_retry_after_is_parsed_as_seconds_or_date() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=3000), usegmt=True)
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=30), usegmt=True)
    assert 2000 <= (retry_after(soon) or 0) <= 3000
    assert [retry_after(x) for x in (None, "7", past, "soon", "-3")] == [None, 7.0, 0.0, None, None]


# --- Settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"url": "ftp://host/x"}, "write http://host:port/path"),
        ({"url": "file:///etc/passwd"}, "write http://host:port/path"),
        ({"url": "host/x"}, "write http://host:port/path"),
        ({"url": "http://host:99999/"}, "write http://host:port/path"),
        ({"url": 5}, "write http://host:port/path"),
        ({"url": "http://ho st/"}, "write http://host:port/path"),
        ({"url": "https://me@host/"}, "which would be saved with the configuration"),
        ({"timeout": 0}, "timeout must be a number above 0, not 0"),
        ({"retries": -1}, "retries must be a number of at least 0, not -1"),
        ({"retries": 1.5}, "retries must be a whole number, not 1.5"),
        ({"backoff": "1"}, "backoff must be a number of at least 0, not '1'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"concurrency": True}, "concurrency must be a whole number of at least 1, not True"),
        ({"headers_from_env": {"X-Key": "NOT_SET_ANYWHERE"}}, "'NOT_SET_ANYWHERE'"),
        ({"headers_from_env": "KEY"}, "write {Header: ENVIRONMENT_VARIABLE}"),
        ({"headers_from_env": {"X Key\n": "HOME"}}, "cannot be sent"),
    ],
)
def test_invalid_settings_are_refused_before_any_request(
    arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigurationError) as error:
        reward(**{"url": "http://127.0.0.1:1/", **arguments})
    assert reason in str(error.value)
    assert "secret" not in str(error.value)


def test_url_is_required() -> None:
    with pytest.raises(ConfigurationError, match="it needs 'url'"):
        Rewards([RewardConfig(function="server")])


def test_columns_that_cannot_be_sent_are_named_before_any_request(
    scripted_server: ScriptedServer,
) -> None:
    columns = {"bytes": [b"x"] * 5, "answer": list("vwxyz")}
    with pytest.raises(RewardError, match=r"bytes is not JSON serializable.*send"):
        score(reward(scripted_server.url), **columns)
    with pytest.raises(RewardError, match=r"'send' names the column 'answr'"):
        score(reward(scripted_server.url, send=["answr"]), **columns)
    assert not scripted_server.requests
    assert score(reward(scripted_server.url, send=["answer"]), **columns).outcomes[0] == 1.0
