"""Sampling by recorded steps, on a CPU.

A recorder repeats operations on the same memory, as a CUDA graph does. Recording on a GPU itself
is not tested. Policies have no fast path, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.op_recorder import OpRecorder
from helpers.rollout_engines import (
    SAMPLING,
    check_rows_against_backbone,
    engine_of,
    last_states,
    prompts_of,
    tokens_of,
)
from helpers.tiny_models import SHARING, checkpoint, family, letters_tokenizer, random_lm
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trivium.errors import ModelError
from trivium.hf.model_config import ModelConfig
from trivium.models import flops
from trivium.models.policy import Policy
from trivium.models.reference import frozen_copy
from trivium.rollout import local_engine
from trivium.rollout.cuda_graphs import GraphedCache, Step, graphs_work
from trivium.rollout.kv_cache import BLOCK_TOKENS, KVCache
from trivium.rollout.sampling import Sampling


def policy_of(name: str = "llama", **options: Any) -> Policy:
    model = random_lm(family(name, 13, **options), spread=0.2)
    return Policy(model, letters_tokenizer(), fast_path="off")


class Recorder:
    """Records a step as a CUDA graph does: operations on given memory, and nothing else."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.recordings = 0

    def __call__(self, step: Step) -> Step:
        self.recordings += 1
        step()
        with OpRecorder() as recorder:
            result = step()

        def replay() -> Tensor:
            recorder.repeat()
            return result.copy_(recorder.results[id(result)])

        return replay


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Return the recorders of all engines whose policy samples by graphs, in order."""
    made: list[Recorder] = []

    def recorder(device: torch.device) -> Recorder:
        made.append(Recorder())
        return made[-1]

    monkeypatch.setattr(local_engine, "CudaGraphs", recorder)
    monkeypatch.setattr(local_engine, "graphs_work", partial(graphs_work, record=recorder))
    return made


@pytest.mark.parametrize("max_rows", [512, 9])
@pytest.mark.parametrize("lengths", [(3, 1, 7, 2, 5, 4), (70, 66, 3)])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2-window", "gemma2"])
def test_recorded_steps_draw_the_same_tokens_at_the_same_flops(
    name: str, lengths: Sequence[int], max_rows: int, recorders: list[Recorder]
) -> None:
    policy = policy_of(name, max_position_embeddings=128)
    prompts, sampling = prompts_of(lengths), Sampling(max_tokens=40)
    with flops.apart() as plain:
        expected = engine_of(policy, max_rows).generate(prompts, 4, sampling, seed=0, step=0)
    policy.cuda_graphs = True
    engine = engine_of(policy, max_rows)
    for _ in range(2):
        with flops.apart() as counted:
            found = engine.generate(prompts, 4, sampling, seed=0, step=0)
        assert tokens_of(found) == tokens_of(expected)
        assert counted.flops == plain.flops > 0
        assert recorders[-1].recordings > 0
        for group, others in zip(found, expected, strict=True):
            for response, other in zip(group, others, strict=True):
                assert response.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    # One for the check, once per engine, and one for each generation.
    assert len(recorders) == 3


@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
def test_recorded_rows_are_independent_of_other_rows(name: str) -> None:
    policy = policy_of(name)
    check_rows_against_backbone(policy, GraphedCache(policy, Recorder()))


def test_a_step_is_recorded_again_only_when_the_cache_grows_or_is_compacted() -> None:
    policy, recorder = policy_of(max_position_embeddings=128), Recorder()
    cache = GraphedCache(policy, recorder)
    prompt = prompts_of((5,))[0].tokens
    expected, rows = 0, 8
    with torch.no_grad():
        cache.admit([prompt], rows)
        for fed in range(2 * BLOCK_TOKENS + 3):
            expected += fed in (0, BLOCK_TOKENS, 2 * BLOCK_TOKENS)
            if fed == 10:  # Half of the slots are idle, and the cache is not compacted.
                rows = 4
                cache.keep([0, 2, 3, 5])
            if fed == 20:
                rows, expected = 3, expected + 1
                cache.keep([0, 1, 3])
            found = cache.advance(torch.full((rows,), 4))
            assert recorder.recordings == expected
    row = [*prompt, *[4] * (2 * BLOCK_TOKENS + 3)]
    torch.testing.assert_close(found, last_states(policy, [row] * 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("graphed", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2-window", "qwen3"])
def test_decoding_on_a_gpu_waits_for_nothing_and_keeps_nothing_elsewhere(
    name: str, graphed: bool
) -> None:
    policy = policy_of(name)
    cache = KVCache(policy)
    if graphed:
        cache = GraphedCache(policy, lambda step: step)
    with torch.no_grad():
        cache.admit([p.tokens for p in prompts_of((7, 3))], 3)
        cache.advance(torch.full((6,), 4))
        cache.device = torch.device(ELSEWHERE)
        cache._update_grid()
        tensors = [x for x in vars(cache.grid).values() if isinstance(x, Tensor)]
        assert tensors and all(x.device.type == ELSEWHERE for x in tensors)
        move(cache, FakeTensorMode(allow_non_fake_inputs=True))
        for rows in ([0, 1, 3, 4, 5], [1, 3], [0, 1]):
            cache.keep(rows)
            assert cache.advance(torch.full((len(rows),), 4)).shape == (len(rows), 32)
        cache.length_S[:] = BLOCK_TOKENS
        assert cache.advance(torch.full((2,), 4)).device.type == ELSEWHERE


ELSEWHERE = "meta"
"""A device that stands for a GPU: its tensors have no data and cannot mix with the CPU's."""
HOSTS = {"prompt_length_S", "group_of_S", "length_S", "slot_of_R"}


def move(thing: Any, gpu: FakeTensorMode) -> Any:
    """Move all tensors to the GPU, without data."""
    if isinstance(thing, Tensor):
        return gpu.from_tensor(thing.detach().to(ELSEWHERE))
    if isinstance(thing, list | tuple):
        return type(thing)(move(x, gpu) for x in thing)
    if isinstance(thing, dict):
        return {key: move(x, gpu) for key, x in thing.items()}
    if isinstance(thing, nn.Module):
        for module in thing.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    del module._parameters[name]
                    setattr(module, name, move(parameter, gpu))
            for name, buffer in module._buffers.items():
                module._buffers[name] = move(buffer, gpu)
    elif isinstance(thing, partial):
        move(thing.args, gpu)
    elif type(thing).__module__.startswith("trivium."):
        for name, x in vars(thing).items():
            if name not in HOSTS:
                vars(thing)[name] = move(x, gpu)
    return thing


def test_policy_whose_recorded_steps_differ_is_sampled_without_graphs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def forgetful(step: Step) -> Step:
        found = step().clone()
        return lambda: found

    policy, prompts = policy_of(), prompts_of()
    assert graphs_work(policy, record=lambda device: Recorder())
    assert not caplog.records and not frozen_copy(policy).cuda_graphs
    assert not graphs_work(policy, record=lambda device: forgetful)
    assert "sampled without CUDA graphs: hidden states differ" in caplog.text
    expected = engine_of(policy).generate(prompts, 2, SAMPLING, seed=0, step=0)
    policy.cuda_graphs = True
    found = engine_of(frozen_copy(policy)).generate(prompts, 2, SAMPLING, seed=0, step=0)
    assert tokens_of(found) == tokens_of(expected)
    assert "sampled without CUDA graphs: " in caplog.records[-1].getMessage()


def test_a_failed_recording_is_a_warning_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    def failing(step: Step) -> Step:
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise ValueError("capture was invalidated")

    assert not graphs_work(policy_of(), record=lambda device: failing)
    assert "operation not permitted when stream is capturing" in caplog.text


@pytest.mark.parametrize("name", SHARING)
def test_every_family_that_shares_prompts_can_be_recorded(name: str) -> None:
    assert graphs_work(policy_of(name), record=lambda device: Recorder())


def test_family_that_waits_for_the_gpu_is_sampled_without_graphs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = policy_of("gemma2")
    norm: Any = policy.backbone.norm
    norm.register_forward_hook(lambda module, args, out: out * float(out.abs().max() > 0))
    assert not graphs_work(policy, record=lambda device: Recorder())
    assert "Gemma2ForCausalLM is sampled without CUDA graphs: aten._local_scalar" in caplog.text


def test_graphs_are_refused_where_auto_means_a_device_without_them(tmp_path: Path) -> None:
    config = ModelConfig(path=str(checkpoint(tmp_path / "model")), cuda_graphs=True)
    with pytest.raises(ModelError, match=r"cuda_graphs is true, and model.device 'auto' is cpu"):
        Policy.load(config)
