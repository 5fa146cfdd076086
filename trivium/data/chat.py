"""Text to tokens and back: chat templates, where responses begin and end, where characters fall.

A prompt's tokens are those that a rollout will see, so a response in the data is tokenized as the
continuation of exactly these. A response that is complete ends in a token that ends generation,
once. Plain text is used as it is; messages are rendered by the tokenizer's own chat template.
Reading files and choosing columns is for the loaders.
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
"""A response: its text, or messages that begin and end with the assistant's."""

_PROBE = "probe"
_ANCHORS = ("\n", ":", "a")


# --- tokens to text -------------------------------------------------------------------------------


@dataclass
class _Pieces:
    """What each token adds to a text, remembered, and a token to stand before the first."""

    before: list[int]
    before_text: str
    of: dict[int, str] = field(default_factory=dict)


_PIECES: WeakKeyDictionary[PreTrainedTokenizerBase, _Pieces] = WeakKeyDictionary()


def _pieces(tokenizer: PreTrainedTokenizerBase) -> _Pieces:
    if tokenizer not in _PIECES:
        before = encode(tokenizer, "a")[-1:]
        _PIECES[tokenizer] = _Pieces(before, _decode(tokenizer, before))
    return _PIECES[tokenizer]


def _decode(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], keep_special: bool = False
) -> str:
    text = tokenizer.decode(
        list(tokens), skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False
    )
    return text if isinstance(text, str) else "".join(text)


def decode_response(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the text that the tokens add to a prompt: no special tokens, every space kept.

    A tokenizer of the sentencepiece kind drops the space that begins a text, but a response does
    not begin one, so it is decoded behind another token.
    """
    pieces = _pieces(tokenizer)
    text = _decode(tokenizer, [*pieces.before, *tokens])
    if text.startswith(pieces.before_text):
        return text[len(pieces.before_text) :]
    return _decode(tokenizer, tokens)


def token_pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """Return what each token adds to a text; a special token as it is written."""
    pieces = [decode_response(tokenizer, [token]) for token in tokens]
    return [
        piece or _decode(tokenizer, [token], keep_special=True)
        for token, piece in zip(tokens, pieces, strict=True)
    ]


def step_ends(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], char_ends: Sequence[int]
) -> list[int]:
    """Return the index of the token with which the text before each character end is complete.

    The text is `decode_response`'s, and an end is exclusive, as in a span. A character of several
    tokens is complete with its last. Raises ValueError for an end outside [1, len(text)].
    """
    text = decode_response(tokenizer, tokens)
    for end in char_ends:
        if not 1 <= end <= len(text):
            raise ValueError(f"a step ends at character {end} of a text of {len(text)}")
    known = _pieces(tokenizer).of
    for token in set(tokens) - known.keys():
        known[token] = decode_response(tokenizer, [token])
    if "".join(known[token] for token in tokens) == text:
        token_ends = list(accumulate(len(known[token]) for token in tokens))
        return [bisect_left(token_ends, end) for end in char_ends]

    def completes(index: int, end: int) -> bool:
        return decode_response(tokenizer, tokens[: index + 1])[:end] == text[:end]

    indices = range(len(tokens))
    return [
        bisect_left(indices, True, key=lambda i, end=end: completes(i, end)) for end in char_ends
    ]


# --- text to tokens -------------------------------------------------------------------------------


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the text's tokens, without any that the tokenizer would add around them."""
    checked_text(text, "the text to be tokenized")
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer puts before a text, such as its BOS."""
    bare = encode(tokenizer, "a")
    whole = tokenizer.encode("a", verbose=False)
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:at]


def end_tokens(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> frozenset[int]:
    """Return the tokens that end a response.

    They are the tokenizer's EOS, the generation configuration's (one or several), and the special
    token with which the chat template ends the assistant's turn.
    """
    named = None if generation_config is None else generation_config.eos_token_id
    several = named if isinstance(named, list | tuple) else [named]
    found = [tokenizer.eos_token_id, *several, _turn_end(tokenizer)]
    return frozenset(token for token in found if token is not None)


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that follows the content of a rendered assistant turn, if any."""
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
    """Return the messages as the chat template writes them, ready for the assistant's turn if open.

    Raises ModelError where the tokenizer has no template, DataError where it refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template, and "
            "the data holds messages; use a chat model, put the model's chat_template.jinja "
            "beside its tokenizer, or give the data as plain text (see `template`)"
        )
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=open_turn
        )
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"the chat template refuses these messages: {error}") from None
    return str(text)


def checked_messages(value: Any, what: str) -> Messages:
    """Return `value` if it is a chat, without null entries; `what` names it in the DataError."""
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{what} is {shortened(value)}, not messages; write a list such as "
            '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
        )
    return [_checked_message(part, f"message {n} of {what}") for n, part in enumerate(value, 1)]


def _checked_message(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{what} is {shortened(value)}, not an object with `role` and `content`")
    message = {key: part for key, part in value.items() if part is not None}
    calls_tools = bool(message.get("tool_calls"))
    for key in ("role",) if calls_tools and "content" not in message else ("role", "content"):
        if key not in message:
            held = ", ".join(map(str, message)) or "nothing"
            raise DataError(f"{what} has no `{key}`; it has {held}. Write `role` and `content`")
        checked_text(message[key], f"`{key}` of {what}")
    return message


def shared_length(one: str, other: str) -> int:
    """Return how many characters the two texts begin with in common."""
    pairs = zip(one, other, strict=False)
    ends = (at for at, (a, b) in enumerate(pairs) if a != b)
    return next(ends, min(len(one), len(other)))


def reply_text(reply: Reply) -> str:
    """Return the response's text: of several messages, the last one's."""
    return reply if isinstance(reply, str) else str(reply[-1].get("content", ""))


@dataclass(frozen=True)
class Exchange:
    """A prompt and its complete response in tokens.

    Attributes:
        trained: for each response token, whether it was the assistant's to write.
        straddled: whether the tokenizer alone would have merged text across a border of turns, so
            that the texts were encoded one by one.
    """

    prompt: list[int]
    response: list[int]
    trained: list[bool]
    straddled: bool


class Encoder:
    """Turns prompts and responses into tokens, with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.leading = leading_tokens(tokenizer)
        self.ends = end_tokens(tokenizer)

    def prompt(self, prompt: str | Messages) -> list[int]:
        """Return the prompt's tokens: plain text behind the tokenizer's BOS, a chat as rendered."""
        if not isinstance(prompt, str):
            return encode(self.tokenizer, render(self.tokenizer, prompt, open_turn=True))
        return self._led(encode(self.tokenizer, prompt))

    def bare(self, text: str) -> list[int]:
        """Return the text's own tokens, without a BOS."""
        return encode(self.tokenizer, text)

    def exchange(self, prompt: str | Messages, response: Reply) -> Exchange:
        """Return the prompt with one response; a response to a chat is its assistant's turn."""
        if not isinstance(prompt, str):
            assistant: Messages = [{"role": "assistant", "content": response}]
            reply = assistant if isinstance(response, str) else response
            return self.dialogue([*prompt, *reply], len(prompt))
        bare = self.bare(prompt)
        tokens, straddled = self.continuation(prompt, bare, reply_text(response))
        tokens = self._ended(tokens)
        return Exchange(self._led(bare), tokens, [True] * len(tokens), straddled)

    def passage(self, text: str) -> Exchange:
        """Return plain text to be learned whole; without a BOS, its first token is the prompt."""
        tokens = self._ended(self._led(encode(self.tokenizer, text)))
        begins = max(1, len(self.leading))
        response = tokens[begins:]
        return Exchange(tokens[:begins], response, [True] * len(response), False)

    def dialogue(self, messages: Messages, first: int) -> Exchange:
        """Return a chat whose response is its messages from `first` on, the last an assistant's.

        Turns of others inside the response are there but not trained. Raises DataError where the
        template does not write a chat as the beginning of the longer chat.
        """
        turns = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        whole = render(self.tokenizer, messages)
        starts = [len(self._opening(messages[:i], whole, i)) for i in turns]
        prompt = encode(self.tokenizer, whole[: starts[0]])
        response: list[int] = []
        trained: list[bool] = []
        straddled = False
        for turn, start, stop in zip(turns, starts, [*starts[1:], len(whole)], strict=True):
            context = [*prompt, *response]
            written, crossed = self.continuation(whole[:start], context, whole[start:stop])
            straddled |= crossed
            if turn == turns[-1]:
                written = self._ended(written)
                count = len(written)
            else:
                count = self._turn_length(messages[: turn + 1], whole, start, context, written)
            response += written
            trained += [True] * count + [False] * (len(written) - count)
        return Exchange(prompt, response, trained, straddled)

    def continuation(self, head: str, tokens: Sequence[int], text: str) -> tuple[list[int], bool]:
        """Return the tokens of `text` after `head`, whose tokens are given, and whether it was cut.

        Where the tokenizer would write the two with a token across their border, which cannot
        follow the prompt that the policy sees, the text is encoded behind a neutral character.
        """
        joint = encode(self.tokenizer, head + text)
        if joint[: len(tokens)] == list(tokens):
            return joint[len(tokens) :], False
        for anchor in _ANCHORS:
            before = encode(self.tokenizer, anchor)
            behind = encode(self.tokenizer, anchor + text)
            if behind[: len(before)] == before:
                return behind[len(before) :], True
        return encode(self.tokenizer, text), True

    def _led(self, tokens: list[int]) -> list[int]:
        given = self.leading and tokens[: len(self.leading)] == self.leading
        return tokens if given else [*self.leading, *tokens]

    def _ended(self, tokens: list[int]) -> list[int]:
        """Return the tokens up to the first of their closing end tokens, or with EOS appended."""
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
                "so no response could end; set `eos_token` in its tokenizer_config.json"
            )
        return [*tokens, eos]

    def _opening(self, messages: Messages, whole: str, number: int) -> str:
        """Return the chat so far with the assistant's turn opened, which must begin `whole`."""
        opening = render(self.tokenizer, messages, open_turn=True)
        if whole.startswith(opening):
            return opening
        at = shared_length(opening, whole)
        raise DataError(
            f"the chat template does not keep a prompt as the beginning of the longer chat: before "
            f"message {number + 1} it writes …{opening[max(0, at - 20) : at + 20]!r}, and with the "
            f"rest of the chat …{whole[max(0, at - 20) : at + 20]!r}. Give single-turn data, plain "
            "text in the template's own form, or a tokenizer with a template that keeps prompts"
        )

    def _turn_length(
        self, messages: Messages, whole: str, start: int, context: list[int], written: list[int]
    ) -> int:
        """Return how many tokens of `written`, which begins at `start`, are the last message's."""
        for index, token in enumerate(written):
            if token in self.ends:
                return index + 1
        closed = render(self.tokenizer, messages)
        if not whole.startswith(closed):
            raise DataError(
                f"the chat template marks no end of message {len(messages)}, so what the assistant "
                "wrote cannot be told from what follows; give single-turn data"
            )
        return len(self.continuation(whole[:start], context, closed[start:])[0])
