"""`trivium sample` and `trivium evaluate`: correctness of their output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import World, checkpoint, letters_tokenizer

from trivium.cli import main
from trivium.commands import evaluate as evaluate_command
from trivium.commands import sample
from trivium.commands.evaluate import Measured
from trivium.commands.evaluate import run as evaluate
from trivium.commands.evaluate_config import EvaluateConfig
from trivium.commands.sample_config import SampleConfig
from trivium.errors import ConfigurationError, DataError, ModelError, RewardError
from trivium.maths.intervals import mean_interval, share_interval


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


# --- sample ---------------------------------------------------------------------------------------


def sampling(world: World, **options: Any) -> SampleConfig:
    settings = {
        "model": {"path": world.path},
        "data": world.prompts,
        "output": "responses.jsonl",
        "sampling": {"max_tokens": 6},
        **options,
    }
    return SampleConfig.model_validate(settings)


def test_rows_hold_the_responses_in_prompt_order_with_columns_and_rewards(world: World) -> None:
    prompts = [{"prompt": p, "answer": n} for n, p in enumerate(("a", "bcd", "ef.gh"))]
    data = world.rows("answers.jsonl", prompts)
    rewards = [{**world.reward("letters")[0], "weight": 2.0, "name": "score"}]
    written = lines(sample.run(sampling(world, data=data, samples=3, rewards=rewards)))
    assert [(row["prompt"], row["answer"]) for row in written] == [
        (row["prompt"], row["answer"]) for row in prompts for _ in range(3)
    ]
    tokenizer = letters_tokenizer()
    for row in written:
        assert row["components"] == {"score": letters(row["response"])}
        assert row["reward"] == 2 * letters(row["response"])
        text_tokens = len(tokenizer.encode(row["response"], add_special_tokens=False))
        assert row["tokens"] == text_tokens + (row["finish_reason"] == "eos")
        assert row["finish_reason"] == "eos" or row["tokens"] == 6


def test_step_rewards_are_written_and_included_in_the_reward(world: World) -> None:
    rewards = world.reward("letters", "pairs")
    for row in lines(sample.run(sampling(world, rewards=rewards))):
        text = row["response"]
        ends = [min(i + 2, len(text)) for i in range(0, len(text), 2)]
        assert [end for end, _ in row["step_rewards"]] == ends
        total = letters(text) + sum(value for _, value in row["step_rewards"])
        assert row["reward"] == pytest.approx(total, abs=1e-12)


def test_rows_without_reward_functions_have_no_reward(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    [first, *_] = lines(sample.run(sampling(world)))
    assert list(first) == ["prompt", "response", "tokens", "finish_reason"]
    assert "reward" not in capsys.readouterr().out


def test_responses_depend_on_the_seed_and_not_on_the_batch_size(
    world: World, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sample.run(sampling(world, samples=2)).read_bytes()
    monkeypatch.setattr(sample, "RESPONSES_PER_BATCH", 2)
    assert sample.run(sampling(world, samples=2, overwrite=True)).read_bytes() == first
    assert sample.run(sampling(world, samples=2, overwrite=True, seed=1)).read_bytes() != first
    names = sorted(path.name for path in here.iterdir())
    assert names == ["responses.counts.json", "responses.jsonl"]


def test_budget_ends_sampling_and_the_cost_is_recorded(
    world: World, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "RESPONSES_PER_BATCH", 2)
    rows = lines(sample.run(sampling(world, samples=2, budget={"generated_tokens": 13})))
    counts = json.loads((here / "responses.counts.json").read_text())
    assert counts["prompts"] == 2 and counts["responses"] == len(rows) == 4
    assert counts["generated_tokens"] == sum(row["tokens"] for row in rows) >= 13
    assert counts["seconds"] > 0 and counts["flops"] > 0


def test_only_responses_with_at_least_the_minimum_reward_are_written(
    world: World, here: Path
) -> None:
    settings = {"samples": 6, "rewards": world.reward("letters")}
    everything = lines(sample.run(sampling(world, **settings)))
    kept = lines(sample.run(sampling(world, **settings, minimum_reward=0.5, overwrite=True)))
    assert kept == [row for row in everything if row["reward"] >= 0.5]
    assert 0 < len(kept) < len(everything)
    with pytest.raises(DataError, match="none of 24 responses has a reward of at least 99"):
        sample.run(sampling(world, **settings, minimum_reward=99.0, overwrite=True))


def test_existing_output_is_refused_before_a_model_is_loaded(world: World, here: Path) -> None:
    (here / "responses.jsonl").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"already exists; .* overwrite=true"):
        sample.run(sampling(world, model={"path": "./nowhere"}))
    assert (here / "responses.jsonl").read_text() == "mine"
    (here / "folder.jsonl").mkdir()
    with pytest.raises(ConfigurationError, match=r"is a directory; name another file$"):
        sample.run(sampling(world, output="folder.jsonl", overwrite=True))


def test_rows_written_before_a_failure_stay_in_a_partial_file(
    world: World, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "RESPONSES_PER_BATCH", 1)
    (here / "second.py").write_text(
        "calls = []\n"
        "def fails(responses):\n"
        "    calls.append(1)\n"
        "    return [1.0] if len(calls) == 1 else [float('nan')]\n"
    )
    with pytest.raises(RewardError, match="not a finite number"):
        sample.run(sampling(world, rewards=[{"function": "second.py:fails"}]))
    assert not (here / "responses.jsonl").exists()
    assert len(lines(here / "responses.jsonl.partial")) == 1


def test_data_columns_with_names_of_output_columns_are_refused(world: World) -> None:
    data = world.rows("taken.jsonl", [{"prompt": "a", "reward": 1, "tokens": [2]}])
    with pytest.raises(DataError, match="the columns tokens, reward, which"):
        sample.run(sampling(world, data=data))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "responses.txt"}, "ends in .jsonl"),
        ({"samples": 2, "sampling": {"temperature": 0}}, "all samples of a prompt"),
        ({"minimum_reward": 1.0}, "needs rewards: name what scores"),
    ],
)
def test_conflicting_settings_of_sample_are_refused(
    world: World, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sampling(world, **options)


# --- evaluate -------------------------------------------------------------------------------------


def evaluation(world: World, **options: Any) -> EvaluateConfig:
    settings = {
        "model": {"path": world.path},
        "data": world.prompts,
        "rewards": world.reward("letters", "pairs"),
        "max_tokens": 6,
        **options,
    }
    return EvaluateConfig.model_validate(settings)


def rewards_of(world: World, temperature: float, samples: int, seed: int) -> list[float]:
    """Return the mean reward `letters` of each prompt's responses from `sample`."""
    settings = {"temperature": temperature, "max_tokens": 6}
    config = sampling(world, sampling=settings, samples=samples, seed=seed, overwrite=True)
    values = [letters(row["response"]) for row in lines(sample.run(config))]
    return [sum(values[i : i + samples]) / samples for i in range(0, len(values), samples)]


def test_evaluation_equals_the_rewards_of_sample_with_prompts_as_observations(
    world: World,
) -> None:
    measured = evaluate(evaluation(world, samples=4, temperature=1.5, seed=3))
    greedy = mean_interval(rewards_of(world, 0.0, 1, seed=3))
    sampled = mean_interval(rewards_of(world, 1.5, 4, seed=3))
    assert measured.evaluation.record()["n"] == 4
    assert measured.greedy_rewards["letters"] == greedy
    assert measured.sampled_rewards["letters"] == sampled
    assert measured.evaluation.kl is None


def test_kl_to_the_model_itself_is_zero_and_to_another_model_is_not(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = checkpoint(tmp_path_factory.mktemp("other"), seed=1, spread=0.2)
    to_itself = evaluate(evaluation(world, reference={"path": world.path})).evaluation
    to_other = evaluate(evaluation(world, reference={"path": other})).evaluation
    assert to_itself.kl is not None and to_itself.kl.mean == 0.0
    assert to_other.kl is not None and to_other.kl.mean != 0.0


def test_reference_with_another_vocabulary_is_refused(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = checkpoint(tmp_path_factory.mktemp("strange"), letters="jihgfedcba.\n")
    with pytest.raises(ModelError, match="its tokenizer differs from that of"):
        evaluate(evaluation(world, reference={"path": other}))


def test_output_file_and_table_agree(
    world: World, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    settings = evaluation(world, output="e.json").model_dump(mode="json")
    (here / "e.yaml").write_text(json.dumps(settings))
    assert main(["evaluate", "e.yaml"]) == 0
    out = capsys.readouterr().out
    record = json.loads((here / "e.json").read_text())
    table = {
        line.split("  ")[1].strip(): line.split()
        for line in out.splitlines()
        if line.startswith("  ") and line.strip()
    }
    row = table["letters, greedy"]
    greedy = record["rewards"]["letters"]["greedy"]
    assert row[-4:] == [f"{greedy[k]:.3f}" if k else "–" for k in ("mean", "low", None, "high")]
    low, high = record["sampled_low"], record["sampled_high"]
    assert table["reward, sampled"][-4:] == [
        f"{record['sampled']:.3f}",
        f"{low:.3f}",
        "–",
        f"{high:.3f}",
    ]
    assert record["n"] == 4
    assert record["config"]["max_tokens"] == 6
    assert main(["evaluate", "e.yaml"]) == 2
    assert "already exists" in capsys.readouterr().err


def test_binary_rewards_get_the_interval_of_a_share(world: World, here: Path) -> None:
    (here / "first.py").write_text(
        "def one(prompts, responses): return [float(p == 'a') for p in prompts]"
    )
    measured = evaluate(evaluation(world, rewards=[{"function": "first.py:one"}]))
    assert measured.evaluation.greedy_reward == share_interval(1, 4)
    assert isinstance(measured, Measured)


def test_intervals_are_over_the_prompts_that_a_reward_applies_to(world: World, here: Path) -> None:
    (here / "some.py").write_text(
        "def short(prompts, responses): return [len(p) if len(p) < 3 else None for p in prompts]\n"
        "def once(prompts, responses): return [1 if len(responses) == 4 else None] * len(responses)"
    )
    rewards = [{"function": f"some.py:{name}"} for name in ("short", "once")]
    rewards = [*world.reward("letters"), *rewards]
    measured = evaluate(evaluation(world, rewards=rewards, samples=2))
    assert measured.sampled_rewards["short"] == mean_interval([1.0, 2.0])
    once = measured.record()["rewards"]["once"]
    assert (once["greedy"]["mean"], once["sampled"]) == (1.0, None)
    titles = [str(cell) for cell in measured.__rich__().columns[0].cells]
    assert "once, greedy" in titles and "once, sampled" not in titles


# --- choosing one of several samples --------------------------------------------------------------


def process_model(world: World) -> dict[str, Any]:
    arguments = {"path": world.reward_model(), "separator": "a", "aggregate": "minimum"}
    return {"function": "process_reward_model", "name": "minimum", "arguments": arguments}


def test_reranked_and_voted_responses_are_those_of_sample(world: World, here: Path) -> None:
    (here / "own.py").write_text(
        "def first(responses): return [r[:1] or None for r in responses]\n"
    )
    config = evaluation(
        world,
        rewards=world.reward("letters"),
        samples=8,
        seed=3,
        vote="own.py:first",
        rerank=[process_model(world)],
    )
    found = evaluate(config).record()["selections"]
    options = {"sampling": {"max_tokens": 6}, "samples": 8, "seed": 3}
    rows = lines(sample.run(sampling(world, rewards=[process_model(world)], **options)))
    best, vote, possible = [], [], []
    for start in range(0, len(rows), 8):
        group = rows[start : start + 8]
        highest = max(row["reward"] for row in group)
        top = [letters(row["response"]) for row in group if row["reward"] == highest]
        best.append(sum(top) / len(top))
        possible.append(max(letters(row["response"]) for row in group))
        firsts = [row["response"][:1] for row in group if row["response"]]
        most = max(map(firsts.count, firsts))
        winners = [
            [letters(row["response"]) for row in group if row["response"][:1] == first]
            for first in sorted(set(firsts))
            if firsts.count(first) == most
        ]
        vote.append(sum(sum(w) / len(w) for w in winners) / len(winners))
    for name, values in {"minimum": best, "majority vote": vote, "best possible": possible}.items():
        expected = mean_interval(values)
        assert (found[name]["mean"], found[name]["low"], found[name]["high"]) == pytest.approx(
            (expected.mean, expected.low, expected.high), abs=1e-6
        )
    gap = found["minimum − majority vote"]["mean"]
    assert gap == pytest.approx(sum(best) / 4 - sum(vote) / 4, abs=1e-6)


def test_evaluation_without_vote_and_rerank_has_no_selections(world: World) -> None:
    assert evaluate(evaluation(world, samples=2)).record()["selections"] == {}


def test_rerank_by_own_functions_without_one_score_per_response_is_refused(
    world: World, here: Path
) -> None:
    with pytest.raises(ConfigurationError, match="rerank: one of the rewards scores steps"):
        evaluate(evaluation(world, samples=2, rerank=world.reward("pairs")))
    (here / "some.py").write_text(
        "def short(prompts, responses): return [1.0 if len(p) < 3 else None for p in prompts]\n"
    )
    rerank = [*world.reward("letters"), {"function": "some.py:short"}]
    with pytest.raises(ConfigurationError, match="rerank: short has no value for a response"):
        evaluate(evaluation(world, samples=2, rerank=rerank))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vote": "number"}, "nothing to choose from: set samples"),
        ({"samples": 4, "vote": "numbers"}, "'number', 'boxed' or file.py:function"),
        ({"samples": 4, "rerank": [{"function": "steps"}]}, "chosen by one score: set aggregate"),
        (
            {"samples": 4, "rerank": [{"function": "gsm8k", "weight": 2.0}]},
            "each reward chooses alone: leave weight out",
        ),
    ],
)
def test_conflicting_settings_of_a_choice_are_refused(
    world: World, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluation(world, **options)


def test_rerank_does_not_depend_on_the_size_of_its_calls(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = evaluation(world, samples=6, rerank=world.reward("letters"))
    whole = evaluate(config).selections
    monkeypatch.setattr(evaluate_command, "RESPONSES_PER_BATCH", 5)
    assert evaluate(config).selections == whole
