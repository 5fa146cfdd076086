"""The models and the data that both sides of the comparison are given.

Qwen2 with random weights, in two sizes, and a tokenizer whose words are one token each, space
included. The end token's logit is raised until it has a probability of 2 in the most tokens that a
response may have, so that lengths spread over all that are possible, as those of a trained model
do: each is that of a geometric distribution, cut off. Imports nothing of Trivium or TRL.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Tokenizer,
)
from transformers.utils.logging import disable_progress_bar

END, PADDING = 0, 1
SPACE = "Ġ"
"""What the tokenizer's vocabulary writes for a space."""
SYLLABLES = [c + v for c, v in product("bcdfghjklmnpqrstvwxyz", "aeiou")]
COMMON = 80.0
"""The constant that dimension 0 of every embedding holds, in standard deviations of the others."""


@dataclass(frozen=True)
class Size:
    """What a Qwen2 is made of; keys are shared by pairs of heads."""

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
SIZES = {"S": S, "M": M}


def write_world(
    directory: Path,
    size: Size,
    *,
    prompt_tokens: int,
    response_tokens: int = 64,
    rows: int = 1024,
) -> None:
    """Checkpoints ``model`` and ``scorer``, and ``data.jsonl``, whose rows serve every method.

    Args:
        directory: where; it must not exist.
        size: of both models.
        prompt_tokens: of every prompt.
        response_tokens: the most of a response, its end included; half of it is the mean of the
            distribution that is cut off there.
        rows: of the data.
    """
    disable_progress_bar()
    directory.mkdir(parents=True)
    tokenizer, words = _tokenizer(size.vocabulary)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(size.config())
    _raise_end(model, response_tokens)
    config = size.config()
    config.num_labels = 1
    scorer = Qwen2ForSequenceClassification(config)
    for name, written in {"model": model, "scorer": scorer}.items():
        written.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    drawn = random.Random(0)
    with (directory / "data.jsonl").open("w") as file:
        for _ in range(rows):
            file.write(json.dumps(_row(drawn, words, prompt_tokens, response_tokens)) + "\n")


def _tokenizer(vocabulary: int) -> tuple[Qwen2Tokenizer, list[str]]:
    """A tokenizer of so many tokens, and the words that are one token with the space before them.

    It is Qwen2's own, since ``transformers`` gives Qwen2 no other: byte pairs are merged to
    syllables, and these to words. Consonants and vowels take turns, so there is one way to do it.
    """
    letters = sorted({letter for syllable in SYLLABLES for letter in syllable})
    parts = ["<end>", "<pad>", SPACE, *letters, *SYLLABLES, *(SPACE + s for s in SYLLABLES)]
    merges = [(s[0], s[1]) for s in SYLLABLES] + [(SPACE, s) for s in SYLLABLES]
    longer = [*product(SYLLABLES, repeat=2), *islice(product(SYLLABLES, repeat=3), vocabulary)]
    chosen = longer[: vocabulary - len(parts)]
    words = ["".join(syllables) for syllables in chosen]
    merges += [(SPACE + "".join(syllables[:-1]), syllables[-1]) for syllables in chosen]
    tokens = parts + [SPACE + word for word in words]
    numbered = {token: i for i, token in enumerate(tokens)}
    names = {"eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<pad>"}
    return Qwen2Tokenizer(vocab=numbered, merges=merges, **names), words


@torch.no_grad()
def _raise_end(model: Qwen2ForCausalLM, response: int) -> None:
    """Let the end token have a probability of 2 in ``response`` on average, at random contexts."""
    embedding = model.get_input_embeddings().weight
    embedding[:, 0] = COMMON * embedding.std()
    tokens = torch.randint(2, len(embedding), (16, 64))
    hidden = model.model(tokens).last_hidden_state.flatten(0, 1)
    logits = hidden @ embedding.T
    others = logits[:, END + 1 :].logsumexp(-1)
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        end = logits[:, END] + hidden[:, 0] * embedding[END, 0] * middle
        low, high = (
            (middle, high) if (end - others).sigmoid().mean() < 2 / response else (low, middle)
        )
    embedding[END, 0] *= 1 + middle


def _row(drawn: random.Random, words: list[str], prompt: int, response: int) -> dict[str, Any]:
    def text(count: int) -> str:
        return "".join(" " + drawn.choice(words) for _ in range(count))

    def length() -> int:
        return min(1 + int(drawn.expovariate(2 / response)), response - 1)

    return {"prompt": text(prompt), "chosen": text(length()), "rejected": text(length())}
