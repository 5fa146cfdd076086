"""Rewards made of plain functions, scored on four prompts with one response each."""

from __future__ import annotations

from trivium.data.prompts import Prompt
from trivium.data.response import Response
from trivium.rewards.reward import RewardConfig, Rewards

TEXTS = ["aaaa", "bb\x1b[31mbb", "cccc", "dddd"]


def prompt(index=0, text="p", **columns):
    return Prompt(tokens=[1], text=text, columns=columns, index=index)


def response(text, tokens=(1,), finish_reason="eos"):
    return Response(
        tokens=list(tokens), logprobs=[0.0] * len(tokens), finish_reason=finish_reason, text=text
    )


PROMPTS = [prompt(10 + i) for i in range(4)]
RESPONSES = [response(text) for text in TEXTS]


def rewards(*functions, **settings):
    names = [f"f{i}" for i in range(len(functions))]
    configs = [RewardConfig(function=name, **settings) for name in names]
    return Rewards(configs, functions=dict(zip(names, functions, strict=True)))


def score(function, **settings):
    return rewards(function, **settings).score(PROMPTS, RESPONSES)


def returning(result):
    return lambda responses: result


def per_response(values):
    """Return a reward that looks up the value of each response by its text."""
    table = dict(zip(TEXTS, values, strict=True))
    return lambda responses: [table[text] for text in responses]
