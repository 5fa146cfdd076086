"""The tokenizer and the size of the model that learns the task from nothing.

A byte-level BPE trained on the task's own text: every digit is a token, so that arithmetic is
learned digit by digit, and every name, thing and clause becomes one token. It is an ordinary
`transformers` tokenizer, saved and loaded like any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

END = "<|end|>"
PAD = "<|pad|>"
PIECES = r"\d|[,.][^\d,.]*"
"""A digit, or a clause from its comma on; what lies between is a piece too."""


def train_tokenizer(texts: Iterable[str], vocabulary: int = 392) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocabulary` tokens, the same for the same texts in any order."""
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
    """A Llama of about 340K parameters for this tokenizer; `changes` replace single settings.

    Llama, because `AutoTokenizer` loads its tokenizers as they were saved; for other families it
    puts the family's own splitting of text in the place of the saved one.
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
