"""Rewards for the format of a response: a pattern, tagged parts, and a soft length limit."""

from __future__ import annotations

from collections.abc import Sequence

import regex


def format(
    responses: list[str],
    pattern: str,
    whole: bool = True,
    seconds: float = 1.0,
    special_tokens: bool = False,
    raw_responses: list[str] | None = None,
) -> list[float]:
    r"""Return 1 for each response that matches a regular expression, else 0.

    With `whole` the pattern must match the whole response, otherwise any part of it. ``.`` also
    matches line breaks. ``^`` and ``$`` match only the ends of the response, unless the pattern
    sets ``(?m)``. A match that takes longer than `seconds` on one response (catastrophic
    backtracking) raises TimeoutError; the standard library's `re` has no timeout. With
    `special_tokens` it reads `raw_responses`, the texts with special tokens.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"pattern must be a text, not {pattern!r}")
    if not isinstance(whole, bool):
        raise ValueError(f"whole must be true or false, not {whole!r}")
    texts = _texts(responses, raw_responses, special_tokens)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise ValueError(f"seconds must be a positive number, not {seconds!r}")
    try:
        compiled = regex.compile(pattern, regex.DOTALL)
    except regex.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from None
    match = compiled.fullmatch if whole else compiled.search
    scores = []
    for response in texts:
        try:
            scores.append(float(match(response, timeout=seconds) is not None))
        except TimeoutError:
            raise TimeoutError(
                f"pattern {pattern!r} takes more than {seconds:g} s on this response: write it "
                "without nested or overlapping repetitions, or set a higher `seconds`"
            ) from None
    return scores


def tags(
    responses: list[str],
    tags: Sequence[str] = ("think", "answer"),
    opened: bool = False,
    special_tokens: bool = False,
    raw_responses: list[str] | None = None,
) -> list[float]:
    """Return 1 for each response that consists of these tagged parts, in this order, else 0.

    With the default, that of DeepSeek-R1-Zero: ``<think> … </think> <answer> … </answer>``. Each
    tag occurs once, each part holds text, and there is only white space around the parts. With
    `opened`, the prompt ends with the first tag, so a response begins inside the first part. With
    `special_tokens` it reads `raw_responses`, for tags that are special tokens.
    """
    names = tags if isinstance(tags, list | tuple) else ()
    if not names or not all(isinstance(n, str) and regex.fullmatch(r"[\w-]+", n) for n in names):
        raise ValueError(f"tags must be a list of names such as [think, answer], not {tags!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"tags are {', '.join(names)}: a name occurs twice; keep one")
    if not isinstance(opened, bool):
        raise ValueError(f"opened must be true or false, not {opened!r}")
    texts = _texts(responses, raw_responses, special_tokens)
    start = f"<{names[0]}>" if opened else ""
    return [float(_has_parts(start + text, names)) for text in texts]


def _texts(
    responses: list[str], raw_responses: list[str] | None, special_tokens: bool
) -> list[str]:
    """Return the texts to read: those with special tokens if the arguments say so."""
    if not isinstance(special_tokens, bool):
        raise ValueError(f"special_tokens must be true or false, not {special_tokens!r}")
    if special_tokens and raw_responses is None and responses:
        raise ValueError("special_tokens needs raw_responses, the texts with special tokens")
    return (raw_responses or []) if special_tokens else responses


def _has_parts(text: str, names: Sequence[str]) -> bool:
    if any(text.count(tag) != 1 for name in names for tag in (f"<{name}>", f"</{name}>")):
        return False
    for name in names:
        before, _, text = text.partition(f"<{name}>")
        content, closed, text = text.partition(f"</{name}>")
        if before.strip() or not closed or not content.strip():
            return False
    return not text.strip()


def length(response_tokens: list[list[int]], limit: int, buffer: int) -> list[float]:
    """Return the soft overlong punishment of DAPO (Yu et al. 2025, eq. 13), in tokens.

    ``0`` for ``|y| ≤ limit − buffer``; ``(limit − buffer − |y|) / buffer`` up to `limit`; ``−1``
    beyond. Use it with a task reward, and set `limit` to at most the length limit of sampling.
    """
    for name, value in (("limit", limit), ("buffer", buffer)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    if buffer > limit:
        raise ValueError(f"buffer ({buffer}) must not be above limit ({limit})")
    free = limit - buffer
    return [-min(max(len(tokens) - free, 0) / buffer, 1.0) for tokens in response_tokens]
