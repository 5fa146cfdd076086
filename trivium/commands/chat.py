"""``trivium chat``: talk to a checkpoint in the terminal.

If the model has a chat template, the input lines form a conversation. Otherwise the model continues
each line as plain text, and an empty line continues the last text further. Model output is
untrusted: control characters in it never reach the terminal. Tools, images and several models at
once are not supported.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

from torch import Tensor

from trivium.commands.chat_config import LINE, ChatConfig
from trivium.data.chat import decode_response
from trivium.data.encoder import Encoder
from trivium.data.prompts import Prompt
from trivium.data.template import Messages
from trivium.errors import ConfigurationError
from trivium.models.logprobs import Head
from trivium.models.policy import Policy
from trivium.rollout.local_engine import LocalEngine, Row
from trivium.rollout.sampling import Sampling
from trivium.training.setup import local_engine

logger = logging.getLogger("trivium")

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def chat(config: ChatConfig) -> None:
    """Read lines and answer them until the input ends or a line says /quit."""
    config = config.model_copy(update={"model": config.checkpoint()})
    policy = Policy.load(config.model, temperature=config.sampling.temperature or 1.0)
    conversation = Conversation(config, policy, _write)
    interactive = sys.stdin.isatty()
    if interactive:
        logger.info("%s; /reset starts over, /quit or Ctrl-D exits", conversation.introduction)
    for line in _lines(interactive):
        match line.strip():
            case "/quit":
                return
            case "/reset":
                conversation.reset()
                logger.info("conversation reset")
            case _:
                _answer(conversation, line, interactive)


def _answer(conversation: Conversation, line: str, interactive: bool) -> None:
    """Answer one line. Ctrl-C on a terminal stops the response."""
    try:
        conversation.say(line)
    except KeyboardInterrupt:
        if not interactive:
            raise
        _write("\n")
        logger.info("stopped")


class StreamingEngine(LocalEngine):
    """Engine that calls `on_tokens` with the response's tokens after each sampled token."""

    def __init__(
        self, policy: Policy, end_tokens: set[int], on_tokens: Callable[[list[int]], None]
    ) -> None:
        super().__init__(policy, end_tokens, max_rows=1)
        self._on_tokens = on_tokens

    def _sample_tokens(
        self, rows: list[Row], head: Head, hidden_RD: Tensor, sampling: Sampling
    ) -> None:
        super()._sample_tokens(rows, head, hidden_RD, sampling)
        for row in rows:
            self._on_tokens(row.tokens)


class Conversation:
    """Conversation with a model: its messages or text so far, and the engine that continues it."""

    def __init__(self, config: ChatConfig, policy: Policy, write: Callable[[str], None]) -> None:
        self.config, self.policy = config, policy
        self.write = write
        self.encoder = Encoder(policy.tokenizer, config.template_arguments)
        self.has_chat_template = policy.tokenizer.chat_template is not None
        self.engine = StreamingEngine(policy, set(local_engine(policy).end_tokens), self._show)
        self.turns = self.shown_chars = 0
        self.response_tokens: list[int] = []
        self.reset()
        if self.has_chat_template and config.template is not None:
            raise ConfigurationError(
                "template is for models without a chat template, and this model has one: leave "
                "template out"
            )
        if not self.has_chat_template and config.system is not None:
            raise ConfigurationError(
                "system needs a chat template, and this model has none: put its text into "
                "template, as in template='Be brief. {line}'"
            )

    @property
    def introduction(self) -> str:
        """One line about the model and the mode, for the start of the conversation."""
        path = self.config.model.path
        if self.has_chat_template:
            return f"{path}: conversation"
        return (
            f"{path} has no chat template: it continues each line as text, and at an empty line "
            "the last text"
        )

    def reset(self) -> None:
        """Start over with an empty conversation."""
        system = self.config.system
        self.messages: Messages = [{"role": "system", "content": system}] if system else []
        self.tokens: list[int] = []

    def say(self, line: str) -> None:
        """Answer a line, writing the response as it is sampled. The conversation keeps both."""
        if self.has_chat_template:
            self._reply(line)
        else:
            self._continue(line)

    def _reply(self, line: str) -> None:
        if not line.strip():
            return
        messages: Messages = [*self.messages, {"role": "user", "content": line}]
        try:
            self._generate(self.encoder.prompt(messages))
        finally:
            if self.response_tokens:
                answer = decode_response(self.policy.tokenizer, self.response_tokens)
                self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _continue(self, line: str) -> None:
        if line:
            template = self.config.template or LINE
            tokens = self.encoder.prompt(template.replace(LINE, line))
        else:
            tokens = self.tokens
        if not tokens:
            logger.info("nothing to continue: type the beginning of a text")
            return
        try:
            self._generate(tokens)
        finally:
            ended = self.response_tokens[-1:] and self.response_tokens[-1] in self.engine.end_tokens
            self.tokens = [] if ended else [*tokens, *self.response_tokens]

    def _generate(self, tokens: list[int]) -> None:
        """Sample and write a response of at most the remaining context; set `response_tokens`."""
        self.response_tokens = []
        limit = self.policy.context_length
        max_tokens = min(self.config.sampling.max_tokens, limit - len(tokens))
        if max_tokens < 1:
            logger.warning("the context of %d tokens is full: /reset starts over", limit)
            return
        self.turns += 1
        self.shown_chars = 0
        sampling = self.config.sampling.model_copy(update={"max_tokens": max_tokens})
        prompt = Prompt(tokens, "", {}, self.turns)
        ((answer,),) = self.engine.generate([prompt], 1, sampling, seed=self.config.seed, step=0)
        self.write(printable_text(answer.text[self.shown_chars :]) + "\n")
        if answer.finish_reason == "length":
            logger.info("truncated after %d tokens", len(answer.tokens))

    def _show(self, tokens: list[int]) -> None:
        """Write the text that the last token adds, once its characters are complete."""
        self.response_tokens = list(tokens)
        text = decode_response(self.policy.tokenizer, tokens)
        if not text.endswith("\ufffd"):
            self.write(printable_text(text[self.shown_chars :]))
            self.shown_chars = len(text)


def printable_text(text: str) -> str:
    """Return text with terminal control characters escaped, as in \\x1b. Line breaks are kept."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _lines(interactive: bool) -> Iterator[str]:
    """Yield the input's lines. Ctrl-C at a terminal's prompt discards the typed line."""
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401 - adds line editing and history to input()
    while True:
        try:
            yield input("> " if interactive else "")
        except EOFError:
            if interactive:
                _write("\n")
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            _write("\n")
            logger.info("Ctrl-D or /quit exits")
