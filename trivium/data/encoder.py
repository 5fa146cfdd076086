"""Prompts and responses as tokens.

A prompt has the same tokens as in a rollout, so a response in the data is tokenized as the
continuation of these tokens. A complete response ends in exactly one token that ends generation.
Plain text is used verbatim; messages are rendered by the tokenizer's own chat template. The
loaders read files and choose columns.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trivium.data.chat import (
    common_prefix_length,
    decode,
    encode,
    end_tokens,
    leading_tokens,
    turn_end,
)
from trivium.data.messages import shortened
from trivium.data.template import ChatTemplate, Messages, Tools, omissions
from trivium.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("trivium")

Reply = str | Messages
"""A response: its text, or messages that begin and end with an assistant turn."""

_ANCHORS = ("\n", ":", "a")
"""Characters that stand in for the end of a prompt when a text is encoded separately."""
_PROBE = "probe"
_TOLD: set[tuple[str, str]] = set()
"""Models, each with its template, whose plain prompts were reported."""
_VERBATIM = (
    "the chat template does not write the response as it is, so its text follows the opened turn "
    "without the template"
)


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
        remarks: how the tokens differ from what the messages say.
    """

    prompt: list[int]
    response: list[int]
    loss_mask: list[bool]
    encoded_separately: bool
    remarks: tuple[str, ...] = ()


class Encoder:
    """Encodes prompts and responses with one tokenizer.

    Args:
        tokenizer: tokenizer, with a chat template if there are messages.
        template_arguments: variables for the chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, template_arguments)
        self.leading = leading_tokens(tokenizer)
        self.ends = end_tokens(tokenizer)
        self._turn_end = turn_end(tokenizer)
        self._end_texts = [decode(tokenizer, [t], keep_special=True) for t in sorted(self.ends)]

    def prompt(self, prompt: str | Messages, tools: Tools | None = None) -> list[int]:
        """Return the prompt's tokens: plain text after the BOS, or a chat with an open turn."""
        return self.prompt_and_remarks(prompt, tools)[0]

    def prompt_and_remarks(
        self, prompt: str | Messages, tools: Tools | None = None
    ) -> tuple[list[int], list[str]]:
        """Return the prompt's tokens, and how they differ from what its messages say."""
        if isinstance(prompt, str):
            return self._with_leading(encode(self.tokenizer, prompt)), []
        text = self.template.render(prompt, tools=tools, open_turn=True)
        return encode(self.tokenizer, text), self._remarks(prompt, text)

    def tell_of_chat(self, prompt: str | Messages) -> None:
        """Log, once for a model, that a plain prompt does not use its chat template.

        A plain prompt in the form of a template is meant so.
        """
        model = (str(self.tokenizer.name_or_path), self.template.source)
        if not isinstance(prompt, str) or not self.template.source or model in _TOLD:
            return
        if not any(text in prompt for text in self._control_texts):
            _TOLD.add(model)
            logger.warning(
                "prompts are plain text, as %s, and the model has a chat template, which they do "
                "not use: if it is an instruct model, set `chat: true` beside the data's `path` to "
                "make each prompt a user's message",
                shortened(prompt),
            )

    @cached_property
    def _control_texts(self) -> list[str]:
        """Special tokens, and the beginning of an assistant turn in the template's form."""
        added = self.tokenizer.added_tokens_decoder.values()
        texts = [token.content for token in added if token.special]
        try:
            turn = self.template.render([{"role": "user", "content": _PROBE}], open_turn=True)
        except DataError:
            return texts
        opening = turn.rpartition(_PROBE)[2].strip()
        return [*texts, opening] if opening else texts

    def encode_plain(self, text: str) -> list[int]:
        """Return the text's tokens, without a BOS."""
        return encode(self.tokenizer, text)

    def exchange(
        self, prompt: str | Messages, response: Reply, tools: Tools | None = None
    ) -> Exchange:
        """Return the prompt with one response; a response to a chat is an assistant turn."""
        if not isinstance(prompt, str):
            if isinstance(response, str):
                return self._text_turn(prompt, response, tools)
            return self.dialogue([*prompt, *response], len(prompt), tools)
        plain = self.encode_plain(prompt)
        tokens, encoded_separately = self.continuation(prompt, plain, reply_text(response))
        tokens = self._with_end_token(tokens)
        return Exchange(self._with_leading(plain), tokens, [True] * len(tokens), encoded_separately)

    def _text_turn(self, prompt: Messages, text: str, tools: Tools | None) -> Exchange:
        """Return a chat with one assistant turn, as the template writes it.

        If the template does not write the text, or not behind the prompt of sampling, the text
        itself follows that prompt.
        """
        messages = [*prompt, {"role": "assistant", "content": text}]
        opened = self.template.render(prompt, tools=tools, open_turn=True)
        chat = self.template.render(messages, tools=tools)
        if chat.startswith(opened) and text.strip() in chat[len(opened) :]:
            return self.dialogue(messages, len(prompt), tools)
        text = text[_overlap(opened, text) :]
        head = encode(self.tokenizer, opened)
        tokens, encoded_separately = self.continuation(opened, head, text)
        tokens = self._with_end_token(tokens, self._turn_end)
        remarks = (*self._remarks(prompt, opened), _VERBATIM)
        return Exchange(head, tokens, [True] * len(tokens), encoded_separately, remarks)

    def document(self, text: str) -> Exchange:
        """Return plain text with a loss on every token after the BOS.

        If the tokenizer adds no BOS, the first token is the prompt.
        """
        tokens = self._with_end_token(self._with_leading(encode(self.tokenizer, text)))
        prompt_length = max(1, len(self.leading))
        response = tokens[prompt_length:]
        return Exchange(tokens[:prompt_length], response, [True] * len(response), False)

    def dialogue(self, messages: Messages, first: int, tools: Tools | None = None) -> Exchange:
        """Return a chat whose response is its messages from `first` on.

        The last message must be an assistant turn. Other turns in the response have no loss, nor
        have assistant turns with `weight` 0.
        Raises DataError if the rendered beginning of the chat is not a prefix of the rendered chat.
        """
        turns = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        chat = self.template.render(messages, tools=tools)
        starts = [len(self._turn_prefix(messages[:i], chat, tools)) for i in turns]
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
                turn_messages = messages[: turn + 1]
                count = self._turn_length(turn_messages, chat, start, context, tokens, tools)
            response += tokens
            has_loss = messages[turn].get("weight") != 0
            loss_mask += [has_loss] * count + [False] * (len(tokens) - count)
        remarks = tuple(self._remarks(messages, chat))
        return Exchange(prompt, response, loss_mask, encoded_separately, remarks)

    def _remarks(self, messages: Messages, text: str) -> list[str]:
        """Return how a rendered chat differs from what its messages say."""
        left_out = [
            f"the chat template leaves out or changes {part}" for part in omissions(messages, text)
        ]
        contents = [str(message.get("content", "")).rstrip() for message in messages]
        inside = [
            end
            for end in self._end_texts
            if any(end in content.removesuffix(end) for content in contents)
        ]
        return left_out + [
            f"a message contains {end}, which the tokenizer reads as the end of a response (if it "
            "is meant as text, write it in another way)"
            for end in inside
        ]

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

    def _with_end_token(self, tokens: list[int], turn_end: int | None = None) -> list[int]:
        """Return the tokens with exactly one end token: the first of the closing ones.

        Where there is none, add the end of a turn, or EOS.
        """
        end = None
        for index in range(len(tokens) - 1, -1, -1):
            if tokens[index] in self.ends:
                end = index
            elif decode(self.tokenizer, [tokens[index]], keep_special=True).strip():
                break
        if end is not None:
            return tokens[: end + 1]
        eos = self.tokenizer.eos_token_id if turn_end is None else turn_end
        if not isinstance(eos, int):
            raise ModelError(
                f"the tokenizer of {self.tokenizer.name_or_path or 'the model'} has no EOS token, "
                "so no response would end; set `eos_token` in its tokenizer_config.json"
            )
        return [*tokens, eos]

    def _turn_prefix(self, messages: Messages, chat: str, tools: Tools | None) -> str:
        """Return the rendered messages with an open assistant turn; it must be a prefix of `chat`.

        The next message of the chat is the assistant's.
        """
        prefix = self.template.render(messages, tools=tools, open_turn=True)
        if chat.startswith(prefix):
            return prefix
        number = len(messages) + 1
        at = common_prefix_length(prefix, chat)
        closed = self.template.render(messages, tools=tools)
        if prefix.startswith(closed) and chat.startswith(closed):
            raise DataError(
                f"the chat template ends an opened turn with {prefix[at:]!r}, which it does not "
                f"write in message {number}, so what would be learned does not follow the prompt "
                "of sampling. Give the turn as a `completion` in plain text, which follows the "
                "opened turn as it is, or use another template"
            )
        raise DataError(
            "the chat template does not render a prompt as a prefix of the longer chat: before "
            f"message {number} it renders …{prefix[max(0, at - 20) : at + 20]!r}, and with the "
            f"rest of the chat …{chat[max(0, at - 20) : at + 20]!r}. Give single-turn data, plain "
            "text in the template's own form, or a tokenizer with a template that keeps prompts"
        )

    def _turn_length(
        self,
        messages: Messages,
        chat: str,
        start: int,
        context: list[int],
        tokens: list[int],
        tools: Tools | None,
    ) -> int:
        """Return how many of `tokens`, which begin at character `start`, are the last message's."""
        content = str(messages[-1].get("content", ""))
        first_end = next((i for i, token in enumerate(tokens) if token in self.ends), None)
        if first_end is not None and not any(end in content for end in self._end_texts):
            return first_end + 1
        closed = self.template.render(messages, tools=tools)
        if not chat.startswith(closed):
            raise DataError(
                f"the chat template marks no end of message {len(messages)}, so the assistant's "
                "text cannot be separated from the next message; give single-turn data"
            )
        turn = self.continuation(chat[:start], context, closed[start:])[0]
        last_end = next((i for i in range(len(turn))[::-1] if turn[i] in self.ends), len(turn) - 1)
        return last_end + 1


def _overlap(head: str, text: str) -> int:
    """Return the length of the text's beginning with which `head` ends: at least two characters.

    A template that opens a turn with <think> must not be followed by a second <think>.
    """
    lengths = range(min(len(head), len(text)), 1, -1)
    return next((n for n in lengths if head.endswith(text[:n]) and len(text[:n].strip()) > 1), 0)
