"""Models and data that both sides of the comparison use.

The models are Qwen2 with random weights, in two sizes. The tokenizer has one token per word,
including the space before it. The logit of the end token is raised until its probability is 2 over
the largest number of response tokens. Response lengths then follow a truncated geometric
distribution and spread over all possible lengths, as for a trained model. The module imports
neither Trivium nor TRL.
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
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Tokenizer,
)
from transformers.utils.logging import disable_progress_bar

END, PADDING = 0, 1
SPACE = "Ġ"
"""Symbol of a space in the tokenizer's vocabulary."""
SYLLABLES = [c + v for c, v in product("bcdfghjklmnpqrstvwxyz", "aeiou")]
CONSTANT_DIMENSION = 80.0
"""Value of dimension 0 of every embedding, in standard deviations of the other dimensions."""


@dataclass(frozen=True)
class Size:
    """Size of a Qwen2; every pair of query heads shares a key head."""

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
    scorer: bool = True,
) -> None:
    """Write the checkpoints ``model`` and ``scorer``, and ``data.jsonl`` for every method.

    Args:
        directory: output directory, which must not exist.
        size: size of both models.
        prompt_tokens: tokens of every prompt.
        response_tokens: largest number of tokens of a response, with its end token; the mean of the
            distribution before truncation is half of it.
        rows: number of rows of data.
        scorer: whether to write ``scorer``, which takes as much room as ``model``.
    """
    disable_progress_bar()
    directory.mkdir(parents=True)
    tokenizer, words = _tokenizer(size.vocabulary)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(size.config())
    _raise_end(model, response_tokens)
    networks: dict[str, PreTrainedModel] = {"model": model}
    if scorer:
        config = size.config()
        config.num_labels = 1
        networks["scorer"] = Qwen2ForSequenceClassification(config)
    for name, network in networks.items():
        network.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    rng = random.Random(0)
    with (directory / "data.jsonl").open("w") as file:
        for _ in range(rows):
            file.write(json.dumps(_row(rng, words, prompt_tokens, response_tokens)) + "\n")


def _tokenizer(vocabulary: int) -> tuple[Qwen2Tokenizer, list[str]]:
    """Return a tokenizer with `vocabulary` tokens and the words that are one token.

    It has Qwen2's tokenizer class, the only one that ``transformers`` accepts for Qwen2. Byte pairs
    are merged into syllables, and syllables into words. Consonants and vowels alternate, so the
    merges are unambiguous.
    """
    letters = sorted({letter for syllable in SYLLABLES for letter in syllable})
    short_tokens = ["<end>", "<pad>", SPACE, *letters, *SYLLABLES, *(SPACE + s for s in SYLLABLES)]
    merges = [(s[0], s[1]) for s in SYLLABLES] + [(SPACE, s) for s in SYLLABLES]
    longer = [*product(SYLLABLES, repeat=2), *islice(product(SYLLABLES, repeat=3), vocabulary)]
    longer_words = longer[: vocabulary - len(short_tokens)]
    words = ["".join(syllables) for syllables in longer_words]
    merges += [(SPACE + "".join(syllables[:-1]), syllables[-1]) for syllables in longer_words]
    tokens = short_tokens + [SPACE + word for word in words]
    token_ids = {token: i for i, token in enumerate(tokens)}
    names = {"eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<pad>"}
    return Qwen2Tokenizer(vocab=token_ids, merges=merges, **names), words


@torch.no_grad()
def _raise_end(model: Qwen2ForCausalLM, response: int) -> None:
    """Raise the end token's mean probability over random contexts to 2 / `response`."""
    embedding = model.get_input_embeddings().weight
    embedding[:, 0] = CONSTANT_DIMENSION * embedding.std()
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


def _row(rng: random.Random, words: list[str], prompt: int, response: int) -> dict[str, Any]:
    def text(count: int) -> str:
        return "".join(" " + rng.choice(words) for _ in range(count))

    def length() -> int:
        return min(1 + int(rng.expovariate(2 / response)), response - 1)

    return {"prompt": text(prompt), "chosen": text(length()), "rejected": text(length())}
