"""Text to tokens and back: tokens of texts, ends of responses, and tokens of characters.

Prompts with responses are in ``encoder``, chats as text in ``template``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from trivium.data.messages import checked_text
from trivium.data.template import render
from trivium.errors import DataError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

_PROBE = "probe"


# --- tokens to text -------------------------------------------------------------------------------


@dataclass
class _TokenTexts:
    """Cache of the text that each token adds, and a token to decode before it."""

    prefix: list[int]
    prefix_text: str
    text_of: dict[int, str] = field(default_factory=dict)


_TOKEN_TEXTS: WeakKeyDictionary[PreTrainedTokenizerBase, _TokenTexts] = WeakKeyDictionary()


def _token_texts(tokenizer: PreTrainedTokenizerBase) -> _TokenTexts:
    if tokenizer not in _TOKEN_TEXTS:
        prefix = encode(tokenizer, "a")[-1:]
        _TOKEN_TEXTS[tokenizer] = _TokenTexts(prefix, decode(tokenizer, prefix))
    return _TOKEN_TEXTS[tokenizer]


def decode(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], keep_special: bool = False
) -> str:
    """Return the text of the tokens, with all spaces."""
    text = tokenizer.decode(
        list(tokens), skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False
    )
    return text if isinstance(text, str) else "".join(text)


def decode_response(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], keep_special: bool = False
) -> str:
    """Return the text that the tokens add to a prompt, with all spaces.

    Special tokens are left out, or written by name with `keep_special`.

    A sentencepiece tokenizer drops the space at the beginning of a text. A response is not the
    beginning of its text, so another token is decoded before it.
    """
    known = _token_texts(tokenizer)
    text = decode(tokenizer, [*known.prefix, *tokens], keep_special)
    if text.startswith(known.prefix_text):
        return text[len(known.prefix_text) :]
    return decode(tokenizer, tokens, keep_special)


def token_pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """Return the text that each token adds; for a special token, its name."""
    pieces = [decode_response(tokenizer, [token]) for token in tokens]
    return [
        piece or decode(tokenizer, [token], keep_special=True)
        for token, piece in zip(tokens, pieces, strict=True)
    ]


def step_ends(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], char_ends: Sequence[int]
) -> list[int]:
    """Return, for each character end, the index of the token that completes the text before it.

    The text is that of `decode_response`. An end is exclusive, as in a span. The last token of a
    character completes it. Raises ValueError for an end outside [1, len(text)].
    """
    text = decode_response(tokenizer, tokens)
    for end in char_ends:
        if not 1 <= end <= len(text):
            raise ValueError(f"a step ends at character {end} of a text of {len(text)} characters")
    text_of = _token_texts(tokenizer).text_of
    for token in set(tokens) - text_of.keys():
        text_of[token] = decode_response(tokenizer, [token])
    if "".join(text_of[token] for token in tokens) == text:
        token_ends = list(accumulate(len(text_of[token]) for token in tokens))
        return [bisect_left(token_ends, end) for end in char_ends]

    def is_complete(index: int, end: int) -> bool:
        return decode_response(tokenizer, tokens[: index + 1])[:end] == text[:end]

    indices = range(len(tokens))
    return [
        bisect_left(indices, True, key=lambda i, end=end: is_complete(i, end)) for end in char_ends
    ]


# --- text to tokens -------------------------------------------------------------------------------


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the text's tokens, without special tokens before or after them.

    Raises DataError for a text with a special token that the model has no embedding for.
    """
    checked_text(text, "the text to be tokenized")
    tokens = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    known = _EMBEDDED.get(tokenizer)
    if known is not None and tokens and max(tokens) >= known:
        name = tokenizer.convert_ids_to_tokens(max(tokens))
        raise DataError(
            f"the text holds {name}, token {max(tokens)} of the tokenizer, and the model has "
            f"embeddings for {known}: take it out of the text, or resize the model's embeddings"
        )
    return tokens


_EMBEDDED: WeakKeyDictionary[PreTrainedTokenizerBase, int] = WeakKeyDictionary()


def limit_tokens(tokenizer: PreTrainedTokenizerBase, known: int) -> None:
    """Make ``encode`` refuse tokens from ``known`` on, for which the model has no embeddings."""
    _EMBEDDED[tokenizer] = known


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer adds before a text, such as its BOS."""
    plain = encode(tokenizer, "a")
    full = tokenizer.encode("a", verbose=False)
    count = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return full[:count]


def end_tokens(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> frozenset[int]:
    """Return the tokens that end a response.

    They are the EOS of the tokenizer, the EOS (one or several) of the generation configuration,
    and the special token with which the chat template ends an assistant turn.
    """
    configured = None if generation_config is None else generation_config.eos_token_id
    eos_tokens = configured if isinstance(configured, list | tuple) else [configured]
    candidates = [tokenizer.eos_token_id, *eos_tokens, turn_end(tokenizer)]
    return frozenset(token for token in candidates if token is not None)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token after the content of a rendered assistant turn, or None."""
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        _, found, tail = render(tokenizer, turns).rpartition(_PROBE)
    except DataError:
        return None
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    for token in encode(tokenizer, tail) if found else []:
        if token in special:
            return token
        if decode(tokenizer, [token]).strip():
            return None
    return None


def common_prefix_length(one: str, other: str) -> int:
    """Return the number of characters in the longest common prefix of two texts."""
    pairs = zip(one, other, strict=False)
    differences = (index for index, (a, b) in enumerate(pairs) if a != b)
    return next(differences, min(len(one), len(other)))
