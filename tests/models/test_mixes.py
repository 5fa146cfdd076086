"""Mixes of weights, heads, tokenizers and configurations: each is refused, or loads right.

Every refused mix gives one message with a remedy, before anything is trained or sampled.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.tiny_models import (
    checkpoint,
    family,
    letters_tokenizer,
    perturb,
    plain_logprobs,
    random_groups,
    random_lm,
    rows,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MambaConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
    T5Config,
    ViTConfig,
    ViTModel,
)

from trivium.data.batch import Batch
from trivium.data.demonstrations import DemonstrationsConfig, load_demonstrations
from trivium.errors import DataError, ModelError
from trivium.hf.checkpoint_files import check_checkpoint, local_directory
from trivium.hf.loading import load_tokenizer
from trivium.hf.model_config import ModelConfig
from trivium.models.policy import Policy
from trivium.models.reward_model import RewardModel
from trivium.rewards.learned import LearnedRewards
from trivium.rewards.reward_config import RewardConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
"""``peft`` uses names that ``transformers`` deprecated."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTERS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
GROUPS = random_groups(13, [3, 2], [[4, 2], [3]])
Make = Callable[[Path], object]


# --- makers: each writes a checkpoint to an empty directory ---------------------------------------


def plain(d: Path, **options: Any) -> None:
    checkpoint(d, "llama", **options)


def saved(d: Path, model: PreTrainedModel) -> None:
    """Save a model of another kind, with noise on its weights, beside the letters' tokenizer."""
    perturb(model, seed=3, spread=0.1)
    model.save_pretrained(d)
    letters_tokenizer().save_pretrained(d)


def classifier(d: Path, labels: int = 1, **options: Any) -> None:
    config = family("llama", 13, pad_token_id=12, num_labels=labels, **options)
    torch.manual_seed(0)
    saved(d, AutoModelForSequenceClassification.from_config(config))


def edit(d: Path, change: Callable[[dict[str, Any]], object], file: str = "config.json") -> None:
    content = json.loads((d / file).read_text())
    change(content)
    (d / file).write_text(json.dumps(content))


def reweigh(
    d: Path, change: Callable[[dict[str, torch.Tensor]], object], file: str = WEIGHTS
) -> None:
    weights = load_file(d / file)
    change(weights)
    save_file(weights, d / file, metadata={"format": "pt"})


def then(make: Make, *changes: Make) -> Make:
    def both(d: Path) -> None:
        for step in (make, *changes):
            step(d)

    return both


def config_with(**values: Any) -> Make:
    return lambda d: edit(d, lambda c: c.update(values))


def weights_with(**values: Any) -> Make:
    """Add weights, with "__" for the dots of their names; None removes one."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            weights.pop(name.replace("__", "."), None)
            if value is not None:
                weights[name.replace("__", ".")] = value

    return lambda d: reweigh(d, change)


def tokenizer_with(**tokens: Any) -> Make:
    """Add special tokens to the tokenizer, beyond the model's embeddings."""

    def change(d: Path) -> None:
        tokenizer = letters_tokenizer()
        template = tokens.pop("template", None)
        tokenizer.add_special_tokens(dict(tokens))
        tokenizer.chat_template = template
        tokenizer.save_pretrained(d)

    return change


def sharded(d: Path) -> None:
    """Save a model in several shards."""
    plain(d)
    random_lm(family("llama", 13)).save_pretrained(d, max_shard_size="30KB")
    (d / WEIGHTS).unlink()
    assert len(list(d.glob("model-*.safetensors"))) > 1


def first_shard(d: Path) -> Path:
    return min(d.glob("model-*.safetensors"))


def index_with(change: Callable[[dict[str, str]], object]) -> Make:
    return lambda d: edit(d, lambda index: change(index["weight_map"]), INDEX)


def named_twice(d: Path) -> None:
    text = (d / INDEX).read_text()
    line = next(x for x in text.splitlines() if "embed_tokens" in x)
    (d / INDEX).write_text(text.replace(line, f"{line.rstrip(',')},\n{line}"))


def bert(*, decoder: bool) -> BertConfig:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertConfig(vocab_size=13, intermediate_size=64, is_decoder=decoder, **size)


def seq2seq(kind: str) -> PreTrainedModel:
    if kind == "t5":
        config: Any = T5Config(
            vocab_size=13, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2
        )
    else:
        size = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        config = BartConfig(vocab_size=13, d_model=16, decoder_ffn_dim=16, **size, **heads)
    return AutoModelForSeq2SeqLM.from_config(config)


def vision_language(d: Path) -> None:
    text = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    image = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 28}
    image |= {"num_attention_heads": 2, "patch_size": 14}
    config = Gemma3Config(
        text_config={**text, **heads}, vision_config=image, mm_tokens_per_image=4,
        image_token_index=5, boi_token_index=6, eoi_token_index=7,
    )  # fmt: skip
    saved(d, Gemma3ForConditionalGeneration(config))


def recurrent(kind: str) -> PreTrainedModel:
    if kind == "mamba":
        config: Any = MambaConfig(vocab_size=13, hidden_size=16, num_hidden_layers=2, state_size=4)
    else:
        size = {"hidden_size": 16, "intermediate_size": 32, "lru_width": 16, "head_dim": 8}
        config = RecurrentGemmaConfig(
            vocab_size=13, num_hidden_layers=3, num_attention_heads=2, **size
        )
    return AutoModelForCausalLM.from_config(config)


def vit() -> PreTrainedModel:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return ViTModel(ViTConfig(num_attention_heads=2, image_size=28, patch_size=14, **size))


def lfs_pointer(d: Path) -> None:
    (d / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def gguf(d: Path) -> None:
    (d / WEIGHTS).rename(d / "model-q4.gguf")


def without_index(d: Path) -> None:
    (d / INDEX).unlink()


def another_shard(d: Path) -> None:
    shutil.copy(first_shard(d), d / "model-00009-of-00009.safetensors")


def with_leftover_shard(d: Path) -> None:
    shutil.copy(d / WEIGHTS, d / "model-00001-of-00002.safetensors")


def adapter_config(d: Path) -> None:
    (d / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere"}))


def adapters(d: Path, task: str = "CAUSAL_LM") -> None:
    """Save adapters with noise on their weights, whose base is beside their directory."""
    base = d.parent / "base"
    plain(base)
    auto: Any = AutoModelForCausalLM
    heads, labels = None, {}
    if task == "SEQ_CLS":
        auto, heads, labels = AutoModelForSequenceClassification, ["score"], {"num_labels": 1}
    settings = peft.LoraConfig(
        task_type=task, target_modules=["q_proj"], r=2, modules_to_save=heads
    )
    adapted = peft.get_peft_model(auto.from_pretrained(base, **labels), settings)
    perturb(adapted, seed=4, spread=0.1)
    adapted.save_pretrained(d)


def scorer_adapters(d: Path) -> None:
    adapters(d, "SEQ_CLS")


def adapters_with(**values: Any) -> Make:
    return then(adapters, lambda d: edit(d, lambda c: c.update(values), ADAPTER_CONFIG))


def not_numbers(d: Path) -> None:
    reweigh(d, lambda w: w[min(w)].fill_(torch.nan), ADAPTERS)


def zero_head(d: Path) -> None:
    reweigh(d, lambda w: [w[name].zero_() for name in w if "score" in name], ADAPTERS)


def half(d: Path) -> None:
    plain(d, dtype="float16")


def base_model(d: Path) -> None:
    saved(d, random_lm(family("llama", 13, tie_word_embeddings=False)).base_model)


def spread_far(d: Path) -> None:
    saved(d, random_lm(family("llama", 9000)))


# --- the table ------------------------------------------------------------------------------------

HEAD = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
CHATML = "{% for m in messages %}<|turn|>{{ m.content }}<|end|>{% endfor %}"
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 64}

MIXES: list[tuple[str, str, Make, str | None]] = [
    # name, role, maker, the message's decisive words (None: it loads)
    ("language model as reward model", "outcome", plain,
     "has no trained head: .* reads score.weight, and it is a language model.*reward-model"),
    ("language model as process reward model", "process", plain,
     "has no trained head: .* it is a language model"),
    ("head under another name", "outcome",
     then(classifier, weights_with(score__weight=None, value_head__weight=HEAD)),
     "has no trained head: .* holds value_head.weight instead.*save that head as score.weight"),
    ("process reward model with a value head", "process",
     then(classifier, weights_with(score__weight=None, v_head__summary__weight=HEAD)),
     "has no trained head: .* holds v_head.summary.weight instead"),
    ("head of zeros", "outcome", then(classifier, weights_with(score__weight=HEAD * 0)),
     "score.weight. is zero everywhere.*never trained"),
    ("classifier with two labels", "outcome", lambda d: classifier(d, 2), "with 2 labels: .*one"),
    ("classifier that lost its head", "start", then(classifier, weights_with(score__weight=None)),
     "has no trained head: .*it has no head at all"),
    ("language model to start from", "start", plain, None),
    ("trained reward model to start from", "start", classifier, None),
    ("trained reward model", "outcome", classifier, None),
    ("trained process reward model", "process", classifier, None),
    ("value head on what a reward model starts from", "start",
     then(plain, weights_with(v_head__summary__weight=HEAD)), "no trained head: .*v_head.summary"),
    ("reward model as policy", "policy", classifier,
     "is a LlamaForSequenceClassification, .* without a language-model head: a policy is"),
    ("tied reward model as policy", "policy", lambda d: classifier(d, tie_word_embeddings=True),
     "is a LlamaForSequenceClassification, .* without a language-model head"),
    ("policy with a value head", "policy", then(plain, weights_with(v_head__summary__weight=HEAD)),
     r"holds 1 weights that LlamaForCausalLM has no place for \(v_head.summary.weight\).*save"),
    ("weights of adapters under a model's name", "policy",
     then(plain, weights_with(base_model__model__lora_A__weight=HEAD)),
     "weights of adapters .*merge_and_unload"),
    ("adapters beside a model", "policy", then(plain, adapter_config),
     r"holds adapters \(adapter_config.json\) beside a model.*directory of their own"),
    ("adapters", "policy", adapters, None),
    ("adapters without a base", "policy", adapters_with(base_model_name_or_path=None),
     "names no base: write"),
    ("adapters whose base is gone", "policy", adapters_with(base_model_name_or_path="./gone"),
     "base_model_name_or_path is './gone': there is no checkpoint directory"),
    ("adapters without their weights", "policy",
     then(adapters, lambda d: (d / ADAPTERS).unlink()), "no adapter_model.*copy the adapters"),
    ("adapters whose weights are not numbers", "policy", then(adapters, not_numbers),
     "lora_A.weight with values that are not finite.*earlier checkpoint"),
    ("adapters of another base", "policy",
     then(adapters, lambda d: plain(d.parent / "base", hidden_size=64)),
     "does not fit the base .*base: "),
    ("adapters of a base without its head", "policy",
     then(adapters, lambda d: weights_with(lm_head__weight=None)(d.parent / "base")),
     r"base \(the base of .*\) lacks 1 weights .*lm_head.weight"),
    ("adapters of another kind", "policy",
     adapters_with(peft_type="IA3"), "peft_type is 'IA3': only LORA is loaded"),
    ("adapters that changed their base", "policy", adapters_with(init_lora_weights="pissa"),
     "init_lora_weights is 'pissa', which also changed the base's weights: convert"),
    ("adapters of a reward model", "outcome", scorer_adapters, None),
    ("adapters of a reward model as policy", "policy", scorer_adapters,
     "task_type is SEQ_CLS.*a reward model, which cannot be a policy"),
    ("adapters of a policy as reward model", "outcome", adapters,
     r"base \(the base of .*\) has no trained head: .* it is a language model"),
    ("adapters of a reward model whose head is zero", "outcome",
     then(scorer_adapters, zero_head), "score.weight. is zero everywhere.*never trained"),
    ("end token beyond the embeddings", "policy",
     then(plain, tokenizer_with(eos_token="<|im_end|>")),
     r"writes <\|im_end\|> \(13\).*resize_token_embeddings"),
    ("template's tokens beyond the embeddings", "policy",
     then(plain, tokenizer_with(
         additional_special_tokens=["<|turn|>", "<|end|>"], template=CHATML)),
     r"has 15 tokens.* for 13: it writes <\|turn\|> \(13\), <\|end\|> \(14\).*resize"),
    ("padding beyond the embeddings", "policy", then(plain, tokenizer_with(pad_token="<pad>")),
     None),
    ("special tokens that nothing writes beyond the embeddings", "policy",
     then(plain, tokenizer_with(additional_special_tokens=["<image>"])), None),
    ("ordinary tokens beyond the embeddings", "policy",
     then(plain, lambda d: letters_tokenizer("abcdefghijklmnop").save_pretrained(d)),
     "has 17 tokens.* for 13: .*take the tokenizer that belongs"),
    ("tokenizer of a model with far fewer tokens", "policy", spread_far,
     "has 13 tokens, and .* embeddings for 9,000: take the tokenizer that belongs"),
    ("embeddings fewer than config.json says", "policy", then(plain, config_with(vocab_size=20)),
     r"another shape .*\(lm_head.weight is \[13, 32\], and .* \[20, 32\]\)|embed_tokens"),
    ("weights of another width", "policy", then(plain, config_with(intermediate_size=96)),
     r"holds 6 weights of another shape .*\[32, 64\], and .*\[32, 96\].*take the config.json"),
    ("more layers than config.json says", "policy", then(plain, config_with(num_hidden_layers=1)),
     r"weights that LlamaForCausalLM has no place for \(model.layers.1.*a part of what was saved"),
    ("fewer layers than config.json says", "policy", then(plain, config_with(num_hidden_layers=3)),
     "lacks 9 weights of LlamaForCausalLM .*model.layers.2.*copy the checkpoint again"),
    ("untied model without its head", "policy",
     then(plain, weights_with(lm_head__weight=None)), "lacks 1 weights .*lm_head.weight"),
    ("tied configuration with a head of its own", "policy",
     then(plain, config_with(tie_word_embeddings=True)), None),
    ("backbone without a head", "policy", base_model, "lacks 1 weights .*lm_head.weight"),
    ("weights that are not numbers", "policy",
     then(plain, weights_with(model__norm__weight=torch.full((32,), torch.nan))),
     "model.norm.weight with values that are not finite.*earlier checkpoint"),
    ("pointer of Git LFS", "policy", then(plain, lfs_pointer), "pointer of Git LFS.*git lfs pull"),
    ("weights for inference only", "policy", then(plain, gguf), "model-q4.gguf.*converted from"),
    ("several shards", "policy", sharded, None),
    ("shards without their index", "policy", then(sharded, without_index),
     "shards of weights without model.safetensors.index.json.*copy"),
    ("one file and shards", "policy", then(plain, with_leftover_shard),
     "holds model.safetensors and also model-00001-of-00002.*unclear which.*remove"),
    ("one file and an index", "policy", then(sharded, plain),
     "holds model.safetensors and also model.safetensors.index.json, .*unclear which"),
    ("extra shard", "policy", then(sharded, another_shard),
     "also holds model-00009-of-00009.safetensors, which its index does not name: remove"),
    ("missing shard", "policy", then(sharded, lambda d: first_shard(d).unlink()),
     "names model-00001-of-.*, which is not there: copy"),
    ("index that names a weight twice", "policy", then(sharded, named_twice),
     "names model.embed_tokens.weight twice"),
    ("index that lacks a weight", "policy",
     then(sharded, index_with(lambda m: m.pop("model.norm.weight"))),
     "also holds model.norm.weight, so index and shards are of different checkpoints"),
    ("index that names a weight in the wrong shard", "policy",
     then(sharded, index_with(lambda m: m.update({"other.weight": min(m.values())}))),
     "does not hold other.weight, so index and shards"),
    ("half-precision weights", "policy", half, None),
    ("scaled context", "policy", lambda d: plain(d, rope_parameters=YARN), None),
    ("encoder with a masked head", "policy",
     lambda d: saved(d, AutoModelForMaskedLM.from_config(bert(decoder=False))),
     "is a BertForMaskedLM, an encoder.*: a policy is a decoder"),
    ("encoder under a language model's class", "policy",
     lambda d: saved(d, BertLMHeadModel(bert(decoder=False))),
     "a token changes the states of those before it: it is an encoder.*is_decoder"),
    ("encoder as reward model", "outcome",
     lambda d: saved(d, AutoModelForSequenceClassification.from_config(
         BertConfig(**{**bert(decoder=False).to_dict(), "num_labels": 1, "id2label": {0: "x"}}))),
     "a token changes the states of those before it: it is an encoder"),
    ("classifier of tokens", "policy",
     lambda d: saved(d, AutoModelForTokenClassification.from_config(family("llama", 13))),
     "is a LlamaForTokenClassification, a classifier of tokens"),
    ("encoder-decoder (T5)", "policy", lambda d: saved(d, seq2seq("t5")),
     "is an encoder-decoder .T5For.*a policy is a decoder"),
    ("encoder-decoder (BART) as reward model", "outcome", lambda d: saved(d, seq2seq("bart")),
     "is an encoder-decoder"),
    ("state-space model", "policy", lambda d: saved(d, recurrent("mamba")),
     "is a MambaForCausalLM, whose layers keep a state.*attention in every layer"),
    ("attention and recurrent layers", "policy", lambda d: saved(d, recurrent("griffin")),
     "is a RecurrentGemmaForCausalLM, whose layers keep a state"),
    ("vision-language model", "policy", vision_language,
     "reads more than text .Gemma3ForConditionalGeneration with vision_config.*language model"),
    ("vision model", "policy", lambda d: saved(d, vit()),
     "is a ViTModel, of which transformers has no causal language model"),
    ("quantized weights", "policy",
     then(plain, config_with(quantization_config={"quant_method": "gptq", "bits": 4})),
     r"holds quantized weights \(gptq\).*quantized from"),
    ("unknown type of model", "policy", then(plain, config_with(model_type="nonesuch")),
     "cannot load .*nonesuch"),
]  # fmt: skip


def load(role: str, path: str) -> Any:
    """Load a checkpoint as a command does: the checks without torch first."""
    check_checkpoint(path)
    config = ModelConfig(path=path)
    if role == "policy":
        return Policy.load(config)
    if role == "start":
        return RewardModel.load(config, new_head=True)
    function = "reward_model" if role == "outcome" else "process_reward_model"
    reward = RewardConfig(function=function, arguments={"path": path})
    return LearnedRewards([reward], letters_tokenizer()).models[path]


@pytest.mark.parametrize(
    ("role", "make", "words"), [m[1:] for m in MIXES], ids=[m[0] for m in MIXES]
)
def test_mix_is_refused_with_one_message_or_loads_right(
    role: str, make: Make, words: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    path.mkdir()
    make(path)
    if words is None:
        _require_right(load(role, str(path)), path)
        return
    with pytest.raises(ModelError, match=words) as caught:
        load(role, str(path))
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message


def _require_right(model: Any, path: Path) -> None:
    """Compare a loaded model with plain ``transformers``, one sequence at a time."""
    batch = Batch.of(GROUPS)
    if isinstance(model, Policy):
        reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        expected_T = plain_logprobs(reference, GROUPS)
        torch.testing.assert_close(model.logprobs(batch).detach(), expected_T, atol=1e-5, rtol=0)
        return
    scores_N = model.scores(batch).detach()
    if (path / ADAPTERS).is_file():
        base = path.parent / "base"
        scorer = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        reference: Any = peft.PeftModel.from_pretrained(scorer, path)
    elif "score.weight" not in load_file(path / WEIGHTS):
        assert torch.equal(scores_N, torch.zeros(3))
        return
    else:
        reference = AutoModelForSequenceClassification.from_pretrained(path)
    sequences = [g.prompt + r for g in GROUPS for r in g.responses]
    logits = [reference(input_ids=torch.tensor([s])).logits[0, 0].detach() for s in sequences]
    torch.testing.assert_close(scores_N, torch.stack(logits), atol=1e-5, rtol=0)
    assert float(scores_N.abs().max()) > 0.01


def test_the_documented_table_is_this_one() -> None:
    page = Path(__file__).resolve().parents[2] / "docs/internals/mixes.md"
    documented = re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|", page.read_text(), re.MULTILINE)[1:]
    roles = {"outcome": "reward model", "process": "process reward model", "policy": "policy"}
    roles["start"] = "start of a reward model or critic"
    assert documented == [(name, roles[role]) for name, role, _, _ in MIXES]


# --- special tokens in a text ---------------------------------------------------------------------


def test_text_with_a_token_beyond_the_embeddings_is_refused_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "model"
    then(plain, tokenizer_with(additional_special_tokens=["<image>"]))(path)
    tokenizer = load_tokenizer(ModelConfig(path=str(path)))
    examples = [{"prompt": "a", "completion": "b"}, {"prompt": "a<image>", "completion": "b"}]
    config = DemonstrationsConfig(path=rows(tmp_path / "d.jsonl", examples))
    with pytest.raises(DataError, match=r"d\.jsonl:2.* the text holds <image>, token 13.* for 13"):
        load_demonstrations(config, tokenizer)


# --- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("modle", "model"),
        ("./modle", "model"),
        ("runs/first/fianl", "runs/first/final"),
        ("runs/frist/final", "runs/first/final"),
        ("run/first", "runs/first"),
        ("runs/First", "runs/first"),
        ("runs/frist", "runs/first"),
        ("rnus/first", "runs/first"),
        ("runs/qwertz", None),
        ("./qwertz", None),
        ("qwertz/a/b", None),
    ],
)
def test_mistyped_path_is_answered_with_the_nearest_name_and_never_by_the_hub(
    written: str, meant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model", "runs/first/final", "runs/second/final"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for loader in ("AutoConfig", "AutoTokenizer"):
        monkeypatch.setattr(
            f"transformers.{loader}.from_pretrained", lambda *_, **__: pytest.fail("looked up")
        )
    with pytest.raises(ModelError, match="there is no checkpoint directory") as caught:
        load_tokenizer(ModelConfig(path=written))
    assert ("did you mean" in str(caught.value)) == (meant is not None)
    if meant is not None:
        assert f"did you mean {meant}?" in str(caught.value)


def test_names_of_the_hub_are_not_taken_for_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "someone/model", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        assert local_directory(name) is None


def test_directory_of_a_run_names_the_checkpoint_in_it(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run" / "final")
    with pytest.raises(ModelError, match=r"without config\.json.*such as .*run/final"):
        check_checkpoint(str(tmp_path / "run"))
