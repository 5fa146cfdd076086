"""Saved checkpoints: plain ``transformers`` finds the model that was trained."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.data_tokenizers import chatml_tokenizer
from helpers.tiny_models import (
    EOS,
    SEPARATE,
    SHARING,
    World,
    checkpoint,
    family,
    perturb,
    random_lm,
    rows,
)
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from trivium.algorithms import dpo, grpo, sft
from trivium.algorithms.dpo_config import DPOConfig
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.sft_config import SFTConfig
from trivium.hf.model_config import LoraConfig, ModelConfig
from trivium.hf.saving import SaveCheck
from trivium.models import flops
from trivium.models.policy import Policy
from trivium.models.reward_model import RewardModel


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


# --- ends of responses ----------------------------------------------------------------------------


def chat_checkpoint(directory: Path, **generation: Any) -> str:
    """Write a model whose EOS is 0, beside a chat template that ends turns with another token."""
    tokenizer = chatml_tokenizer()
    model = random_lm(family("llama", len(tokenizer), eos_token_id=0))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    file = directory / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | generation))
    return str(directory)


def saved_ends(directory: Path) -> Any:
    return json.loads((directory / "generation_config.json").read_text())["eos_token_id"]


def test_generation_ends_at_the_bases_own_tokens_and_at_the_templates_turn_end(
    tmp_path: Path,
) -> None:
    path = chat_checkpoint(tmp_path / "base", eos_token_id=[0, 7])
    Policy.load(ModelConfig(path=path)).save(tmp_path / "saved")
    turn_end = chatml_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert turn_end not in (0, 7)
    assert saved_ends(tmp_path / "saved") == [0, 7, turn_end]


def test_a_single_end_token_stays_a_number(llama: str, tmp_path: Path) -> None:
    Policy.load(ModelConfig(path=llama)).save(tmp_path)
    assert saved_ends(tmp_path) == EOS


def test_faults_of_the_bases_generation_configuration_do_not_prevent_saving(
    tmp_path: Path,
) -> None:
    path = chat_checkpoint(tmp_path / "base", do_sample=False, temperature=0.5)
    with pytest.raises(ValueError, match="temperature"):
        GenerationConfig.from_pretrained(path).validate(strict=True)
    Policy.load(ModelConfig(path=path)).save(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert written["temperature"] == 0.5
    assert len(written["eos_token_id"]) == 2


def test_reward_models_get_no_generation_configuration(llama: str, tmp_path: Path) -> None:
    RewardModel.load(ModelConfig(path=llama), new_head=True).save(tmp_path)
    assert not (tmp_path / "generation_config.json").exists()


def test_model_fine_tuned_on_chats_stops_by_itself_in_plain_transformers(tmp_path: Path) -> None:
    path = chat_checkpoint(tmp_path / "base")
    turns = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": "9"}]
    config = {
        "model": {"path": path},
        "data": {"path": rows(tmp_path / "rows.jsonl", [{"messages": turns}])},
        "optimizer": {"learning_rate": 1e-2},
        "epochs": 20,
        "run": {"directory": str(tmp_path / "run")},
    }
    final = sft.train(SFTConfig.model_validate(config)) / "final"
    tokenizer = chatml_tokenizer()
    prompt = tokenizer.apply_chat_template(
        turns[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = AutoModelForCausalLM.from_pretrained(final)
    full = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]
    response = full[prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(response) == "9<|im_end|>"


@pytest.mark.parametrize("kind", ["grpo", "dpo"])
def test_tokens_that_ended_sampled_responses_end_generation(world: World, kind: str) -> None:
    sampling = {"max_tokens": 8, "stop_tokens": [3]}
    if kind == "grpo":
        final = grpo.train(
            GRPOConfig.model_validate(world.on_policy(sampling=sampling, steps_per_iteration=1))
        )
    else:
        online = {
            "data": world.prompts,
            "rewards": world.reward("letters"),
            "sampling": sampling,
            "responses_per_prompt": 4,
            "steps": 1,
        }
        config = {"model": {"path": world.path}, "online": online, "run": world.run()}
        final = dpo.train(DPOConfig.model_validate(config))
    assert saved_ends(final / "final") == [EOS, 3]


# --- comparison with the trained model ------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_model_is_saved_bit_by_bit(tmp_path: Path, dtype: str) -> None:
    path = checkpoint(tmp_path / "base", dtype=dtype)
    policy = Policy.load(ModelConfig.model_validate({"path": path, "dtype": dtype}))
    perturb(policy.model, seed=3, spread=0.1)
    check = policy.save(tmp_path / "saved")
    assert check == SaveCheck(dtype, 0.0)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(
        torch.equal(p, q)
        for p, q in zip(plain.parameters(), policy.model.parameters(), strict=True)
    )


def test_saved_weights_that_are_not_the_trained_ones_are_told(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(ModelConfig(path=llama))
    write = type(policy.base).save_pretrained

    def write_wrongly(model: PreTrainedModel, directory: Path) -> None:
        wrong = copy.deepcopy(model)
        perturb(wrong.get_output_embeddings(), seed=1, spread=1e-6)
        write(wrong, directory)

    monkeypatch.setattr(type(policy.base), "save_pretrained", write_wrongly)
    check = policy.save(tmp_path)
    assert check.difference is None
    assert "1 saved weights or settings (lm_head.weight …) differ from the tr" in check.message


def test_saved_settings_that_are_not_the_trained_ones_are_told(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(ModelConfig(path=llama))
    write = type(policy.base).save_pretrained

    def write_wrongly(model: PreTrainedModel, directory: Path) -> None:
        write(model, directory)
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.5}))

    monkeypatch.setattr(type(policy.base), "save_pretrained", write_wrongly)
    check = policy.save(tmp_path)
    assert check.difference is None
    assert "1 saved weights or settings (rms_norm_eps …) differ" in check.message


@pytest.mark.parametrize("name", [*SHARING, *SEPARATE])
def test_no_family_is_told_of_a_difference_that_is_none(name: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "base", name)
    assert Policy.load(ModelConfig(path=path)).save(tmp_path / "saved") == SaveCheck("float32", 0.0)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_saved_model_that_cannot_be_loaded_is_told(
    llama: str, tmp_path: Path, lora: LoraConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(ModelConfig(path=llama, lora=lora))
    monkeypatch.setattr(type(policy.base), "save_pretrained", lambda *_: None)
    check = policy.save(tmp_path)
    assert "could not be compared" in check.message


def test_saving_changes_no_random_state_and_counts_no_flops(llama: str, tmp_path: Path) -> None:
    policy = Policy.load(ModelConfig(path=llama, lora=LoraConfig(rank=2)))
    before, cost = torch.random.get_rng_state(), flops.total()
    attention = policy.base.config._attn_implementation
    policy.save(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert flops.total() == cost
    assert policy.base.config._attn_implementation == attention
    assert policy.model.training


def test_run_reports_how_its_saved_model_compares(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = checkpoint(tmp_path / "base", dtype="bfloat16")
    config = {
        "model": {"path": path, "dtype": "bfloat16", "lora": {"rank": 2}},
        "data": {"path": rows(tmp_path / "rows.jsonl", [{"prompt": "ab", "completion": "cd"}])},
        "optimizer": {"learning_rate": 1e-3},
        "epochs": 2,
        "run": {"directory": str(tmp_path / "run")},
    }
    run = sft.train(SFTConfig.model_validate(config))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (event,) = (event for event in events if event["kind"] == "compared")
    assert event["name"] == "final"
    assert event["dtype"] == "float32"
    assert event["difference"] < 1e-4
    assert "rounded to bfloat16" in event["message"]
    assert "rounded to bfloat16" in caplog.text
