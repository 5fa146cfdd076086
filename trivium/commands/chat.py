"""``trivium chat``: talk to a checkpoint in the terminal.

With a chat template the lines are a conversation; without one each line is a text to continue, and
an empty line continues it further. What a model writes is untrusted: nothing in it reaches the
terminal as a command. Tools, images and several models at once are left out.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

from torch import Tensor

from trivium.commands.chat_config import LINE, ChatConfig
from trivium.data.chat import Encoder, Messages, decode_response
from trivium.data.prompts import Prompt
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
    """Read lines and answer them until the input ends or says /quit."""
    config = config.model_copy(update={"model": config.checkpoint()})
    policy = Policy.load(config.model, temperature=config.sampling.temperature or 1.0)
    conversation = Conversation(config, policy, _write)
    interactive = sys.stdin.isatty()
    if interactive:
        logger.info("%s; /reset begins anew, /quit or Ctrl-D leaves", conversation.introduction)
    for line in _lines(interactive):
        match line.strip():
            case "/quit":
                return
            case "/reset":
                conversation.reset()
                logger.info("forgotten")
            case _:
                _answer(conversation, line, interactive)


def _answer(conversation: Conversation, line: str, interactive: bool) -> None:
    """Answer one line; Ctrl-C on a terminal cuts the answer short."""
    try:
        conversation.say(line)
    except KeyboardInterrupt:
        if not interactive:
            raise
        _write("\n")
        logger.info("stopped")


class StreamingEngine(LocalEngine):
    """Tells of the response's tokens as each is drawn."""

    def __init__(
        self, policy: Policy, end_tokens: set[int], tell: Callable[[list[int]], None]
    ) -> None:
        super().__init__(policy, end_tokens, max_rows=1)
        self._tell = tell

    def _sample_tokens(
        self, rows: list[Row], head: Head, hidden_RD: Tensor, sampling: Sampling
    ) -> None:
        super()._sample_tokens(rows, head, hidden_RD, sampling)
        for row in rows:
            self._tell(row.tokens)


class Conversation:
    """What has been said, and the model that says more."""

    def __init__(self, config: ChatConfig, policy: Policy, write: Callable[[str], None]) -> None:
        self.config, self.policy = config, policy
        self.write = write
        self.encoder = Encoder(policy.tokenizer)
        self.templated = policy.tokenizer.chat_template is not None
        self.engine = StreamingEngine(policy, set(local_engine(policy).end_tokens), self._show)
        self.turns = self.shown = 0
        self.drawn: list[int] = []
        self.reset()
        if self.templated and config.template is not None:
            raise ConfigurationError(
                "template is for models without a chat template, and this one has its own: leave "
                "it out"
            )
        if not self.templated and config.system is not None:
            raise ConfigurationError(
                "system needs a chat template, which this model lacks: write its text into "
                "template, as in template='Be brief. {line}'"
            )

    @property
    def introduction(self) -> str:
        """What a user should know before the first line."""
        path = self.config.model.path
        if self.templated:
            return f"{path}, a conversation"
        return f"{path} has no chat template: it continues each line, and again at an empty one"

    def reset(self) -> None:
        """Forget what has been said."""
        system = self.config.system
        self.messages: Messages = [{"role": "system", "content": system}] if system else []
        self.tokens: list[int] = []

    def say(self, line: str) -> None:
        """Take a line, and write the answer while it is drawn; what was written is remembered."""
        if self.templated:
            self._reply(line)
        else:
            self._continue(line)

    def _reply(self, line: str) -> None:
        if not line.strip():
            return
        said: Messages = [*self.messages, {"role": "user", "content": line}]
        try:
            self._generate(self.encoder.prompt(said))
        finally:
            if self.drawn:
                answer = decode_response(self.policy.tokenizer, self.drawn)
                self.messages = [*said, {"role": "assistant", "content": answer}]

    def _continue(self, line: str) -> None:
        if line:
            template = self.config.template or LINE
            tokens = self.encoder.prompt(template.replace(LINE, line))
        else:
            tokens = self.tokens
        if not tokens:
            logger.info("nothing to continue: type how the text begins")
            return
        try:
            self._generate(tokens)
        finally:
            ended = self.drawn[-1:] and self.drawn[-1] in self.engine.end_tokens
            self.tokens = [] if ended else [*tokens, *self.drawn]

    def _generate(self, tokens: list[int]) -> None:
        """Draw and write a response, as far as the context has room; it is in `drawn`."""
        self.drawn = []
        limit = self.policy.context_length
        room = min(self.config.sampling.max_tokens, limit - len(tokens))
        if room < 1:
            logger.warning("no room is left in the context of %d tokens: /reset begins anew", limit)
            return
        self.turns += 1
        self.shown = 0
        sampling = self.config.sampling.model_copy(update={"max_tokens": room})
        prompt = Prompt(tokens, "", {}, self.turns)
        ((answer,),) = self.engine.generate([prompt], 1, sampling, seed=self.config.seed, step=0)
        self.write(printable_text(answer.text[self.shown :]) + "\n")
        if answer.finish_reason == "length":
            logger.info("cut off after %d tokens", len(answer.tokens))

    def _show(self, tokens: list[int]) -> None:
        """Write what the last token adds, once its characters are complete."""
        self.drawn = list(tokens)
        text = decode_response(self.policy.tokenizer, tokens)
        if not text.endswith("\ufffd"):
            self.write(printable_text(text[self.shown :]))
            self.shown = len(text)


def printable_text(text: str) -> str:
    """Return text with whatever could steer a terminal written out, as in \\x1b; lines are kept."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _lines(interactive: bool) -> Iterator[str]:
    """Yield the input's lines; Ctrl-C at the prompt of a terminal drops what was typed."""
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() its editing and history
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
            logger.info("Ctrl-D or /quit leaves")
