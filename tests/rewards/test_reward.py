"""Several rewards: inputs of each function, and the weighted sum."""

from __future__ import annotations

import math
from typing import Any

import pytest
from helpers.data_tokenizers import chatml_tokenizer
from helpers.rewards import (
    PROMPTS,
    RESPONSES,
    TEXTS,
    per_response,
    prompt,
    response,
    returning,
    rewards,
    score,
)

from trivium.data.chat import decode_response, encode
from trivium.data.response import FinishReason, Response
from trivium.errors import ConfigurationError, RewardError
from trivium.rewards.reward import RewardConfig, Rewards

TOKENIZER: Any = chatml_tokenizer()

# --- Sums ----------------------------------------------------------------------------------------


def test_outcomes_are_the_weighted_sum_and_components_stay_unweighted():
    combined = Rewards(
        [
            RewardConfig(function="a", weight=2.0),
            RewardConfig(function="b", weight=-0.5),
            RewardConfig(function="c", weight=0),
        ],
        functions={
            "a": returning([1.0, 0.0, 3.0, 4.0]),
            "b": returning([4.0, 2.0, 0.0, 0.0]),
            "c": returning([9.0, 9.0, 9.0, 9.0]),
        },
    )
    scores = combined.score(PROMPTS, RESPONSES)
    assert scores.outcomes == [0.0, -1.0, 6.0, 8.0]
    assert scores.components["b"] == [4.0, 2.0, 0.0, 0.0]
    assert scores.components["c"] == [9.0] * 4
    assert scores.steps is None
    assert scores.fallbacks == {"a": 0, "b": 0, "c": 0}


def test_reward_that_returns_none_counts_as_absent_for_that_response():
    combined = Rewards(
        [
            RewardConfig(function="a", weight=2.0, fallback=7.0),
            RewardConfig(function="b", weight=0.5),
            RewardConfig(function="steps", weight=3.0),
        ],
        functions={
            "a": returning([1.0, None, None, 4.0]),
            "b": returning([None, 2.0, None, 8.0]),
            "steps": returning([None, None, [((0, 2), 1.0)], []]),
        },
    )
    scores = combined.score(PROMPTS, RESPONSES)
    assert scores.outcomes == [2.0, 1.0, 0.0, 12.0]
    assert scores.steps == [[], [], [(2, 3.0)], []]
    assert scores.components["a"] == [1.0, None, None, 4.0]
    assert scores.components["steps"] == [None, None, 1.0, 0.0]
    assert scores.fallbacks == {"a": 0, "b": 0, "steps": 0}


def test_response_that_no_weighted_reward_applies_to_is_an_error_with_its_row():
    combined = Rewards(
        [RewardConfig(function="a"), RewardConfig(function="b", weight=0)],
        functions={"a": returning([1.0, None, 1.0, 1.0]), "b": returning([1.0] * 4)},
    )
    with pytest.raises(RewardError, match=r"response 1 of 4 \(prompt row 11\).*returned None"):
        combined.score(PROMPTS, RESPONSES)


# --- Special tokens ------------------------------------------------------------------------------


def special_response(text: str, finish_reason: FinishReason = "eos") -> Response:
    tokens = encode(TOKENIZER, text)
    return Response(tokens, [0.0] * len(tokens), finish_reason, decode_response(TOKENIZER, tokens))


def test_reward_that_asks_gets_special_tokens_ids_and_the_tokenizer():
    seen: dict[str, Any] = {}

    def reward(responses, raw_responses, response_ids, tokenizer):
        seen.update(texts=responses, raw=raw_responses, ids=response_ids, tokenizer=tokenizer)
        return [1.0] * len(responses)

    scorer = Rewards([RewardConfig(function="f")], functions={"f": reward}, tokenizer=TOKENIZER)
    ended = special_response("<|im_start|>4 eggs<|im_end|>")
    cut = special_response(" 4<|im_end|>", "length")
    scorer.score(PROMPTS[:2], [ended, cut])
    assert seen["texts"] == ["4 eggs", " 4"]
    assert seen["raw"] == ["<|im_start|>4 eggs", " 4<|im_end|>"]
    assert seen["ids"] == [ended.tokens, cut.tokens]
    assert seen["tokenizer"] is TOKENIZER


@pytest.mark.parametrize("name", ["raw_responses", "tokenizer"])
def test_reward_that_needs_a_tokenizer_is_an_error_without_one(name):
    reward = eval(f"lambda responses, {name}: [1.0]")
    scorer = Rewards([RewardConfig(function="f")], functions={"f": reward})
    with pytest.raises(ConfigurationError, match=f"{name!r} needs the policy's tokenizer"):
        scorer.score(PROMPTS, RESPONSES)


def test_format_reads_special_tokens_if_its_argument_says_so():
    thought = special_response("<|im_start|>4 eggs<|im_end|>")
    for special, value in ((False, 0.0), (True, 1.0)):
        arguments = {"pattern": r"<\|im_start\|>4.*", "special_tokens": special}
        config = RewardConfig(function="format", arguments=arguments)
        assert Rewards([config], tokenizer=TOKENIZER).score(PROMPTS[:1], [thought]).outcomes == [
            value
        ]


@pytest.mark.parametrize(
    ("text", "finish_reason", "parameters", "warnings"),
    [
        ("<|im_start|>4<|im_end|>", "eos", "responses", 1),
        ("4<|im_end|>", "eos", "responses", 0),
        ("4<|im_end|>", "length", "responses", 1),
        ("<|im_start|>4<|im_end|>", "eos", "responses, raw_responses", 0),
        ("<|im_start|>4<|im_end|>", "eos", "response_tokens", 0),
    ],
)
def test_special_tokens_that_a_reward_does_not_see_are_a_warning_once(
    caplog, text, finish_reason, parameters, warnings
):
    function = eval(f"lambda {parameters}: [1.0]")
    scorer = Rewards([RewardConfig(function="f")], functions={"f": function}, tokenizer=TOKENIZER)
    for _ in range(2):
        scorer.score(PROMPTS[:1], [special_response(text, finish_reason)])
    told = [r.getMessage() for r in caplog.records if "special tokens" in r.getMessage()]
    assert len(told) == warnings
    assert all("(f)" in message and repr("4") in message for message in told)


def test_process_rewards_with_the_same_step_end_are_added():
    combined = Rewards(
        [RewardConfig(function="a", weight=2.0), RewardConfig(function="b", weight=10.0)],
        functions={
            "a": returning([[((0, 2), 1.0), ((2, 4), 0.5)], [], [], []]),
            "b": returning([[((0, 1), 1.0), ((2, 4), 0.25)], [], [((1, 3), 2)], []]),
        },
    )
    scores = combined.score(PROMPTS, RESPONSES)
    assert scores.steps == [[(1, 10.0), (2, 2.0), (4, 3.5)], [], [(3, 20.0)], []]
    assert scores.outcomes == [0.0] * 4
    assert scores.components == {"a": [0.75, 0, 0, 0], "b": [0.625, 0, 2.0, 0]}


def test_outcome_and_process_rewards_stay_separate():
    combined = Rewards(
        [RewardConfig(function="a"), RewardConfig(function="b")],
        functions={"a": returning([1.0] * 4), "b": returning([[((0, 4), 0.5)]] * 4)},
    )
    scores = combined.score(PROMPTS, RESPONSES)
    assert scores.outcomes == [1.0] * 4
    assert scores.steps == [[(4, 0.5)]] * 4


def test_rewards_are_not_called_without_responses():
    empty = rewards(lambda responses: [1 / 0]).score([], [])
    assert (empty.outcomes, empty.steps, empty.components) == ([], None, {"f0": []})


def test_overflow_of_the_weighted_sum_is_an_error():
    with pytest.raises(RewardError, match=r"response 1: the weighted sum .* not finite"):
        score(per_response([0, 1e308, 0, 0]), weight=10.0)


def test_prompts_and_responses_must_have_the_same_length():
    with pytest.raises(ValueError, match="3 prompts for 4 responses"):
        rewards(returning([1.0])).score(PROMPTS[:3], RESPONSES)


# --- Inputs of a function ------------------------------------------------------------------------


def test_function_receives_only_the_inputs_that_it_names():
    received = {}

    def reward(responses, answer, finish_reasons, scale=1.0, hint="none"):
        received.update(
            responses=responses,
            answer=answer,
            finish_reasons=finish_reasons,
            scale=scale,
            hint=hint,
        )
        return [0.0] * len(responses)

    scorer = rewards(reward, arguments={"scale": 3.0})
    scorer.score(
        [prompt(answer="x", other=1)] * 2, [response("a"), response("b", finish_reason="length")]
    )
    assert received == {
        "responses": ["a", "b"],
        "answer": ["x", "x"],
        "finish_reasons": ["eos", "length"],
        "scale": 3.0,
        "hint": "none",
    }


def test_var_keywords_receive_prompts_responses_and_every_column():
    received = {}

    def reward(**keywords):
        received.update(keywords)
        return [0.0] * 2

    messages = [{"role": "user", "content": "hi"}]
    prompts = [prompt(text=messages, a=1), prompt(text="plain", a=2, responses="hidden")]
    rewards(reward, arguments={"b": 5}).score(prompts, [response("x"), response("y")])
    assert received == {
        "prompts": [messages, "plain"],
        "responses": ["x", "y"],
        "a": [1, 2],
        "b": 5,
    }


def test_function_that_names_tokens_receives_them():
    def reward(prompt_tokens, response_tokens):
        return [
            float(len(p) + 10 * len(r)) for p, r in zip(prompt_tokens, response_tokens, strict=True)
        ]

    assert rewards(reward).score([prompt()], [response("a", (4, 5))]).outcomes == [21.0]


def test_columns_can_be_renamed():
    scorer = rewards(lambda responses, answer: answer, columns={"answer": "truth"})
    assert scorer.score([prompt(truth=4.0)], [response("a")]).outcomes == [4.0]


def test_missing_column_of_a_row_is_none():
    scorer = rewards(lambda responses, bonus: [b or 0 for b in bonus])
    assert scorer.score([prompt(bonus=2), prompt()], RESPONSES[:2]).outcomes == [2.0, 0.0]


def test_check_lists_every_missing_column_and_the_available_ones():
    scorer = rewards(lambda responses, answr: [], lambda responses, level: [])
    with pytest.raises(ConfigurationError) as caught:
        scorer.check(["answer", "question"])
    first, second = str(caught.value).splitlines()
    assert "'answr'" in first and "did you mean 'answer'?" in first
    assert "'answer', 'question'" in first
    assert "'level'" in second
    rewards(lambda responses, answer, other=1: []).check({"answer"})


def test_missing_column_is_an_error_when_scoring():
    with pytest.raises(ConfigurationError, match="data column 'answer'"):
        score(lambda responses, answer: [])


# --- Configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"timeout": 0.0}, {"weight": math.nan}, {"fallback": math.inf}, {"name": ""}, {"extra": 1}],
    ids=str,
)
def test_invalid_settings_are_refused(settings):
    with pytest.raises(ValueError):
        RewardConfig(function="f", **settings)


def test_names_must_be_unique_and_at_least_one_reward_is_needed():
    two = [RewardConfig(function="f"), RewardConfig(function="f", name="g")]
    functions = {"f": returning([])}
    assert Rewards(two, functions=functions).names == ["f", "g"]
    with pytest.raises(ConfigurationError, match="2 rewards are called 'f'"):
        Rewards([two[0], two[0]], functions=functions)
    with pytest.raises(ConfigurationError, match="there is no reward"):
        Rewards([])


def test_scoring_while_sampling_and_whole_batch_exclude_each_other():
    with pytest.raises(ValueError, match="whole_batch asks for one call"):
        RewardConfig(function="f", while_sampling=True, whole_batch=True)
    assert not RewardConfig(function="math", whole_batch=True).overlaps_sampling


# --- Shares of a batch ---------------------------------------------------------------------------


def in_shares(scorer, columns=()):
    """Return the checked values of the first three and of the last response, put together."""
    halves = [
        scorer.check_values(PROMPTS[a:b], RESPONSES[a:b], columns) for a, b in ((0, 3), (3, 4))
    ]
    return {name: halves[0][name] + halves[1][name] for name in halves[0] if name in halves[1]}


@pytest.mark.parametrize(
    ("values", "settings"),
    [
        ([1.0, 2.0, 3.0, 4.0], {}),
        ([1.0, 2.0, ValueError("bad"), 4.0], {"fallback": 0.5}),
        ([[((0, 2), 1.0)], [], [((0, 1), 2.0)], ValueError("bad")], {"fallback": 0.5}),
    ],
    ids=["values", "fallback", "steps"],
)
def test_scores_of_shares_are_those_of_the_batch(values, settings):
    """The last share of the steps has no step that would show that the reward scores steps."""
    reward = per_response(values)
    scorer = rewards(reward, **settings)
    shared = scorer.score(PROMPTS, RESPONSES, in_shares(scorer))
    whole = rewards(reward, **settings).score(PROMPTS, RESPONSES)
    assert shared == whole


def test_failure_in_one_share_names_the_response_of_the_batch():
    def fails_on_last(responses):
        if TEXTS[3] in responses:
            raise ValueError("no such text")
        return [0.0] * len(responses)

    scorer = rewards(fails_on_last)
    with pytest.raises(RewardError, match=r"response 3 of 4 \(prompt row 13\)"):
        scorer.score(PROMPTS, RESPONSES, in_shares(scorer))


def test_a_reward_of_the_whole_batch_is_left_out_of_shares():
    calls = []

    def ranked(responses):
        calls.append(len(responses))
        return [float(i) for i in range(len(responses))]

    scorer = rewards(ranked, whole_batch=True)
    assert scorer.need_whole_batch and in_shares(scorer) == {} and calls == []
    checked = scorer.check_whole_batch(PROMPTS, RESPONSES)
    assert scorer.score(PROMPTS, RESPONSES, checked).outcomes == [0.0, 1.0, 2.0, 3.0]
    assert calls == [4]
