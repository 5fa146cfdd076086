"""Learned rewards whose model has another vocabulary than the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import checkpoint, letters_tokenizer, perturb
from transformers import AutoTokenizer

from trivium.data.batch import Batch
from trivium.data.encoder import Encoder
from trivium.data.group import Group
from trivium.errors import ConfigurationError
from trivium.hf.model_config import ModelConfig
from trivium.models.reward_model import RewardModel
from trivium.rewards.learned import LearnedRewards
from trivium.rewards.reward_config import RewardConfig

TEMPLATE = (
    "{% if brief %}b{% endif %}{% for t in tools or [] %}{{ t.name }}{% endfor %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)
CHAT = [{"role": "user", "content": "cd"}]


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Write a reward model with letters of its own and a chat template; return its path."""
    start = checkpoint(tmp_path / "start", letters="dcba")
    model = RewardModel.load(ModelConfig(path=start), new_head=True)
    perturb(model.model, seed=11, spread=0.1)
    model.save(tmp_path / "reward-model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward-model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "reward-model")
    return str(tmp_path / "reward-model")


def learned(path: str, tokenizer: Any, **arguments: Any) -> LearnedRewards:
    config = RewardConfig(function="reward_model", arguments={"path": path, **arguments})
    return LearnedRewards([config], tokenizer)


def test_model_reads_the_rows_tools_and_its_template_arguments(path: str) -> None:
    rewards = learned(path, letters_tokenizer())
    model = rewards.models[path]
    encode = Encoder(model.tokenizer).encode_plain
    ends = [model.tokenizer.eos_token_id]
    groups = [Group(encode(p), [encode("a") + ends]) for p in ("bccd", "bcd")]
    expected_N = model.scores(Batch.of(groups)).detach()
    assert expected_N[0] != expected_N[1]
    scores = rewards.outcome(
        [CHAT, CHAT], ["a", "a"], [[0], [0]], [[0], [0]], ["eos", "eos"],
        tools=[[{"name": "c"}], None], template_arguments={"brief": True}, path=path,
    )  # fmt: skip
    assert scores == pytest.approx(expected_N.tolist(), abs=1e-6)


def test_template_arguments_without_effect_are_an_error(path: str) -> None:
    with pytest.raises(ConfigurationError, match="sets long, and the chat template of"):
        learned(path, letters_tokenizer(), template_arguments={"long": True})
    own = AutoTokenizer.from_pretrained(path)
    with pytest.raises(ConfigurationError, match="has the policy's vocabulary and reads the pol"):
        learned(path, own, template_arguments={"brief": True})
