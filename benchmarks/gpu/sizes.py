"""Models and prompts for both sides of ``benchmarks/gpu.sh``. Imports neither Trivium nor TRL."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "speed"))

from worlds import END, PADDING, Size, write_world

__all__ = ["LARGE", "SMALL", "TINY", "Qwen", "write_world"]


@dataclass(frozen=True)
class Qwen(Size):
    """A Qwen2 of a published size, with random weights."""

    heads: int
    key_heads: int
    inner: int

    def config(self) -> Qwen2Config:
        return Qwen2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            max_position_embeddings=32_768,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=PADDING,
        )


SMALL = Qwen(896, 24, 151_936, heads=14, key_heads=2, inner=4_864)
LARGE = Qwen(1_536, 28, 151_936, heads=12, key_heads=2, inner=8_960)
TINY = Qwen(64, 2, 512, heads=4, key_heads=2, inner=128)
