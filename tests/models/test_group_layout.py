"""FlexAttention and masks see the same keys."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import random_groups

from trivium.data.batch import Batch
from trivium.models.flex_attention import FlexLayout
from trivium.models.group_layout import MaskedLayout
from trivium.models.layout import AttentionSpec

SHAPES = {
    "one response each": ([9, 3, 40], [[4], [7], [1]]),
    "pairs": ([9, 3, 40], [[4, 2], [7, 7], [1, 30]]),
    "groups": ([30, 30, 5], [[4, 2, 9, 1], [7, 7], [1, 30, 3]]),
    "one and several": ([6, 2], [[3], [1, 2, 3]]),
    "single tokens": ([1, 1], [[1, 1], [1]]),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "spec",
    [AttentionSpec(0.3, None, None), AttentionSpec(0.3, 4, None), AttentionSpec(0.3, 9, 0.7)],
)
def test_flex_attention_equals_masked_attention(spec: AttentionSpec) -> None:
    # FlexAttention runs on the CPU uncompiled and without gradients.
    for shape in SHAPES.values():
        batch = Batch.of(random_groups(50, *shape))
        generator = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(len(batch.tokens_L), heads, 16, dtype=torch.float64, generator=generator)
            for heads in (4, 2, 2)
        )
        with torch.no_grad():
            found = FlexLayout(batch).attend(0, query, key, value, spec=spec)
            expected = MaskedLayout(batch).attend(0, query, key, value, spec=spec)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
