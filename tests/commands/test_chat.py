"""`trivium chat`: memory of the conversation, output, and how it ends."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.data_tokenizers import chatml_tokenizer
from helpers.tiny_models import letters_tokenizer, scripted_lm

from trivium.cli import main
from trivium.commands import chat
from trivium.commands.chat import Conversation, printable_text
from trivium.commands.chat_config import ChatConfig
from trivium.hf.saving import save_checkpoint
from trivium.models.policy import Policy
from trivium.rollout.sampling import Sampling


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


ESCAPING = "ab\x1b["
"""Vocabulary in which a model can write the start of a terminal escape sequence."""


def scripted(directory: Path, response: str) -> str:
    """Save a checkpoint, of context 64, that answers a prompt of two letters with `response`."""
    tokenizer = letters_tokenizer(ESCAPING)
    script = [0, 0, *tokenizer.encode(response), 0]
    save_checkpoint(directory, scripted_lm(script, len(tokenizer)), tokenizer)
    return str(directory)


def talk(
    monkeypatch: pytest.MonkeyPatch, path: str, typed: str, *settings: str, status: int = 0
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert main(["chat", path, "sampling.temperature=0", *settings]) == status


def test_piped_chat_prints_only_responses_and_ends_with_its_input(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = scripted(here / "model", "abba")
    talk(monkeypatch, path, "ab\nba\n")
    out, err = capsys.readouterr()
    assert (out, err) == ("abba\nabba\n", "")
    talk(monkeypatch, path, "ab\n/quit\nab\n")
    assert capsys.readouterr().out == "abba\n"


def test_model_output_cannot_control_the_terminal(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(monkeypatch, scripted(here / "model", "a\x1b[b"), "ab\n")
    assert capsys.readouterr().out == "a\\x1b[b\n"


def test_control_and_direction_characters_are_escaped_and_text_is_kept() -> None:
    unsafe = "\x00\x07\x08\r\x1b\x7f\x9b\u202e\u2066\ufeff\U000e0041\ud800"
    written = printable_text(unsafe)
    assert written.isascii()
    assert written.isprintable()
    assert written.count("\\") == len(unsafe)
    kept = "é 日本語 a\tb\nc — 👩‍🚀 می‌خواهم"
    assert printable_text(kept) == kept


def test_empty_line_continues_the_text_and_reset_clears_it(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = scripted(here / "model", "abbabab")
    talk(monkeypatch, path, "ab\n\n\n\n/reset\n\n", "sampling.max_tokens=3")
    out, err = capsys.readouterr()
    assert out == "abb\naba\nb\n"
    assert err.splitlines() == [
        "truncated after 3 tokens",
        "truncated after 3 tokens",
        "nothing to continue: type the beginning of a text",
        "conversation reset",
        "nothing to continue: type the beginning of a text",
    ]


def test_template_makes_the_prompt_from_a_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = scripted(here / "model", "abba")
    talk(monkeypatch, path, "b\n", 'template="a{line}"')
    assert capsys.readouterr().out == "abba\n"
    talk(monkeypatch, path, "b\n", "template=a", status=2)
    assert "write {line} where" in capsys.readouterr().err
    talk(monkeypatch, path, "b\n", "system=be brief", status=2)
    assert "system needs a chat template" in capsys.readouterr().err


def test_full_context_gives_a_warning_and_responses_are_shortened_to_fit(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = scripted(here / "model", "a")
    talk(monkeypatch, path, "a" * 61 + "\n" + "a" * 64 + "\nab\n", "sampling.max_tokens=30")
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert err.splitlines() == [
        "truncated after 3 tokens",
        "warning: the context of 64 tokens is full: /reset starts over",
    ]


def test_run_directory_selects_its_final_model(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(here / "run" / "final", "ab")
    (here / "run" / "run.json").write_text("{}")
    talk(monkeypatch, str(here / "run"), "ab\n")
    assert capsys.readouterr().out == "ab\n"


class Talk:
    """Conversation with a scripted model that has a chat template, and the pieces it writes."""

    def __init__(self, directory: Path, script: list[int], **settings: Any) -> None:
        self.tokenizer = chatml_tokenizer()
        model = scripted_lm(script, len(self.tokenizer))
        config = ChatConfig.model_validate(
            {"model": {"path": str(directory)}, "sampling": {"temperature": 0}, **settings}
        )
        self.pieces: list[str] = []
        self.conversation = Conversation(config, Policy(model, self.tokenizer), self.pieces.append)


def prompt_length(messages: list[dict[str, str]]) -> int:
    tokenizer = chatml_tokenizer()
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return len(tokenizer.encode(text))


def script_of(text: str, *user_lines: str, system: str | None = None) -> list[int]:
    """Return the token script of a model that answers the first message with `text`."""
    tokenizer = chatml_tokenizer()
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": line} for line in user_lines]
    padding = [0] * prompt_length(messages)
    return [*padding, *tokenizer.encode(text), tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_conversation_keeps_both_sides(here: Path) -> None:
    talk = Talk(here, script_of("four", "two?"), system=None)
    talk.conversation.say("two?")
    assert "".join(talk.pieces) == "four\n"
    talk.conversation.say("   ")
    assert talk.conversation.messages == [
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "four"},
    ]
    prompts_seen: list[list[int]] = []
    generate = talk.conversation.engine.generate

    def spy(prompts: Any, samples: int, settings: Sampling, **rest: Any) -> Any:
        prompts_seen.extend(prompt.tokens for prompt in prompts)
        return generate(prompts, samples, settings, **rest)

    talk.conversation.engine.generate = spy  # type: ignore[method-assign]
    talk.conversation.say("and?")
    assert talk.tokenizer.decode(prompts_seen[0]) == (
        "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>\n"
        "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
    )
    talk.conversation.reset()
    assert talk.conversation.messages == []


def test_system_message_comes_first_and_survives_a_reset(here: Path) -> None:
    talk = Talk(here, script_of("four", "two?", system="be"), system="be")
    talk.conversation.say("two?")
    assert "".join(talk.pieces) == "four\n"
    talk.conversation.reset()
    assert talk.conversation.messages == [{"role": "system", "content": "be"}]


def test_character_of_several_tokens_is_streamed_at_once(here: Path) -> None:
    text = "a é日 b"
    talk = Talk(here, script_of(text, "two?"))
    assert len(talk.tokenizer.encode(text)) > len(text)
    talk.conversation.say("two?")
    assert "".join(talk.pieces) == f"{text}\n"
    assert len(talk.pieces) > 3
    assert not any("\ufffd" in piece for piece in talk.pieces)


def test_interrupted_response_is_kept_up_to_the_interruption(here: Path) -> None:
    talk = Talk(here, script_of("four eggs", "two?"))
    written: list[str] = []

    def interrupt(piece: str) -> None:
        written.append(piece)
        if "".join(written) == "four":
            raise KeyboardInterrupt

    talk.conversation.write = interrupt
    with pytest.raises(KeyboardInterrupt):
        talk.conversation.say("two?")
    assert talk.conversation.messages[-1] == {"role": "assistant", "content": "four"}


class Terminal(io.StringIO):
    """Standard input that reports to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_ctrl_c_discards_a_line_or_response_and_ctrl_d_exits(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = scripted(here / "model", "ab")
    events: list[Any] = [KeyboardInterrupt, "ab", "stop", EOFError]

    def typed(prompt: str) -> str:
        assert prompt == "> "
        event = events.pop(0)
        if isinstance(event, str):
            return event
        raise event

    say = Conversation.say

    def interrupted(self: Conversation, line: str) -> None:
        if line == "stop":
            raise KeyboardInterrupt
        say(self, line)

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(chat.Conversation, "say", interrupted)
    assert main(["chat", path, "sampling.temperature=0"]) == 0
    out, err = capsys.readouterr()
    assert "ab\n" in out
    assert "/quit or Ctrl-D exits" in err.splitlines()[0]
    assert err.splitlines()[1:] == ["Ctrl-D or /quit exits", "stopped"]
    assert events == []


def test_same_seed_gives_the_same_story(
    shared_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(shared_dir / "checkpoints" / "stories260k")
    stories = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon a time\n"))
        assert main(["chat", path, "sampling.max_tokens=40"]) == 0
        stories.append(capsys.readouterr().out)
    assert stories[0] == stories[1]
    assert len(stories[0].split()) > 15
