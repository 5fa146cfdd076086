"""Supervised fine-tuning on a tiny model: whose tokens are learned, and how they are weighed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    EOS,
    STILL,
    Captured,
    World,
    letters_tokenizer,
    metrics_of,
    random_lm,
)
from helpers.tiny_models import family as model_family
from torch import Tensor
from transformers import AutoModelForCausalLM

from trivium.algorithms import sft
from trivium.algorithms.sft import batch_indices
from trivium.algorithms.sft_config import SFTConfig
from trivium.runs.store import read_evaluations

TEXTS = [("ab", "cdef"), ("g", "hi"), ("j", "a.b.c.d")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def data_of(world: World) -> dict[str, Any]:
    return world.rows("texts.jsonl", [{"prompt": p, "completion": c} for p, c in TEXTS])


def config_of(world: World, **options: Any) -> SFTConfig:
    given = {"model": {"path": world.path}, "data": data_of(world), "run": world.run()}
    return SFTConfig(**(given | {"optimizer": STILL, "steps": 1} | options))


def token_losses(world: World) -> list[Tensor]:
    """−log π of each response token, EOS included, by plain transformers."""
    plain = AutoModelForCausalLM.from_pretrained(world.path)
    found = []
    for prompt, completion in TEXTS:
        ids = letters_tokenizer().encode(prompt + completion + "<eos>")
        log_p = plain(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        at = torch.arange(len(prompt), len(ids))
        found.append(-log_p[at - 1, torch.tensor(ids)[at]].detach())
    return found


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "fixed_length"])
def test_loss_is_that_of_the_response_tokens_by_plain_transformers(
    world: World, aggregation: str
) -> None:
    data = data_of(world) | {"max_response_tokens": 10}
    run = sft.train(config_of(world, data=data, aggregation=aggregation, tokens_per_micro_batch=12))
    losses = token_losses(world)
    expected = {
        "token_mean": torch.cat(losses).mean(),
        "sequence_mean": torch.stack([row.mean() for row in losses]).mean(),
        "fixed_length": torch.stack([row.sum() / 10 for row in losses]).mean(),
    }[aggregation]
    (line,) = metrics_of(run)
    assert line["loss"] == pytest.approx(float(expected), abs=1e-5)
    assert line["nll"] == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)
    assert line["tokens/trained"] == sum(len(row) for row in losses) == 16


def test_tokens_of_others_are_read_but_not_learned(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chat"
    tokenizer = letters_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'a' + m['content'] + '.' }}"
        "{% else %}{{ m['content'] + '<eos>' }}{% endif %}{% endfor %}"
    )
    random_lm(model_family("llama", 13), spread=0.2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    chat = [("user", "b"), ("assistant", "cd"), ("user", "ef"), ("assistant", "g")]
    messages = [{"role": role, "content": content} for role, content in chat]
    data = world.rows("chat.jsonl", [{"messages": messages}])
    captured = Captured(monkeypatch)
    run = sft.train(config_of(world, model={"path": str(path)}, data=data))
    (line,) = metrics_of(run)

    plain = AutoModelForCausalLM.from_pretrained(path)
    ids = tokenizer.encode("ab.cd<eos>aef.g<eos>")
    log_p = plain(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    trained = [3, 4, 5, 10, 11]
    assert [ids[i] for i in trained] == [3, 4, EOS, 7, EOS]
    loss = -torch.stack([log_p[i - 1, ids[i]] for i in trained]).mean()
    loss.backward()
    assert line["tokens/trained"] == 5
    assert line["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert line["nll"] == pytest.approx(float(loss.detach()), abs=1e-5)
    (gradients,) = captured.take()
    matrices = [p.grad for p in plain.parameters() if p.dim() >= 2]
    for mine, theirs in zip(gradients, matrices, strict=False):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_loss_falls_to_nothing_on_what_is_repeated(world: World) -> None:
    config = config_of(
        world, steps=None, epochs=60.0, optimizer={"learning_rate": 0.01},
        validation=data_of(world), examples_per_step=3,
    )  # fmt: skip
    run = sft.train(config)
    lines = metrics_of(run)
    assert lines[0]["loss"] > 2.0
    assert lines[-1]["loss"] < 0.05
    assert read_evaluations(run)[-1]["nll"] < 0.05
    plain = AutoModelForCausalLM.from_pretrained(run / "final")
    ids = torch.tensor([letters_tokenizer().encode("ab")])
    out = plain.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, pad_token_id=1
    )
    assert letters_tokenizer().decode(out[0]) == "abcdef<eos>"


def test_curriculum_goes_from_short_to_long_in_the_first_pass_only() -> None:
    def indices(step: int) -> list[int]:
        return batch_indices(6, 2, step, 0, in_order=True)

    assert [indices(step) for step in (1, 2, 3)] == [[0, 1], [2, 3], [4, 5]]
    later = [sorted(i for step in steps for i in indices(step)) for steps in ((4, 5, 6), (7, 8, 9))]
    assert later == [[0, 1, 2, 3, 4, 5]] * 2
    assert [i for step in (4, 5, 6) for i in indices(step)] != [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregation": "fixed_length"}, "max_response_tokens"),
        ({"epochs": 2.0}, "give one of them"),
        ({"evaluation": "without rewards"}, "name what measures quality"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    world: World, options: dict[str, Any], message: str
) -> None:
    if "evaluation" in options:
        options = {"evaluation": {"data": world.prompts}}
    with pytest.raises(ValueError, match=message):
        config_of(world, **options)


def test_held_out_prompts_are_answered_and_scored(world: World) -> None:
    evaluation = {"data": world.prompts, "rewards": world.reward("letters"), "max_tokens": 6}
    run = sft.train(config_of(world, evaluation=evaluation))
    assert (run / "evaluation.jsonl").read_text().count("\n") >= 1
    assert (run / "samples.jsonl").read_text().count("\n") >= 8
