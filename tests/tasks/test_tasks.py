"""The embedded default task: problems, demonstrations, rewards, tokenizer and data files."""

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
from trivium.errors import DataError
from trivium.rewards.reward import RewardConfig, Rewards
from trivium.rollout.engine import Response
from trivium.tasks import problems as problems_module
from trivium.tasks.problems import MAXIMUM, Operation, Problem, generate
from trivium.tasks.tokenizer import small_model_config, train_tokenizer
from trivium.tasks.verifier import correct, judge, steps
from trivium.tasks.writer import (
    Habits,
    Sizes,
    demonstrations,
    digitwise,
    labeled,
    questions,
    write,
    write_files,
)

EGGS = Problem("Max", "eggs", 31, (Operation("+", 9, "finds"), Operation("+", 6, "finds")))
PENS = Problem("Ana", "pens", 12, (Operation("-", 5, "loses"), Operation("*", 3, "triples them")))
NEVER = Habits(careless=1.0, forgets_borrow=0.0, drops_carry=0.0, skips_clause=0.0, misreads=0.0)
MEANS = [-3.0, -0.5, 0.0, 0.3, 0.9, 1.0]


def reference(problem):
    return "\n".join([*problem.steps, f"#### {problem.answer}"])


def values(response, expected=EGGS.steps):
    return [value for _, value in judge(response, expected)]


def centered(response, expected, mean):
    return sum(value - mean for value in values(response, expected))


def habits(**rates):
    return Habits(**{**NEVER.__dict__, **rates})


def written(problem, habits):
    return write(problem, random.Random(0), habits)


@pytest.fixture(scope="module")
def texts():
    return [row["prompt"] + row["completion"] for row in demonstrations(generate(5, 3000), 5)]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts)


# --- Problems ------------------------------------------------------------------------------------


def test_a_problem_reads_and_solves_as_documented():
    assert EGGS.prompt == "Max has 31 eggs, finds 9, finds 6. How many now?\n"
    assert EGGS.steps == ["31+9=40", "40+6=46"]
    assert EGGS.answer == 46
    assert PENS.prompt == "Ana has 12 pens, loses 5, triples them. How many now?\n"
    assert PENS.steps == ["12-5=7", "7*3=21"]
    assert PENS.answer == 21


def test_problems_are_a_function_of_the_seed():
    assert generate(3, 200) == generate(3, 200)
    assert generate(3, 200) == generate(3, 300)[:200]
    assert generate(3, 200) != generate(4, 200)


@pytest.mark.parametrize("split", ["train", "test"])
def test_problems_are_distinct_in_range_and_of_the_asked_numbers_of_operations(split):
    problems = generate(1, 900, (2, 4), split)
    assert len({problem.prompt for problem in problems}) == 900
    assert {len(problem.operations) for problem in problems} == {2, 3, 4}
    results = [int(step.split("=")[1]) for problem in problems for step in problem.steps]
    assert min(results) >= 0
    assert max(results) <= MAXIMUM


def test_training_and_held_out_problems_share_no_chain_of_numbers_whatever_the_seeds():
    chains = {
        split: {tuple(p.steps) for seed in range(3) for p in generate(seed, 500, (2, 2), split)}
        for split in ("train", "test")
    }
    assert len(chains["train"]) > 1000
    assert len(chains["test"]) > 300
    assert not chains["train"] & chains["test"]


def test_the_split_does_not_depend_on_names_things_or_verbs():
    for problem in generate(2, 100):
        told_otherwise = tuple(Operation(o.symbol, o.operand, "moves") for o in problem.operations)
        assert Problem("Kim", "rocks", problem.start, told_otherwise).split == "train"


def test_asking_for_more_problems_than_exist_or_for_an_empty_range_is_an_error(monkeypatch):
    monkeypatch.setattr(problems_module, "NAMES", ("Max",))
    monkeypatch.setattr(problems_module, "THINGS", ("eggs",))
    with pytest.raises(DataError, match=r"count = 9000: only \d+ different test problems"):
        generate(0, 9_000, (1, 1), "test")
    with pytest.raises(DataError, match=r"operations = \(3, 2\)"):
        generate(0, 1, (3, 2))


# --- The writer ----------------------------------------------------------------------------------


def test_a_careful_writer_is_always_right():
    for problem in generate(7, 300):
        assert written(problem, Habits(careless=0.0)) == reference(problem)


@pytest.mark.parametrize(
    ("value", "symbol", "operand", "result"),
    [(31, "+", 9, 30), (31, "+", 8, 39), (40, "-", 6, 44), (46, "-", 6, 40), (17, "*", 3, 31)],
)
def test_without_carry_or_borrow_only_the_unit_digit_is_right(value, symbol, operand, result):
    assert digitwise(value, symbol, operand) == result


@pytest.mark.parametrize(
    ("problem", "slip", "text"),
    [
        (EGGS, {"drops_carry": 1.0}, "31+9=30\n30+6=36\n#### 36"),
        (PENS, {"forgets_borrow": 1.0}, "12-5=17\n17*3=51\n#### 51"),
        (PENS, {"drops_carry": 1.0}, "12-5=7\n7*3=1\n#### 1"),
        (EGGS, {"misreads": 1.0}, "31-9=22\n22-6=16\n#### 16"),
        (PENS, {"misreads": 1.0}, "12+5=17\n17+3=20\n#### 20"),
        (EGGS, {"skips_clause": 1.0}, "31+6=37\n#### 37"),
    ],
)
def test_every_slip_is_carried_into_the_later_lines(problem, slip, text):
    assert written(problem, habits(**slip)) == text


def test_a_slip_that_would_lead_out_of_range_is_noticed():
    problem = Problem("Leo", "cups", 12, (Operation("+", 9, "gets"), Operation("-", 14, "loses")))
    assert written(problem, habits(drops_carry=1.0)) == "12+9=21\n21-14=7\n#### 7"
    for row in demonstrations(generate(8, 2000), 8):
        results = [int(line.split("=")[1]) for line in row["completion"].split("\n")[:-1]]
        assert all(0 <= result <= MAXIMUM for result in results)


def test_about_47_percent_of_demonstrations_end_correct_and_some_by_luck():
    problems = generate(11, 4000)
    rows = demonstrations(problems, 11)
    completions = [row["completion"] for row in rows]
    right = correct([], completions, [problem.answer for problem in problems])
    exact = [c == reference(p) for c, p in zip(completions, problems, strict=True)]
    # Three standard errors of a share of 4,000 are 0.024.
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
    assert judge("31+9=40\n40+6=45\n#### 45", EGGS.steps) == [
        ((0, 7), 1.0),
        ((7, 15), 0.0),
        ((15, 23), 1.0),
    ]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("31+9=40\n40+6=46\n#### 46", [1, 1, 1]),
        ("31+9=30\n30+6=36\n#### 36", [0, 1, 1]),  # a slip costs its own step only
        ("31+9=30\n40+6=46\n#### 46", [0, 0, 1]),  # the value reached was 30
        ("31+9=30\n30+6=46\n#### 46", [0, 0, 1]),  # an error that cancels is two errors
        ("31+9=40\n40+6=46\n#### 45", [1, 1, 0]),
        ("31-9=22\n22+6=28\n#### 28", [0, 1, 1]),
        ("32+9=41\n41+6=47\n#### 47", [0, 1, 1]),
        ("31+6=37\n#### 37", [0, -1]),  # a skipped clause
        ("31+9=40\n#### 40", [1, -1]),
        ("31+9=40\n#### 46", [1, -1]),
        ("#### 46", [-2]),
        ("#### 46\n40+6=46\n#### 46", [-2]),  # nothing after a closing is a step
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
        ("31+9=\n31+6=37\n#### 37", [0, 1, 1]),  # no result: the value stays
        ("31+9=040\n40+6=46\n#### 46", [0, 1, 1]),
        (f"31+9={'9' * 5000}\n40+6=46\n#### 46", [0, 0, 1]),
        ("", []),
    ],
)
def test_a_step_is_right_where_it_is_due_and_continues_from_the_value_reached(response, expected):
    assert values(response) == expected


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
def test_steps_tile_the_response_and_are_at_most_one_more_than_the_operations(response):
    judged = judge(response, EGGS.steps)
    bounds = [0, *(end for (_, end), _ in judged)]
    assert [start for (start, _), _ in judged] == bounds[:-1]
    assert bounds[-1] == len(response)
    assert bounds == sorted(set(bounds))
    assert len(judged) <= 3


@given(RESPONSES)
def test_only_the_correct_response_attains_the_maximum_however_rewards_are_centered(response):
    best = reference(EGGS)
    if response in (best, ""):
        return
    assert sum(values(response)) < sum(values(best)) == 3
    for mean in MEANS:
        assert centered(response, EGGS.steps, mean) < centered(best, EGGS.steps, mean)


def test_no_line_dropped_repeated_swapped_or_added_pays_on_real_problems():
    for problem in generate(13, 100):
        lines = reference(problem).split("\n")
        degenerate = [lines[:i] + lines[i + 1 :] for i in range(len(lines))]
        degenerate += [lines[: i + 1] + lines[i:] for i in range(len(lines))]
        degenerate += [lines[:i] for i in range(1, len(lines))]
        degenerate += [lines[:i] + lines[-1:] for i in range(len(lines) - 1)]
        degenerate += [[*lines[:-1], *lines], [*lines, *lines]]
        for mean in MEANS:
            best = centered(reference(problem), problem.steps, mean)
            for text in map("\n".join, degenerate):
                assert text == reference(problem) or centered(text, problem.steps, mean) < best


@pytest.mark.parametrize("mean", MEANS)
def test_ending_early_never_beats_writing_the_missing_steps_wrongly(mean):
    for problem in generate(14, 50):
        lines = problem.steps
        for i in range(len(lines)):
            wrong = "\n".join([*lines[:i], *["?"] * (len(lines) - i), "#### ?"])
            for closing in ([], ["#### 1"]):
                early = "\n".join([*lines[:i], *closing])
                if early:
                    attempted = centered(wrong, problem.steps, mean)
                    assert centered(early, problem.steps, mean) <= attempted + 1e-12


@pytest.mark.parametrize("expected", [["31+9"], ["31 + 9 = 40"], ["nine"], []])
def test_steps_that_are_no_step_lines_are_an_error(expected):
    with pytest.raises(DataError, match="steps: "):
        steps(["p"], ["r"], [expected])


def test_both_rewards_work_as_configured_rewards():
    names = ["trivium.tasks.verifier:correct", "trivium.tasks.verifier:steps"]
    rewards = Rewards([RewardConfig(function=name) for name in names])
    columns = {"answer": "46", "steps": EGGS.steps, "operations": 2}
    rewards.check(columns)
    prompt = Prompt(tokens=[1], text=EGGS.prompt, columns=columns, index=0)
    texts = [reference(EGGS), "31+9=30\n30+6=36\n#### 36", ""]
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


def test_the_tokenizer_gives_each_digit_and_each_word_of_the_task_one_token(tokenizer):
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


def test_the_tokenizer_is_the_same_for_the_same_texts_in_any_order(texts, tokenizer):
    shuffled = random.Random(0).sample(texts, len(texts))
    again = train_tokenizer(shuffled)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_the_tokenizer_survives_saving_beside_its_model_and_gives_any_text_back(
    tokenizer, tmp_path
):
    tokenizer.save_pretrained(tmp_path)
    # AutoTokenizer looks at the model's configuration, and for some families splits anew.
    small_model_config(tokenizer).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in (EGGS.prompt, reference(EGGS), "a ☃ , é.  \n\n 007 ?", "### . ,"):
        assert loaded.decode(loaded(text).input_ids) == text
        assert loaded(text).input_ids == tokenizer(text).input_ids
    assert (loaded.eos_token, loaded.pad_token) == ("<|end|>", "<|pad|>")
    assert loaded.eos_token_id != loaded.pad_token_id
    assert loaded.bos_token_id is None


def test_the_small_model_has_about_340k_parameters_and_takes_changes(tokenizer):
    model = AutoModelForCausalLM.from_config(small_model_config(tokenizer))
    assert model.num_parameters() == pytest.approx(340_000, rel=0.03)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert small_model_config(tokenizer, hidden_size=64).hidden_size == 64


def test_files_load_as_a_users_own_and_hold_no_held_out_chain(tokenizer, tmp_path):
    paths = write_files(tmp_path / "data", 3, Sizes(200, problems=100, heldout=50, labels=40))
    rows = {
        stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for stem, path in paths.items()
    }
    assert {stem: len(of) for stem, of in rows.items()} == {
        "demonstrations": 200,
        "problems": 100,
        "heldout": 50,
        "labels": 40,
    }
    train_prompts = {problem.prompt for problem in generate(6, 200)}
    assert {row["prompt"] for row in rows["demonstrations"]} == train_prompts
    assert rows["problems"] == questions(generate(7, 100))
    assert rows["heldout"] == questions(generate(3, 50, split="test"))
    shown = load_demonstrations(DemonstrationsConfig(path=str(paths["demonstrations"])), tokenizer)
    first = rows["demonstrations"][0]
    group = shown[0].group
    assert tokenizer.decode(group.prompt) == first["prompt"]
    assert tokenizer.decode(group.responses[0]) == first["completion"] + "<|end|>"
    prompts = load_prompts(PromptsConfig(path=str(paths["problems"])), tokenizer)
    assert prompts[0].columns == {k: v for k, v in rows["problems"][0].items() if k != "prompt"}


def test_labels_mark_each_line_of_a_demonstration_and_load_as_step_labels(tokenizer, tmp_path):
    completion = "31+9=30\n30+6=36\n#### 36"
    assert labeled([EGGS], [{"prompt": EGGS.prompt, "completion": completion}]) == [
        {
            "prompt": EGGS.prompt,
            "completions": ["31+9=30", "30+6=36", "#### 36"],
            "labels": [False, True, True],
        }
    ]
    skipped = labeled([EGGS], [{"prompt": EGGS.prompt, "completion": "31+6=37\n#### 37"}])
    assert skipped[0]["labels"] == [False, False]
    paths = write_files(tmp_path, 3, Sizes(demonstrations=60, problems=5, heldout=5, labels=40))
    shown = [json.loads(line) for line in paths["demonstrations"].read_text().splitlines()[:40]]
    rows = [json.loads(line) for line in paths["labels"].read_text().splitlines()]
    assert ["\n".join(row["completions"]) for row in rows] == [r["completion"] for r in shown]
    loaded = load_step_labels(StepLabelsConfig(path=str(paths["labels"])), tokenizer)
    assert [labels.labels for labels in loaded] == [row["labels"] for row in rows]


def test_files_are_a_function_of_the_seed(tmp_path):
    sizes = Sizes(demonstrations=50, problems=50, heldout=50)
    first, same, other = (
        [p.read_bytes() for p in write_files(tmp_path / name, seed, sizes).values()]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == same
    assert all(mine != theirs for mine, theirs in zip(first, other, strict=True))
