"""Rewards for the format of a response."""

from __future__ import annotations

import pytest

from trivium.data.prompts import Prompt
from trivium.data.response import Response
from trivium.errors import ConfigurationError, RewardError
from trivium.rewards.format import format, length, tags
from trivium.rewards.reward import RewardConfig, Rewards


def test_pattern_must_match_the_whole_response_unless_whole_is_false():
    responses = ["ab", "xab", "abx", "a\nb", ""]
    assert format(responses, "ab") == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert format(responses, "ab", whole=False) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert format(responses, "a|ab") == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_dot_matches_line_breaks_and_anchors_match_the_ends():
    assert format(["<think>\na\n</think>\n5"], "<think>.*</think>.*") == [1.0]
    assert format(["a\nb"], "^b", whole=False) == [0.0]
    assert format(["a\nb"], "(?m)^b", whole=False) == [1.0]


def test_catastrophic_backtracking_stops_and_names_the_response():
    # Without its limit, the match of 200 letters would not end.
    slow = {"pattern": "(a|aa)+", "seconds": 0.5}
    config = RewardConfig(function="format", arguments=slow)
    prompts = [Prompt(tokens=[1], text="p", columns={}, index=i) for i in range(2)]
    texts = ("aa", "a" * 200 + "b")
    responses = [Response(tokens=[1], logprobs=[0.0], finish_reason="eos", text=t) for t in texts]
    with pytest.raises(RewardError, match=r"response 1 of 2.*takes more than 0.5 s"):
        Rewards([config]).score(prompts, responses)


def test_soft_overlong_punishment_falls_linearly_over_its_buffer():
    lengths = [0, 5, 6, 7, 8, 9, 10, 11, 100]
    values = length([[0] * n for n in lengths], limit=10, buffer=4)
    assert values == [0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1]


GOOD = "<think>2+2 is 4</think>\n<answer>4</answer>\n"


@pytest.mark.parametrize(
    ("response", "value"),
    [
        (GOOD, 1.0),
        (" \n" + GOOD.replace("\n", ""), 1.0),
        (GOOD + "so 4", 0.0),
        ("Well: " + GOOD, 0.0),
        (GOOD.replace("\n", " and "), 0.0),
        ("<answer>4</answer><think>a</think>", 0.0),
        ("<think>a</think>", 0.0),
        ("<think> \n</think><answer>4</answer>", 0.0),
        (GOOD + GOOD, 0.0),
        (GOOD.replace("2+2", "<think>"), 0.0),
        (GOOD.replace("2+2", "<answer>4</answer>"), 0.0),
        ("<think>a<answer>b</think>c</answer>", 0.0),
        ("</think>a<think><answer>b</answer>", 0.0),
        ("<Think>a</Think><answer>b</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_tagged_response_is_its_parts_in_order_and_nothing_else(response: str, value: float):
    assert tags([response]) == [value]


def test_opened_tag_of_the_prompt_begins_the_response():
    responses = ["2+2</think><answer>4</answer>", GOOD, "<answer>4</answer>"]
    assert tags(responses, opened=True) == [1.0, 0.0, 0.0]
    assert tags(["<plan>a</plan> <code>b</code>", GOOD], ["plan", "code"]) == [1.0, 0.0]


def test_tags_that_are_special_tokens_are_read_from_the_raw_responses():
    stripped = ["2+2 is 4\n4\n"]
    assert tags(stripped, raw_responses=[GOOD]) == [0.0]
    assert tags(stripped, special_tokens=True, raw_responses=[GOOD]) == [1.0]
    with pytest.raises(ValueError, match="needs raw_responses"):
        tags(stripped, special_tokens=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tags": "think"}, "a list of names such as"),
        ({"tags": []}, "a list of names such as"),
        ({"tags": ["<think>"]}, "a list of names such as"),
        ({"tags": ["think", "think"]}, "occurs twice"),
        ({"opened": 1}, "true or false"),
    ],
)
def test_arguments_of_tags_are_checked_before_a_run(arguments: dict, message: str):
    with pytest.raises(ConfigurationError, match=message):
        Rewards([RewardConfig(function="tags", arguments=arguments)])
