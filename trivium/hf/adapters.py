"""LoRA adapters: adding, loading and merging them, through ``peft``.

Only the settings in ``_TAKEN`` of an adapter's configuration are used. Others can import modules,
change the base's weights, or train parts of the model that are not merged.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from trivium.errors import ModelError
from trivium.hf.checkpoint_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Adapter,
    adapter_settings,
    local_directory,
)
from trivium.hf.fit import require_finite
from trivium.hf.model_config import LoraConfig

logger = logging.getLogger(__name__)

NOTICED_LOSS = 0.1
"""Share of a merged update that rounding may lose without a warning."""
_TAKEN = (
    "r lora_alpha target_modules exclude_modules use_rslora use_dora rank_pattern alpha_pattern "
    "fan_in_fan_out lora_bias modules_to_save layers_to_transform layers_pattern"
).split()
_WITHOUT_EFFECT = (
    "peft_type peft_version task_type base_model_name_or_path revision inference_mode auto_mapping "
    "lora_dropout runtime_config ensure_weight_tying"
).split()
_INITIAL = (True, False, "gaussian", "orthogonal", "eva")
"""Initial values that leave the base's weights as they are."""


def has_lora(model: nn.Module) -> bool:
    """Return whether ``model`` has ``peft`` adapters."""
    return hasattr(model, "peft_config")


def unwrap_peft(model: nn.Module) -> PreTrainedModel:
    """Return the ``transformers`` model, with or without adapters around it."""
    return model.get_base_model() if has_lora(model) else model  # type: ignore[return-value,operator]


def lora_of(model: nn.Module) -> LoraConfig:
    """Return the configuration of a model's adapters."""
    return vars(model)["trivium_lora"]


def starts_at_base(model: nn.Module) -> bool:
    """Return whether a model's adapters changed nothing before training."""
    return lora_of(model).initial == "new"


def task_of(adapter: Adapter) -> str:
    """Return the ``peft`` task type of adapters: CAUSAL_LM, or SEQ_CLS for those of a scorer."""
    return adapter_settings(adapter.directory).get("task_type") or "CAUSAL_LM"


def add_adapters(model: PreTrainedModel, lora: LoraConfig, task: str) -> PreTrainedModel:
    """Add new LoRA adapters for a ``peft`` task type (CAUSAL_LM or SEQ_CLS).

    Raises:
        ModelError: ``peft`` is not installed, the model has no module named in the targets, or a
            target shares its weights with another module.
    """
    settings = {
        "r": lora.rank,
        "lora_alpha": lora.scale_numerator,
        "target_modules": lora.targets,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "modules_to_save": ["score"] if task == "SEQ_CLS" else None,
    }
    return _adapted(model, settings, lora, task, f"model.lora.targets is {lora.targets!r}")


def load_adapters(
    model: PreTrainedModel, adapter: Adapter, lora: LoraConfig, task: str
) -> PreTrainedModel:
    """Add the adapters of a directory to their base, to be trained.

    Raises:
        ModelError: they are adapters of another kind, task or base.
    """
    adapted = shape_adapters(model, adapter, lora, task)
    _load_weights(adapted, adapter)
    return adapted


def shape_adapters(
    model: PreTrainedModel, adapter: Adapter, lora: LoraConfig, task: str
) -> PreTrainedModel:
    """Add adapters of the shapes in a directory, with other values.

    Raises:
        ModelError: they are adapters of another kind or task.
    """
    found = _settings(adapter)
    if task_of(adapter) != task:
        raise ModelError(
            f"{adapter.directory / ADAPTER_CONFIG}: task_type is {task_of(adapter)}, and here it "
            f"would have to be {task}: leave model.lora.initial out to add new adapters"
        )
    return _adapted(model, found, lora, task, str(adapter.directory / ADAPTER_CONFIG))


def merge_from(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """Return the base with the adapters of a directory merged into its weights.

    The sum is computed in float32. A warning tells if rounding it loses much of the update.

    Raises:
        ModelError: they are adapters of another kind or base.
    """
    task = task_of(adapter)
    if task == "SEQ_CLS" and not hasattr(model, "score"):
        raise ModelError(
            f"{adapter.directory / ADAPTER_CONFIG}: task_type is SEQ_CLS, so these are adapters of "
            "a reward model, which cannot be a policy"
        )
    place = str(adapter.directory / ADAPTER_CONFIG)
    adapted = _adapted(model, _settings(adapter), LoraConfig(), task, place)
    _load_weights(adapted, adapter)
    lost = _merge_precisely(adapted)
    if lost > NOTICED_LOSS:
        logger.warning(
            "%s was merged into %s weights, and rounding lost %.0f %% of its update (by norm): "
            "write model.dtype: float32, or train these adapters with model.lora.initial: loaded",
            adapter.directory,
            str(model.dtype).removeprefix("torch."),
            100 * lost,
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        merged: PreTrainedModel = adapted.merge_and_unload()  # type: ignore[operator]
    return merged.requires_grad_(True)


def precise_copy(model: nn.Module) -> nn.Module:
    """Return a copy on the CPU whose weights are float32 or wider."""
    memo: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        wide = widened(tensor.dtype) if tensor.is_floating_point() else tensor.dtype
        copied = tensor.detach().to("cpu", wide, copy=True)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(copied, requires_grad=False) if is_parameter else copied
    return copy.deepcopy(model, memo)


def widened(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or the data type itself if that is wider."""
    return torch.promote_types(dtype, torch.float32)


def _adapted(
    model: PreTrainedModel, settings: dict[str, Any], lora: LoraConfig, task: str, place: str
) -> PreTrainedModel:
    """Return the model with adapters around it; ``place`` names the settings in errors."""
    peft = _peft()
    try:
        with warnings.catch_warnings():
            # peft uses names that transformers deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            # Tied weights are refused below.
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
            with _seeded(model, lora.seed):
                adapted = peft.get_peft_model(model, peft.LoraConfig(**settings, task_type=task))
    except (ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{place}: {reason}") from None
    _require_separate_weights(adapted, place)
    _name_base(adapted)
    vars(adapted)["trivium_lora"] = lora
    return adapted


def _name_base(model: nn.Module) -> None:
    """Write the base's absolute path, or its revision on the hub, into the adapters' settings."""
    base = unwrap_peft(model)
    settings: Any = model.active_peft_config
    directory = local_directory(base.name_or_path) if base.name_or_path else None
    if directory is not None:
        settings.base_model_name_or_path = str(directory.resolve())
    else:
        settings.revision = getattr(base.config, "_commit_hash", None)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ModelError("LoRA needs the peft package: pip install 'trivium[lora]'") from None
    return peft


@contextmanager
def _seeded(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Draw random numbers from a seed, and leave the generators as they were."""
    kind = model.device.type
    devices = [] if kind == "cpu" else [model.device]
    with torch.random.fork_rng(devices, device_type=kind):
        torch.manual_seed(seed)
        yield


def _require_separate_weights(model: nn.Module, place: str) -> None:
    """Raise if an adapted weight is also that of another module, as tied embeddings are.

    Training would change what one of them computes, and merging what both compute.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            own = list(module.get_base_layer().parameters())
        elif isinstance(module, ModulesToSaveWrapper):
            own = list(module.original_module.parameters())
        else:
            continue
        for parameter in own:
            if len(names[id(parameter)]) > 1:
                one, other = (_module_name(name) for name in names[id(parameter)][:2])
                raise ModelError(
                    f"{place}: {one} and {other} share their weights (tied embeddings), so that an "
                    "adapter would change one of them in training and both once it is merged: "
                    "leave both out of the targets"
                )


def _module_name(parameter: str) -> str:
    parts = parameter.split(".")[:-1]
    inner = ("base_layer", "original_module")
    return next(part for part in reversed(parts) if part not in inner)


def _settings(adapter: Adapter) -> dict[str, Any]:
    """Return the settings of an adapter's file for ``peft``; raise if it has others."""
    saved, place = adapter_settings(adapter.directory), adapter.directory / ADAPTER_CONFIG
    if saved.get("peft_type") != "LORA":
        raise ModelError(f"{place}: peft_type is {saved.get('peft_type')!r}: only LORA is loaded")
    initial = saved.get("init_lora_weights", True)
    if initial not in _INITIAL:
        raise ModelError(
            f"{place}: init_lora_weights is {initial!r}, which also changed the base's weights: "
            "convert the adapter to plain LoRA with peft, or merge it there"
        )
    known = {*_TAKEN, *_WITHOUT_EFFECT, "init_lora_weights"}
    defaults = _peft().LoraConfig().to_dict()
    for name, value in saved.items():
        if name not in known and value and value != defaults.get(name):
            raise ModelError(
                f"{place}: {name} is {value!r}, which Trivium does not support: merge the adapter "
                "with peft (merge_and_unload), and name the result"
            )
    return {name: saved[name] for name in _TAKEN if name in saved}


def _load_weights(model: nn.Module, adapter: Adapter) -> None:
    """Load the adapters' weights; every one must be in the file, and no other."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    file = adapter.directory / ADAPTER_WEIGHTS
    weights = load_file(file)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    for kind, names in (
        ("lacks", sorted(set(expected) - set(weights))),
        ("holds besides its adapters", sorted(set(weights) - set(expected))),
    ):
        if names:
            raise ModelError(
                f"{file} {kind} {len(names)} weights ({names[0]} …) for the base {adapter.base}: "
                "take the adapter's own base and configuration"
            )
    require_finite(weights.items(), str(file))
    try:
        set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ModelError(f"{file} does not fit the base {adapter.base}: {reason}") from None


@torch.no_grad()
def _merge_precisely(model: nn.Module) -> float:
    """Merge every adapter in float32, then round; return the share of the update that is lost."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    lost = total = 0.0
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        weight: Tensor = module.get_base_layer().weight  # type: ignore[assignment]
        before, dtype = weight.data, weight.dtype
        weight.data = before.to(widened(dtype))
        module.merge()
        exact = weight.data
        weight.data = exact.to(dtype)
        lost += float((weight.data - exact).square().sum())
        total += float((exact - before).square().sum())
    return math.sqrt(lost / total) if total else 0.0
