"""What is computed the fast way is what the plain way computes: values and gradients."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from helpers.op_recorder import Noted, aten
from helpers.tiny_models import family, letters_tokenizer, random_groups, random_lm
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.data.batch import Batch
from trivium.data.group import Group
from trivium.models import attention, flops, logprobs
from trivium.models.attention import (
    AttentionSpec,
    GroupLayout,
    MaskedLayout,
    hidden_states,
    on_line,
)
from trivium.models.cpu import layers, prefix_attention
from trivium.models.cpu import linear as linear_module
from trivium.models.cpu.decode import DecodeModel, decode_specs
from trivium.models.cpu.linear import (
    Linear,
    Packed,
    linear,
    matmul_backend,
    pad_rows,
    use_fast_linears,
)
from trivium.models.cpu.prefix_attention import (
    MAX_PADDING,
    MIN_SPLIT_PAIRS,
    MIN_UNBATCHED_PAIRS,
    bucket_by_size,
    plan,
)
from trivium.models.flex_attention import FlexLayout
from trivium.models.logprobs import Head, token_logprobs
from trivium.models.policy import Policy
from trivium.models.segments import SegmentViews
from trivium.rollout.engine import draw
from trivium.rollout.sampling import Sampling

LEAN = ["llama", "qwen2", "qwen2-window", "qwen3", "mistral"]
NOT_LEAN = ["gemma", "gemma2", "gemma3", "phi3", "gpt2", "olmo2", "cohere"]


@pytest.fixture(autouse=True)
def onednn() -> Iterator[None]:
    """The product that is not PyTorch's own, whichever is faster here."""
    before = matmul_backend.name
    matmul_backend.use("onednn")
    yield
    matmul_backend.use(before)


# --- attention ----------------------------------------------------------------------------------


def lines(batch: Batch, heads: int, key_heads: int, width: int = 8) -> list[Tensor]:
    """Queries, keys and values of a line, and a gradient by the output, in float64."""
    generator = torch.Generator().manual_seed(len(batch.tokens_L))
    return [
        torch.randn(len(batch.tokens_L), n, width, dtype=torch.float64, generator=generator)
        for n in (heads, key_heads, key_heads, heads)
    ]


def outputs(
    attend: object, batch: Batch, heads: int, key_heads: int, read: Tensor | None = None
) -> list[Tensor]:
    """The output of an attention and its gradients by queries, keys and values."""
    *inputs, gradient = lines(batch, heads, key_heads)
    gradient = gradient if read is None else gradient[read]
    leaves = [x.requires_grad_() for x in inputs]
    out = attend(*leaves)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


SHAPES = {
    "one response each": ([9, 3, 40], [[4], [7], [1]]),
    "pairs": ([9, 3, 40], [[4, 2], [7, 7], [1, 30]]),
    "groups": ([30, 30, 5], [[4, 2, 9, 1], [7, 7], [1, 30, 3]]),
    "one and several": ([6, 2], [[3], [1, 2, 3]]),
    "single tokens": ([1, 1], [[1, 1], [1]]),
}


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=["equal", "grouped", "one"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_attention_in_parts_equals_the_masked_one(
    shape: tuple[list[int], list[list[int]]], heads: tuple[int, int]
) -> None:
    batch = Batch.of(random_groups(50, *shape))
    spec = AttentionSpec(0.3, None, None)
    shared, masked = GroupLayout(batch), MaskedLayout(batch)
    found = outputs(lambda *qkv: shared.attend(0, *qkv, spec=spec), batch, *heads)
    expected = outputs(lambda *qkv: masked.attend(0, *qkv, spec=spec), batch, *heads)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("alone", [1, 200, MIN_UNBATCHED_PAIRS, 1 << 30])
@pytest.mark.parametrize("seed", range(20))
def test_attention_of_many_shapes_in_one_batch_equals_the_masked_one(
    monkeypatch: pytest.MonkeyPatch, seed: int, alone: int
) -> None:
    monkeypatch.setattr(prefix_attention, "MIN_UNBATCHED_PAIRS", alone)
    drawn = random.Random(seed)
    groups = [
        Group([1] * drawn.randint(1, 60), [[2] * drawn.randint(1, 50) for _ in range(n)])
        for n in (drawn.randint(1, 6) for _ in range(drawn.randint(1, 12)))
    ]
    batch, spec = Batch.of(groups), AttentionSpec(0.3, None, None)
    shared, masked = GroupLayout(batch), MaskedLayout(batch)
    found = outputs(lambda *qkv: shared.attend(0, *qkv, spec=spec), batch, 4, 2)
    expected = outputs(lambda *qkv: masked.attend(0, *qkv, spec=spec), batch, 4, 2)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("alone", [1, 200, 1 << 30])
@pytest.mark.parametrize("seed", range(10))
def test_what_is_read_of_the_last_layer_and_its_gradients_are_as_if_all_were(
    monkeypatch: pytest.MonkeyPatch, seed: int, alone: int, share: float
) -> None:
    monkeypatch.setattr(prefix_attention, "MIN_UNBATCHED_PAIRS", alone)
    drawn = random.Random(seed)
    shape = [drawn.randint(1, 30) for _ in range(5)]
    batch = Batch.of(random_groups(50, shape, [[4, 2, 25], [1], [30], [7, 7], [12]], seed=seed))
    length = len(batch.tokens_L)
    read = torch.tensor(sorted(drawn.sample(range(length), max(1, int(share * length)))))
    spec, masked = AttentionSpec(0.3, None, None), MaskedLayout(batch)
    shared = GroupLayout(batch, read, last=3)

    def found(layer: int) -> list[Tensor]:
        return outputs(lambda *qkv: shared.attend(layer, *qkv, spec=spec)[read], batch, 4, 2, read)

    expected = outputs(lambda *qkv: masked.attend(3, *qkv, spec=spec)[read], batch, 4, 2, read)
    for mine, theirs in zip(found(3) + found(2), expected * 2, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


def test_last_layer_attends_from_few_tokens_where_few_are_read() -> None:
    batch = Batch.of(random_groups(50, [100] * 4, [[50]] * 4))

    def pairs(read: Tensor | None) -> int:
        line = torch.zeros(len(batch.tokens_L), 1)
        blocks = [(b.queries.dense(line), b.keys.dense(line)) for b in plan(batch, read)]
        both = [pair for queries, keys in blocks for pair in zip(queries, keys, strict=True)]
        return sum(q.shape[0] * q.shape[2] * k.shape[2] for q, k in both)

    assert pairs(None) == 4 * 150**2
    assert pairs(batch.last_tokens_N) == 4 * (149 + 1)


def test_scores_of_any_size_are_merged_without_overflow() -> None:
    batch, spec = (
        Batch.of(random_groups(50, [9, 4], [[5, 6, 2], [3, 1]])),
        AttentionSpec(300.0, None, None),
    )
    shared, masked = GroupLayout(batch), MaskedLayout(batch)
    found = outputs(lambda *qkv: shared.attend(0, *qkv, spec=spec), batch, 2, 2)
    expected = outputs(lambda *qkv: masked.attend(0, *qkv, spec=spec), batch, 2, 2)
    for mine, theirs in zip(found, expected, strict=True):
        assert bool(mine.isfinite().all())
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)


def test_no_key_of_a_prompt_is_copied_for_a_response() -> None:
    def keys(prompt: int, responses: int) -> int:
        groups = [Group([1] * prompt, [[2] * 3] * responses)] * 2
        line = torch.zeros(2 * (prompt + 3 * responses), 1)
        blocks = [block for block in plan(Batch.of(groups)) if not block.causal]
        return sum(keys.numel() for block in blocks for keys in block.keys.dense(line))

    assert keys(400, 2) == keys(400, 80) == 2 * 400
    assert keys(4, 2) == keys(4, 80) == 2 * 4


def test_all_rows_but_short_ones_are_read_where_they_lie_and_computed_as_masked_ones() -> None:
    batch = Batch.of(random_groups(50, [801, 300, 9, 8], [[250, 3], [40], [3, 140], [90, 2]]))
    line = torch.randn(len(batch.tokens_L), 4, 8)
    for rows in (rows for block in plan(batch) for rows in (block.queries, block.keys)):
        for dense in rows.dense(line):
            lies = dense.untyped_storage().data_ptr() == line.untyped_storage().data_ptr()
            assert lies == isinstance(rows, SegmentViews)
    # A prompt and its response, or the responses to one prompt, lie end to end.
    found_rows = []
    for block in plan(batch):
        rows = block.queries
        alone = isinstance(rows, SegmentViews)
        lengths = [x.shape[2] for x in rows.dense(line)] if alone else rows.held.sum(1).tolist()
        found_rows.append((alone, block.causal, lengths))
    assert found_rows == [
        (True, True, [801, 250, 340, 140, 90]),
        (False, True, [3, 9, 3, 8, 2]),
        (True, False, [253, 143]),
        (False, False, [92]),
    ]
    spec = AttentionSpec(0.3, None, None)
    shared, masked = GroupLayout(batch), MaskedLayout(batch)
    found = outputs(lambda *qkv: shared.attend(0, *qkv, spec=spec), batch, 4, 2)
    expected = outputs(lambda *qkv: masked.attend(0, *qkv, spec=spec), batch, 4, 2)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "spec",
    [AttentionSpec(0.3, None, None), AttentionSpec(0.3, 4, None), AttentionSpec(0.3, 9, 0.7)],
)
def test_flex_attention_sees_what_the_masked_one_sees(spec: AttentionSpec) -> None:
    # Uncompiled and without gradients, which is what FlexAttention can do on the CPU.
    for shape in SHAPES.values():
        batch = Batch.of(random_groups(50, *shape))
        query, key, value, _ = lines(batch, 4, 2, width=16)
        with torch.no_grad():
            found = FlexLayout(batch).attend(0, query, key, value, spec=spec)
            expected = MaskedLayout(batch).attend(0, query, key, value, spec=spec)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@given(st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), min_size=1, max_size=40))
def test_lots_hold_each_rectangle_once_and_waste_little(sizes: list[tuple[int, int]]) -> None:
    widths, heights = (torch.tensor(x) for x in zip(*sizes, strict=True))
    lots = bucket_by_size(widths, heights)
    assert sorted(i for lot in lots for i in lot.tolist()) == list(range(len(sizes)))
    for lot in lots:
        box = int(widths[lot].max()) * int(heights[lot].max()) * len(lot)
        used = int((widths[lot] * heights[lot]).sum())
        assert len(lot) == 1 or box <= max(MAX_PADDING * used, MIN_SPLIT_PAIRS)


def test_rows_from_a_size_on_are_alone() -> None:
    def alone(prompt: int, response: int) -> set[tuple[bool, bool]]:
        batch = Batch.of([Group([1] * prompt, [[2] * response] * 2)])
        return {(block.causal, isinstance(block.queries, SegmentViews)) for block in plan(batch)}

    assert alone(32, 31) == {(True, True), (True, False), (False, True)}
    assert alone(31, 32) == {(True, False), (True, True), (False, True)}
    assert alone(16, 31) == {(True, False), (False, False)}
    assert alone(16, 32) == {(True, False), (True, True), (False, True)}


def test_nothing_flows_through_what_is_not_read() -> None:
    # The latter half looks at itself and at the former: as many queries as the line has tokens.
    batch = Batch.of([Group([1] * 6, [[2] * 6])])
    read, spec = torch.arange(6, 12), AttentionSpec(0.3, None, None)
    layout = GroupLayout(batch, read, last=0)
    for _ in range(20):
        query, key, value, gradient = (x.fill_(torch.nan) for x in lines(batch, 4, 2))
        del query, key, value, gradient
        out, of_query, *_ = outputs(lambda *qkv: layout.attend(0, *qkv, spec=spec), batch, 4, 2)
        assert not out[:6].any() and not of_query[:6].any()


# --- linear layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [16, 40])
@pytest.mark.parametrize("shape", [(300, 24), (2, 200, 24), (1, 24), (0, 24)])
def test_linear_layer_and_its_gradients_equal_those_of_torch(
    shape: tuple[int, ...], width: int, bias: bool
) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(24, width, bias=bias), torch.randn(shape, requires_grad=True)
    found, expected = linear(x, layer.weight, layer.bias), layer(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    gradient = torch.randn(expected.shape)
    leaves = [x, *layer.parameters()]
    mine = torch.autograd.grad(found, leaves, gradient)
    theirs = torch.autograd.grad(expected, leaves, gradient)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_frozen_weight_gets_no_gradient_and_passes_one_on() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40).requires_grad_(False)
    x = torch.randn(200, 24, requires_grad=True)
    linear(x, layer.weight, layer.bias).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(200, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_torch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(300, 8, dtype=dtype), torch.randn(5, 8, dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_autocast_is_left_to_torch() -> None:
    x, weight = torch.randn(300, 8), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


def test_all_plain_linear_layers_of_a_model_become_fast_and_keep_their_names() -> None:
    model = random_lm(family("llama"))
    names = set(model.state_dict())
    use_fast_linears(model)
    kinds = {type(x) for x in model.modules() if isinstance(x, nn.Linear)}
    assert kinds == {Linear} and set(model.state_dict()) == names


@pytest.mark.usefixtures("each_product")
@pytest.mark.parametrize("rows", [1, 7, 200])
@pytest.mark.parametrize("biases", [(True, True), (False, False), (True, False)])
def test_packed_layers_equal_their_parts(rows: int, biases: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(64, n, bias=b) for n, b in zip((96, 160), biases, strict=True)]
    x = torch.randn(rows, 64)
    with torch.no_grad():
        expected = torch.cat([layer(x) for layer in layers], 1)
        torch.testing.assert_close(Packed.of(*layers)(x), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_layers_are_one_product_by_torch_too(dtype: torch.dtype, bias: bool) -> None:
    matmul_backend.use("torch")
    with torch.no_grad():
        packed = Packed.of(*(nn.Linear(64, n, bias=bias, dtype=dtype) for n in (96, 160)))
        x = torch.randn(7, 64, dtype=dtype)
        with Noted() as noted:
            packed(x)
    assert [call[0].overloadpacket for call in noted.calls] == [aten.addmm if bias else aten.mm]


def test_onednn_meets_few_numbers_of_rows_however_many_a_batch_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    met, onednn = set(), linear_module._onednn
    packed, x = Packed.of(nn.Linear(64, 96)), torch.randn(130, 64)

    def noted(a_LD: Tensor, *others: Any) -> Tensor:
        met.add(len(a_LD))
        return onednn(a_LD, *others)

    monkeypatch.setattr(linear_module, "_onednn", noted)
    monkeypatch.setattr(linear_module, "MIN_FLOPS", 1)
    for rows in range(1, 131):
        torch.testing.assert_close(packed(x[:rows]), packed(x)[:rows], atol=1e-5, rtol=0)
    assert met == {16, 32, 48, 64, 80, 96, 112, 128, 144}


@pytest.mark.usefixtures("each_product")
def test_packed_layers_are_as_they_were_when_they_were_packed() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 96), torch.randn(200, 64)
    with torch.no_grad():
        packed, before = Packed.of(layer), layer(x)
        layer.weight += 1
        torch.testing.assert_close(packed(x), before, atol=1e-5, rtol=0)


def test_which_product_is_used_is_measured_once_and_can_be_set() -> None:
    fresh = type(matmul_backend)()
    assert fresh.name in ("torch", "onednn")
    fresh.use("torch")
    assert not fresh.supports(1000, torch.ones(1))
    fresh.use("onednn")
    assert fresh.supports(1000, torch.ones(1))


@pytest.mark.parametrize(
    ("seconds", "name"), [([3.0, 1.0], "onednn"), ([1.0, 1.0], "torch"), ([1.0, 3.0], "torch")]
)
def test_onednn_is_used_where_it_is_clearly_faster(
    seconds: list[float], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_module, "_seconds", lambda *works: seconds)
    assert linear_module._faster() == name


def test_products_are_measured_in_turn() -> None:
    done: list[str] = []
    seconds = linear_module._seconds(lambda: done.append("a"), lambda: done.append("b"))
    assert len(seconds) == 2 and done == ["a", "b"] * linear_module.NUM_PROBES


# --- few kernels --------------------------------------------------------------------------------


def test_lines_are_filled_up_by_little_to_few_lengths() -> None:
    x = torch.ones(1)
    for octave in range(7, 16):
        met = set()
        for rows in range(1 << octave, 2 << octave):
            more = pad_rows(rows, x)
            assert 0 <= more < max(16, rows / 32)
            met.add(rows + more)
        assert len(met) <= 33


def test_nothing_is_filled_up_where_no_kernel_is_kept() -> None:
    assert pad_rows(131, torch.ones(1)) == 13
    assert pad_rows(127, torch.ones(1)) == 0
    assert pad_rows(131, torch.ones(1, dtype=torch.float64)) == 0
    half = torch.ones(1, dtype=torch.bfloat16)
    assert pad_rows(131, half) == 13 and pad_rows(127, half) == 0
    assert pad_rows(131, half.to("meta")) == 0
    matmul_backend.use("torch")
    assert pad_rows(131, torch.ones(1)) == 0


def learned(policy: Policy, batch: Batch) -> tuple[list[Tensor], float]:
    """Log-probs and entropies, their gradients by all weights, and the FLOPs they cost."""
    with flops.apart() as counted:
        scores = policy.score(batch)
        generator = torch.Generator().manual_seed(0)
        of_logprobs, of_entropy = torch.rand(2, len(scores.logprobs_T), generator=generator)
        loss = (of_logprobs * scores.logprobs_T - of_entropy * scores.entropy_T).mean()
        gradients = torch.autograd.grad(loss, list(policy.model.parameters()))
    found = [scores.logprobs_T.detach(), scores.entropy_T.detach(), *gradients]
    return found, counted.flops


def wide_policy(name: str, dtype: str = "float32") -> Policy:
    options = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 1024}
    return Policy(random_lm(family(name, 200, **options), dtype=dtype), letters_tokenizer())


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gemma2"])
@pytest.mark.parametrize("prompt", [96, 5])
def test_filled_up_lines_teach_what_bare_ones_do(name: str, prompt: int) -> None:
    policy = wide_policy(name)
    batch = Batch.of(random_groups(200, [prompt, 3], [[100, 113], [2]]))
    found, cost = learned(policy, batch)
    matmul_backend.use("torch")
    expected, bare_cost = learned(policy, batch)
    assert cost == bare_cost
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-3)


def test_filled_up_lines_in_bfloat16_teach_what_bare_ones_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = wide_policy("llama", "bfloat16")
    batch = Batch.of(random_groups(200, [96, 3], [[100, 113], [2]]))
    found, cost = learned(policy, batch)
    for module in (attention, layers, logprobs):
        monkeypatch.setattr(module, "pad_rows", lambda *_: 0)
    expected, bare_cost = learned(policy, batch)
    assert cost == bare_cost
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=0.03, rtol=0.1)


def test_states_are_of_the_tokens_and_not_of_what_fills_the_line_up() -> None:
    batch = Batch.of(random_groups(200, [96], [[209]]))
    assert len(hidden_states(wide_policy("llama").backbone, batch)) == 96 + 209


def test_head_with_a_bias_learns_from_tokens_alone() -> None:
    torch.manual_seed(0)
    shapes = (131, 128), (200, 128), (200,)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    targets_T = torch.randint(200, (131,))
    found = []
    for name in ("onednn", "torch"):
        matmul_backend.use(name)
        chosen_T, entropy_T = token_logprobs(leaves[0], Head(*leaves[1:]), targets_T)
        assert entropy_T is not None
        loss = (chosen_T * torch.arange(131)).mean() + entropy_T.mean()
        found.append(torch.autograd.grad(loss, leaves))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-4)


def test_lines_of_like_lengths_are_learned_from_with_the_same_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, onednn = wide_policy("llama"), linear_module._onednn
    met: set[tuple[torch.Size, torch.Size]] = set()

    def noted(a_LD: Tensor, b_ED: Tensor, *others: Any) -> Tensor:
        met.add((a_LD.shape, b_ED.shape))
        return onednn(a_LD, b_ED, *others)

    monkeypatch.setattr(linear_module, "_onednn", noted)
    learned(policy, Batch.of(random_groups(200, [96], [[209]])))
    first = set(met)
    for length in range(210, 225):
        learned(policy, Batch.of(random_groups(200, [96], [[length]])))
    assert met == first
    assert {rows for (rows, _), _ in met} == {320, 224, 128}


# --- the lean pass ------------------------------------------------------------------------------


def policy_of(name: str) -> Policy:
    return Policy(random_lm(family(name)), letters_tokenizer())


def adapted(layer: nn.Linear) -> nn.Module:
    return peft.tuners.lora.Linear(layer, "default", peft.LoraConfig(), r=4)


@pytest.mark.parametrize("name", LEAN)
def test_lean_pass_equals_the_backbone(name: str) -> None:
    policy = policy_of(name)
    specs = decode_specs(policy.backbone)
    assert specs is not None
    batch = Batch.of(random_groups(50, [9, 3, 14], [[4, 2], [7, 7, 20], [1]]))
    with torch.no_grad():
        args = (batch.tokens_L, batch.positions_L, GroupLayout(batch))
        expected = on_line(policy.backbone, *args)
        found = DecodeModel(policy.backbone, specs)(*args)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", LEAN)
def test_half_precision_is_no_reason_to_compute_separate_rows(name: str) -> None:
    model = random_lm(family(name, num_hidden_layers=8, hidden_size=64)).to(torch.bfloat16)
    policy = Policy(model, letters_tokenizer())
    assert policy.shared and isinstance(policy.decode_model(), DecodeModel)


@pytest.mark.parametrize("name", NOT_LEAN)
def test_other_families_keep_their_own_pass(name: str) -> None:
    policy = policy_of(name)
    assert decode_specs(policy.backbone) is None
    assert not isinstance(policy.decode_model(), DecodeModel)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_family_that_looks_alike_but_computes_otherwise_keeps_its_own_pass(dtype: str) -> None:
    for options in ({"residual_multiplier": 0.5}, {"embedding_multiplier": 3.0}):
        model = random_lm(family("granite", **options), dtype=dtype)
        assert decode_specs(Policy(model, letters_tokenizer()).backbone) is None


def test_a_lean_pass_that_fails_or_differs_is_left_and_that_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy, right = policy_of("llama"), DecodeModel.__call__

    def fails(*given: Any) -> Tensor:
        raise RuntimeError("no such product")

    assert decode_specs(policy.backbone) is not None and not caplog.messages
    for wrong, why in ((fails, "it failed: no such product"), (lambda *x: right(*x) + 1, "differ")):
        monkeypatch.setattr(DecodeModel, "__call__", wrong)
        assert decode_specs(policy.backbone) is None
        assert why in caplog.messages[-1] and "slower" in caplog.messages[-1]


def test_adapters_keep_their_own_pass() -> None:
    policy = policy_of("llama")
    policy.backbone.layers[1].self_attn.v_proj = adapted(nn.Linear(32, 16))  # type: ignore[union-attr,index]
    assert decode_specs(policy.backbone) is None


def test_lean_pass_has_the_weights_of_now() -> None:
    policy = policy_of("llama")
    batch = Batch.of(random_groups(50, [5], [[4, 2]]))
    args = (batch.tokens_L, batch.positions_L, GroupLayout(batch))
    with torch.no_grad():
        before = policy.decode_model()(*args)
        for parameter in policy.model.parameters():
            parameter += 0.1
        found = policy.decode_model()(*args)
        expected = on_line(policy.backbone, *args)
    assert not torch.allclose(before, found, atol=0.01)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_comparing_passes_is_not_counted() -> None:
    policy = policy_of("llama")
    before = flops.total()
    policy.decode_model()
    assert flops.total() == before


# --- drawing ------------------------------------------------------------------------------------


def test_uniform_that_rounds_up_to_the_total_draws_the_last_possible_token() -> None:
    logits_RV = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 1.0, 2.0]])
    token_R, _ = draw(logits_RV, torch.ones(2, dtype=torch.float64), Sampling())
    assert token_R.tolist() == [1, 2]
