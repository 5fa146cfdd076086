"""Loading of reward functions and errors before the run."""

from __future__ import annotations

import functools
import sys

import pytest

from trivium.config.functions import printable
from trivium.data.prompts import Prompt
from trivium.data.response import Response
from trivium.errors import ConfigurationError
from trivium.rewards.reward import RewardConfig, Rewards

VALID_SOURCE = "def score(prompts, responses, **columns):\n    return [len(r) for r in responses]\n"


@pytest.fixture(autouse=True)
def work_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def load(source, directory=None, functions=None, **settings):
    values = {"function": source, **settings}
    config = RewardConfig.model_validate(values, context={"directory": directory})
    return Rewards([config], functions=functions)


def outcomes_of(rewards):
    prompt = Prompt(tokens=[1], text="p", columns={"answer": "4"}, index=0)
    response = Response(tokens=[1], logprobs=[0.0], finish_reason="eos", text="four")
    return rewards.score([prompt], [response]).outcomes


def error_of(source, **settings):
    with pytest.raises(ConfigurationError) as caught:
        load(source, **settings)
    return str(caught.value)


def test_file_is_found_in_the_current_or_the_configurations_directory(work_dir):
    (work_dir / "mine.py").write_text(VALID_SOURCE)
    nested = work_dir / "configs"
    nested.mkdir()
    (nested / "theirs.py").write_text(VALID_SOURCE.replace("len(r)", "10"))
    assert outcomes_of(load("mine.py:score")) == [4.0]
    assert outcomes_of(load("theirs.py:score", directory=nested)) == [10.0]
    assert outcomes_of(load(f"{nested / 'theirs.py'}:score")) == [10.0]
    (nested / "mine.py").write_text(VALID_SOURCE.replace("len(r)", "20"))
    assert outcomes_of(load("mine.py:score", directory=nested)) == [4.0]


def test_file_can_import_its_neighbors_and_share_a_name_with_another(work_dir):
    for name, value in (("a", 1), ("b", 2)):
        folder = work_dir / name
        folder.mkdir()
        (folder / "same.py").write_text(f"VALUE = {value}\ndef f(responses): return [VALUE]\n")
    both = Rewards(
        [
            RewardConfig(function="a/same.py:f", name="a"),
            RewardConfig(function="b/same.py:f", name="b", weight=10.0),
        ]
    )
    assert outcomes_of(both) == [21.0]
    (work_dir / "a" / "neighbor_of_reward.py").write_text("WORTH = 5.0\n")
    (work_dir / "a" / "user.py").write_text(
        "from neighbor_of_reward import WORTH\ndef f(responses): return [WORTH]\n"
    )
    assert outcomes_of(load("a/user.py:f")) == [5.0]


def test_module_is_found_in_the_current_directory(work_dir):
    package = work_dir / "reward_package_of_test"
    package.mkdir()
    (package / "inner.py").write_text(VALID_SOURCE)
    assert outcomes_of(load("reward_package_of_test.inner:score")) == [4.0]


def test_error_of_a_missing_file_names_every_searched_path(work_dir):
    nested = work_dir / "configs"
    nested.mkdir()
    message = error_of("gone.py:score", directory=nested)
    assert "no such file 'gone.py'" in message
    assert str(work_dir / "gone.py") in message and str(nested / "gone.py") in message


def test_error_of_a_missing_function_suggests_the_closest_name(work_dir):
    (work_dir / "mine.py").write_text(VALID_SOURCE)
    assert "no function 'scor' (did you mean 'score'?)" in error_of("mine.py:scor")


def test_object_that_is_not_a_function_is_refused(work_dir):
    (work_dir / "mine.py").write_text("score = 3\nclass Reward:\n    def __call__(self): ...\n")
    assert "not a function but int 3" in error_of("mine.py:score")
    assert "not a function but a class" in error_of("mine.py:Reward")


@pytest.mark.parametrize(
    ("code", "line", "error"),
    [
        ("import os\nx = 1 / 0\n", 2, "ZeroDivisionError"),
        ("\n\ndef score(:\n", 3, "SyntaxError"),
        ("\nimport module_that_is_not_there\n", 2, "ModuleNotFoundError"),
        ("import sys\nsys.exit(4)\n", 2, "SystemExit: 4"),
    ],
)
def test_import_error_names_the_line_in_the_users_file(work_dir, code, line, error):
    (work_dir / "broken.py").write_text(code)
    (work_dir / "broken_module.py").write_text(code)
    for source in ("broken.py:score", "broken_module:score"):
        message = error_of(source)
        assert f"{source.partition(':')[0].removesuffix('.py')}.py:{line}: {error}" in message


def test_missing_module_is_distinguished_from_a_failing_one():
    message = error_of("no_such_module.inner:score")
    assert "no module named 'no_such_module'" in message and "file.py:function" in message


def test_error_of_an_unknown_built_in_name_lists_all_names():
    message = error_of("gsm8")
    assert "did you mean 'gsm8k'?" in message
    assert "code, format, gsm8k, language, length, math, server, steps, tags" in message
    assert "names no function" in error_of("file.py:")


@pytest.mark.parametrize(
    ("signature", "reason"),
    [
        ("responses, /", "positional-only"),
        ("prompts, completions", "does not accept 'responses'"),
        ("", "does not accept 'responses'"),
    ],
)
def test_signature_that_cannot_be_called_is_refused(work_dir, signature, reason):
    (work_dir / "mine.py").write_text(f"def score({signature}): return []\n")
    assert reason in error_of("mine.py:score")


def test_all_unaccepted_arguments_are_reported_together(work_dir):
    (work_dir / "mine.py").write_text("def score(responses, scale, answer): return []\n")
    message = error_of(
        "mine.py:score",
        arguments={"scal": 1, "prompts": []},
        columns={"anser": "x", "scale": "y"},
    )
    assert "arguments sets 'scal', which it does not accept (did you mean 'scale'?)" in message
    assert "arguments sets 'prompts', which every call sets: rename it" in message
    assert "columns sets 'anser', which it does not accept (did you mean 'answer'?)" in message
    message = error_of("mine.py:score", arguments={"scale": 1}, columns={"scale": "y"})
    assert "'scale' is both in arguments and in columns" in message


def test_errors_of_several_rewards_are_reported_together():
    configs = [RewardConfig(function=f) for f in ("gone.py:f", "mth", "format")]
    with pytest.raises(ConfigurationError) as caught:
        Rewards(configs)
    lines = str(caught.value).splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["rewards.0", "rewards.1", "rewards.2"]


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("format", {"pattern": "("}, "not a regular expression"),
        ("format", {"pattern": 3}, "must be a text"),
        ("format", {"pattern": "a", "whole": "yes"}, "whole"),
        ("format", {"pattern": "a", "seconds": 0}, "seconds"),
        ("length", {"limit": 10, "buffer": 20}, "must not be above limit"),
        ("length", {"limit": True, "buffer": 1}, "limit must be a whole number"),
        ("gsm8k", {"markers": "####"}, "markers must be a list"),
        ("gsm8k", {"markers": []}, "markers must be a list"),
        ("math", {"seconds": 0.5}, "whole number"),
        ("math", {"boxed": 1}, "boxed"),
        ("steps", {"separator": ""}, "separator"),
        ("steps", {"without_equation": True}, "without_equation"),
        ("steps", {"exact": 1}, "exact"),
    ],
)
def test_built_in_rewards_check_their_arguments_before_the_run(name, arguments, reason):
    assert reason in error_of(name, arguments=arguments)


def test_built_in_reward_names_every_missing_argument():
    message = error_of("length")
    assert "it needs 'limit': set it in 'arguments'" in message
    assert "it needs 'buffer': set it in 'arguments'" in message


def test_partial_functions_and_callable_objects_are_rewards():
    class Counter:
        def __call__(self, responses, *, bonus):
            return [len(r) + bonus for r in responses]

    partial = functools.partial(Counter(), bonus=1)
    assert outcomes_of(load("f", functions={"f": partial})) == [5.0]
    assert outcomes_of(load("f", functions={"f": Counter()}, arguments={"bonus": 2})) == [6.0]


def test_printable_escapes_control_characters_and_shortens():
    assert printable("a\x1b[31mb\nc\udce4é") == r"a\x1b[31mb\nc\udce4é"
    assert printable("x" * 999, limit=5) == "xxxxx…"
