"""The models and the data that both sides of the comparison are given.

Qwen2 with random weights, in two sizes, and a tokenizer that has a token for every word it is
given. The end token's logit is raised until a response ends after 32 tokens on average, so that
lengths spread over 1 to 64 as those of a trained model do: each is geometric, cut off.
Imports nothing of Trivium or TRL.
"""

from __future__ import annotations

import json
import random
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Tokenizer,
)

END, PADDING = 0, 1
END_NAME, PADDING_NAME = "<|endoftext|>", "<|pad|>"
SPACE = "Ġ"
"""How byte-level tokens write a space."""
FIRST_WORD = 2 + 256
MEAN_LENGTH, LONGEST = 32, 64
COMMON = 4.0
"""The constant that dimension 0 of every embedding holds, in standard deviations of the others."""


@dataclass(frozen=True)
class Size:
    """What a Qwen2 is made of; heads are 64 wide and keys are shared by pairs of them."""

    width: int
    layers: int
    vocabulary: int

    def config(self) -> Qwen2Config:
        heads = self.width // 32 if self.width < 256 else self.width // 64
        return Qwen2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.width * 8 // 3 // 32 * 32,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=PADDING,
        )


S = Size(width=128, layers=4, vocabulary=512)
M = Size(width=384, layers=6, vocabulary=32_000)


def write_world(directory: Path, size: Size, *, prompt_tokens: int, rows: int = 1024) -> None:
    """Checkpoints ``model``, ``scorer``, and ``data.jsonl``, whose rows serve every method."""
    directory.mkdir(parents=True)
    tokenizer = _tokenizer(size.vocabulary)
    tokenizer.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "scorer")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(size.config())
    _raise_end(model)
    model.save_pretrained(directory / "model")
    config = size.config()
    config.num_labels = 1
    Qwen2ForSequenceClassification(config).save_pretrained(directory / "scorer")
    drawn, known = random.Random(0), words(size.vocabulary)
    with (directory / "data.jsonl").open("w") as file:
        for _ in range(rows):
            row = _row(drawn, known, prompt_tokens)
            file.write(json.dumps(row) + "\n")


def words(vocabulary: int) -> list[str]:
    """The tokens that are whole words, each with the space before it."""
    made = [" "]
    letters = string.ascii_lowercase
    while len(made) < vocabulary:
        made += [word + letter for word in made if len(word) == len(made[-1]) for letter in letters]
    return made[1 : vocabulary - FIRST_WORD + 1]


def _tokenizer(vocabulary: int) -> Qwen2Tokenizer:
    """Byte-level, as Qwen2's has to be, with merges that make a token of each word."""
    names = [END_NAME, PADDING_NAME, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = []
    for word in words(vocabulary):
        name = word.replace(" ", SPACE)
        merges.append((name[:-1], name[-1]))
        names.append(name)
    return Qwen2Tokenizer(
        vocab={name: i for i, name in enumerate(names)},
        merges=merges,
        unk_token=END_NAME,
        eos_token=END_NAME,
        pad_token=PADDING_NAME,
    )


@torch.no_grad()
def _raise_end(model: Qwen2ForCausalLM) -> None:
    """Let the end token have a probability of 1 in 32 on average, at random contexts.

    Dimension 0 holds a constant that no layer adds to, and only the end token reads it.
    """
    embedding = model.get_input_embeddings().weight
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    embedding[:, 0] = COMMON * embedding.std()
    tokens = torch.randint(2, len(embedding), (16, LONGEST))
    wanted = 1 / MEAN_LENGTH
    low, high = 0.0, 1e4
    before = embedding[END].clone()
    for _ in range(50):
        middle = (low + high) / 2
        embedding[END] = before
        embedding[END, 0] = before[0] * (1 + middle)
        found = float(model(tokens).logits.softmax(-1)[..., END].mean())
        low, high = (middle, high) if found < wanted else (low, middle)


def _row(drawn: random.Random, known: list[str], prompt_tokens: int) -> dict[str, Any]:
    def text(count: int) -> str:
        return "".join(drawn.choices(known, k=count))

    def length() -> int:
        return min(1 + int(drawn.expovariate(1 / MEAN_LENGTH)), LONGEST - 1)

    return {"prompt": text(prompt_tokens), "chosen": text(length()), "rejected": text(length())}
