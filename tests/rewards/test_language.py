"""The language reward: which words count, and which of them are in the language's scripts."""

from __future__ import annotations

import pytest

from trivium.errors import ConfigurationError
from trivium.rewards.language import SCRIPTS, language
from trivium.rewards.reward import RewardConfig, Rewards


@pytest.mark.parametrize(
    ("text", "code", "value"),
    [
        ("We add both numbers.", "en", 1.0),
        ("We add 两 个 numbers.", "en", 3 / 5),
        ("我们 use 这个方法", "zh", 6 / 7),
        ("カードを使う", "ja", 1.0),
        ("漢字 and かな", "ja", 4 / 5),
        ("漢字 and かな", "zh", 2 / 5),
        ("그는 세 개를 got", "ko", 2 / 3),
        ("Привет, мир: hello", "ru", 2 / 3),
        ("Добар dan", "sr", 1.0),
        ("Ça m'étonne, naïve", "fr", 1.0),
        ("e\u0301te\u0301 zéro", "fr", 1.0),
        ("αβγ and text", "en", 2 / 3),
        ("hеllo world", "en", 1 / 2),  # the е is Cyrillic
    ],
)
def test_value_is_the_share_of_words_in_the_scripts_of_the_language(
    text: str, code: str, value: float
) -> None:
    assert language([text], code) == [pytest.approx(value, abs=1e-12)]


@pytest.mark.parametrize(
    "left_out",
    [
        "$x^2 + бета$",
        r"\(привет\)",
        r"\[ a \text{мир} \]",
        r"\frac",
        "`переменная = 1`",
        "```\nкод()\n```",
        "$$\nслово\n$$",
        "https://пример.рф/путь",
        "<think>",
        "x",
        "α",
        "я",
        "42 + 7 = 49%",
    ],
)
def test_formulas_code_urls_tags_and_single_letters_do_not_count(left_out: str) -> None:
    assert language([f"one {left_out} два"], "en") == [0.5]


def test_text_without_words_has_the_value_0() -> None:
    assert language(["", "42", "$x$", "x + y"], "en") == [0.0] * 4


def test_only_the_text_of_the_tag_counts() -> None:
    text = "<think>one два</think><answer>three четыре пять</answer>"
    assert language([text, text.replace("</think>", ""), ""], "en", tag="think") == [0.5, 0, 0]


def test_delimiters_without_an_end_take_nothing_away() -> None:
    assert language(["one $ два", "one ``` два", r"one \[ два"], "en") == [0.5] * 3


def test_every_language_names_scripts_that_unicode_has() -> None:
    for code in SCRIPTS:
        assert language(["42"], code) == [0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"language": "english"}, "must be one of af, am, .*not 'english'"),
        ({"language": "en", "tag": ""}, "tag must be a name"),
        ({}, "it needs 'language': set it in 'arguments'"),
    ],
)
def test_arguments_are_checked_before_a_run(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Rewards([RewardConfig(function="language", arguments=arguments)])
