"""`trivium pairs`: pairs made from scored responses, and the sources of the responses."""

from __future__ import annotations

import gzip
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import World

from trivium.commands import sample
from trivium.commands.candidates import Candidates, field_of
from trivium.commands.pairs import contrasts
from trivium.commands.pairs import run as pairs
from trivium.commands.pairs_config import PairsConfig
from trivium.commands.sample_config import SampleConfig
from trivium.data.preferences import PreferencesConfig, load_preferences
from trivium.errors import DataError
from trivium.hf.loading import load_tokenizer
from trivium.hf.model_config import ModelConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def letters(text: str) -> float:
    """Independent implementation of the world's reward `letters`."""
    return text.count("a") - text.count("b") + 0.25 * text.count("c")


def chosen_pairs(texts: list[str], scores: list[float], index: int = 0, **options: Any) -> Any:
    """Return the (chosen, rejected) texts of one prompt's pairs."""
    settings = {
        "data": {"path": "rows.jsonl"},
        "candidates": [{"response": "r", "score": "s"}],
        "output": "pairs.jsonl",
        **options,
    }
    config = PairsConfig.model_validate(settings)
    found = contrasts(Candidates("q", index, texts, scores), config)
    assert all(row["prompt"] == "q" for row in found)
    values = dict(zip(texts, scores, strict=True))
    for row in found:
        assert row["chosen_reward"] == values[row["chosen"]]
        assert row["rejected_reward"] == values[row["rejected"]]
    return [(row["chosen"], row["rejected"]) for row in found]


def test_single_pair_is_the_best_against_the_worst() -> None:
    assert chosen_pairs(["a", "b", "c"], [0.5, 2.0, -1.0]) == [("b", "c")]


def test_pairs_are_ordered_by_decreasing_gap() -> None:
    texts, scores = ["a", "b", "c"], [0.5, 2.0, -0.5]
    everything = [("b", "c"), ("b", "a"), ("a", "c")]
    assert chosen_pairs(texts, scores, pairs_per_prompt=2) == everything[:2]
    assert chosen_pairs(texts, scores, pairs_per_prompt=None) == everything


def test_pairs_below_the_minimum_gap_are_left_out() -> None:
    texts, scores = ["a", "b", "c"], [0.0, 1.0, 3.0]
    exact = chosen_pairs(texts, scores, minimum_gap=2.0, pairs_per_prompt=None)
    assert exact == [("c", "a"), ("c", "b")]
    assert chosen_pairs(texts, scores, minimum_gap=3.5) == []


def test_equal_scores_equal_texts_and_blank_texts_make_no_pair() -> None:
    assert chosen_pairs(["a", "b"], [1.0, 1.0]) == []
    assert chosen_pairs(["", "b", " \n"], [0.0, 1.0, 2.0]) == []
    everything = chosen_pairs(["a", "b", "b"], [1.0, 0.0, 0.0], pairs_per_prompt=None)
    assert everything == [("a", "b")]
    config = {"data": {"path": "x"}, "candidates": [{"response": "r", "score": "s"}]}
    pairs_config = PairsConfig.model_validate({**config, "output": "p.jsonl"})
    assert contrasts(Candidates("q", 0, ["a", "a"], [1.0, 0.0]), pairs_config) == []


def test_ties_are_broken_by_seed_and_row_and_not_by_position() -> None:
    texts, scores = ["a", "b", "c", "d"], [1.0, 1.0, 0.0, 0.0]
    first = [chosen_pairs(texts, scores, index)[0] for index in range(40)]
    assert set(first) == set(product("ab", "cd"))
    assert first == [chosen_pairs(texts, scores, index)[0] for index in range(40)]
    assert first != [chosen_pairs(texts, scores, index, seed=1)[0] for index in range(40)]


def test_best_random_pairs_the_best_with_random_others_without_repetition() -> None:
    texts, scores = ["a", "b", "c", "d"], [0.5, 2.0, -0.5, 1.0]
    options = {"pairing": "best_random"}
    firsts = [chosen_pairs(texts, scores, index, **options) for index in range(60)]
    assert all(len(pairs) == 1 and pairs[0][0] == "b" for pairs in firsts)
    counts = {other: sum(pairs[0][1] == other for pairs in firsts) for other in "acd"}
    assert all(10 <= count <= 30 for count in counts.values())
    everything = chosen_pairs(texts, scores, pairs_per_prompt=None, **options)
    assert sorted(everything) == [("b", "a"), ("b", "c"), ("b", "d")]
    assert chosen_pairs(texts, scores, pairs_per_prompt=2, **options) == everything[:2]


def test_best_random_chooses_one_of_equal_best_responses_and_keeps_the_gap() -> None:
    texts, scores = ["a", "b", "c"], [1.0, 1.0, 0.0]
    options = {"pairing": "best_random", "pairs_per_prompt": None}
    found = [chosen_pairs(texts, scores, index, **options) for index in range(40)]
    assert {tuple(pairs) for pairs in found} == {(("a", "c"),), (("b", "c"),)}
    gap = {"minimum_gap": 1.5, "pairs_per_prompt": None}
    far = chosen_pairs(["a", "b", "c"], [2.0, 1.0, 0.0], pairing="best_random", **gap)
    assert far == [("a", "c")]
    assert chosen_pairs(["a", "b"], [1.0, 1.0], pairing="best_random") == []


def test_scores_of_ai_feedback_are_read_from_a_list_of_completions(world: World) -> None:
    completions = [
        {"model": name, "response": text, "overall_score": score}
        for name, text, score in [("m1", "b", 6.5), ("m2", "a", 8.0), ("m3", "c", 3.0)]
    ]
    candidate = {"response": "completions.response", "score": "completions.overall_score"}
    config = row_pairs(
        world,
        [{"prompt": "ab", "completions": completions}],
        candidates=[candidate],
        pairing="best_random",
        pairs_per_prompt=None,
    )
    found = lines(pairs(config))
    assert sorted((row["chosen"], row["rejected"]) for row in found) == [("a", "b"), ("a", "c")]


def sampled_pairs(world: World, **options: Any) -> PairsConfig:
    settings = {
        "model": {"path": world.path},
        "data": world.prompts,
        "rewards": world.reward("letters"),
        "sampling": {"max_tokens": 8},
        "output": "pairs.jsonl",
        "keep_truncated": True,
        **options,
    }
    return PairsConfig.model_validate(settings)


def test_sampled_pairs_prefer_the_higher_reward_and_load_as_preferences(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="trivium"):
        path = pairs(sampled_pairs(world, pairs_per_prompt=3))
    found = lines(path)
    for row in found:
        assert row["chosen_reward"] == letters(row["chosen"])
        assert row["rejected_reward"] == letters(row["rejected"]) < row["chosen_reward"]
    assert {row["prompt"] for row in found} == {"a", "bcd", "ef.gh", "ij"}
    assert f"pairs.jsonl: {len(found)} pairs from 4 prompts" in caplog.text
    tokenizer = load_tokenizer(ModelConfig(path=world.path))
    read = load_preferences(PreferencesConfig(path=str(path)), tokenizer)
    assert [(p.prompt, p.chosen) for p in read] == [(r["prompt"], r["chosen"]) for r in found]


def test_truncated_responses_make_no_pairs_unless_they_are_kept(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {
        "model": {"path": world.path},
        "data": world.prompts,
        "sampling": {"max_tokens": 6},
        "samples": 64,
        "output": "responses.jsonl",
    }
    every = lines(sample.run(SampleConfig.model_validate(settings)))
    complete = {row["response"] for row in every if row["finish_reason"] == "eos"}
    truncated = {row["response"] for row in every if row["finish_reason"] == "length"}
    assert complete
    assert truncated
    options = {"samples": 64, "sampling": {"max_tokens": 6}, "pairs_per_prompt": None}
    with caplog.at_level("INFO", logger="trivium"):
        clean = lines(pairs(sampled_pairs(world, keep_truncated=False, **options)))
    assert {text for row in clean for text in (row["chosen"], row["rejected"])} <= complete
    count = sum(row["finish_reason"] == "length" for row in every)
    message = f"{count} of 256 responses left out because they are truncated at 6 tokens"
    assert message in caplog.text
    kept = lines(pairs(sampled_pairs(world, output="kept.jsonl", **options)))
    assert {text for row in kept for text in (row["chosen"], row["rejected"])} & (
        truncated - complete
    )


def test_no_pair_at_all_is_an_error_with_the_reason(world: World, here: Path) -> None:
    (here / "same.py").write_text("def score(responses): return [1.0] * len(responses)")
    with pytest.raises(DataError, match="0 pairs from 4 prompts; 4 prompts without two responses"):
        pairs(sampled_pairs(world, rewards=[{"function": "same.py:score"}]))
    assert [path.name for path in here.iterdir()] == ["same.py"]


def row_pairs(world: World, rows: list[dict[str, Any]], **options: Any) -> PairsConfig:
    settings = {"data": world.rows("rows.jsonl", rows), "output": "pairs.jsonl", **options}
    return PairsConfig.model_validate(settings)


def test_candidates_come_from_fields_lists_and_lists_of_objects(world: World) -> None:
    row = {
        "question": "1+1?",
        "first": {"text": " 2", "ok": True},
        "others": ["3", "4"],
        "scores": [0.0, 0.5],
        "more": [{"text": "5", "ok": -1}],
    }
    config = row_pairs(
        world,
        [row],
        candidates=[
            {"response": "first.text", "score": "first.ok"},
            {"response": "others", "score": "scores"},
            {"response": "more.text", "score": "more.ok"},
        ],
        pairs_per_prompt=None,
    )
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"template": "Q: {question}\n"})}
    )
    found = lines(pairs(config))
    assert {row["prompt"] for row in found} == {"Q: 1+1?\n"}
    order = [" 2", "4", "3", "5"]
    expected = {(a, b) for i, a in enumerate(order) for b in order[i + 1 :]}
    assert {(row["chosen"], row["rejected"]) for row in found} == expected
    assert len(found) == len(expected)


def test_column_name_with_a_dot_is_found_before_a_nested_field() -> None:
    assert field_of({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert field_of({"a": {"b": [{"c": 1}, {"c": 2}]}}, "a.b.c") == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"one": {"txt": "a", "ok": 1}}, r"no `text`: there are txt, ok; did you mean `txt`"),
        ({"one": 3}, "no `text`: expected an object with this key, found 3"),
        (
            {"one": {"text": "a", "ok": "yes"}},
            "`one.ok` is 'yes'; a score must be true, false or a",
        ),
        ({"one": {"text": 3, "ok": 1}}, r"`one.text` is 3 \(int\), not text"),
        ({"one": {"text": ["a", "b"], "ok": [1]}}, "holds 2 responses and `one.ok` 1 scores"),
    ],
)
def test_faulty_row_is_reported_with_its_field(
    world: World, changes: dict[str, Any], message: str
) -> None:
    good = {"prompt": "q", "one": {"text": "a", "ok": 1}}
    candidates = [{"response": "one.text", "score": "one.ok"}]
    with pytest.raises(DataError, match=rf"rows.jsonl:2: .*{message}"):
        pairs(row_pairs(world, [good, {**good, **changes}], candidates=candidates))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either model"),
        ({"model": {"path": "m"}}, "it is empty: name the rewards that rank"),
        (
            {"model": {"path": "m"}, "candidates": [{"response": "r", "score": "s"}]},
            "give either model",
        ),
        (
            {"candidates": [{"response": "r", "score": "s"}], "samples": 3, "keep_truncated": True},
            r"(?s)samples\n.*so it has no effect.*keep_truncated\n.*so it has no effect",
        ),
        (
            {
                "candidates": [{"response": "r", "score": "s"}],
                "data": {"path": "x", "max_prompt_tokens": 3},
            },
            r"data\.max_prompt_tokens\n.*so it has no effect",
        ),
    ],
)
def test_conflicting_settings_of_pairs_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairsConfig.model_validate({"data": {"path": "x"}, "output": "p.jsonl", **options})


def test_gsm8k_pairs_join_every_correct_with_every_wrong_solution(shared_dir: Path) -> None:
    source = shared_dir / "datasets" / "gsm8k" / "example_model_solutions.jsonl.gz"
    names = [f"{size}_{kind}" for size in ("6b", "175b") for kind in ("finetuning", "verification")]
    expected = 0
    for line in gzip.decompress(source.read_bytes()).decode().splitlines()[:300]:
        solutions = [json.loads(line)[name] for name in names]
        right = {s["solution"] for s in solutions if s["is_correct"] and s["solution"].strip()}
        wrong = {s["solution"] for s in solutions if not s["is_correct"] and s["solution"].strip()}
        expected += len(right) * len(wrong)
    settings = {
        "data": {"path": str(source), "limit": 300, "columns": {"prompt": "question"}},
        "candidates": [
            {"response": f"{name}.solution", "score": f"{name}.is_correct"} for name in names
        ],
        "pairs_per_prompt": None,
        "output": "pairs.jsonl",
    }
    found = lines(pairs(PairsConfig.model_validate(settings)))
    assert len(found) == expected > 300
    assert {(row["chosen_reward"], row["rejected_reward"]) for row in found} == {(1.0, 0.0)}
