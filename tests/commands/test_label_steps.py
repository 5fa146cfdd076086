"""`trivium label-steps`: labels of steps, solutions that cannot be labeled, and interruptions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import World, letters_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from trivium.cli import main
from trivium.commands import label_steps, sample
from trivium.commands.label_steps_config import LabelStepsConfig
from trivium.commands.sample_config import SampleConfig
from trivium.commands.solutions import split_steps
from trivium.data.preferences import StepLabelsConfig, load_step_labels
from trivium.data.prompts import Prompt
from trivium.data.response import Response
from trivium.errors import ConfigurationError, DataError, RewardError
from trivium.hf.loading import load_tokenizer
from trivium.hf.model_config import ModelConfig
from trivium.rollout.local_engine import LocalEngine
from trivium.rollout.sampling import Sampling

RIGHT = """
def right(responses):
    return [float(r.count("a") % 2 == 0) for r in responses]

def graded(responses):
    return [r.count("a") / 4 for r in responses]

def by_step(responses):
    return [[((0, len(r)), 1.0)] if r else [] for r in responses]

def never(responses):
    raise OSError("the checker is down")
"""
SOLUTIONS = ["ab.cd.e", "a.b", "hij.aa.b.a", "b.\n.c", "fgh"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checks.py").write_text(RIGHT)
    return tmp_path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def labeling(world: World, texts: Sequence[Any] = SOLUTIONS, **options: Any) -> Any:
    rows = [{"prompt": "ab", "completion": text, "n": i} for i, text in enumerate(texts)]
    settings = {
        "model": {"path": world.path},
        "data": world.rows("solutions.jsonl", rows),
        "rewards": [{"function": "checks.py:right"}],
        "separator": ".",
        "sampling": {"max_tokens": 4},
        "completions": 8,
        "output": "labels.jsonl",
        **options,
    }
    return LabelStepsConfig.model_validate(settings)


def right(text: str) -> bool:
    """Independent implementation of the reward `right`."""
    return len([letter for letter in text if letter == "a"]) % 2 == 0


# --- labels ---------------------------------------------------------------------------------------


def exact_value(world: World, prefix: str) -> float:
    """Return the probability that a completion of one token is right, by the model alone."""
    tokenizer = letters_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(world.path)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer.encode("ab" + prefix)])).logits[0, -1]
    p = logits.double().softmax(-1)
    return sum(float(p[t]) for t in range(len(p)) if right(prefix + tokenizer.decode([t])))


def test_soft_labels_estimate_the_probability_that_a_completion_is_right(world: World) -> None:
    samples = 4096
    config = labeling(world, completions=samples, labels="soft", sampling={"max_tokens": 1})
    for row in lines(label_steps.run(config)):
        *beginnings, whole = [
            ".".join(row["completions"][: k + 1]).rstrip() for k in range(len(row["completions"]))
        ]
        assert row["labels"] == row["values"]
        for prefix, value in zip(beginnings, row["labels"], strict=False):
            p = exact_value(world, prefix)
            assert value == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / samples))
        assert row["labels"][-1] == right(whole)


def test_hard_label_is_whether_any_completion_is_right(world: World) -> None:
    rows = lines(label_steps.run(labeling(world, completions=2)))
    soft = lines(label_steps.run(labeling(world, completions=2, labels="soft", overwrite=True)))
    values = [value for row in soft for value in row["labels"]]
    assert {0.0, 0.5, 1.0} <= set(values)
    assert [label for row in rows for label in row["labels"]] == [value > 0 for value in values]
    assert [row["values"] for row in rows] == [row["labels"] for row in soft]


def test_completions_are_those_of_each_prefix_sampled_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[list[Prompt], list[list[Response]]]] = []
    generate = LocalEngine.generate

    def record(engine: LocalEngine, prompts: Any, *arguments: Any, **options: Any) -> Any:
        found = generate(engine, prompts, *arguments, **options)
        calls.append((prompts, found))
        return found

    monkeypatch.setattr(LocalEngine, "generate", record)
    label_steps.run(labeling(world, ["ab.cd.e"]))
    [(prefixes, found)] = calls
    tokenizer = letters_tokenizer()
    assert [tokenizer.decode(p.tokens) for p in prefixes] == ["abab", "abab.cd"]
    monkeypatch.undo()
    monkeypatch.chdir(world.directory)
    policy = sample.load_sampler(ModelConfig(path=world.path), tokenizer, Sampling())
    for prefix, group in zip(prefixes, found, strict=True):
        [alone] = LocalEngine(policy, {tokenizer.eos_token_id}).generate(
            [prefix], 8, Sampling(max_tokens=4), seed=0, step=label_steps.COMPLETIONS_STEP
        )
        assert [r.tokens for r in alone] == [r.tokens for r in group]


def test_rows_keep_their_columns_and_load_as_step_labels(world: World) -> None:
    path = label_steps.run(labeling(world, [*SOLUTIONS, ["j.a", "i.b"]]))
    rows = lines(path)
    assert list(rows[0]) == ["n", "prompt", "completions", "labels", "values"]
    assert [row["n"] for row in rows] == [0, 1, 2, 3, 4, 5, 5]
    assert [".".join(row["completions"]) for row in rows] == [*SOLUTIONS, "j.a", "i.b"]
    tokenizer = load_tokenizer(ModelConfig(path=world.path))
    read = load_step_labels(StepLabelsConfig(path=str(path), separator="."), tokenizer)
    assert [item.labels for item in read] == [list(map(float, row["labels"])) for row in rows]
    counts = json.loads(path.with_suffix(".counts.json").read_text())
    assert (counts["solutions"], counts["steps"], counts["one_step"]) == (7, 16, 1)
    assert counts["completions"] == 8 * (16 - 7)
    assert counts["generated_tokens"] > counts["completions"]


def test_blank_pieces_belong_to_the_step_before_or_to_the_first() -> None:
    for text, steps in {
        "a\nb": ["a", "b"],
        "a\n\nb\n": ["a\n", "b\n"],
        "\n\na\nb": ["\n\na", "b"],
        "a": ["a"],
        "a\n \nb": ["a\n ", "b"],
    }.items():
        assert split_steps(text, "\n") == steps
        assert "\n".join(steps) == text


# --- sampled solutions ----------------------------------------------------------------------------


def test_sampled_solutions_are_those_of_sample_that_ended(world: World) -> None:
    given = {"model": {"path": world.path}, "data": world.prompts, "sampling": {"max_tokens": 12}}
    responses = lines(
        sample.run(SampleConfig.model_validate({**given, "samples": 16, "output": "all.jsonl"}))
    )
    ended = [row for row in responses if row["finish_reason"] == "eos" and row["response"].strip()]
    assert 0 < len(ended) < len(responses)
    rows = lines(label_steps.run(labeling(world, solutions=16, **_without_model(given))))
    assert [(row["prompt"], ".".join(row["completions"])) for row in rows] == [
        (row["prompt"], row["response"]) for row in ended
    ]
    counts = json.loads(Path("labels.counts.json").read_text())
    left_out = counts.get("truncated", 0) + counts.get("empty", 0)
    assert counts["solutions"] + left_out == 64


def _without_model(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "model"}


# --- solutions that cannot be labeled -------------------------------------------------------------


def test_solution_of_one_step_is_labeled_by_its_reward_without_completions(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="trivium"):
        rows = lines(label_steps.run(labeling(world, ["fgh", "aab", "ab", "a.b"])))
    assert [row["labels"] for row in rows[:3]] == [[True], [True], [False]]
    assert "3 solutions of one step, which need no completions" in caplog.text


def test_empty_solutions_are_left_out_and_counted(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="trivium"):
        rows = lines(label_steps.run(labeling(world, ["", "a.b", [" ", "c.d"]])))
    assert [row["completions"] for row in rows] == [["a", "b"], ["c", "d"]]
    assert "2 left out: empty solution" in caplog.text


def test_file_without_separators_is_refused_with_the_separator(world: World, here: Path) -> None:
    config = labeling(world, separator=";")
    with pytest.raises(DataError, match=r"none of 5 solutions has two steps: the separator ';'"):
        label_steps.run(config)
    (here / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    assert main(["label-steps", "config.yaml"]) == 2
    assert not list(here.glob("labels*"))


def test_sampled_solutions_without_separators_are_refused_and_leave_no_file(
    world: World, here: Path
) -> None:
    config = labeling(world, solutions=4, separator=";", data=world.prompts)
    with pytest.raises(DataError, match=r"none of \d+ solutions has two steps"):
        label_steps.run(config)
    assert not list(here.glob("labels*"))


def test_solution_whose_steps_end_in_one_token_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    vocabulary = {"<eos>": 0, "a": 1, "b": 2, ".": 3, "a.b": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"a\.b|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    splitter = label_steps.StepSplitter(".", fast)
    prompt = Prompt([1], "a", {}, 7)
    split = splitter.solution(prompt, 0, splitter.response([2, 3, 1, 0], "eos"))
    assert split is not None and (split.steps, split.ends) == (["b", "a"], [0, 2])
    assert splitter.solution(prompt, 0, splitter.response([4, 3, 2, 0], "eos")) is None
    assert "row 7: a solution is left out: steps 1 and 2 end in the same token" in caplog.text


def test_solution_beyond_the_context_is_an_error_with_its_row(tmp_path: Path) -> None:
    world = World(tmp_path / "short", max_position_embeddings=16)
    config = labeling(world, ["a.b", "a.b.c.d.e.f.g"])
    with pytest.raises(DataError, match=r"row 1: .* up to 20 tokens, .* context holds 16"):
        label_steps.run(config)


def test_graded_rewards_need_a_threshold(world: World) -> None:
    graded = [{"function": "checks.py:graded"}]
    with pytest.raises(ConfigurationError, match=r"the reward 0\.\d+, which is neither 1"):
        label_steps.run(labeling(world, rewards=graded))
    rows = lines(label_steps.run(labeling(world, rewards=graded, pass_threshold=0.5)))
    assert [row["labels"][-1] for row in rows] == [text.count("a") / 4 >= 0.5 for text in SOLUTIONS]


def test_rewards_of_steps_are_refused(world: World) -> None:
    with pytest.raises(ConfigurationError, match="one of them scores steps"):
        label_steps.run(labeling(world, rewards=[{"function": "checks.py:by_step"}]))
    process = {"function": "process_reward_model", "arguments": {"path": world.path}}
    for reward in ({"function": "steps"}, process):
        with pytest.raises(ValueError, match="scores steps, and the labels come from whole"):
            labeling(world, rewards=[reward])
    process["arguments"]["aggregate"] = "minimum"  # type: ignore[index]
    labeling(world, rewards=[process], pass_threshold=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": {"temperature": 0}}, "all completions would be the same"),
        ({"sampling": {"temperature": 0}, "completions": 1, "solutions": 2}, "all solutions would"),
        ({"rewards": []}, "at least 1"),
        ({"separator": ""}, "at least 1 character"),
    ],
)
def test_conflicting_settings_are_refused(
    world: World, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        labeling(world, **options)


# --- interruptions --------------------------------------------------------------------------------


def interrupted(config: LabelStepsConfig, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command, and interrupt it in the batch number ``after``."""
    calls = iter(range(after))
    right_of = label_steps.Labeler._right

    def stop(labeler: Any, *arguments: Any) -> list[bool]:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return right_of(labeler, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(label_steps.Labeler, "_right", stop)
        with pytest.raises(KeyboardInterrupt, match="rerun the command to resume"):
            label_steps.run(config)


@pytest.mark.parametrize("sampled", [False, True])
def test_labels_after_interruptions_have_the_bits_of_labels_without(
    world: World, here: Path, monkeypatch: pytest.MonkeyPatch, sampled: bool
) -> None:
    monkeypatch.setattr(label_steps, "SOLUTIONS_PER_BATCH", 16 if sampled else 2)
    options: dict[str, Any] = {"labels": "soft"}
    if sampled:
        options |= {"solutions": 16, "data": world.prompts, "sampling": {"max_tokens": 12}}
    whole = label_steps.run(labeling(world, output="whole.jsonl", **options)).read_bytes()
    config = labeling(world, **options)
    journal = here / "labels.jsonl.partial"
    for after in (0, 1, 1):
        interrupted(config, after, monkeypatch)
        assert not (here / "labels.jsonl").exists()
        if journal.exists():  # A write that was interrupted leaves half a line.
            journal.write_bytes(journal.read_bytes() + b'{"rows": [{"pro')
    assert len(journal.read_bytes().split(b"\n")) == 1 + 2 + 1
    assert label_steps.run(config).read_bytes() == whole
    assert sorted(path.name for path in here.glob("labels*")) == [
        "labels.counts.json",
        "labels.jsonl",
    ]
    one, other = (json.loads((here / f"{n}.counts.json").read_text()) for n in ("whole", "labels"))
    for counts in (one, other):
        del counts["seconds"]
    assert one == other


def test_labels_do_not_depend_on_the_batch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first = label_steps.run(labeling(world)).read_bytes()
    monkeypatch.setattr(label_steps, "SOLUTIONS_PER_BATCH", 1)
    assert label_steps.run(labeling(world, overwrite=True)).read_bytes() == first
    assert label_steps.run(labeling(world, overwrite=True, seed=1)).read_bytes() != first


def test_unfinished_labels_of_other_settings_are_not_continued(
    world: World, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_steps, "SOLUTIONS_PER_BATCH", 2)
    interrupted(labeling(world), 1, monkeypatch)
    before = (here / "labels.jsonl.partial").read_bytes()
    changed = labeling(world, seed=1, completions=4)
    with pytest.raises(
        ConfigurationError, match=r"something else now \(seed, completions\): .* delete"
    ):
        label_steps.run(changed)
    assert (here / "labels.jsonl.partial").read_bytes() == before
    fresh = label_steps.run(labeling(world, seed=1, completions=4, overwrite=True)).read_bytes()
    expected = labeling(world, seed=1, completions=4, output="expected.jsonl")
    assert fresh == label_steps.run(expected).read_bytes()


def test_unfinished_labels_of_changed_data_are_not_continued(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_steps, "SOLUTIONS_PER_BATCH", 2)
    interrupted(labeling(world), 1, monkeypatch)
    with pytest.raises(ConfigurationError, match=r"something else now \(.*solutions\.jsonl\)"):
        label_steps.run(labeling(world, [*SOLUTIONS, "a.b"]))


def test_file_of_another_command_is_not_continued(world: World, here: Path) -> None:
    (here / "labels.jsonl.partial").write_text('{"prompt": "a"}\n')
    with pytest.raises(ConfigurationError, match="not an unfinished file of this command"):
        label_steps.run(labeling(world))


def test_budget_ends_labeling_after_a_batch(
    world: World, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_steps, "SOLUTIONS_PER_BATCH", 2)
    rows = lines(label_steps.run(labeling(world, budget={"generated_tokens": 1})))
    assert [row["n"] for row in rows] == [0, 1]


def test_failed_reward_leaves_the_output_absent(world: World, here: Path) -> None:
    with pytest.raises(RewardError, match="the checker is down"):
        label_steps.run(labeling(world, rewards=[{"function": "checks.py:never"}]))
    assert not list(here.glob("labels*"))


def test_rows_without_a_solution_are_named_with_file_and_line(
    world: World, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = world.rows("missing.jsonl", [{"prompt": "a", "completion": "a.b"}, {"prompt": "b"}])
    config = labeling(world, data=data)
    (here / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    assert main(["label-steps", "config.yaml"]) == 2
    assert "missing.jsonl:2: no column `completion`" in capsys.readouterr().err


def test_taken_columns_are_refused(world: World) -> None:
    data = world.rows("taken.jsonl", [{"prompt": "a", "completion": "a.b", "labels": [1]}])
    with pytest.raises(DataError, match="the columns labels, which the output uses"):
        label_steps.run(labeling(world, data=data))
