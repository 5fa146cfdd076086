"""Components of a run: held-out prompts are rendered as the training data is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import World
from transformers import AutoTokenizer

from trivium.algorithms import dpo, reward_model, sft
from trivium.algorithms.dpo_config import DPOConfig
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.reward_model_config import RewardModelConfig
from trivium.algorithms.sft_config import SFTConfig
from trivium.models.policy import Policy
from trivium.models.reference import Reference
from trivium.training.setup import build_components

TEMPLATE = "{{ 'a' if marked else 'b' }}{% for m in messages %}{{ m.content }}{% endfor %}"
ROW = {"prompt": "cd", "completion": "e", "chosen": "e", "rejected": "f"}


def held_out_prompt(kind: str, world: World, marked: dict[str, Any], own: dict[str, Any]) -> str:
    """Return the first held-out prompt of a run whose training data has the arguments `marked`."""
    data = world.rows("rows.jsonl", [ROW]) | {"chat": True}
    training, held_out = data | marked, data | own
    evaluation = {"data": held_out, "rewards": world.reward("letters"), "max_tokens": 2}
    model: dict[str, Any] = {"model": {"path": world.path}, "run": world.run()}
    tokenizer = AutoTokenizer.from_pretrained(world.path)
    if kind == "sft":
        config = SFTConfig(**model, data=training, evaluation=evaluation)
        tokens = sft.load_evaluation(config, tokenizer, None)[0][0].tokens
    elif kind == "dpo":
        config = DPOConfig(**model, data=training, evaluation=evaluation)
        policy = Policy.load(config.model)
        evaluator = dpo.make_evaluator(config, policy, Reference(policy))
        assert evaluator is not None
        tokens = evaluator.prompts[0].tokens
    elif kind == "grpo":
        options = world.on_policy(data=training, evaluation=evaluation)
        config = GRPOConfig(**options)
        components = build_components(
            config.model, config.data, config.rewards, config.evaluation, config.sampling
        )
        assert components.evaluator is not None
        tokens = components.evaluator.prompts[0].tokens
    else:
        config = RewardModelConfig(**model, pairs=training, validation_pairs=held_out)
        data_set = reward_model.load_data(config)[1]
        assert data_set is not None
        tokens = data_set.groups[0].prompt
    return tokenizer.decode(tokens)


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo", "reward-model"])
def test_held_out_prompts_have_the_template_arguments_of_the_training_data(
    tmp_path: Path, kind: str
) -> None:
    world = World(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(world.path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(world.path)
    marked = {"template_arguments": {"marked": True}}
    assert held_out_prompt(kind, world, marked, {}) == "acd"
    assert held_out_prompt(kind, world, marked, {"template_arguments": {}}) == "bcd"
    assert held_out_prompt(kind, world, {}, {}) == "bcd"
