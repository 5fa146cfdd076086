"""A reward server over real loopback connections, well-behaved and not."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import pytest

from trivium.data.prompts import Prompt
from trivium.errors import ConfigurationError, RewardError
from trivium.rewards.functions import time_left
from trivium.rewards.reward import RewardConfig, Rewards
from trivium.rewards.server import retry_after
from trivium.rollout.engine import Response

Answer = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    """Answers as the server's script says, request by request; its last entry repeats."""

    server: Scripted
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((body, dict(self.headers), time.monotonic()))
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
        """Tests print nothing."""


class Scripted(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.script: list[Answer] = [lengths]
        self.requests: list[tuple[dict[str, Any], dict[str, str], float]] = []
        self.open = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score"


def rewards_of(values: Callable[[dict[str, Any]], Any]) -> Answer:
    return lambda handler, body: handler.reply(200, json.dumps({"rewards": values(body)}).encode())


def saying(status: int, content: bytes = b"no", **headers: str) -> Answer:
    return lambda handler, body: handler.reply(status, content, **headers)


lengths = rewards_of(lambda body: [float(len(r)) for r in body["responses"]])


def hang(handler: Handler, body: dict[str, Any]) -> None:
    handler.server.open.wait(5)


def drop(handler: Handler, body: dict[str, Any]) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def break_off(handler: Handler, body: dict[str, Any]) -> None:
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
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    server = Scripted()
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
    given = {"url": url, "backoff": 0.01, **arguments}
    config = RewardConfig(function="server", arguments=given, timeout=limit, fallback=fallback)
    return Rewards([config])


def score(rewards: Rewards, **columns: list[Any]):
    prompts = [
        Prompt(tokens=[1], text="p", columns={k: v[i] for k, v in columns.items()}, index=10 + i)
        for i in range(5)
    ]
    responses = [Response(tokens=[1], logprobs=[0.0], finish_reason="eos", text=t) for t in TEXTS]
    return rewards.score(prompts, responses)


# --- A server that works -------------------------------------------------------------------------


def test_values_come_in_the_order_of_responses_whatever_the_batches(scripted: Scripted) -> None:
    for batch_size in (1, 2, 32):
        for concurrency in (1, 3):
            found = reward(scripted.url, batch_size=batch_size, concurrency=concurrency)
            assert score(found).outcomes == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert len(scripted.requests) == 2 * (5 + 3 + 1)


def test_request_holds_prompts_responses_and_the_chosen_columns(scripted: Scripted) -> None:
    columns = {"answer": list("vwxyz"), "notes": [[1], {}, None, 2.5, "ä\ud800"]}
    score(reward(scripted.url, batch_size=3, concurrency=1), **columns)
    score(reward(scripted.url, send=["answer"]), **columns)
    bodies = [body for body, _, _ in scripted.requests]
    assert bodies[1] == {
        "prompts": ["p", "p"], "responses": TEXTS[3:], "answer": ["y", "z"],
        "notes": [2.5, "ä\ud800"],
    }  # fmt: skip
    assert set(bodies[2]) == {"prompts", "responses", "answer"}


def test_steps_are_read_like_those_of_a_function(scripted: Scripted) -> None:
    scripted.script = [rewards_of(lambda b: [[[[0, len(r)], 0.5]] for r in b["responses"]])]
    assert score(reward(scripted.url)).steps == [[(n, 0.5)] for n in range(1, 6)]


def test_secret_comes_from_the_environment_and_stands_nowhere_else(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_AUTHORIZATION", "Bearer s3cret")
    rewards = reward(scripted.url, headers_from_env={"Authorization": "REWARD_AUTHORIZATION"})
    score(rewards)
    assert scripted.requests[0][1]["Authorization"] == "Bearer s3cret"
    scripted.script = [saying(403)]
    with pytest.raises(RewardError) as error:
        score(rewards)
    assert "s3cret" not in str(error.value)


def test_requests_run_side_by_side_up_to_the_limit(scripted: Scripted) -> None:
    busy, most = 0, 0

    def slow(handler: Handler, body: dict[str, Any]) -> None:
        nonlocal busy, most
        with scripted.lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.05)
        with scripted.lock:
            busy -= 1
        lengths(handler, body)

    scripted.script = [slow]
    score(reward(scripted.url, batch_size=1, concurrency=2))
    assert most == 2


# --- One that does not ---------------------------------------------------------------------------

FAULTS: dict[str, tuple[Answer, str]] = {
    "500": (saying(500, b"boom \x1b[31m"), "answered 500 Internal Server Error: 'boom \\\\x1b"),
    "429": (saying(429, Retry_After="0"), "answered 429"),
    "502": (saying(502), "answered 502"),
    "drops": (drop, "broke off or cannot be reached"),
    "breaks off": (break_off, "broke off or cannot be reached"),
    "hangs": (hang, r"did not answer within 0\.3 s"),
    "trickles": (trickle, r"did not answer within 0\.3 s"),
    "garbage": (saying(200, b"<html>"), "answered what is no JSON: '<html>'"),
    "deep garbage": (saying(200, b"[" * 200000), "answered what is no JSON"),
    "no text": (saying(200, b"\xff\xfe{"), "answered what is no JSON"),
    "nothing": (saying(200, b""), "answered what is no JSON: ''"),
}


SLOW = ("hangs", "trickles")


@pytest.mark.parametrize("fault", FAULTS)
def test_passing_fault_is_asked_again_and_a_lasting_one_is_an_error(
    scripted: Scripted, fault: str
) -> None:
    answer, reason = FAULTS[fault]
    scripted.script = [answer, answer, lengths]
    rewards = reward(scripted.url, timeout=0.3 if fault in SLOW else 10.0, retries=2)
    assert score(rewards).outcomes == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert len(scripted.requests) == 3
    scripted.script = [answer]
    with pytest.raises(RewardError, match=reason) as error:
        score(rewards)
    message = str(error.value)
    assert "'server'" in message and f"{scripted.url} " in message
    assert "(asked 3 times)" in message and "fallback" in message
    assert "\x1b" not in message
    assert len(scripted.requests) == 6, "no culprit is searched for, response by response"


FINAL: dict[str, tuple[Answer, str]] = {
    "404": (saying(404, b"no such page"), "answered 404 Not Found: 'no such page'"),
    "redirect": (
        saying(307, Location="http://elsewhere.example/steal"),
        "points to 'http://elsewhere.example/steal': redirects are not followed",
    ),
    "wrong count": (rewards_of(lambda b: [1.0]), "answered 1 rewards for 5 responses"),
    "a list": (saying(200, b"[1, 2, 3, 4, 5]"), 'without a list "rewards"'),
    "no list": (rewards_of(lambda b: 1.0), 'without a list "rewards"'),
    "flood": (flood, "sent more than 393216 bytes"),
}


@pytest.mark.parametrize("fault", FINAL)
def test_what_another_try_cannot_cure_is_asked_once(scripted: Scripted, fault: str) -> None:
    answer, reason = FINAL[fault]
    scripted.script = [answer]
    with pytest.raises(RewardError) as error:
        score(reward(scripted.url))
    assert reason in str(error.value)
    assert len(scripted.requests) == 1


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "null", '"1.0"', "[1]", "{}"])
def test_value_that_is_no_finite_number_names_its_response(scripted: Scripted, value: str) -> None:
    scripted.script = [saying(200, f'{{"rewards": [1, 2, {value}, 4, 5]}}'.encode())]
    with pytest.raises(RewardError, match=r"response 2 of 5 \(prompt row 12\), 'ccc': "):
        score(reward(scripted.url))
    found = score(reward(scripted.url, fallback=-1.0))
    assert (found.outcomes, found.fallbacks) == ([1.0, 2.0, -1.0, 4.0, 5.0], {"server": 1})


def test_fallback_takes_the_place_of_the_failed_batch_alone(scripted: Scripted) -> None:
    def picky(handler: Handler, body: dict[str, Any]) -> None:
        (saying(500) if "ccc" in body["responses"] else lengths)(handler, body)

    scripted.script = [picky]
    rewards = reward(scripted.url, batch_size=2, retries=1, fallback=-1.0)
    found = score(rewards)
    assert found.outcomes == [1.0, 2.0, -1.0, -1.0, 5.0]
    assert found.fallbacks == {"server": 2}
    with pytest.raises(RewardError, match=r"response 2 of 5 .* \(1 more fail as well\)"):
        score(reward(scripted.url, batch_size=2, retries=0))


def test_nobody_listening_is_said(scripted: Scripted) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RewardError, match="cannot be reached: ConnectError"):
        score(reward(f"http://127.0.0.1:{port}/", retries=1))


# --- Time ----------------------------------------------------------------------------------------


def test_waits_double_and_the_servers_wish_is_kept(scripted: Scripted) -> None:
    scripted.script = [saying(503), saying(503), saying(429, Retry_After="1"), lengths]
    score(reward(scripted.url, backoff=0.1))
    times = [at for _, _, at in scripted.requests]
    first, second, third = (after - before for before, after in pairwise(times))
    assert first >= 0.05 and second >= 0.1 and third >= 1.0


def test_wish_that_goes_past_the_rewards_limit_ends_the_asking(scripted: Scripted) -> None:
    scripted.script = [saying(429, Retry_After="600")]
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"asking again in 600 s would be past .*'timeout'"):
        score(reward(scripted.url, limit=5.0))
    assert time.monotonic() - started < 1


def test_limit_of_the_reward_keeps_what_came_in_time(scripted: Scripted) -> None:
    def slow_for_some(handler: Handler, body: dict[str, Any]) -> None:
        (hang if "dddd" in body["responses"] else lengths)(handler, body)

    scripted.script = [slow_for_some]
    rewards = reward(scripted.url, limit=1.0, fallback=0.0, batch_size=1, concurrency=1)
    found = score(rewards)
    # The last one waits behind the one that hangs, until no time is left.
    assert found.outcomes == [1.0, 2.0, 3.0, 0.0, 0.0]
    with pytest.raises(RewardError, match=r"did not answer within 0\.4.*'timeout' is spent"):
        score(reward(scripted.url, limit=0.5))


def test_without_a_limit_every_request_still_has_its_own(scripted: Scripted) -> None:
    scripted.script = [hang]
    with pytest.raises(RewardError, match=r"did not answer within 0\.1 s \(asked 2 times\)"):
        score(reward(scripted.url, limit=None, timeout=0.1, retries=1))
    assert time_left() is None


def test_retry_after_is_read_as_seconds_or_date() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=30), usegmt=True)
    assert 28 <= (retry_after(soon) or 0) <= 30
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
        ({"url": "https://me@host/"}, "would be saved with the configuration"),
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
def test_impossible_settings_are_refused_before_anything_is_asked(
    arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigurationError) as error:
        reward(**{"url": "http://127.0.0.1:1/", **arguments})
    assert reason in str(error.value)
    assert "secret" not in str(error.value)


def test_url_is_needed() -> None:
    with pytest.raises(ConfigurationError, match="it needs 'url'"):
        Rewards([RewardConfig(function="server")])


def test_columns_that_cannot_be_sent_are_named_before_the_server_is_asked(
    scripted: Scripted,
) -> None:
    columns = {"bytes": [b"x"] * 5, "answer": list("vwxyz")}
    with pytest.raises(RewardError, match=r"bytes is not JSON serializable.*send"):
        score(reward(scripted.url), **columns)
    with pytest.raises(RewardError, match=r"'send' names the column 'answr'"):
        score(reward(scripted.url, send=["answr"]), **columns)
    assert not scripted.requests
    assert score(reward(scripted.url, send=["answer"]), **columns).outcomes[0] == 1.0
