"""The fast path as a whole: it agrees with the reference path, and ``off`` leaves it out."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rollout_engines import engine_of, prompts_of, tokens_of
from helpers.tiny_models import (
    RAGGED,
    SEPARATE,
    SHARING,
    checkpoint,
    family,
    letters_tokenizer,
    random_groups,
    random_lm,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import trivium
from trivium import numerics
from trivium.data.batch import Batch
from trivium.hf.model_config import FastPath, LoraConfig, ModelConfig
from trivium.models.cpu import CpuKernels
from trivium.models.cpu.linear import Backend, MatmulBackend, matmul_backend
from trivium.models.fast_path import REFERENCE, kernels_of
from trivium.models.policy import Policy
from trivium.models.reference import frozen_copy
from trivium.models.reward_model import RewardModel
from trivium.numerics import load_numerics_state, numerics_state, register_choice
from trivium.rollout.sampling import Sampling

pytestmark = pytest.mark.fast_path
WIDE = {"hidden_size": 128, "intermediate_size": 256}
"""Wide enough that oneDNN multiplies, where the family has these fields."""
FLOAT64 = {"phi", "gpt-neox", "gpt2", "opt", "bloom", "gptj", "falcon"}
"""Families that compute everything in the model's type."""
EXPERTS = {"gpt-oss", "qwen2-moe-window"}
BATCH = Batch.of(random_groups(13, *RAGGED))
LONG = Batch.of(random_groups(13, [30, 9], [[21, 24, 3], [14, 20]], seed=1))


def policy_of(name: str, fast_path: FastPath, dtype: str = "float32", **options: Any) -> Policy:
    model = random_lm(family(name, 13, **options), dtype=dtype)
    return Policy(model, letters_tokenizer(), fast_path=fast_path)


def values_and_gradients(policy: Policy, batch: Batch) -> list[Tensor]:
    """Return log-probs, entropies, and gradients of a sum in which each has its own weight."""
    scores = policy.score(batch)
    found = [scores.logprobs_T, scores.entropy_T]
    weight_T = torch.linspace(-1, 1, len(found[0]), dtype=found[0].dtype) / len(found[0])
    loss = (weight_T * found[0]).sum() + (weight_T * found[1]).sum() / 3
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    return [*(x.detach() for x in found), *(g for g in gradients if g is not None)]


@pytest.mark.usefixtures("each_product")
@pytest.mark.parametrize("batch", [BATCH, LONG], ids=["ragged", "long"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", [*SHARING, *SEPARATE])
def test_logprobs_and_gradients_equal_the_reference_path(
    name: str, dtype: str, batch: Batch
) -> None:
    if name in EXPERTS and dtype == "float64":
        pytest.skip("PyTorch multiplies experts in float32 and half precision only")
    expected, found = (
        values_and_gradients(policy_of(name, fast_path, dtype), batch)
        for fast_path in ("off", "auto")
    )
    assert max(float(g.abs().max()) for g in expected[2:]) > 0.001
    # In families whose norms compute in float32, the last bit of a float64 may move that of a
    # float32. In float32 sums are added in another order.
    atol = 1e-5 if dtype == "float32" else 1e-11 if name in FLOAT64 else 1e-6
    for mine, reference in zip(found, expected, strict=True):
        scale = max(1.0, float(reference.abs().max()))
        torch.testing.assert_close(mine, reference, atol=atol * scale, rtol=0)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_wide_models_in_float32_equal_the_reference_path_up_to_rounding(name: str) -> None:
    batch = Batch.of(random_groups(13, [30, 9], [[11, 14, 3], [14, 20]], seed=1))
    before = matmul_backend.name
    matmul_backend.use("onednn")
    try:
        policies = [policy_of(name, fast_path, **WIDE) for fast_path in ("off", "auto")]
        expected, found = (values_and_gradients(policy, batch) for policy in policies)
    finally:
        matmul_backend.use(before)
    for mine, reference in zip(found, expected, strict=True):
        # Sums of 128 and 256 products in another order: some 1e-6 of the largest term.
        scale = max(1.0, float(reference.abs().max()))
        torch.testing.assert_close(mine, reference, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("name", [*SHARING, *SEPARATE])
def test_greedy_samples_equal_the_reference_path(name: str) -> None:
    sampling = Sampling(temperature=0.0, max_tokens=12)
    prompts = prompts_of((3, 1, 7, 2, 5, 4, 20))
    samples = []
    for fast_path in ("off", "auto"):
        policy = policy_of(name, fast_path)
        samples.append(tokens_of(engine_of(policy).generate(prompts, 2, sampling, seed=0, step=0)))
    assert samples[0] == samples[1]


def owners(thing: object) -> str:
    return type(thing).__module__


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["whole", "lora"])
@pytest.mark.parametrize("scorer", [False, True])
def test_off_leaves_every_module_as_transformers_made_it(
    tmp_path: Path, scorer: bool, lora: LoraConfig | None
) -> None:
    config = ModelConfig(path=checkpoint(tmp_path), lora=lora, fast_path="off")
    model = RewardModel.load(config, new_head=True) if scorer else Policy.load(config)
    copies = [model.model] if scorer else [model.model, frozen_copy(model).model]
    for module in (module for copied in copies for module in copied.modules()):
        assert not owners(module).startswith("trivium.models.cpu")
        assert "forward" not in vars(module)
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        assert not any("models.cpu" in getattr(hook, "__module__", "") for hook in hooks)
    assert kernels_of(model.backbone) is REFERENCE and model.shared


def test_auto_is_installed_on_a_cpu_and_copied_with_the_model() -> None:
    policy = policy_of("llama", "auto")
    copied = frozen_copy(policy)
    for each in (policy, copied):
        assert isinstance(kernels_of(each.backbone), CpuKernels)
        assert type(each.head.kernels) is CpuKernels
    for mine, other in zip(policy.model.modules(), copied.model.modules(), strict=True):
        assert type(mine) is type(other)
        if "forward" in vars(mine):
            assert vars(mine)["forward"].__self__ is mine
            assert vars(other)["forward"].__self__ is other
    replaced = [m for m in policy.model.modules() if "forward" in vars(m)]
    linears = [m for m in policy.model.modules() if isinstance(m, nn.Linear)]
    assert len(replaced) >= len(linears) > 0 and all(type(m) is nn.Linear for m in linears)


def test_only_one_module_outside_of_the_fast_path_imports_it() -> None:
    package = Path(trivium.__file__).parent
    importers = set()
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                imported = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if any(module.startswith("trivium.models.cpu") for module in imported):
                importers.add(name)
    assert {name for name in importers if not name.startswith("models/cpu/")} == {
        "models/fast_path.py"
    }


RUN_OFF = """
import sys, torch
from pathlib import Path
from trivium.algorithms import sft, grpo
from trivium.algorithms.sft_config import SFTConfig
from trivium.algorithms.grpo_config import GRPOConfig
world = Path(sys.argv[1])
model = {"path": str(world / "model"), "fast_path": "off", "device": "cpu"}
(world / "rows.jsonl").write_text('{"prompt": "ab", "completion": "cd"}\\n' * 4)
sft.train(SFTConfig.model_validate({
    "model": model, "data": {"path": str(world / "rows.jsonl")}, "steps": 2,
    "examples_per_step": 2, "run": {"directory": str(world / "sft"), "measure_memory": True},
}))
grpo.train(GRPOConfig.model_validate({
    "model": model, "data": {"path": str(world / "rows.jsonl")},
    "rewards": [{"function": "length", "arguments": {"limit": 4, "buffer": 2}}],
    "sampling": {"max_tokens": 4},
    "steps_per_iteration": 2, "prompts_per_step": 2, "responses_per_prompt": 2,
    "run": {"directory": str(world / "grpo")},
}))
print([name for name in sys.modules if name.startswith("trivium.models.cpu")])
"""


def test_runs_with_off_do_not_even_import_the_fast_path(tmp_path: Path) -> None:
    checkpoint(tmp_path / "model")
    result = subprocess.run(
        [sys.executable, "-c", RUN_OFF, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.stdout.splitlines()[-1:] == ["[]"], result.stderr[-2000:]


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["whole", "lora"])
def test_checkpoints_of_auto_and_off_have_the_same_tensors(
    tmp_path: Path, lora: LoraConfig | None
) -> None:
    path = checkpoint(tmp_path / "model", "qwen3")
    saved = []
    for fast_path in ("off", "auto"):
        policy = Policy.load(ModelConfig(path=path, lora=lora, fast_path=fast_path))
        saved.append([policy.state_dict().keys(), policy.model.state_dict().keys()])
        policy.save(tmp_path / fast_path)
    assert saved[0] == saved[1]
    off, auto = (load_file(tmp_path / name / "model.safetensors") for name in ("off", "auto"))
    assert off.keys() == auto.keys()
    assert all(torch.equal(off[name], auto[name]) for name in off)
    configs = [(tmp_path / name / "config.json").read_text() for name in ("off", "auto")]
    assert configs[0] == configs[1]


# --- numerics -------------------------------------------------------------------------------------


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "_choices", {})
    monkeypatch.setattr(numerics, "_pending", {})


@pytest.mark.usefixtures("choices")
@pytest.mark.parametrize("name", ["onednn", "torch"])
def test_numerics_state_round_trips(name: Backend) -> None:
    first, second = MatmulBackend(), MatmulBackend()
    register_choice("matmul_backend", lambda: first.name, first.use)
    first.use(name)
    state = numerics_state()
    assert state == {"matmul_backend": name}
    register_choice("matmul_backend", lambda: second.name, second.use)
    load_numerics_state(state)
    assert second.name == name and numerics_state() == state


@pytest.mark.usefixtures("choices")
def test_state_that_is_loaded_before_a_choice_is_registered_takes_effect_then() -> None:
    load_numerics_state({"matmul_backend": "another"})
    assert numerics_state() == {}
    used: list[str] = []
    register_choice("matmul_backend", lambda: used[-1], used.append)
    assert numerics_state() == {"matmul_backend": "another"}
    register_choice("matmul_backend", lambda: used[-1], used.append)
    assert used == ["another"]


@pytest.mark.usefixtures("choices")
def test_installing_the_fast_path_registers_the_matrix_product() -> None:
    policy_of("llama", "off")
    assert numerics_state() == {}
    policy_of("llama", "auto")
    assert numerics_state() == {"matmul_backend": matmul_backend.name}
