"""LoRA adapters: their sizes, merging, saved forms, and adapters that are loaded again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.tiny_models import RAGGED, checkpoint, perturb, plain_logprobs, random_groups
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from trivium.config.base import dump, load_configuration
from trivium.data.batch import Batch, Grouped
from trivium.errors import ConfigurationError, ModelError
from trivium.hf.checkpoint_files import check_checkpoint, context_of
from trivium.hf.loading import trained_parameters
from trivium.hf.model_config import LoraConfig, ModelConfig
from trivium.memory.shapes import Shape
from trivium.models.policy import Policy
from trivium.models.reference import Reference
from trivium.models.reward_model import RewardModel
from trivium.training.reference_cache import cache_key

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
"""``peft`` uses names that ``transformers`` deprecated."""

GROUPS = random_groups(13, *RAGGED)
BATCH = Batch.of(GROUPS)
WEIGHT = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("half"), dtype="bfloat16")


def policy_at(path: str | Path, **options: Any) -> Policy:
    return Policy.load(ModelConfig.model_validate({"path": str(path), **options}))


def moved(path: str | Path, spread: float = 0.1, **options: Any) -> Policy:
    """Return a policy with every trained parameter changed."""
    policy = policy_at(path, **options)
    trained = torch.nn.ParameterList(trained_parameters(policy.model))
    perturb(trained, seed=5, spread=spread)
    return policy


def logprobs(policy: Policy | Reference) -> Tensor:
    return policy.logprobs(BATCH).detach()


def saved_adapter(llama: str, directory: Path, **lora: Any) -> Policy:
    """Save changed adapters of rank 2; return the policy."""
    policy = moved(llama, lora={"rank": 2, "save": "adapter", **lora})
    policy.save(directory)
    return policy


def edit(directory: Path, **settings: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "scale"),
    [
        ({"rank": 4}, 2.0),
        ({"rank": 64}, 2.0),
        ({"rank": 4, "alpha": 4.0}, 1.0),
        ({"rank": 16, "rslora": True}, 2.0),
        ({"rank": 64, "rslora": True}, 1.0),
        ({"rank": 4, "alpha": 3.0, "rslora": True}, 1.5),
    ],
)
def test_alpha_follows_the_rank_and_rslora_divides_it_by_the_root(
    llama: str, lora: dict[str, Any], scale: float
) -> None:
    layer = policy_at(llama, lora=lora).base.get_submodule(WEIGHT)
    assert layer.scaling == {"default": pytest.approx(scale)}


# --- tied embeddings ------------------------------------------------------------------------------


def test_adapters_on_tied_embeddings_are_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ModelError, match="embed_tokens and lm_head share their weights") as caught:
        policy_at(path, lora={"targets": ["q_proj", "embed_tokens"]})
    assert "model.lora.targets is ['q_proj', 'embed_tokens']" in str(caught.value)
    assert "leave both out" in str(caught.value)
    policy_at(path, lora={"targets": ["q_proj"]})
    RewardModel.load(
        ModelConfig(path=path, lora=LoraConfig(targets=["embed_tokens"])), new_head=True
    )


def test_adapters_on_embeddings_that_are_not_tied_are_merged(llama: str, tmp_path: Path) -> None:
    policy = moved(llama, lora={"rank": 2, "targets": ["q_proj", "embed_tokens"]})
    policy.save(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain_logprobs(plain, GROUPS), logprobs(policy), atol=1e-5, rtol=0)


# --- merging --------------------------------------------------------------------------------------


def test_adapters_are_merged_in_float32(half: str, tmp_path: Path) -> None:
    policy = moved(half, 1e-3, dtype="bfloat16", lora={"rank": 2, "alpha": 3.0})
    check = policy.save(tmp_path)
    layer = policy.base.get_submodule(WEIGHT)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert down.dtype == torch.float32
    expected = layer.get_base_layer().weight.float() + 1.5 * up @ down
    found = load_file(tmp_path / "model.safetensors")[f"{WEIGHT}.weight"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)
    assert check.dtype == "float32"
    assert check.difference is not None
    assert check.difference < 1e-4
    assert "rounded to bfloat16" in check.message
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


def test_dora_is_merged_as_a_length_times_a_direction(llama: str, tmp_path: Path) -> None:
    policy = moved(llama, lora={"rank": 2, "alpha": 2.0, "dora": True})
    policy.save(tmp_path)
    layer = policy.base.get_submodule(WEIGHT)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    direction = layer.get_base_layer().weight + up @ down
    length = layer.lora_magnitude_vector["default"].weight
    expected = length[:, None] * direction / direction.norm(dim=1, keepdim=True)
    found = load_file(tmp_path / "model.safetensors")[f"{WEIGHT}.weight"]
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=0)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain_logprobs(plain, GROUPS), logprobs(policy), atol=1e-5, rtol=0)


@pytest.mark.parametrize("spread", [1e-3, 0.3])
def test_merged_model_is_base_and_adapter_where_bfloat16_would_lose_updates(
    half: str, tmp_path: Path, spread: float
) -> None:
    """The loss is a share of a small update, and absolute for a large one."""
    policy = moved(half, spread, dtype="bfloat16", lora={"rank": 2})
    policy.save(tmp_path)
    exact = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32), tmp_path / "adapter"
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(
        plain_logprobs(plain, GROUPS), plain_logprobs(exact, GROUPS), atol=1e-5, rtol=0
    )


def test_merged_weights_keep_bfloat16_where_nothing_is_lost(half: str, tmp_path: Path) -> None:
    check = policy_at(half, dtype="bfloat16", lora={"rank": 2}).save(tmp_path)
    assert (check.dtype, check.message) == ("bfloat16", "")
    assert check.difference is not None
    assert check.difference < 1e-5
    saved = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("choice", "dtype", "told"), [("base", "bfloat16", True), ("float32", "float32", False)]
)
def test_merged_dtype_decides_and_a_loss_is_told(
    half: str, tmp_path: Path, choice: str, dtype: str, told: bool
) -> None:
    lora = {"rank": 2, "merged_dtype": choice}
    check = moved(half, 1e-3, dtype="bfloat16", lora=lora).save(tmp_path)
    assert check.dtype == dtype
    assert ("is not the trained one" in check.message) == told
    saved = load_file(tmp_path / "model.safetensors")
    assert {str(tensor.dtype) for tensor in saved.values()} == {f"torch.{dtype}"}


# --- saved forms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["adapter", "merged", "both", None])
def test_saved_model_has_the_form_that_is_asked_for(
    llama: str, tmp_path: Path, form: str | None
) -> None:
    policy = moved(llama, lora={"rank": 2, "save": form})
    policy.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert ("model.safetensors" in names) == (form != "adapter")
    assert ("adapter_model.safetensors" in names) == (form == "adapter")
    assert ("adapter" in names) == (form in ("both", None))
    assert "tokenizer.json" in names
    if form != "merged":
        directory = tmp_path if form == "adapter" else tmp_path / "adapter"
        plain = AutoModelForCausalLM.from_pretrained(llama)
        adapted = peft.PeftModel.from_pretrained(plain, directory)
        found = plain_logprobs(adapted, GROUPS)
        torch.testing.assert_close(found, logprobs(policy), atol=1e-5, rtol=0)


def test_saved_adapters_that_are_not_the_trained_ones_are_told(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_wrongly(model: Any, directory: Path, **options: Any) -> None:
        write(model, directory, **options)
        weights = load_file(directory / "adapter_model.safetensors")
        weights[min(weights)] += 1e-6
        save_file(weights, directory / "adapter_model.safetensors")

    write = peft.PeftModel.save_pretrained
    for form in ("adapter", "both"):
        policy = moved(llama, lora={"rank": 2, "save": form})
        assert policy.save(tmp_path / form).message == ""
        with monkeypatch.context() as patch:
            patch.setattr(peft.PeftModel, "save_pretrained", write_wrongly)
            check = policy.save(tmp_path / f"{form}-wrong")
        assert check.difference is None
        assert "1 saved weights of adapters" in check.message
    assert (tmp_path / "both-wrong" / "model.safetensors").is_file()


def test_adapters_name_their_base_from_any_directory(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(llama).parent)
    policy_at(f"./{Path(llama).name}", lora={"rank": 2}).save(tmp_path)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(Path(llama).resolve())


# --- adapters as input ----------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_adapter_directory_is_the_policy_that_was_saved(
    llama: str, tmp_path: Path, dora: bool
) -> None:
    trained = saved_adapter(llama, tmp_path, dora=dora)
    check_checkpoint(str(tmp_path))
    assert context_of(str(tmp_path)) == 64
    policy = policy_at(tmp_path)
    assert all(p.requires_grad for p in policy.model.parameters())
    torch.testing.assert_close(logprobs(policy), logprobs(trained), atol=1e-5, rtol=0)


def test_loaded_adapters_are_trained_further_from_their_values(llama: str, tmp_path: Path) -> None:
    trained = saved_adapter(llama, tmp_path / "first")
    before = torch.random.get_rng_state()
    policy = policy_at(tmp_path / "first", lora={"initial": "loaded"})
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(logprobs(policy), logprobs(trained))
    names = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    perturb(torch.nn.ParameterList(trained_parameters(policy.model)), seed=6, spread=0.1)
    assert not torch.equal(logprobs(policy), logprobs(trained))
    policy.save(tmp_path / "second")
    base = AutoModelForCausalLM.from_pretrained(llama)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "second" / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    for plain in (adapted, merged):
        found = plain_logprobs(plain, GROUPS)
        torch.testing.assert_close(found, logprobs(policy), atol=1e-5, rtol=0)


def test_reference_of_loaded_adapters_is_the_policy_that_was_loaded(
    llama: str, tmp_path: Path
) -> None:
    trained = saved_adapter(llama, tmp_path)
    policy = policy_at(tmp_path, lora={"initial": "loaded"})
    reference = Reference(policy)
    perturb(torch.nn.ParameterList(trained_parameters(policy.model)), seed=6, spread=0.1)
    assert torch.equal(logprobs(reference), logprobs(trained))
    assert reference.state_dict() is None
    assert not torch.equal(logprobs(policy), logprobs(trained))


def test_cached_logprobs_of_a_reference_depend_on_loaded_adapters(
    llama: str, tmp_path: Path
) -> None:
    data, keys = Grouped(GROUPS), set()
    for name, lora in (("one", {"seed": 1}), ("two", {"seed": 2})):
        saved_adapter(llama, tmp_path / name, **lora)
        policy = policy_at(tmp_path / name, lora={"initial": "loaded"})
        keys.add(cache_key(policy, data, [[0]]))
    assert len(keys) == 2


def test_new_adapters_on_an_adapter_directory_start_from_its_policy(
    llama: str, tmp_path: Path
) -> None:
    trained = saved_adapter(llama, tmp_path / "first")
    policy = policy_at(tmp_path / "first", lora={"rank": 3})
    torch.testing.assert_close(logprobs(policy), logprobs(trained), atol=1e-5, rtol=0)
    reference = Reference(policy)
    perturb(torch.nn.ParameterList(trained_parameters(policy.model)), seed=6, spread=0.1)
    torch.testing.assert_close(logprobs(reference), logprobs(trained), atol=1e-5, rtol=0)
    policy.save(tmp_path / "second")
    assert not (tmp_path / "second" / "adapter").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    torch.testing.assert_close(plain_logprobs(plain, GROUPS), logprobs(policy), atol=1e-5, rtol=0)


def test_rounding_of_adapters_merged_at_load_is_told(
    half: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved(half, 1e-3, dtype="bfloat16", lora={"rank": 2, "save": "adapter"}).save(tmp_path)
    policy_at(tmp_path, dtype="float32")
    policy_at(tmp_path, dtype="bfloat16", lora={"initial": "loaded"})
    assert caplog.text == ""
    policy_at(tmp_path, dtype="bfloat16")
    assert "rounding lost" in caplog.text
    assert "model.dtype: float32" in caplog.text


def test_reward_models_adapters_are_loaded_with_their_head(llama: str, tmp_path: Path) -> None:
    lora = LoraConfig(rank=2, save="adapter")
    model = RewardModel.load(ModelConfig(path=llama, lora=lora), new_head=True)
    perturb(torch.nn.ParameterList(trained_parameters(model.model)), seed=5, spread=0.1)
    model.save(tmp_path)
    expected = model.scores(BATCH).detach()
    assert float(expected.abs().max()) > 0.01
    for loaded in (None, LoraConfig(initial="loaded")):
        found = RewardModel.load(ModelConfig(path=str(tmp_path), lora=loaded)).scores(BATCH)
        torch.testing.assert_close(found.detach(), expected, atol=1e-5, rtol=0)
    with pytest.raises(ModelError, match="a reward model, which cannot be a policy"):
        policy_at(tmp_path)
    with pytest.raises(ModelError, match="task_type is SEQ_CLS"):
        policy_at(tmp_path, lora={"initial": "loaded"})


@pytest.mark.parametrize("lora", [None, {"rank": 3}, {"initial": "loaded"}])
def test_predicted_shape_of_an_adapter_directory_is_that_of_its_policy(
    llama: str, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    saved_adapter(llama, tmp_path)
    config = ModelConfig.model_validate({"path": str(tmp_path), "lora": lora})
    real = Shape.of(Policy.load(config).model)
    predicted = Shape.read(config)
    assert (predicted.parameters, predicted.trained) == (real.parameters, real.trained)


def test_configuration_of_loaded_adapters_survives_its_own_file(llama: str, tmp_path: Path) -> None:
    saved_adapter(llama, tmp_path / "adapter")
    lora = LoraConfig(initial="loaded")
    config = ModelConfig(path=str(tmp_path / "adapter"), lora=lora)
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load_configuration(ModelConfig, str(tmp_path / "config.yaml"), []) == config


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: edit(d, peft_type="IA3"), "only LORA is loaded"),
        (lambda d: edit(d, init_lora_weights="pissa"), "also changed the base's weights"),
        (lambda d: edit(d, megatron_core="os"), "megatron_core is 'os', which Trivium does not"),
        (lambda d: edit(d, bias="all"), "bias is 'all'"),
        (lambda d: edit(d, r=3), "does not fit the base"),
        (lambda d: edit(d, target_modules=["q_proj"]), "holds besides its adapters"),
        (lambda d: edit(d, target_modules=["nowhere"]), "nowhere"),
        (lambda d: edit(d, base_model_name_or_path=None), "names no base"),
        (lambda d: edit(d, base_model_name_or_path="./gone"), "there is no checkpoint directory"),
        (lambda d: edit(d, base_model_name_or_path=str(d)), "holds only adapters"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "holds no adapter_model"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"xx"), "truncated"),
        (lambda d: drop_weight(d), "lacks 1 weights"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    llama: str, tmp_path: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    saved_adapter(llama, tmp_path)
    spoil(tmp_path)
    for lora in (None, {"initial": "loaded"}):
        with pytest.raises(ModelError, match=message):
            policy_at(tmp_path, lora=lora)


def drop_weight(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(min(weights))
    save_file(weights, file)


def test_settings_of_adapters_that_have_no_effect_are_conflicts(llama: str, tmp_path: Path) -> None:
    saved_adapter(llama, tmp_path)
    for path, lora, message in (
        (llama, {"initial": "loaded"}, "no directory of adapters"),
        (tmp_path, {"initial": "loaded", "rank": 4}, "takes it from the adapters"),
        (tmp_path, {"save": "both"}, "not on the disk"),
        (llama, {"save": "adapter", "merged_dtype": "base"}, "merges nothing"),
    ):
        settings = [f"path={path}", f"lora={json.dumps(lora)}"]
        with pytest.raises(ConfigurationError, match=message):
            load_configuration(ModelConfig, None, settings)


def test_scale_of_both_defaults_is_two_at_rank_sixteen() -> None:
    plain, stabilized = LoraConfig(), LoraConfig(rslora=True)
    assert plain.scale_numerator / 16 == stabilized.scale_numerator / math.sqrt(16) == 2.0
