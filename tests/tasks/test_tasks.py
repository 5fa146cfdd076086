"""The built-in task: problems, demonstrations, rewards, tokenizer and data files."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from trivium.data.demonstrations import DemonstrationsConfig, load_demonstrations
from trivium.data.preferences import StepLabelsConfig, load_step_labels
from trivium.data.prompts import Prompt, PromptsConfig, load_prompts
from trivium.data.response import Response
from trivium.errors import DataError
from trivium.rewards.reward import RewardConfig, Rewards
from trivium.tasks import problems as problems_module
from trivium.tasks.problems import MAXIMUM, Operation, Problem, generate
from trivium.tasks.tokenizer import small_model_config, train_tokenizer
from trivium.tasks.verifier import correct, score_steps, steps
from trivium.tasks.writer import (
    ErrorRates,
    Sizes,
    compute_without_carry,
    demonstration_rows,
    problem_rows,
    step_label_rows,
    write_demonstration,
    write_files,
)

EGGS = Problem("Max", "eggs", 31, (Operation("+", 9, "finds"), Operation("+", 6, "finds")))
PENS = Problem("Ana", "pens", 12, (Operation("-", 5, "loses"), Operation("*", 3, "triples them")))
NO_ERRORS = ErrorRates(
    careless=1.0, forgets_borrow=0.0, drops_carry=0.0, skips_clause=0.0, misreads=0.0
)
MEANS = [-3.0, -0.5, 0.0, 0.3, 0.9, 1.0]


def correct_response(problem):
    return "\n".join([*problem.steps, f"#### {problem.answer}"])


def rewards_of(response, expected=EGGS.steps):
    return [reward for _, reward in score_steps(response, expected)]


def centered_sum(response, expected, mean):
    return sum(reward - mean for reward in rewards_of(response, expected))


def error_rates(**rates):
    return ErrorRates(**{**NO_ERRORS.__dict__, **rates})


def demonstration(problem, rates):
    return write_demonstration(problem, random.Random(0), rates)


@pytest.fixture(scope="module")
def texts():
    return [row["prompt"] + row["completion"] for row in demonstration_rows(generate(5, 3000), 5)]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts)


# --- Problems ------------------------------------------------------------------------------------


def test_problem_has_the_documented_prompt_steps_and_answer():
    assert EGGS.prompt == "Max has 31 eggs, finds 9, finds 6. How many now?\n"
    assert EGGS.steps == ["31+9=40", "40+6=46"]
    assert EGGS.answer == 46
    assert PENS.prompt == "Ana has 12 pens, loses 5, triples them. How many now?\n"
    assert PENS.steps == ["12-5=7", "7*3=21"]
    assert PENS.answer == 21


def test_same_seed_gives_the_same_problems():
    assert generate(3, 200) == generate(3, 200)
    assert generate(3, 200) == generate(3, 300)[:200]
    assert generate(3, 200) != generate(4, 200)


@pytest.mark.parametrize("split", ["train", "test"])
def test_problems_are_distinct_and_in_range_with_the_requested_operations(split):
    problems = generate(1, 900, (2, 4), split)
    assert len({problem.prompt for problem in problems}) == 900
    assert {len(problem.operations) for problem in problems} == {2, 3, 4}
    results = [int(step.split("=")[1]) for problem in problems for step in problem.steps]
    assert min(results) >= 0
    assert max(results) <= MAXIMUM


def test_training_and_held_out_problems_share_no_chain_for_any_seed():
    chains = {
        split: {tuple(p.steps) for seed in range(3) for p in generate(seed, 500, (2, 2), split)}
        for split in ("train", "test")
    }
    assert len(chains["train"]) > 1000
    assert len(chains["test"]) > 300
    assert not chains["train"] & chains["test"]


def test_the_split_does_not_depend_on_names_things_or_verbs():
    for problem in generate(2, 100):
        reworded = tuple(Operation(o.symbol, o.operand, "moves") for o in problem.operations)
        assert Problem("Kim", "rocks", problem.start, reworded).split == "train"


def test_too_many_problems_or_an_empty_range_is_an_error(monkeypatch):
    monkeypatch.setattr(problems_module, "NAMES", ("Max",))
    monkeypatch.setattr(problems_module, "THINGS", ("eggs",))
    with pytest.raises(DataError, match=r"count = 9000: only \d+ different test problems"):
        generate(0, 9_000, (1, 1), "test")
    with pytest.raises(DataError, match=r"operations = \(3, 2\)"):
        generate(0, 1, (3, 2))


# --- Demonstrations ------------------------------------------------------------------------------


def test_demonstrations_without_carelessness_are_correct():
    for problem in generate(7, 300):
        assert demonstration(problem, ErrorRates(careless=0.0)) == correct_response(problem)


@pytest.mark.parametrize(
    ("value", "symbol", "operand", "result"),
    [(31, "+", 9, 30), (31, "+", 8, 39), (40, "-", 6, 44), (46, "-", 6, 40), (17, "*", 3, 31)],
)
def test_without_carry_only_the_unit_digit_is_right(value, symbol, operand, result):
    assert compute_without_carry(value, symbol, operand) == result


@pytest.mark.parametrize(
    ("problem", "mistake", "text"),
    [
        (EGGS, {"drops_carry": 1.0}, "31+9=30\n30+6=36\n#### 36"),
        (PENS, {"forgets_borrow": 1.0}, "12-5=17\n17*3=51\n#### 51"),
        (PENS, {"drops_carry": 1.0}, "12-5=7\n7*3=1\n#### 1"),
        (EGGS, {"misreads": 1.0}, "31-9=22\n22-6=16\n#### 16"),
        (PENS, {"misreads": 1.0}, "12+5=17\n17+3=20\n#### 20"),
        (EGGS, {"skips_clause": 1.0}, "31+6=37\n#### 37"),
    ],
)
def test_every_mistake_propagates_to_later_lines(problem, mistake, text):
    assert demonstration(problem, error_rates(**mistake)) == text


def test_mistakes_never_lead_out_of_range():
    problem = Problem("Leo", "cups", 12, (Operation("+", 9, "gets"), Operation("-", 14, "loses")))
    assert demonstration(problem, error_rates(drops_carry=1.0)) == "12+9=21\n21-14=7\n#### 7"
    for row in demonstration_rows(generate(8, 2000), 8):
        results = [int(line.split("=")[1]) for line in row["completion"].split("\n")[:-1]]
        assert all(0 <= result <= MAXIMUM for result in results)


def test_about_47_percent_of_demonstrations_are_correct_and_some_by_chance():
    problems = generate(11, 4000)
    rows = demonstration_rows(problems, 11)
    completions = [row["completion"] for row in rows]
    right = correct([], completions, [problem.answer for problem in problems])
    exact = [c == correct_response(p) for c, p in zip(completions, problems, strict=True)]
    # Three standard errors of a proportion of 4,000 samples are 0.024.
    assert sum(right) / 4000 == pytest.approx(0.473, abs=0.024)
    assert 0.02 < (sum(right) - sum(exact)) / 4000 < 0.08


# --- The outcome reward --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("31+9=40\n40+6=46\n#### 46", 1.0),
        ("31+9=46\n#### 46", 1.0),
        ("#### 46", 1.0),
        ("31+9=40\n40+6=46\n#### 45", 0.0),
        ("31+9=40\n40+6=46\n#### 046", 0.0),
        ("31+9=40\n40+6=46\n####46", 0.0),
        ("31+9=40\n40+6=46\n#### 46 ", 0.0),
        ("31+9=40\n40+6=46\n#### 46\n", 0.0),
        ("31+9=40\n40+6=46\n#### 46\n46", 0.0),
        ("#### 12\n#### 46", 0.0),
        ("31+9=40 #### 46", 0.0),
        ("46", 0.0),
        ("", 0.0),
    ],
)
def test_only_a_last_line_with_the_answer_is_correct(response, reward):
    assert correct(["p"] * 2, [response] * 2, [46, "46"], operations=[2, 2]) == [reward] * 2


# --- The step reward -----------------------------------------------------------------------------


def test_spans_are_lines_with_the_newline_before_them():
    assert score_steps("31+9=40\n40+6=45\n#### 45", EGGS.steps) == [
        ((0, 7), 1.0),
        ((7, 15), 0.0),
        ((15, 23), 1.0),
    ]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("31+9=40\n40+6=46\n#### 46", [1, 1, 1]),
        ("31+9=30\n30+6=36\n#### 36", [0, 1, 1]),  # a mistake costs its own step only
        ("31+9=30\n40+6=46\n#### 46", [0, 0, 1]),  # the current value was 30
        ("31+9=30\n30+6=46\n#### 46", [0, 0, 1]),  # two mistakes that cancel are two mistakes
        ("31+9=40\n40+6=46\n#### 45", [1, 1, 0]),
        ("31-9=22\n22+6=28\n#### 28", [0, 1, 1]),
        ("32+9=41\n41+6=47\n#### 47", [0, 1, 1]),
        ("31+6=37\n#### 37", [0, -1]),  # a skipped clause
        ("31+9=40\n#### 40", [1, -1]),
        ("31+9=40\n#### 46", [1, -1]),
        ("#### 46", [-2]),
        ("#### 46\n40+6=46\n#### 46", [-2]),  # no steps after a closing
        ("31+9=40\n40+6=46", [1, 0]),  # no closing
        ("31+9=40", [-1]),
        ("31+9=40\n", [1, -1]),
        ("31+9=40\n31+9=40\n40+6=46\n#### 46", [1, 0, 0]),  # repeated
        ("31+9=40\n40+6=46\n40+6=46\n#### 46", [1, 1, 0]),
        ("31+9=40\n40+6=46\n46+0=46\n#### 46", [1, 1, 0]),  # extra
        ("31+9=40\n40+6=46\n#### 46\n#### 46", [1, 1, 0]),
        ("31+9=40\n40+6=46\n#### 46\n", [1, 1, 0]),
        ("31+9=40\n\n40+6=46\n#### 46", [1, 0, 1]),
        ("\n31+9=40\n40+6=46\n#### 46", [0, 1, 1]),
        ("31+9=\n31+6=37\n#### 37", [0, 1, 1]),  # no result: the value does not change
        ("31+9=040\n40+6=46\n#### 46", [0, 1, 1]),
        (f"31+9={'9' * 5000}\n40+6=46\n#### 46", [0, 0, 1]),
        ("", []),
    ],
)
def test_step_is_correct_if_it_applies_the_operation_to_the_current_value(response, expected):
    assert rewards_of(response) == expected


PIECES = [
    "31+9=40",
    "40+6=46",
    "#### 46",
    "31+9=30",
    "30+6=36",
    "#### 36",
    "31+6=37",
    "",
    "?",
    "40",
]
RESPONSES = st.lists(st.sampled_from(PIECES), max_size=7).map("\n".join) | st.text("0149=+# \n")


@given(RESPONSES)
def test_spans_tile_the_response_and_are_at_most_one_more_than_the_operations(response):
    spans = score_steps(response, EGGS.steps)
    bounds = [0, *(end for (_, end), _ in spans)]
    assert [start for (start, _), _ in spans] == bounds[:-1]
    assert bounds[-1] == len(response)
    assert bounds == sorted(set(bounds))
    assert len(spans) <= 3


@given(RESPONSES)
def test_only_the_correct_response_has_the_maximum_reward_for_any_baseline(response):
    best = correct_response(EGGS)
    if response in (best, ""):
        return
    assert sum(rewards_of(response)) < sum(rewards_of(best)) == 3
    for mean in MEANS:
        assert centered_sum(response, EGGS.steps, mean) < centered_sum(best, EGGS.steps, mean)


def test_dropping_or_repeating_lines_never_raises_the_reward():
    for problem in generate(13, 100):
        lines = correct_response(problem).split("\n")
        degenerate = [lines[:i] + lines[i + 1 :] for i in range(len(lines))]
        degenerate += [lines[: i + 1] + lines[i:] for i in range(len(lines))]
        degenerate += [lines[:i] for i in range(1, len(lines))]
        degenerate += [lines[:i] + lines[-1:] for i in range(len(lines) - 1)]
        degenerate += [[*lines[:-1], *lines], [*lines, *lines]]
        for mean in MEANS:
            best = centered_sum(correct_response(problem), problem.steps, mean)
            for text in map("\n".join, degenerate):
                assert (
                    text == correct_response(problem)
                    or centered_sum(text, problem.steps, mean) < best
                )


@pytest.mark.parametrize("mean", MEANS)
def test_ending_early_never_beats_wrong_steps(mean):
    for problem in generate(14, 50):
        lines = problem.steps
        for i in range(len(lines)):
            wrong = "\n".join([*lines[:i], *["?"] * (len(lines) - i), "#### ?"])
            for closing in ([], ["#### 1"]):
                early = "\n".join([*lines[:i], *closing])
                if early:
                    attempted = centered_sum(wrong, problem.steps, mean)
                    assert centered_sum(early, problem.steps, mean) <= attempted + 1e-12


@pytest.mark.parametrize("expected", [["31+9"], ["31 + 9 = 40"], ["nine"], []])
def test_invalid_step_lines_are_an_error(expected):
    with pytest.raises(DataError, match="steps: "):
        steps(["p"], ["r"], [expected])


def test_both_rewards_work_as_configured_rewards():
    names = ["trivium.tasks.verifier:correct", "trivium.tasks.verifier:steps"]
    rewards = Rewards([RewardConfig(function=name) for name in names])
    columns = {"answer": "46", "steps": EGGS.steps, "operations": 2}
    rewards.check(columns)
    prompt = Prompt(tokens=[1], text=EGGS.prompt, columns=columns, index=0)
    texts = [correct_response(EGGS), "31+9=30\n30+6=36\n#### 36", ""]
    responses = [
        Response(tokens=[1], logprobs=[0.0], finish_reason="eos", text=text) for text in texts
    ]
    scores = rewards.score([prompt] * 3, responses)
    assert scores.outcomes == [1.0, 0.0, 0.0]
    assert scores.steps == [
        [(7, 1.0), (15, 1.0), (23, 1.0)],
        [(7, 0.0), (15, 1.0), (23, 1.0)],
        [],
    ]


# --- Tokenizer, model and files ------------------------------------------------------------------


def test_every_digit_and_every_word_of_the_task_is_one_token(tokenizer):
    assert [tokenizer.decode(i) for i in tokenizer(EGGS.prompt).input_ids] == [
        "Max has ", "3", "1", " eggs", ", finds ", "9", ", finds ", "6", ". How many now?\n",
    ]  # fmt: skip
    assert [tokenizer.decode(i) for i in tokenizer("31+9=40\n#### 40").input_ids] == [
        "3", "1", "+", "9", "=", "4", "0", "\n#### ", "4", "0",
    ]  # fmt: skip
    for problem in generate(21, 2000):
        numbers = sum(o.symbol != "*" for o in problem.operations)
        expected = 3 + len(str(problem.start)) + len(problem.operations) + numbers
        assert len(tokenizer(problem.prompt).input_ids) == expected


def test_tokenizer_does_not_depend_on_the_order_of_texts(texts, tokenizer):
    shuffled = random.Random(0).sample(texts, len(texts))
    again = train_tokenizer(shuffled)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_saved_tokenizer_round_trips_any_text(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    # AutoTokenizer reads the model's configuration and replaces the pre-tokenizer of some families.
    small_model_config(tokenizer).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in (EGGS.prompt, correct_response(EGGS), "a ☃ , é.  \n\n 007 ?", "### . ,"):
        assert loaded.decode(loaded(text).input_ids) == text
        assert loaded(text).input_ids == tokenizer(text).input_ids
    assert (loaded.eos_token, loaded.pad_token) == ("<|end|>", "<|pad|>")
    assert loaded.eos_token_id != loaded.pad_token_id
    assert loaded.bos_token_id is None


def test_small_model_has_about_340k_parameters_and_accepts_changes(tokenizer):
    model = AutoModelForCausalLM.from_config(small_model_config(tokenizer))
    assert model.num_parameters() == pytest.approx(340_000, rel=0.03)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert small_model_config(tokenizer, hidden_size=64).hidden_size == 64


def test_written_files_load_with_the_standard_loaders(tokenizer, tmp_path):
    paths = write_files(tmp_path / "data", 3, Sizes(200, problems=100, heldout=50, labels=40))
    rows = {
        stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for stem, path in paths.items()
    }
    assert {stem: len(of_stem) for stem, of_stem in rows.items()} == {
        "demonstrations": 200,
        "problems": 100,
        "heldout": 50,
        "labels": 40,
    }
    train_prompts = {problem.prompt for problem in generate(6, 200)}
    assert {row["prompt"] for row in rows["demonstrations"]} == train_prompts
    assert rows["problems"] == problem_rows(generate(7, 100))
    assert rows["heldout"] == problem_rows(generate(3, 50, split="test"))
    items = load_demonstrations(DemonstrationsConfig(path=str(paths["demonstrations"])), tokenizer)
    first = rows["demonstrations"][0]
    group = items[0].group
    assert tokenizer.decode(group.prompt) == first["prompt"]
    assert tokenizer.decode(group.responses[0]) == first["completion"] + "<|end|>"
    prompts = load_prompts(PromptsConfig(path=str(paths["problems"])), tokenizer)
    assert prompts[0].columns == {k: v for k, v in rows["problems"][0].items() if k != "prompt"}


def test_labels_mark_each_line_of_a_demonstration_and_load_as_step_labels(tokenizer, tmp_path):
    completion = "31+9=30\n30+6=36\n#### 36"
    assert step_label_rows([EGGS], [{"prompt": EGGS.prompt, "completion": completion}]) == [
        {
            "prompt": EGGS.prompt,
            "completions": ["31+9=30", "30+6=36", "#### 36"],
            "labels": [False, True, True],
        }
    ]
    skipped = step_label_rows([EGGS], [{"prompt": EGGS.prompt, "completion": "31+6=37\n#### 37"}])
    assert skipped[0]["labels"] == [False, False]
    paths = write_files(tmp_path, 3, Sizes(demonstrations=60, problems=5, heldout=5, labels=40))
    demos = [json.loads(line) for line in paths["demonstrations"].read_text().splitlines()[:40]]
    rows = [json.loads(line) for line in paths["labels"].read_text().splitlines()]
    assert ["\n".join(row["completions"]) for row in rows] == [r["completion"] for r in demos]
    loaded = load_step_labels(StepLabelsConfig(path=str(paths["labels"])), tokenizer)
    assert [labels.labels for labels in loaded] == [row["labels"] for row in rows]


def test_same_seed_writes_the_same_files(tmp_path):
    sizes = Sizes(demonstrations=50, problems=50, heldout=50)
    first, same, other = (
        [p.read_bytes() for p in write_files(tmp_path / name, seed, sizes).values()]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == same
    assert all(mine != theirs for mine, theirs in zip(first, other, strict=True))
