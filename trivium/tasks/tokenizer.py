"""Tokenizer and size of the model that learns the task from random initialization.

The tokenizer is a byte-level BPE trained on the task's text. Every digit is a token, so that the
model learns arithmetic digit by digit, and every name, thing and clause is one token. It is saved
and loaded like any `transformers` tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

END = "<|end|>"
PAD = "<|pad|>"
PIECES = r"\d|[,.][^\d,.]*"
"""Pattern of a digit, or of a clause from its comma; the text between matches is one piece."""


def train_tokenizer(texts: Iterable[str], vocabulary: int = 392) -> PreTrainedTokenizerFast:
    """Train a tokenizer of at most `vocabulary` tokens; the order of the texts has no effect."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def small_model_config(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> LlamaConfig:
    """Return the configuration of a Llama of about 340K parameters, with `changes` applied.

    The family is Llama because `AutoTokenizer` loads its tokenizers as they were saved. For other
    families it replaces the saved pre-tokenizer with that of the family.
    """
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.08,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlamaConfig(**{**settings, **changes})
