"""Hugging Face checkpoints in.

Loads causal language models and one-label sequence classifiers from a local directory or the hub,
with LoRA if requested. Safetensors only. Code that comes with a checkpoint runs only if the user
allows it. Checkpoints are written by ``hf.saving``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trivium.data.chat import limit_tokens
from trivium.errors import ModelError
from trivium.hf.adapters import (
    add_adapters,
    load_adapters,
    merge_from,
    task_of,
    unwrap_peft,
)
from trivium.hf.checkpoint_files import (
    Adapter,
    adapter_at,
    adapter_faults,
    local_directory,
    longest_context,
    require_checkpoint,
    weight_faults,
)
from trivium.hf.fit import (
    require_causal,
    require_embeddings,
    require_finite,
    require_trained_head,
    require_weights,
)
from trivium.hf.kinds import (
    POLICY,
    SCORER,
    architecture_of,
    is_classifier,
    is_recurrent,
    kind_fault,
    role_fault,
)
from trivium.hf.model_config import ModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def resolve_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` is the first GPU, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"model.device is {name!r}, which cannot be used: {reason}") from None
    return device


def device_of(config: ModelConfig) -> torch.device:
    """Return the model's device; raise if it cannot do what ``config`` asks for."""
    device = resolve_device(config.device)
    if config.cuda_graphs and device.type != "cuda":
        raise ModelError(
            f"model.cuda_graphs is true, and model.device {config.device!r} is {device} here, "
            "which has no CUDA graphs: leave cuda_graphs out, or use a machine with a GPU"
        )
    return device


def dtype_of(config: ModelConfig) -> torch.dtype:
    """Return the data type of the model's weights."""
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    on_gpu = resolve_device(config.device).type == "cuda"
    return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float32


def load_causal_lm(config: ModelConfig) -> PreTrainedModel:
    """Load a causal language model without dropout, with adapters if configured."""
    model = _from_pretrained(AutoModelForCausalLM, config, scorer=False)
    return _prepare(model, config, task="CAUSAL_LM")


def load_scorer(config: ModelConfig, *, new_head: bool = False) -> PreTrainedModel:
    """Load a one-label sequence classifier.

    With ``new_head``, a language model gets a new head of zeros, to be trained; otherwise the
    checkpoint, or its adapters, must have a trained one.
    """
    adapter = adapter_at(config.path)
    may_lack_head = new_head or (adapter is not None and task_of(adapter) == "SEQ_CLS")
    model = _from_pretrained(
        AutoModelForSequenceClassification, config, scorer=True, new_head=may_lack_head
    )
    model = _prepare(model, config, task="SEQ_CLS")
    if not new_head:
        require_trained_head(unwrap_peft(model), config.path)
    return model


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the checkpoint's tokenizer, and check it against the embeddings of config.json."""
    hf_config = read_hf_config(config)
    adapter = adapter_at(config.path)
    if adapter is not None and not (adapter.directory / "tokenizer_config.json").is_file():
        config = with_base(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{config.path} has no tokenizer that can be loaded ({_first_line(error)}): "
            "put tokenizer.json and tokenizer_config.json beside the weights"
        ) from None
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {config.path} has no EOS token, so no response could ever end: "
            "set eos_token in its tokenizer_config.json"
        )
    known = getattr(hf_config.get_text_config(), "vocab_size", None)
    if isinstance(known, int):
        require_embeddings(tokenizer, config.path, known)
        limit_tokens(tokenizer, known)
    return tokenizer


def context_length(config: ModelConfig) -> int | None:
    """Return the checkpoint's longest context in tokens, if its configuration names one."""
    return longest_context(read_hf_config(config).to_dict())


def with_base(config: ModelConfig) -> ModelConfig:
    """Return the configuration with the base of its adapters, if its path holds only adapters."""
    adapter = adapter_at(config.path)
    if adapter is None:
        return config
    return config.model_copy(update={"path": adapter.base, "revision": adapter.revision})


def _place(config: ModelConfig) -> str:
    """Return how messages name a checkpoint: a base with the adapters that name it."""
    base = with_base(config).path
    return base if base == config.path else f"{base} (the base of {config.path})"


def read_hf_config(config: ModelConfig) -> PreTrainedConfig:
    """Return the configuration of a checkpoint; raise if no model of its kind is trained here."""
    require_checkpoint(config.path)
    config, place = with_base(config), _place(config)
    try:
        with quiet_transformers():
            found = AutoConfig.from_pretrained(
                config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot load {place}: {_first_line(error)}") from None
    if fault := kind_fault(found.to_dict()):
        raise ModelError(f"{place} {fault}")
    return found


def require_role(hf_config: PreTrainedConfig, path: str, *, scorer: bool) -> None:
    """Raise if a checkpoint is no policy, or no reward model or critic, before it is loaded."""
    if fault := role_fault(hf_config.to_dict(), scorer=scorer):
        raise ModelError(f"{path} {fault}")
    auto = AutoModelForSequenceClassification if scorer else AutoModelForCausalLM
    if type(hf_config) in auto._model_mapping:
        kind = auto._model_mapping[type(hf_config)]
        if is_recurrent(hf_config.to_dict(), getattr(kind, "_is_stateful", False)):
            raise ModelError(
                f"{path} is a {architecture_of(hf_config.to_dict())}, whose layers keep a state "
                "(state space, recurrent or convolution): packed and padded sequences would "
                "share it, so it is not trained here; name a model with attention in every layer"
            )
    elif not hasattr(hf_config, "auto_map"):
        role = "sequence classifier" if scorer else "causal language model"
        raise ModelError(
            f"{path} is a {architecture_of(hf_config.to_dict())}, of which transformers has no "
            f"{role}: {SCORER if scorer else POLICY}"
        )


def require_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise if the tokenizer writes tokens that the model has no embedding for."""
    embeddings = unwrap_peft(model).get_input_embeddings()
    known = int(embeddings.weight.shape[0])  # type: ignore[arg-type,index,union-attr]
    require_embeddings(tokenizer, str(model.name_or_path), known)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that an optimizer updates."""
    return [p for p in model.parameters() if p.requires_grad]


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters by name; they share the model's memory."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def restore_trained(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what ``trained_state`` returned into the trained parameters."""
    parameters = dict(model.named_parameters())
    for name, value in state.items():
        parameters[name].copy_(value)


def _from_pretrained(
    auto: Any, config: ModelConfig, *, scorer: bool, new_head: bool = False
) -> PreTrainedModel:
    """Load weights, and check that they are those of the configuration, all of them and no more."""
    hf_config = read_hf_config(config)
    config, place = with_base(config), _place(config)
    require_role(hf_config, place, scorer=scorer)
    directory = local_directory(config.path)
    if directory is not None and (faults := [*weight_faults(directory)]):
        raise ModelError("\n".join(faults))
    try:
        with quiet_transformers():
            model, report = auto.from_pretrained(
                config.path,
                revision=config.revision,
                dtype=dtype_of(config),
                trust_remote_code=config.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # Reported below, with the shapes.
                **({"num_labels": 1} if scorer else {}),
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"cannot load {place}: {_first_line(error)}") from None
    may_lack_head = new_head and not is_classifier(hf_config.to_dict())
    require_weights(model, report, place, scorer=scorer, new_head=may_lack_head)
    if any(name.startswith("score.") for name in report["missing_keys"]):
        nn.init.zeros_(model.score.weight)
    require_finite(model.named_parameters(), place)
    return model


def _prepare(model: PreTrainedModel, config: ModelConfig, *, task: str) -> PreTrainedModel:
    model.to(device_of(config))  # type: ignore[arg-type]
    _copy_from_file(model)
    adapter, lora = _adapter_with_weights(config), config.lora
    continues = lora is not None and lora.initial == "loaded"
    if adapter is not None and not continues:
        model = merge_from(model, adapter)
        if lora is not None and lora.save is None:
            lora = lora.model_copy(update={"save": "merged"})
    disable_dropout(model)
    require_causal(model, config.path)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model, config)
    model.train()
    if lora is None:
        return model
    if adapter is not None and continues:
        return load_adapters(model, adapter, lora, task)
    return add_adapters(model, lora, task)


def _adapter_with_weights(config: ModelConfig) -> Adapter | None:
    """Return the adapters at the configuration's path after checking their file."""
    adapter = adapter_at(config.path)
    if adapter is not None and (faults := [*adapter_faults(adapter.directory)]):
        raise ModelError("\n".join(faults))
    return adapter


def _copy_from_file(model: nn.Module) -> None:
    """Copy weights out of the mapped file, so that they are aligned like every copy of them.

    The last bits of a matrix product depend on alignment, and a reference must equal the policy
    that it copies, and a reloaded model the saved one.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def enable_gradient_checkpointing(model: PreTrainedModel, config: ModelConfig) -> None:
    """Turn on gradient checkpointing.

    Raises:
        ModelError: the model does not support it.
    """
    # The method was renamed within transformers 5.
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(
            f"model.gradient_checkpointing is not possible with {config.path}: {_first_line(error)}"
        ) from None
    model.enable_input_require_grads()


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0: π_old and π_θ must be the same function at ρ = 1."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                setattr(module, name, 0.0)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide progress bars and load reports of ``transformers``; the hub's download bars stay."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    empty = transformers.logging.EmptyTqdm
    shown = transformers.logging.set_tqdm_hook(lambda _, args, kwargs: empty(*args, **kwargs))
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.set_tqdm_hook(shown)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
