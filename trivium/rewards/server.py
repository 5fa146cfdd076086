"""The reward ``server``: responses scored by a program that answers HTTP.

    POST url   {"prompts": […], "responses": […], and a list per data column}
    answer     {"rewards": […]}     per response a number, or its steps: [[[start, end], number], …]

A server that is slow, drops connections, is overloaded or answers garbage is asked again, after a
growing wait or the one it asks for; what it cannot do is not asked twice. Batches that stay without
an answer cost their own responses only. The reward's ``timeout`` bounds everything together: a
tenth of it is kept back, so that what has been answered by then counts. What may stand in the
list of rewards is ``component``'s business. Left out: authentication beyond a header.
"""

from __future__ import annotations

import asyncio
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

_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Status codes that may be gone at the next try."""
_MOST_BYTES = 1 << 16
"""An answer may have so many bytes, and as many for each response."""
_SHARE_OF_TIME = 0.9
_JITTER = random.SystemRandom()
"""Not the random numbers that runs are repeated with."""


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
    """One value per response, as a server says.

    Args:
        url: where to POST to; http or https.
        headers_from_env: a header's name and the environment variable that holds its value, such
            as ``{Authorization: REWARD_AUTHORIZATION}``: a secret is no part of a configuration.
        send: the data's columns that the server is sent; all by default.
        timeout: seconds for one request.
        retries: how often a request is made again.
        backoff: seconds before it is, about; doubled each time.
        batch_size: responses per request.
        concurrency: requests at the same time.

    Raises:
        ValueError: an argument is impossible.
        RewardError: a column cannot be sent.
    """
    _require_numbers(timeout=timeout, retries=retries, backoff=backoff)
    for name, value in (("batch_size", batch_size), ("concurrency", concurrency)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    settings = Settings(
        _checked(url), _headers(headers_from_env), timeout, retries, backoff, concurrency
    )
    if not responses:
        return []
    rows = {"prompts": prompts, "responses": responses, **_chosen(columns, send)}
    starts = range(0, len(responses), batch_size)
    bodies = [_body({k: v[at : at + batch_size] for k, v in rows.items()}) for at in starts]
    counts = [len(responses[at : at + batch_size]) for at in starts]
    return _score(settings, list(zip(bodies, counts, strict=True)))


@dataclass(frozen=True)
class Settings:
    """How the server is asked."""

    url: str
    headers: dict[str, str]
    timeout: float
    retries: int
    backoff: float
    concurrency: int

    @property
    def place(self) -> str:
        """The address without its query, which may hold a secret."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}{parts.path}"


class Unanswered(Exception):
    """A request without a usable answer: whether to ask again, and after how many seconds."""

    def __init__(self, reason: str, *, again: bool, after: float | None = None) -> None:
        super().__init__(reason)
        self.again, self.after = again, after


# --- What is asked -------------------------------------------------------------------------------


def _require_numbers(**values: Any) -> None:
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0 or (name == "timeout" and not value):
            bound = "above 0" if name == "timeout" else "of at least 0"
            raise ValueError(f"{name} must be a number {bound}, not {value!r}")
    if not isinstance(values["retries"], int):
        raise ValueError(f"retries must be a whole number, not {values['retries']!r}")


def _checked(url: Any) -> str:
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (TypeError, ValueError, AttributeError):
        known, parts = False, urlsplit("")
    if not known or any(c.isspace() or not c.isprintable() for c in url):
        raise ValueError(f"url is {url!r}: write http://host:port/path or https://host/path")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "url holds a name or password, which would be saved with the configuration: leave it "
            "out and name an environment variable in headers_from_env"
        )
    return url


def _headers(from_env: Mapping[str, str] | None) -> dict[str, str]:
    if from_env is not None and not isinstance(from_env, Mapping):
        raise ValueError(
            f"headers_from_env is {from_env!r}: write {{Header: ENVIRONMENT_VARIABLE}}"
        )
    found = {}
    for header, variable in (from_env or {}).items():
        value = os.environ.get(str(variable))
        if not value:
            raise ValueError(
                f"headers_from_env names the environment variable {variable!r} for the header "
                f"{header!r}, and it is not set: export it before the run"
            )
        if not (value.isascii() and value.isprintable() and _is_token(str(header))):
            raise ValueError(
                f"the header {header!r} cannot be sent: its name must be letters, digits and "
                f"hyphens, and the value in {variable!r} one printable line of ASCII"
            )
        found[str(header)] = value
    return found


def _is_token(name: str) -> bool:
    return name.isascii() and name.replace("-", "").isalnum()


def _chosen(columns: Mapping[str, list[Any]], send: Sequence[str] | None) -> dict[str, list[Any]]:
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


# --- Asking --------------------------------------------------------------------------------------


async def _score(settings: Settings, batches: Sequence[tuple[bytes, int]]) -> list[Any]:
    """Values, or a RewardError in their place, of all responses, in order."""
    import httpx2  # Slow to load, and needed by few.

    left = time_left()
    deadline = math.inf if left is None else time.monotonic() + _SHARE_OF_TIME * left
    gate = asyncio.Semaphore(settings.concurrency)

    async def of_batch(body: bytes, count: int) -> list[Any]:
        async with gate:
            return await _batch(client, settings, body, count, deadline)

    headers = {
        "Content-Type": "application/json",
        "Accept": "application/json",
        "Accept-Encoding": "identity",
        "User-Agent": "trivium",
        **settings.headers,
    }
    async with httpx2.AsyncClient(headers=headers, timeout=None) as client:
        found = await asyncio.gather(*(of_batch(body, count) for body, count in batches))
    return [value for values in found for value in values]


async def _batch(
    client: httpx2.AsyncClient, settings: Settings, body: bytes, count: int, deadline: float
) -> list[Any]:
    """The values of one request's responses, asked for until they come or no try is left."""
    reason, tries = "was not asked", 0
    while tries <= settings.retries and time.monotonic() < deadline:
        tries += 1
        try:
            return _rewards(await _post(client, settings, body, count, deadline), count)
        except Unanswered as fault:
            reason = str(fault)
            if not fault.again:
                break
            wait = settings.backoff * 2 ** (tries - 1) * _JITTER.uniform(0.5, 1.0)
            wait = max(wait, fault.after or 0.0)
        if tries <= settings.retries:
            if time.monotonic() + wait >= deadline:
                reason += f" (asking again in {wait:.3g} s would be past the reward's 'timeout')"
                break
            await asyncio.sleep(wait)
    late = "" if time.monotonic() < deadline else "; the time of the reward's 'timeout' is spent"
    asked = f" (asked {tries} times)" if tries > 1 else ""
    error = RewardError(f"the server {settings.place} {reason}{asked}{late}")
    return [error] * count


async def _post(
    client: httpx2.AsyncClient, settings: Settings, body: bytes, count: int, deadline: float
) -> bytes:
    """The body of a successful answer; raises Unanswered."""
    import httpx2

    limit = min(settings.timeout, deadline - time.monotonic())
    try:
        async with asyncio.timeout(limit), client.stream("POST", settings.url, content=body) as got:
            return await _content(got, _MOST_BYTES * (1 + count))
    except TimeoutError:
        raise Unanswered(f"did not answer within {limit:.3g} s", again=True) from None
    except (httpx2.HTTPError, OSError) as error:
        words = printable(f"{type(error).__name__}: {error}").rstrip(": ")
        raise Unanswered(f"broke off or cannot be reached: {words}", again=True) from None


async def _content(answer: httpx2.Response, most: int) -> bytes:
    """An answer's body of at most so many bytes, if it is one."""
    status = f"{answer.status_code} {printable(answer.reason_phrase, 60)}".rstrip()
    if 300 <= answer.status_code < 400:
        target = answer.headers.get("location", "")[:200]
        raise Unanswered(
            f"answered {status} and points to {target!r}: redirects are not followed, since they "
            "would send data and headers elsewhere; write the final address as url",
            again=False,
        )
    content = bytearray()
    async for piece in answer.aiter_raw():
        content += piece
        if len(content) > most:
            raise Unanswered(f"sent more than {most} bytes (status {status})", again=False)
    if answer.is_success:
        return bytes(content)
    said = content[:200].decode(errors="replace")
    raise Unanswered(
        f"answered {status}: {said!r}",
        again=answer.status_code in _AGAIN,
        after=retry_after(answer.headers.get("retry-after")),
    )


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, by number or date; None where it says nothing."""
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
    """The list of rewards in an answer; what each of them is worth is judged elsewhere."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        said = content[:100].decode(errors="replace")
        raise Unanswered(f"answered what is no JSON: {said!r}", again=True) from None
    rewards = record.get("rewards") if isinstance(record, dict) else None
    if not isinstance(rewards, list):
        said = content[:100].decode(errors="replace")
        raise Unanswered(
            f'answered without a list "rewards": {said!r}; it must answer {{"rewards": [...]}}',
            again=False,
        )
    if len(rewards) != count:
        raise Unanswered(f"answered {len(rewards)} rewards for {count} responses", again=False)
    return rewards
