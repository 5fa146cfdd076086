"""Text to tokens and back: chat templates, ends of responses, and tokens of characters.

A prompt has the same tokens as in a rollout, so a response in the data is tokenized as the
continuation of these tokens. A complete response ends in exactly one token that ends generation.
Plain text is used verbatim; messages are rendered by the tokenizer's own chat template. The
loaders read files and choose columns.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError

from trivium.data.messages import shortened
from trivium.data.rows import checked_text
from trivium.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
"""A chat: each message has text under `role` and `content`."""
Reply = str | Messages
"""A response: its text, or messages that begin and end with an assistant turn."""

_PROBE = "probe"
_ANCHORS = ("\n", ":", "a")
"""Characters that stand in for the end of a prompt when a text is encoded separately."""


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
        _TOKEN_TEXTS[tokenizer] = _TokenTexts(prefix, _decode(tokenizer, prefix))
    return _TOKEN_TEXTS[tokenizer]


def _decode(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], keep_special: bool = False
) -> str:
    text = tokenizer.decode(
        list(tokens), skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False
    )
    return text if isinstance(text, str) else "".join(text)


def decode_response(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the text that the tokens add to a prompt, without special tokens, with all spaces.

    A sentencepiece tokenizer drops the space at the beginning of a text. A response is not the
    beginning of its text, so another token is decoded before it.
    """
    known = _token_texts(tokenizer)
    text = _decode(tokenizer, [*known.prefix, *tokens])
    if text.startswith(known.prefix_text):
        return text[len(known.prefix_text) :]
    return _decode(tokenizer, tokens)


def token_pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """Return the text that each token adds; for a special token, its name."""
    pieces = [decode_response(tokenizer, [token]) for token in tokens]
    return [
        piece or _decode(tokenizer, [token], keep_special=True)
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
    candidates = [tokenizer.eos_token_id, *eos_tokens, _turn_end(tokenizer)]
    return frozenset(token for token in candidates if token is not None)


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
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
        if _decode(tokenizer, [token]).strip():
            return None
    return None


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, open_turn: bool = False) -> str:
    """Return the messages as text by the chat template.

    With `open_turn`, the text ends with the beginning of an assistant turn. Raises ModelError if
    the tokenizer has no template, DataError if the template rejects the messages.
    """
    if tokenizer.chat_template is None:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template, and "
            "the data contains messages; use a chat model, put the model's chat_template.jinja "
            "next to its tokenizer, or write the data as plain text (see `template`)"
        )
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=open_turn
        )
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"the chat template rejects these messages: {error}") from None
    return str(text)


def checked_messages(value: Any, label: str) -> Messages:
    """Return the messages in `value` without null entries.

    Raises DataError, which calls the value `label`, if it is not a list of messages.
    """
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{label} is {shortened(value)}, not messages; write a list such as "
            '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
        )
    return [
        _checked_message(message, f"message {number} of {label}")
        for number, message in enumerate(value, 1)
    ]


def _checked_message(value: Any, label: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{label} is {shortened(value)}, not an object with `role` and `content`")
    message = {key: entry for key, entry in value.items() if entry is not None}
    calls_tools = bool(message.get("tool_calls"))
    for key in ("role",) if calls_tools and "content" not in message else ("role", "content"):
        if key not in message:
            keys = ", ".join(map(str, message)) or "nothing"
            raise DataError(f"{label} has no `{key}`; it has {keys}. Write `role` and `content`")
        checked_text(message[key], f"`{key}` of {label}")
    return message


def common_prefix_length(one: str, other: str) -> int:
    """Return the number of characters in the longest common prefix of two texts."""
    pairs = zip(one, other, strict=False)
    differences = (index for index, (a, b) in enumerate(pairs) if a != b)
    return next(differences, min(len(one), len(other)))


def reply_text(reply: Reply) -> str:
    """Return the response's text: of several messages, that of the last."""
    return reply if isinstance(reply, str) else str(reply[-1].get("content", ""))


@dataclass(frozen=True)
class Exchange:
    """A prompt and its complete response, as tokens.

    Attributes:
        loss_mask: for each response token, whether it belongs to an assistant turn.
        encoded_separately: whether the tokenizer would have merged text across a boundary of
            turns, so that the texts were encoded one by one.
    """

    prompt: list[int]
    response: list[int]
    loss_mask: list[bool]
    encoded_separately: bool


class Encoder:
    """Encodes prompts and responses with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.leading = leading_tokens(tokenizer)
        self.ends = end_tokens(tokenizer)

    def prompt(self, prompt: str | Messages) -> list[int]:
        """Return the prompt's tokens: plain text after the BOS, or a chat with an open turn."""
        if not isinstance(prompt, str):
            return encode(self.tokenizer, render(self.tokenizer, prompt, open_turn=True))
        return self._with_leading(encode(self.tokenizer, prompt))

    def encode_plain(self, text: str) -> list[int]:
        """Return the text's tokens, without a BOS."""
        return encode(self.tokenizer, text)

    def exchange(self, prompt: str | Messages, response: Reply) -> Exchange:
        """Return the prompt with one response; a response to a chat is an assistant turn."""
        if not isinstance(prompt, str):
            assistant: Messages = [{"role": "assistant", "content": response}]
            reply = assistant if isinstance(response, str) else response
            return self.dialogue([*prompt, *reply], len(prompt))
        plain = self.encode_plain(prompt)
        tokens, encoded_separately = self.continuation(prompt, plain, reply_text(response))
        tokens = self._with_end_token(tokens)
        return Exchange(self._with_leading(plain), tokens, [True] * len(tokens), encoded_separately)

    def document(self, text: str) -> Exchange:
        """Return plain text with a loss on every token after the BOS.

        If the tokenizer adds no BOS, the first token is the prompt.
        """
        tokens = self._with_end_token(self._with_leading(encode(self.tokenizer, text)))
        prompt_length = max(1, len(self.leading))
        response = tokens[prompt_length:]
        return Exchange(tokens[:prompt_length], response, [True] * len(response), False)

    def dialogue(self, messages: Messages, first: int) -> Exchange:
        """Return a chat whose response is its messages from `first` on.

        The last message must be an assistant turn. Other turns in the response have no loss.
        Raises DataError if the rendered beginning of the chat is not a prefix of the rendered chat.
        """
        turns = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        chat = render(self.tokenizer, messages)
        starts = [len(self._turn_prefix(messages[:i], chat, i)) for i in turns]
        prompt = encode(self.tokenizer, chat[: starts[0]])
        response: list[int] = []
        loss_mask: list[bool] = []
        encoded_separately = False
        for turn, start, stop in zip(turns, starts, [*starts[1:], len(chat)], strict=True):
            context = [*prompt, *response]
            tokens, separately = self.continuation(chat[:start], context, chat[start:stop])
            encoded_separately |= separately
            if turn == turns[-1]:
                tokens = self._with_end_token(tokens)
                count = len(tokens)
            else:
                count = self._turn_length(messages[: turn + 1], chat, start, context, tokens)
            response += tokens
            loss_mask += [True] * count + [False] * (len(tokens) - count)
        return Exchange(prompt, response, loss_mask, encoded_separately)

    def continuation(self, head: str, tokens: Sequence[int], text: str) -> tuple[list[int], bool]:
        """Return the tokens of `text` after `head`, and whether it was encoded separately.

        `tokens` are those of `head`. If the tokenizer would merge characters across the boundary
        into one token, that token cannot follow the prompt that the policy sees. The text is then
        encoded after a neutral character instead of `head`.
        """
        joint = encode(self.tokenizer, head + text)
        if joint[: len(tokens)] == list(tokens):
            return joint[len(tokens) :], False
        for anchor in _ANCHORS:
            prefix = encode(self.tokenizer, anchor)
            anchored = encode(self.tokenizer, anchor + text)
            if anchored[: len(prefix)] == prefix:
                return anchored[len(prefix) :], True
        return encode(self.tokenizer, text), True

    def _with_leading(self, tokens: list[int]) -> list[int]:
        has_leading = self.leading and tokens[: len(self.leading)] == self.leading
        return tokens if has_leading else [*self.leading, *tokens]

    def _with_end_token(self, tokens: list[int]) -> list[int]:
        """Return the tokens with exactly one end token: the first of the closing ones, or EOS."""
        end = None
        for index in range(len(tokens) - 1, -1, -1):
            if tokens[index] in self.ends:
                end = index
            elif _decode(self.tokenizer, [tokens[index]], keep_special=True).strip():
                break
        if end is not None:
            return tokens[: end + 1]
        eos = self.tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise ModelError(
                f"the tokenizer of {self.tokenizer.name_or_path or 'the model'} has no EOS token, "
                "so no response would end; set `eos_token` in its tokenizer_config.json"
            )
        return [*tokens, eos]

    def _turn_prefix(self, messages: Messages, chat: str, index: int) -> str:
        """Return the rendered messages with an open assistant turn; it must be a prefix of `chat`.

        `index` is the index of the assistant's message in the whole chat.
        """
        prefix = render(self.tokenizer, messages, open_turn=True)
        if chat.startswith(prefix):
            return prefix
        at = common_prefix_length(prefix, chat)
        raise DataError(
            "the chat template does not render a prompt as a prefix of the longer chat: before "
            f"message {index + 1} it renders …{prefix[max(0, at - 20) : at + 20]!r}, and with the "
            f"rest of the chat …{chat[max(0, at - 20) : at + 20]!r}. Give single-turn data, plain "
            "text in the template's own form, or a tokenizer with a template that keeps prompts"
        )

    def _turn_length(
        self, messages: Messages, chat: str, start: int, context: list[int], tokens: list[int]
    ) -> int:
        """Return how many of `tokens`, which begin at character `start`, are the last message's."""
        for index, token in enumerate(tokens):
            if token in self.ends:
                return index + 1
        closed = render(self.tokenizer, messages)
        if not chat.startswith(closed):
            raise DataError(
                f"the chat template marks no end of message {len(messages)}, so the assistant's "
                "text cannot be separated from the next message; give single-turn data"
            )
        return len(self.continuation(chat[:start], context, closed[start:])[0])
