"""Small models, tokenizers and data files for tests that load, sample and train for real."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    SmolLM3Config,
)

from trivium.data.group import Group
from trivium.hf.loading import disable_dropout
from trivium.hf.model_config import ModelConfig
from trivium.models.reward_model import RewardModel

LETTERS = "abcdefghij.\n"
EOS = 0


def family(name: str, vocabulary: int = 50, **options: Any) -> PreTrainedConfig:
    """Return the configuration of a tiny model of a family."""
    plain = {"vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 2}
    wide = {**plain, "num_attention_heads": 4, "intermediate_size": 64, "pad_token_id": None}
    common = {**wide, "num_key_value_heads": 2, "max_position_embeddings": 64}
    heads = {**common, "head_dim": 8}
    old = {"vocab_size": vocabulary, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    window = {"sliding_window": 4}
    known: dict[str, tuple[Callable[..., PreTrainedConfig], dict[str, Any]]] = {
        "llama": (LlamaConfig, common),
        "qwen2": (Qwen2Config, common),
        "qwen2-window": (
            Qwen2Config,
            {**common, **window, "use_sliding_window": True, "max_window_layers": 1},
        ),
        "qwen3": (Qwen3Config, heads),
        "mistral": (MistralConfig, {**common, **window}),
        "gemma": (GemmaConfig, heads),
        "gemma2": (Gemma2Config, {**heads, **window, "attn_logit_softcapping": 0.5}),
        "gemma3": (Gemma3TextConfig, {**heads, **window}),
        "phi": (PhiConfig, {**common, "num_key_value_heads": 4}),
        "phi3": (Phi3Config, common),
        "smollm3": (SmolLM3Config, common),
        "gpt-neox": (GPTNeoXConfig, {**wide, "max_position_embeddings": 64}),
        "gpt2": (GPT2Config, old),
        "olmo2": (Olmo2Config, common),
        "granite": (GraniteConfig, {**common, "logits_scaling": 3.0}),
        "cohere": (CohereConfig, {**common, "logit_scale": 0.5}),
        "cohere2": (Cohere2Config, {**common, **window}),
        "opt": (
            OPTConfig,
            {**plain, "num_attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 64}
            | {"word_embed_proj_dim": 32},
        ),
        "bloom": (BloomConfig, {"vocab_size": vocabulary, "hidden_size": 32} | _layers(old)),
        "gptj": (GPTJConfig, {**old, "rotary_dim": 4}),
        "falcon": (FalconConfig, {**plain, "num_attention_heads": 4}),
        "gpt-oss": (
            GptOssConfig,
            {**heads, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4},
        ),
        "qwen2-moe-window": (
            Qwen2MoeConfig,
            {**common, "use_sliding_window": True, "sliding_window": 16, "num_experts": 2}
            | {"num_experts_per_tok": 1, "moe_intermediate_size": 32}
            | {"shared_expert_intermediate_size": 32, "max_window_layers": 2},
        ),
    }
    kind, settings = known[name]
    ends = {"bos_token_id": None, "eos_token_id": EOS}
    return kind(**{**settings, **ends, **options})


def _layers(old: dict[str, Any]) -> dict[str, Any]:
    return {"n_layer": old["n_layer"], "n_head": old["n_head"]}


SHARING = (
    "llama qwen2 qwen2-window qwen3 mistral gemma gemma2 gemma3 phi phi3 smollm3 gpt-neox gpt2 "
    "olmo2 granite cohere cohere2 opt"
).split()
SEPARATE = "bloom gptj falcon gpt-oss qwen2-moe-window".split()


def random_lm(
    config: PreTrainedConfig, *, seed: int = 0, spread: float = 0.1, dtype: str = "float32"
) -> PreTrainedModel:
    """Return a model with noise on every weight, bias and norm, so that none is zero or one."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    disable_dropout(model)
    perturb(model, seed=seed, spread=spread)
    return model


@torch.no_grad()
def perturb(model: torch.nn.Module, *, seed: int, spread: float) -> None:
    """Add normal noise to every parameter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_((spread * noise).to(parameter.dtype))


@torch.no_grad()
def scripted_lm(script: Sequence[int], vocabulary: int) -> PreTrainedModel:
    """Return a GPT-2 that predicts ``script[i]`` after any i tokens."""
    config = family("gpt2", vocabulary, n_embd=64, n_layer=1, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config)
    disable_dropout(model)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if name.endswith("ln_f.weight") else 0.0)
    model.transformer.wpe.weight.copy_(torch.eye(64))
    for i, token in enumerate(script[1:]):
        model.lm_head.weight[token, i] = 10.0
    return model


def letters_tokenizer(letters: str = LETTERS) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per letter, from 1 on, and EOS = 0; no BOS or padding."""
    vocabulary = {"<eos>": EOS} | {letter: i for i, letter in enumerate(letters, 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def checkpoint(
    directory: Path,
    name: str = "llama",
    *,
    letters: str = LETTERS,
    seed: int = 0,
    spread: float = 0.1,
    dtype: str = "float32",
    **options: Any,
) -> str:
    """Write a tiny random model with its tokenizer; return the directory as text."""
    tokenizer = letters_tokenizer(letters)
    model = random_lm(
        family(name, len(tokenizer), **options), seed=seed, spread=spread, dtype=dtype
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def rows(path: Path, records: Sequence[dict[str, Any]]) -> str:
    """Write a JSONL file; return its path as text."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def prompts_file(path: Path, prompts: Sequence[str]) -> dict[str, Any]:
    """Write prompts; return the ``data`` section that names them."""
    return {"path": rows(path, [{"prompt": prompt} for prompt in prompts])}


def source(path: Path, code: str) -> str:
    """Write a file of reward functions; return its path as text."""
    path.write_text(code)
    return str(path)


def random_groups(
    vocabulary: int, prompts: Sequence[int], responses: Sequence[Sequence[int]], *, seed: int = 0
) -> list[Group]:
    """Return groups of random tokens with the given lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(1, vocabulary, (length,), generator=generator).tolist()

    return [Group(draw(p), [draw(n) for n in ns]) for p, ns in zip(prompts, responses, strict=True)]


RAGGED = ([9, 2, 12, 1, 1], [[3, 7, 1], [5], [2, 2], [1], [1, 6, 4, 1]])
"""Prompt and response lengths: unequal groups, one-token prompts and responses."""


@torch.no_grad()
def plain_logprobs(
    model: PreTrainedModel, groups: Sequence[Group], temperature: float = 1.0
) -> Tensor:
    """Return what ``differentiable_logprobs`` does, without a gradient."""
    return differentiable_logprobs(model, groups, temperature)


def differentiable_logprobs(
    model: PreTrainedModel, groups: Sequence[Group], temperature: float = 1.0
) -> Tensor:
    """Return response tokens' log-probs, flat, one sequence at a time by the model itself."""
    found = []
    for group in groups:
        for response in group.responses:
            logits = model(input_ids=torch.tensor([group.prompt + response])).logits[0]
            log_p = (logits.float() / temperature).log_softmax(-1)[len(group.prompt) - 1 : -1]
            found.append(log_p.gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(found)


def assert_same_parameter_gradients(
    mine: torch.nn.Module, plain: torch.nn.Module, *, atol: float = 1e-5, rtol: float = 1e-3
) -> None:
    """Assert that two copies of a model hold the same gradient, and that it is not nothing."""
    norm = 0.0
    for one, other in zip(mine.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, atol=atol, rtol=rtol)
            norm += float(other.grad.norm())
    assert norm > 100 * atol


PROMPTS = ("a", "bcd", "ef.gh", "ij")
REWARDS = """
import random
import numpy
import torch

def noise(responses):
    return [random.random() + numpy.random.rand() + torch.rand(()).item() for _ in responses]

def letters(prompts, responses):
    return [r.count("a") - r.count("b") + 0.25 * r.count("c") for r in responses]

def pairs(prompts, responses):
    return [
        [((i, min(i + 2, len(r))), r[i : i + 2].count("a") - 0.3) for i in range(0, len(r), 2)]
        for r in responses
    ]
"""


class World:
    """A directory with a tiny checkpoint, prompts and rewards, and configurations that use them."""

    def __init__(self, directory: Path, name: str = "llama", **options: Any) -> None:
        self.directory = directory
        self.path = checkpoint(directory / "model", name, spread=0.2, **options)
        self.prompts = prompts_file(directory / "prompts.jsonl", PROMPTS)
        self.rewards = source(directory / "rewards.py", REWARDS)
        self.runs = 0

    def run(self, **options: Any) -> dict[str, Any]:
        """Return a ``run`` section with a new directory."""
        self.runs += 1
        return {"directory": str(self.directory / f"run{self.runs}"), **options}

    def reward(self, *names: str) -> list[dict[str, Any]]:
        return [{"function": f"{self.rewards}:{name}", "timeout": None} for name in names]

    def on_policy(self, *rewards: str, **options: Any) -> dict[str, Any]:
        """Return settings for PPO and GRPO with tiny updates, so that steps can be compared."""
        given = {
            "model": {"path": self.path},
            "data": self.prompts,
            "rewards": self.reward(*(rewards or ("letters",))),
            "run": self.run(),
            "sampling": {"max_tokens": 8},
            "optimizer": STILL,
            "prompts_per_step": 4,
            "responses_per_prompt": 3,
        }
        return given | options

    def rows(self, name: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"path": rows(self.directory / name, records)}

    def reward_model(self) -> str:
        """Write a reward model with random weights; return its path."""
        path = self.directory / "reward-model"
        if not path.exists():
            model = RewardModel.load(ModelConfig(path=self.path), new_head=True)
            perturb(model.model, seed=11, spread=0.1)
            model.save(path)
        return str(path)


STILL = {"learning_rate": 1e-10, "max_grad_norm": 1e6}


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Return a run's metrics without times and costs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    cost = ("elapsed", "flops", "tokens/per_second", "time/", "time_share/")
    return [{k: v for k, v in line.items() if not k.startswith(cost)} for line in lines]


class Captured:
    """The gradients of every optimizer step of a training run, in order."""

    def __init__(self, monkeypatch: Any) -> None:
        self.steps: list[list[Tensor]] = []
        move = torch.optim.AdamW.step

        def step(optimizer: torch.optim.AdamW, *args: Any) -> Any:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self.steps.append(
                [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
            )
            return move(optimizer, *args)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)

    def take(self) -> list[list[Tensor]]:
        """Return the gradients since the last call."""
        taken, self.steps = self.steps, []
        return taken


def assert_same_gradients(
    found: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]], atol: float = 4e-6
) -> None:
    """Assert that every gradient of every optimizer step agrees, and that not all are zero.

    The tolerance is ``atol``, times a step's largest gradient if that is above 1: float32 keeps
    seven digits of a gradient, which is a sum.
    """
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected, strict=True):
        largest = max(float(g.abs().max()) for g in theirs)
        assert largest > 100 * atol, "the gradients are too small to compare"
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=atol * max(1.0, largest), rtol=0)


transformers.logging.set_verbosity_error()
