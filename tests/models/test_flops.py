"""Counted FLOPs equal torch's count of executed operations, and counts by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import LETTERS, family, letters_tokenizer, random_groups, random_lm
from torch.utils.flop_counter import FlopCounterMode

from trivium.data.batch import Batch
from trivium.hf.model_config import LoraConfig, ModelConfig
from trivium.models import flops
from trivium.models.cpu.last_mlp import _forward_output_positions
from trivium.models.cpu.replace import is_replaced
from trivium.models.policy import Policy
from trivium.models.reference import frozen_copy
from trivium.rollout.local_engine import LocalEngine
from trivium.rollout.sampling import Sampling

VOCABULARY = len(LETTERS) + 1
PRODUCTS = ("aten.mm", "aten.addmm", "aten._grouped_mm")


def policy(name: str = "llama") -> Policy:
    return Policy(random_lm(family(name, VOCABULARY)), letters_tokenizer())


def executed(counter: FlopCounterMode) -> float:
    """Return the FLOPs of matrix products that torch counted, without attention."""
    counts = counter.get_flop_counts()["Global"]
    return float(sum(n for op, n in counts.items() if str(op) in PRODUCTS))


def width(policy: Policy) -> int:
    config = policy.backbone.config
    heads = config.num_attention_heads
    each = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers * heads * each


def skipped_weights(model: Policy) -> int:
    """Return the weights of the last layer that only output positions pass."""
    layers: Any = getattr(model.backbone, "layers", [None])
    mlp = getattr(layers[-1], "mlp", None)
    replaced = mlp is not None and is_replaced(mlp, _forward_output_positions)
    return sum(p.numel() for p in mlp.parameters()) if replaced else 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "opt", "phi", "gptj"])
def test_a_scoring_pass_costs_the_executed_products_and_its_attention(name: str) -> None:
    model = policy(name)
    groups = random_groups(VOCABULARY, [4, 3], [[2, 3], [5]])
    batch = Batch.of(groups)
    before = flops.total()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.score(batch)
    counted = flops.total() - before
    # Prompts 4·5/2 + 3·4/2, responses (5+6) + (5+6+7) + (4+5+6+7+8); a family that computes
    # separate rows computes its prompt once for each response.
    pairs = 10 + 6 + 11 + 18 + 30 if model.shared else 2 * 10 + 6 + 11 + 18 + 30
    attention = 4 * pairs * width(model)
    if model.shared:
        # Tokens that the fast path skips in the last layer count too.
        skipped = len(batch.tokens_L) - len(batch.logit_positions_T.unique())
        assert counted - attention == executed(counter) + 2 * skipped * skipped_weights(model)
    else:
        assert 0 < counted - attention < executed(counter), "padding is executed, not counted"


def test_a_training_pass_costs_about_three_scoring_passes() -> None:
    model = policy()
    batch = Batch.of(random_groups(VOCABULARY, [6], [[5, 5]]))
    before = flops.total()
    with torch.no_grad():
        model.score(batch)
    scoring = flops.total() - before
    before = flops.total()
    model.score(batch).logprobs_T.sum().backward()
    assert flops.total() - before == 3 * scoring


def test_frozen_weights_cost_no_weight_gradient(tmp_path: Path) -> None:
    model = policy()
    batch = Batch.of(random_groups(VOCABULARY, [6], [[5, 5]]))
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    model.model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    trained = model.model.model.layers[0].mlp.up_proj.weight.numel()
    with torch.no_grad():
        before = flops.total()
        model.score(batch)
        scoring = flops.total() - before
    before = flops.total()
    model.score(batch)
    tokens = 6 + 5 + 5
    attention = 4 * (21 + 2 * (7 + 8 + 9 + 10 + 11)) * width(model)
    assert flops.total() - before == 2 * scoring + attention + 2 * tokens * trained


def test_a_copy_is_counted_once() -> None:
    model = policy()
    copied = frozen_copy(model)
    batch = Batch.of(random_groups(VOCABULARY, [6], [[5]]))
    costs = []
    for each in (model, copied):
        before = flops.total()
        with torch.no_grad():
            each.score(batch)
        costs.append(flops.total() - before)
    assert costs[0] == costs[1] > 0


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_a_rollout_computes_each_prompt_once_and_each_token_once(name: str) -> None:
    from trivium.data.prompts import Prompt

    model = policy(name)
    engine = LocalEngine(model, end_tokens=())
    before = flops.total()
    engine.generate([Prompt([1, 2, 3], "abc", {}, 0)], 4, Sampling(max_tokens=3), seed=0, step=1)
    tables = {id(m.weight) for m in model.backbone.modules() if isinstance(m, torch.nn.Embedding)}
    matrices = sum(
        p.numel() for p in model.backbone.parameters() if p.dim() == 2 and id(p) not in tables
    )
    tokens, pairs = 3 + 4 * 2, 6 + 4 * (4 + 5)
    head = 2 * (4 + 4 + 4) * model.head.weight_VD.numel()
    assert flops.total() - before == 2 * tokens * matrices + 4 * pairs * width(model) + head


def test_adapters_count_in_addition_to_their_base_weights(tmp_path: Path) -> None:
    from helpers.tiny_models import checkpoint

    path = checkpoint(tmp_path / "model")
    plain = Policy.load(ModelConfig(path=path))
    adapted = Policy.load(ModelConfig(path=path, lora=LoraConfig(rank=2)))
    batch = Batch.of(random_groups(VOCABULARY, [6], [[5]]))
    costs = []
    for each in (plain, adapted):
        before = flops.total()
        with torch.no_grad():
            each.score(batch)
        costs.append(flops.total() - before)
    adapters = sum(p.numel() for n, p in adapted.model.named_parameters() if "lora_" in n)
    assert costs[1] - costs[0] == 2 * 11 * adapters


def test_paused_passes_do_not_count() -> None:
    model, batch = policy(), Batch.of(random_groups(VOCABULARY, [6], [[5]]))
    before = flops.total()
    with torch.no_grad(), flops.paused():
        model.hidden(batch)
    assert flops.total() == before
    with torch.no_grad():
        model.hidden(batch)
    assert flops.total() > before


def test_nested_separate_counts_are_neither_lost_nor_counted_twice() -> None:
    before = flops.total()
    with flops.apart() as outer:
        flops.add(1)
        with flops.apart() as inner:
            flops.add(10)
        flops.add(100)
    flops.add(1000)
    assert (inner.flops, outer.flops) == (10, 101)
    assert flops.total() == before + 1000
