"""Reward ``server``: an HTTP server scores the responses.

    POST url   {"prompts": […], "responses": […], and a list per data column}
    reply      {"rewards": […]}     per response a number, or its steps: [[[start, end], number], …]

A request is retried if the server is slow, drops the connection, is overloaded or replies with
invalid JSON. The wait grows with each attempt; ``Retry-After`` can lengthen it. Other errors are
not retried. A request that fails affects only its own responses. The reward's ``timeout`` bounds
all requests together; a tenth of it is reserved, so that replies received by then count.
``component`` checks the list of rewards. The only authentication is a header.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from trivium.config.functions import printable
from trivium.errors import RewardError
from trivium.rewards.functions import time_left

if TYPE_CHECKING:
    import httpx2

_RETRYABLE_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Status codes of temporary errors."""
_BYTES_PER_RESPONSE = 1 << 16
"""Maximum bytes of a reply per response, plus the same amount once."""
_TIMEOUT_FRACTION = 0.9
_JITTER = random.SystemRandom()
"""Separate random numbers, so that retries do not affect the reproducibility of runs."""


def server(
    prompts: list[Any],
    responses: list[str],
    *,
    url: str,
    headers_from_env: Mapping[str, str] | None = None,
    send: Sequence[str] | None = None,
    timeout: float = 20.0,
    retries: int = 3,
    backoff: float = 0.5,
    batch_size: int = 32,
    concurrency: int = 4,
    **columns: list[Any],
) -> Any:
    """Return one value per response, as computed by an HTTP server.

    Args:
        url: address for POST requests; http or https.
        headers_from_env: header names and the environment variables that hold their values, such
            as ``{Authorization: REWARD_AUTHORIZATION}``; a configuration must not hold secrets.
        send: data columns to send; all by default.
        timeout: seconds for one request.
        retries: maximum number of retries of a request.
        backoff: approximate seconds before the first retry; doubled for each further retry.
        batch_size: number of responses per request.
        concurrency: maximum number of parallel requests.

    Raises:
        ValueError: if an argument is invalid.
        RewardError: if a column cannot be sent.
    """
    _require_numbers(timeout=timeout, retries=retries, backoff=backoff)
    for name, value in (("batch_size", batch_size), ("concurrency", concurrency)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    settings = Settings(
        _checked_url(url), _headers(headers_from_env), timeout, retries, backoff, concurrency
    )
    if not responses:
        return []
    rows = {"prompts": prompts, "responses": responses, **_selected_columns(columns, send)}
    starts = range(0, len(responses), batch_size)
    bodies = [_body({k: v[at : at + batch_size] for k, v in rows.items()}) for at in starts]
    counts = [len(responses[at : at + batch_size]) for at in starts]
    return _score(settings, list(zip(bodies, counts, strict=True)))


@dataclass(frozen=True)
class Settings:
    """Settings of the requests to the server."""

    url: str
    headers: dict[str, str]
    timeout: float
    retries: int
    backoff: float
    concurrency: int

    @property
    def address(self) -> str:
        """Address without its query, which may contain a secret."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}{parts.path}"


class RequestFailed(Exception):
    """A request without a valid reply; `retryable` if another attempt may succeed."""

    def __init__(
        self, reason: str, *, retryable: bool, retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(reason)
        self.retryable, self.retry_after_seconds = retryable, retry_after_seconds


# --- Arguments and request bodies ----------------------------------------------------------------


def _require_numbers(**values: Any) -> None:
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0 or (name == "timeout" and not value):
            bound = "above 0" if name == "timeout" else "of at least 0"
            raise ValueError(f"{name} must be a number {bound}, not {value!r}")
    if not isinstance(values["retries"], int):
        raise ValueError(f"retries must be a whole number, not {values['retries']!r}")


def _checked_url(url: Any) -> str:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (TypeError, ValueError, AttributeError):
        valid, parts = False, urlsplit("")
    if not valid or any(c.isspace() or not c.isprintable() for c in url):
        raise ValueError(f"url is {url!r}: write http://host:port/path or https://host/path")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "url contains a user name or password, which would be saved with the configuration: "
            "remove it and use an environment variable with headers_from_env"
        )
    return url


def _headers(from_env: Mapping[str, str] | None) -> dict[str, str]:
    if from_env is not None and not isinstance(from_env, Mapping):
        raise ValueError(
            f"headers_from_env is {from_env!r}: write {{Header: ENVIRONMENT_VARIABLE}}"
        )
    results = {}
    for header, variable in (from_env or {}).items():
        value = os.environ.get(str(variable))
        if not value:
            raise ValueError(
                f"the environment variable {variable!r}, which headers_from_env names for the "
                f"header {header!r}, is not set: export it before the run"
            )
        if not (value.isascii() and value.isprintable() and _is_token(str(header))):
            raise ValueError(
                f"the header {header!r} cannot be sent: its name must be letters, digits and "
                f"hyphens, and the value in {variable!r} one printable line of ASCII"
            )
        results[str(header)] = value
    return results


def _is_token(name: str) -> bool:
    return name.isascii() and name.replace("-", "").isalnum()


def _selected_columns(
    columns: Mapping[str, list[Any]], send: Sequence[str] | None
) -> dict[str, list[Any]]:
    if send is None:
        return dict(columns)
    missing = [name for name in send if name not in columns]
    if missing:
        raise RewardError(
            f"'send' names the column {missing[0]!r}, and the data has {sorted(columns)}"
        )
    return {name: columns[name] for name in send}


def _body(rows: Mapping[str, list[Any]]) -> bytes:
    try:
        return json.dumps(rows, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RewardError(
            f"the data's columns cannot be sent as JSON ({error}): name those that the server "
            "needs in arguments: {send: [...]}"
        ) from None


# --- Requests ------------------------------------------------------------------------------------


async def _score(settings: Settings, batches: Sequence[tuple[bytes, int]]) -> list[Any]:
    """Return the values of all responses in order; a RewardError replaces a missing value."""
    import httpx2  # Slow to import and rarely needed.

    left = time_left()
    deadline = math.inf if left is None else time.monotonic() + _TIMEOUT_FRACTION * left
    semaphore = asyncio.Semaphore(settings.concurrency)

    async def limited_request(body: bytes, count: int) -> list[Any]:
        async with semaphore:
            return await _request_batch(client, settings, body, count, deadline)

    headers = {
        "Content-Type": "application/json",
        "Accept": "application/json",
        "Accept-Encoding": "identity",
        "User-Agent": "trivium",
        **settings.headers,
    }
    mounts = _direct_mounts(settings.url)
    async with httpx2.AsyncClient(headers=headers, timeout=None, mounts=mounts) as client:
        results = await asyncio.gather(*(limited_request(body, count) for body, count in batches))
    return [value for values in results for value in values]


def _direct_mounts(url: str) -> dict[str, None]:
    """Return the pattern of addresses to reach without the environment's proxy: this machine's.

    A proxy would send a request to its own machine instead, with the data in it.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost" or host.endswith(".localhost")
    shown = f"[{host}]" if ":" in host else host
    return {f"{parts.scheme}://{shown}": None} if is_loopback else {}


async def _request_batch(
    client: httpx2.AsyncClient, settings: Settings, body: bytes, count: int, deadline: float
) -> list[Any]:
    """Return the values of one request's responses; retry until success or no attempt is left."""
    reason, attempts = "was not called", 0
    while attempts <= settings.retries and time.monotonic() < deadline:
        attempts += 1
        try:
            return _rewards(await _post(client, settings, body, count, deadline), count)
        except RequestFailed as failure:
            reason = str(failure)
            if not failure.retryable:
                break
            wait = settings.backoff * 2 ** (attempts - 1) * _JITTER.uniform(0.5, 1.0)
            wait = max(wait, failure.retry_after_seconds or 0.0)
        if attempts <= settings.retries:
            if time.monotonic() + wait >= deadline:
                reason += f" (a retry in {wait:.3g} s would exceed the reward's 'timeout')"
                break
            await asyncio.sleep(wait)
    timeout_note = "" if time.monotonic() < deadline else "; the reward's 'timeout' has expired"
    attempts_note = f" (after {attempts} attempts)" if attempts > 1 else ""
    error = RewardError(f"the server {settings.address} {reason}{attempts_note}{timeout_note}")
    return [error] * count


async def _post(
    client: httpx2.AsyncClient, settings: Settings, body: bytes, count: int, deadline: float
) -> bytes:
    """Return the body of a successful reply; raise RequestFailed otherwise."""
    import httpx2

    limit = min(settings.timeout, deadline - time.monotonic())
    try:
        async with (
            asyncio.timeout(limit),
            client.stream("POST", settings.url, content=body) as reply,
        ):
            return await _content(reply, _BYTES_PER_RESPONSE * (1 + count))
    except TimeoutError:
        raise RequestFailed(f"did not reply within {limit:.3g} s", retryable=True) from None
    except (httpx2.HTTPError, OSError) as error:
        message = printable(f"{type(error).__name__}: {error}").rstrip(": ")
        raise RequestFailed(
            f"closed the connection or cannot be reached: {message}", retryable=True
        ) from None


async def _content(reply: httpx2.Response, max_bytes: int) -> bytes:
    """Return a successful reply's body of at most `max_bytes`; raise RequestFailed otherwise."""
    status = f"{reply.status_code} {printable(reply.reason_phrase, 60)}".rstrip()
    if 300 <= reply.status_code < 400:
        target = reply.headers.get("location", "")[:200]
        raise RequestFailed(
            f"replied {status} and redirects to {target!r}: redirects are not followed, since they "
            "would send data and headers elsewhere; set url to the final address",
            retryable=False,
        )
    content = bytearray()
    async for piece in reply.aiter_raw():
        content += piece
        if len(content) > max_bytes:
            raise RequestFailed(
                f"sent more than {max_bytes} bytes (status {status})", retryable=False
            )
    if reply.is_success:
        return bytes(content)
    excerpt = content[:200].decode(errors="replace")
    raise RequestFailed(
        f"replied {status}: {excerpt!r}",
        retryable=reply.status_code in _RETRYABLE_STATUSES,
        retry_after_seconds=retry_after(reply.headers.get("retry-after")),
    )


def retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header (number or date), or None if it is invalid."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    date = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def _rewards(content: bytes, count: int) -> list[Any]:
    """Return the list of rewards in a reply; ``component`` checks its values."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        excerpt = content[:100].decode(errors="replace")
        raise RequestFailed(f"replied with invalid JSON: {excerpt!r}", retryable=True) from None
    rewards = record.get("rewards") if isinstance(record, dict) else None
    if not isinstance(rewards, list):
        excerpt = content[:100].decode(errors="replace")
        raise RequestFailed(
            f'replied without a list "rewards": {excerpt!r}; it must reply {{"rewards": [...]}}',
            retryable=False,
        )
    if len(rewards) != count:
        raise RequestFailed(
            f"replied with {len(rewards)} rewards for {count} responses", retryable=False
        )
    return rewards
