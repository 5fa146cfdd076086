"""Finding a user's reward function, and refusing one that cannot be called, before the run."""

from __future__ import annotations

import functools
import sys

import pytest

from trivium.config.functions import printable
from trivium.data.prompts import Prompt
from trivium.errors import ConfigurationError
from trivium.rewards.reward import RewardConfig, Rewards
from trivium.rollout.engine import Response

GOOD = "def score(prompts, responses, **columns):\n    return [len(r) for r in responses]\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def load(source, directory=None, functions=None, **settings):
    values = {"function": source, **settings}
    config = RewardConfig.model_validate(values, context={"directory": directory})
    return Rewards([config], functions=functions)


def scored(rewards):
    prompt = Prompt(tokens=[1], text="p", columns={"answer": "4"}, index=0)
    response = Response(tokens=[1], logprobs=[0.0], finish_reason="eos", text="four")
    return rewards.score([prompt], [response]).outcomes


def refused(source, **settings):
    with pytest.raises(ConfigurationError) as caught:
        load(source, **settings)
    return str(caught.value)


def test_a_file_is_found_in_the_current_directory_or_the_configuration_s(here):
    (here / "mine.py").write_text(GOOD)
    nested = here / "configs"
    nested.mkdir()
    (nested / "theirs.py").write_text(GOOD.replace("len(r)", "10"))
    assert scored(load("mine.py:score")) == [4.0]
    assert scored(load("theirs.py:score", directory=nested)) == [10.0]
    assert scored(load(f"{nested / 'theirs.py'}:score")) == [10.0]
    (nested / "mine.py").write_text(GOOD.replace("len(r)", "20"))
    assert scored(load("mine.py:score", directory=nested)) == [4.0]


def test_a_file_may_import_its_neighbors_and_two_files_may_share_a_name(here):
    for name, value in (("a", 1), ("b", 2)):
        folder = here / name
        folder.mkdir()
        (folder / "same.py").write_text(f"VALUE = {value}\ndef f(responses): return [VALUE]\n")
    both = Rewards(
        [
            RewardConfig(function="a/same.py:f", name="a"),
            RewardConfig(function="b/same.py:f", name="b", weight=10.0),
        ]
    )
    assert scored(both) == [21.0]
    (here / "a" / "neighbor_of_reward.py").write_text("WORTH = 5.0\n")
    (here / "a" / "user.py").write_text(
        "from neighbor_of_reward import WORTH\ndef f(responses): return [WORTH]\n"
    )
    assert scored(load("a/user.py:f")) == [5.0]


def test_a_module_is_found_in_the_current_directory(here):
    package = here / "reward_package_of_test"
    package.mkdir()
    (package / "inner.py").write_text(GOOD)
    assert scored(load("reward_package_of_test.inner:score")) == [4.0]


def test_a_missing_file_names_every_place_looked_at(here):
    nested = here / "configs"
    nested.mkdir()
    message = refused("gone.py:score", directory=nested)
    assert "no such file 'gone.py'" in message
    assert str(here / "gone.py") in message and str(nested / "gone.py") in message


def test_a_missing_function_names_the_nearest(here):
    (here / "mine.py").write_text(GOOD)
    assert "no function 'scor' (did you mean 'score'?)" in refused("mine.py:scor")


def test_what_is_not_a_function_is_refused(here):
    (here / "mine.py").write_text("score = 3\nclass Reward:\n    def __call__(self): ...\n")
    assert "not a function but int 3" in refused("mine.py:score")
    assert "not a function but a class" in refused("mine.py:Reward")


@pytest.mark.parametrize(
    ("code", "line", "error"),
    [
        ("import os\nx = 1 / 0\n", 2, "ZeroDivisionError"),
        ("\n\ndef score(:\n", 3, "SyntaxError"),
        ("\nimport module_that_is_not_there\n", 2, "ModuleNotFoundError"),
        ("import sys\nsys.exit(4)\n", 2, "SystemExit: 4"),
    ],
)
def test_an_import_error_names_the_user_s_line(here, code, line, error):
    (here / "broken.py").write_text(code)
    (here / "broken_module.py").write_text(code)
    for source in ("broken.py:score", "broken_module:score"):
        message = refused(source)
        assert f"{source.partition(':')[0].removesuffix('.py')}.py:{line}: {error}" in message


def test_a_module_that_does_not_exist_is_told_from_one_that_fails():
    message = refused("no_such_module.inner:score")
    assert "no module named 'no_such_module'" in message and "file.py:function" in message


def test_an_unknown_built_in_name_gives_the_nearest_and_all():
    message = refused("gsm8")
    assert "did you mean 'gsm8k'?" in message
    assert "format, gsm8k, length, math, server, steps" in message
    assert "names no function" in refused("file.py:")


@pytest.mark.parametrize(
    ("signature", "reason"),
    [
        ("responses, /", "positional-only"),
        ("prompts, completions", "does not accept 'responses'"),
        ("", "does not accept 'responses'"),
    ],
)
def test_a_signature_that_no_call_can_meet_is_refused(here, signature, reason):
    (here / "mine.py").write_text(f"def score({signature}): return []\n")
    assert reason in refused("mine.py:score")


def test_arguments_the_function_does_not_accept_are_refused_all_at_once(here):
    (here / "mine.py").write_text("def score(responses, scale, answer): return []\n")
    message = refused(
        "mine.py:score",
        arguments={"scal": 1, "prompts": []},
        columns={"anser": "x", "scale": "y"},
    )
    assert "arguments sets 'scal', which it does not accept (did you mean 'scale'?)" in message
    assert "arguments sets 'prompts', which every call sets itself" in message
    assert "columns sets 'anser', which it does not accept (did you mean 'answer'?)" in message
    twice = refused("mine.py:score", arguments={"scale": 1}, columns={"scale": "y"})
    assert "'scale' is both in arguments and in columns" in twice


def test_faults_of_several_rewards_are_reported_together():
    configs = [RewardConfig(function=f) for f in ("gone.py:f", "mth", "format")]
    with pytest.raises(ConfigurationError) as caught:
        Rewards(configs)
    lines = str(caught.value).splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["rewards.0", "rewards.1", "rewards.2"]


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("format", {"pattern": "("}, "no regular expression"),
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
    assert reason in refused(name, arguments=arguments)


def test_a_built_in_reward_names_every_argument_it_lacks():
    message = refused("length")
    assert "it needs 'limit': set it in 'arguments'" in message
    assert "it needs 'buffer': set it in 'arguments'" in message


def test_partial_functions_and_callable_objects_are_rewards():
    class Counter:
        def __call__(self, responses, *, bonus):
            return [len(r) + bonus for r in responses]

    partial = functools.partial(Counter(), bonus=1)
    assert scored(load("f", functions={"f": partial})) == [5.0]
    assert scored(load("f", functions={"f": Counter()}, arguments={"bonus": 2})) == [6.0]


def test_printable_text_holds_no_control_character_and_is_short():
    assert printable("a\x1b[31mb\nc\udce4é") == r"a\x1b[31mb\nc\udce4é"
    assert printable("x" * 999, limit=5) == "xxxxx…"
