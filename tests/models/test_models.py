"""Loading and saving of policies, adapters, references, reward models and critics."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from helpers.tiny_models import (
    EOS,
    RAGGED,
    checkpoint,
    family,
    letters_tokenizer,
    perturb,
    plain_logprobs,
    random_groups,
    random_lm,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from trivium.data.batch import Batch
from trivium.data.group import Group
from trivium.errors import ModelError
from trivium.hf import loading
from trivium.hf.adapters import unwrap_peft
from trivium.hf.checkpoint_files import context_of
from trivium.hf.loading import dtype_of, load_tokenizer, trained_parameters
from trivium.hf.model_config import LoraConfig, ModelConfig
from trivium.models.critic import VALUE_HEAD_FILE, SeparateCritic, SharedCritic
from trivium.models.policy import Policy
from trivium.models.reference import Reference
from trivium.models.reward_model import RewardModel

GROUPS = random_groups(13, *RAGGED)
BATCH = Batch.of(GROUPS)
LORA = LoraConfig(rank=2, alpha=8.0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("llama"))


def policy_at(path: str | Path, **options: object) -> Policy:
    return Policy.load(ModelConfig(path=str(path), **options))


def logprobs(policy: Policy | Reference) -> Tensor:
    return policy.logprobs(BATCH).detach()


def states(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def move(policy: Policy, seed: int = 5) -> None:
    """Change every trained parameter."""
    perturb(torch.nn.ParameterList(trained_parameters(policy.model)), seed=seed, spread=0.1)


# --- policies -------------------------------------------------------------------------------------


def test_saved_policy_loads_in_plain_transformers_with_tokenizer_and_chat_template(
    llama: str, tmp_path: Path
) -> None:
    policy = policy_at(llama)
    policy.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    move(policy)
    policy.save(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    torch.testing.assert_close(plain_logprobs(plain, GROUPS), logprobs(policy), atol=1e-5, rtol=0)
    assert tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert tokenizer.eos_token_id == EOS
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert rendered == "ab"


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_saved_configuration_does_not_carry_our_attention(
    llama: str, tmp_path: Path, lora: LoraConfig | None
) -> None:
    policy_at(llama, lora=lora).save(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    original = json.loads((Path(llama) / "config.json").read_text())
    assert written == original
    assert not any("trivium" in path.read_text() for path in tmp_path.rglob("*.json"))
    assert [p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")] == []


def test_loaded_models_have_no_dropout(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    policy = policy_at(path)
    assert policy.model.training
    assert torch.equal(logprobs(policy), logprobs(policy))
    plain = AutoModelForCausalLM.from_pretrained(path)
    torch.testing.assert_close(logprobs(policy), plain_logprobs(plain, GROUPS), atol=1e-5, rtol=0)


def test_temperature_divides_the_logits_everywhere(llama: str) -> None:
    policy = Policy.load(ModelConfig(path=llama), temperature=0.6)
    plain = AutoModelForCausalLM.from_pretrained(llama)
    expected_T = plain_logprobs(plain, GROUPS, temperature=0.6)
    torch.testing.assert_close(logprobs(policy), expected_T, atol=1e-5, rtol=0)
    assert torch.equal(logprobs(Reference(policy)), logprobs(policy))


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_gradient_checkpointing_gives_the_same_gradients(
    llama: str, lora: LoraConfig | None
) -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        policy = policy_at(llama, lora=lora, gradient_checkpointing=checkpointing)
        move(policy)
        policy.score(BATCH).logprobs_T.mean().backward()
        found.append([p.grad for p in trained_parameters(policy.model)])
    assert any(float(g.abs().max()) > 1e-3 for g in found[0])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-7, rtol=1e-6)


def test_gradient_checkpointing_recomputes_the_layers(llama: str) -> None:
    policy = policy_at(llama, gradient_checkpointing=True)
    calls = []
    layer = policy.backbone.layers[0].input_layernorm
    layer.register_forward_hook(lambda *_: calls.append(1))
    policy.score(BATCH).logprobs_T.sum().backward()
    assert len(calls) == 2


def test_bfloat16_policy_scores_near_float32_and_trains(llama: str) -> None:
    exact_T = logprobs(policy_at(llama))
    policy = policy_at(llama, dtype="bfloat16")
    assert policy.shared
    scores = policy.score(BATCH)
    assert scores.logprobs_T.dtype == torch.float32
    torch.testing.assert_close(scores.logprobs_T, exact_T, atol=0.1, rtol=0)
    scores.logprobs_T.mean().backward()
    grads = [p.grad for p in policy.model.parameters()]
    assert all(g is not None and g.dtype == torch.bfloat16 and g.isfinite().all() for g in grads)


def test_float64_policy_agrees_with_plain_transformers_to_twelve_digits(llama: str) -> None:
    policy = policy_at(llama, dtype="float64")
    plain = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)
    found = []
    for group in GROUPS:
        for response in group.responses:
            log_p = plain(input_ids=torch.tensor([group.prompt + response])).logits[0]
            log_p = log_p.log_softmax(-1)[len(group.prompt) - 1 : -1]
            found.append(log_p.gather(1, torch.tensor(response)[:, None])[:, 0])
    torch.testing.assert_close(logprobs(policy), torch.cat(found).detach(), atol=1e-12, rtol=0)


def test_context_length_is_the_models(llama: str) -> None:
    assert policy_at(llama).context_length == 64


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, 64),
        ({"rope_type": "dynamic", "factor": 2.5}, 160),
        ({"rope_type": "linear", "factor": 4.0}, 64),
        (
            {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 32}
            | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
            64,
        ),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else str(value),
)
def test_context_is_the_one_that_the_rotary_embeddings_are_scaled_to(
    tmp_path: Path, rope: dict[str, object], context: int
) -> None:
    path = checkpoint(tmp_path, rope_parameters={"rope_theta": 1e4, **rope})
    assert policy_at(path).context_length == context
    assert loading.context_length(ModelConfig(path=path)) == context
    assert context_of(path) == context


def test_context_of_an_older_configuration_is_scaled_too(tmp_path: Path) -> None:
    path = Path(checkpoint(tmp_path))
    config = json.loads((path / "config.json").read_text())
    del config["rope_parameters"]
    old = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    (path / "config.json").write_text(json.dumps(config | {"rope_scaling": old}))
    assert context_of(str(path)) == loading.context_length(ModelConfig(path=str(path))) == 128


# --- adapters and references ----------------------------------------------------------------------


def test_only_adapters_are_trained_with_lora(llama: str) -> None:
    policy = policy_at(llama, lora=LORA)
    names = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    torch.testing.assert_close(logprobs(policy), logprobs(policy_at(llama)), atol=1e-6, rtol=0)


def test_initial_adapters_depend_only_on_their_seed_and_draw_no_random_numbers(
    llama: str,
) -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        policy = policy_at(llama, lora=LORA)
        assert torch.equal(torch.random.get_rng_state(), before)
        found.append([p.detach() for p in trained_parameters(policy.model)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    other = trained_parameters(policy_at(llama, lora=LORA.model_copy(update={"seed": 3})).model)
    assert not all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_reference_of_a_lora_policy_is_its_base(llama: str) -> None:
    policy = policy_at(llama, lora=LORA)
    reference = Reference(policy)
    base_T, before_T = logprobs(policy_at(llama)), logprobs(policy)
    move(policy)
    moved_T = logprobs(policy)
    assert float((moved_T - base_T).abs().max()) > 0.01
    torch.testing.assert_close(logprobs(reference), base_T, atol=1e-6, rtol=0)
    assert torch.equal(logprobs(reference), before_T)
    assert torch.equal(logprobs(policy), moved_T)
    assert trained_parameters(policy.model)


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_refreshed_reference_equals_the_policy_at_that_time(
    llama: str, lora: LoraConfig | None
) -> None:
    policy = policy_at(llama, lora=lora)
    reference = Reference(policy)
    move(policy, seed=1)
    then_T = logprobs(policy)
    assert not torch.equal(logprobs(reference), then_T)
    reference.refresh()
    assert torch.equal(logprobs(reference), then_T)
    move(policy, seed=2)
    assert torch.equal(logprobs(reference), then_T)
    assert not torch.equal(logprobs(policy), then_T)
    policy.score(BATCH).logprobs_T.sum().backward()
    assert all(p.grad is not None for p in trained_parameters(policy.model))


def test_reference_has_no_gradient_and_never_changes(llama: str) -> None:
    policy = policy_at(llama)
    reference = Reference(policy)
    before_T = logprobs(reference)
    assert not reference.logprobs(BATCH).requires_grad
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.1)
    (policy.score(BATCH).logprobs_T - reference.logprobs(BATCH)).sum().backward()
    optimizer.step()
    assert torch.equal(logprobs(reference), before_T)
    assert not torch.equal(logprobs(policy), before_T)


def test_merged_adapters_load_in_plain_transformers_with_equal_logits(
    llama: str, tmp_path: Path
) -> None:
    policy = policy_at(llama, lora=LORA)
    move(policy)
    before = states(policy.model)
    policy.save(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(plain, "peft_config")
    torch.testing.assert_close(plain_logprobs(plain, GROUPS), logprobs(policy), atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == EOS
    assert all(torch.equal(before[name], now) for name, now in states(policy.model).items())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapter_folder_loads_with_peft(llama: str, tmp_path: Path) -> None:
    policy = policy_at(llama, lora=LORA)
    move(policy)
    policy.save(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(llama)
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(plain_logprobs(adapted, GROUPS), logprobs(policy), atol=1e-5, rtol=0)


def test_unknown_lora_target_is_a_clear_error(llama: str) -> None:
    with pytest.raises(ModelError, match=r"model.lora.targets is \['nowhere'\]"):
        policy_at(llama, lora=LoraConfig(targets=["nowhere"]))


def test_adapters_on_the_head_are_refused(llama: str) -> None:
    with pytest.raises(ModelError, match=r"leave the head out of model.lora.targets"):
        policy_at(llama, lora=LoraConfig(targets=["lm_head"]))


def test_head_with_unknown_operations_is_refused() -> None:
    model = random_lm(family("llama"))
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.square())
    with pytest.raises(ModelError, match="log-probs would be wrong"):
        Policy(model, letters_tokenizer())


# --- invalid checkpoints --------------------------------------------------------------------------


def test_directory_without_configuration_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"without config\.json"):
        policy_at(tmp_path)


def test_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no checkpoint directory"):
        policy_at(tmp_path / "nowhere")


def test_checkpoint_without_tokenizer_is_a_clear_error(llama: str, tmp_path: Path) -> None:
    for path in Path(llama).iterdir():
        if "tokenizer" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ModelError, match=r"no tokenizer that can be loaded .*tokenizer\.json"):
        policy_at(tmp_path)


def test_tokenizer_without_eos_is_a_clear_error(llama: str, tmp_path: Path) -> None:
    checkpoint(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no EOS token"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


def test_missing_weights_are_an_error_and_never_random(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights .*layers\.1\.mlp\.up_proj"):
        policy_at(tmp_path)


def test_checkpoint_without_weights_is_a_clear_error(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        policy_at(tmp_path)


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, a pickle, which can run any code"):
        policy_at(tmp_path)


def test_device_that_does_not_exist_is_a_clear_error(llama: str) -> None:
    with pytest.raises(ModelError, match=r"model\.device is 'toaster'"):
        policy_at(llama, device="toaster")


# --- reward models --------------------------------------------------------------------------------


def reward_model_at(path: str | Path, **options: object) -> RewardModel:
    return RewardModel.load(ModelConfig(path=str(path), **options), new_head=True)


def plain_scores(model: PreTrainedModel, groups: list[Group]) -> Tensor:
    """Return scores of prompt and response together, one sequence at a time."""
    rows = [g.prompt + r for g in groups for r in g.responses]
    return torch.cat([model(input_ids=torch.tensor([row])).logits[:, 0] for row in rows]).detach()


def trained_reward_model(llama: str) -> RewardModel:
    model = reward_model_at(llama)
    perturb(model.model, seed=3, spread=0.1)
    return model


def test_new_reward_head_scores_zero(llama: str) -> None:
    assert torch.equal(reward_model_at(llama).scores(BATCH), torch.zeros(len(BATCH.lengths_N)))


def test_saved_reward_model_gives_the_same_scores_in_plain_transformers(
    llama: str, tmp_path: Path
) -> None:
    model = trained_reward_model(llama)
    model.save(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert plain.config.num_labels == 1
    ended = [Group(g.prompt, [[*r, EOS] for r in g.responses]) for g in GROUPS]
    for groups in (GROUPS, ended):
        ours = model.scores(Batch.of(groups)).detach()
        torch.testing.assert_close(ours, plain_scores(plain, groups), atol=1e-5, rtol=0)
    again = reward_model_at(tmp_path)
    assert torch.equal(again.scores(BATCH), model.scores(BATCH))


def test_saved_reward_model_scores_a_padded_batch_at_the_eos(tmp_path: Path) -> None:
    tokenizer = letters_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<spare>"]})
    base = random_lm(family("llama", len(tokenizer)))
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = trained_reward_model(str(tmp_path / "base"))
    model.save(tmp_path / "rm")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    padder = AutoTokenizer.from_pretrained(tmp_path / "rm")
    groups = [Group([1, 2], [[3, EOS]]), Group([4], [[5, 6, 7, EOS]])]
    rows = {"input_ids": [g.prompt + g.responses[0] for g in groups]}
    scores = plain(**padder.pad(rows, return_tensors="pt")).logits[:, 0]
    ours = model.scores(Batch.of(groups))
    torch.testing.assert_close(ours.detach(), scores.detach(), atol=1e-5, rtol=0)
    at_eos = model.scores_at(Batch.of(groups), Batch.of(groups).last_tokens_N)
    assert torch.equal(ours, at_eos)


@pytest.mark.parametrize("padding", [None, EOS, 12])
def test_foreign_reward_model_scores_as_in_plain_transformers(
    tmp_path: Path, padding: int | None
) -> None:
    torch.manual_seed(0)
    config = family("llama", 13, pad_token_id=padding)
    config.num_labels = 1
    plain = LlamaForSequenceClassification(config)
    perturb(plain, seed=1, spread=0.1)
    plain.save_pretrained(tmp_path)
    letters_tokenizer().save_pretrained(tmp_path)
    model = reward_model_at(tmp_path)
    groups = [*GROUPS, Group([1, 2], [[3, 4, EOS], [5, EOS], [EOS]])]
    ours = model.scores(Batch.of(groups)).detach()
    torch.testing.assert_close(ours, plain_scores(plain, groups), atol=1e-5, rtol=0)


def test_step_scores_are_read_at_the_steps_last_tokens(llama: str) -> None:
    model = trained_reward_model(llama)
    groups = [Group([1, 2, 3], [[4, 5, 6, 7], [8, 9]]), Group([2], [[3, 4, 5]])]
    ends = [[1, 3], [], [0, 2]]
    found = model.step_scores(Batch.of(groups), ends).detach()
    cut = [Group([1, 2, 3], [[4, 5], [4, 5, 6, 7]]), Group([2], [[3], [3, 4, 5]])]
    torch.testing.assert_close(found, model.scores(Batch.of(cut)).detach(), atol=1e-5, rtol=0)


def test_reward_model_with_two_labels_is_an_error(tmp_path: Path) -> None:
    config = family("llama", 13)
    config.num_labels = 2
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    letters_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"2 labels|one label"):
        reward_model_at(tmp_path)


def test_lora_reward_model_trains_its_head_and_saves_merged(llama: str, tmp_path: Path) -> None:
    model = reward_model_at(llama, lora=LORA)
    names = [name for name, p in model.model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or "score" in name for name in names)
    assert any("score" in name for name in names)
    trained = torch.nn.ParameterList(trained_parameters(model.model))
    perturb(trained, seed=1, spread=0.1)
    model.save(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(
        model.scores(BATCH).detach(), plain_scores(plain, GROUPS), atol=1e-5, rtol=0
    )
    assert float(model.scores(BATCH).detach().abs().max()) > 0.01


@pytest.mark.parametrize("name", ["gpt2", "bloom", "gpt-neox", "qwen2"])
def test_reward_models_of_other_families_score_as_in_plain_transformers(
    name: str, tmp_path: Path
) -> None:
    model = reward_model_at(checkpoint(tmp_path / "base", name))
    perturb(model.model, seed=3, spread=0.1)
    model.save(tmp_path / "rm")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    torch.testing.assert_close(
        model.scores(BATCH).detach(), plain_scores(plain, GROUPS), atol=1e-5, rtol=0
    )


def test_bfloat16_reward_model_gives_float32_scores(llama: str) -> None:
    scores = reward_model_at(llama, dtype="bfloat16").scores(BATCH)
    assert scores.dtype == torch.float32


# --- critics --------------------------------------------------------------------------------------


def value_before(critic: SeparateCritic | SharedCritic, policy: Policy, group: Group) -> Tensor:
    """Return V(s_t) of a single response, each state scored separately as a full response."""
    line = group.prompt + group.responses[0]
    values = []
    for t in range(len(group.responses[0])):
        seen = line[: len(group.prompt) + t]
        batch = Batch.of([Group(seen[:1], [seen[1:]])])
        values.append(critic.final_values(policy, batch)[0])
    return torch.stack(values).detach()


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_values_are_read_at_the_position_before_their_token(llama: str, kind: str) -> None:
    policy = policy_at(llama)
    critic: SeparateCritic | SharedCritic
    if kind == "separate":
        critic = SeparateCritic(trained_reward_model(llama))
    else:
        critic = SharedCritic(policy)
        perturb(critic.head, seed=1, spread=0.5)
    group = Group([1, 2, 3], [[4, 5, 6]])
    scores = critic.score(policy, Batch.of([group]))
    expected = value_before(critic, policy, group)
    assert float(expected.std()) > 0.01
    torch.testing.assert_close(scores.values_T.detach(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        scores.logprobs_T, policy.score(Batch.of([group])).logprobs_T, atol=1e-6, rtol=0
    )


def test_final_value_of_a_separate_critic_is_read_at_the_last_token_even_if_it_pads(
    tmp_path: Path,
) -> None:
    config = family("llama", 13, pad_token_id=EOS)
    config.num_labels = 1
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    letters_tokenizer().save_pretrained(tmp_path)
    model = reward_model_at(tmp_path)
    batch = Batch.of([Group([1, 2], [[3, EOS]])])
    value = SeparateCritic(model).final_values(policy_at(checkpoint(tmp_path / "lm")), batch)
    assert torch.equal(value, model.scores_at(batch, batch.last_tokens_N))
    assert not torch.equal(value, model.scores(batch))


def test_new_critics_value_everything_at_zero(llama: str) -> None:
    policy = policy_at(llama)
    for critic in (SharedCritic(policy), SeparateCritic(reward_model_at(llama))):
        assert not critic.score(policy, BATCH).values_T.any()


def test_value_loss_of_a_separate_critic_does_not_reach_the_actor(llama: str) -> None:
    policy = policy_at(llama)
    separate = SeparateCritic(trained_reward_model(llama))
    separate.score(policy, BATCH).values_T.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.model.parameters())
    shared = SharedCritic(policy)
    perturb(shared.head, seed=1, spread=0.5)
    shared.score(policy, BATCH).values_T.sum().backward()
    assert float(policy.backbone.layers[0].mlp.up_proj.weight.grad.abs().max()) > 0


def test_saved_critics_load_again(llama: str, tmp_path: Path) -> None:
    policy = policy_at(llama)
    shared = SharedCritic(policy)
    perturb(shared.head, seed=1, spread=0.5)
    shared.save(tmp_path / "shared")
    fresh = SharedCritic(policy)
    fresh.head.load_state_dict(load_file(tmp_path / "shared" / VALUE_HEAD_FILE))
    assert torch.equal(fresh.score(policy, BATCH).values_T, shared.score(policy, BATCH).values_T)
    separate = SeparateCritic(trained_reward_model(llama))
    separate.save(tmp_path / "separate")
    again = SeparateCritic(reward_model_at(tmp_path / "separate"))
    assert torch.equal(again.values(BATCH), separate.values(BATCH))


def test_shared_critic_works_with_a_lora_policy(llama: str) -> None:
    policy = policy_at(llama, lora=LORA)
    critic = SharedCritic(policy)
    scores = critic.score(policy, BATCH)
    assert torch.equal(scores.logprobs_T, policy.score(BATCH).logprobs_T)
    assert unwrap_peft(policy.model).config.hidden_size == critic.head.in_features


def test_classifier_without_a_score_head_is_refused() -> None:
    config = LlamaConfig(vocab_size=13, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    config.num_labels = 1
    with pytest.raises(ModelError, match="head named score"):
        RewardModel(AutoModelForCausalLM.from_config(config), letters_tokenizer())


# --- precision ------------------------------------------------------------------------------------


def test_type_auto_is_float32_on_a_cpu_and_bfloat16_on_a_gpu_that_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = ModelConfig(path="unused", device="cpu")
    assert config.dtype == "auto" and dtype_of(config) == torch.float32
    monkeypatch.setattr(loading, "resolve_device", lambda name: torch.device("cuda"))
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported: supported)
        assert dtype_of(config) == expected
    assert dtype_of(config.model_copy(update={"dtype": "float64"})) == torch.float64


def test_heads_of_half_precision_models_compute_in_float32(llama: str) -> None:
    policy = policy_at(llama, dtype="bfloat16")
    critic = SharedCritic(policy)
    perturb(critic.head, seed=1, spread=0.5)
    assert critic.head.weight.dtype == torch.float32
    hidden_TD = policy.hidden(BATCH).float()
    expected = hidden_TD @ critic.head.weight[0] + critic.head.bias
    assert torch.equal(critic.score(policy, BATCH).values_T, expected)
    scorer = reward_model_at(llama, dtype="bfloat16")
    perturb(scorer.base.score, seed=1, spread=0.5)
    hidden_ND = scorer.hidden_at(BATCH, BATCH.last_tokens_N).float()
    found = scorer.scores_at(BATCH, BATCH.last_tokens_N)
    assert torch.equal(found, hidden_ND @ scorer.base.score.weight[0].float())
