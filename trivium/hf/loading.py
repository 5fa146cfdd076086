"""Hugging Face checkpoints in and out.

Loads causal language models and one-label sequence classifiers from a local directory or the hub,
with LoRA if requested, and saves checkpoints that plain ``transformers`` loads. Safetensors only.
Code that comes with a checkpoint runs only if the user allows it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
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

from trivium.errors import ModelError
from trivium.hf.checkpoint_files import (
    local_directory,
    longest_context,
    require_checkpoint,
    weight_faults,
)
from trivium.hf.model_config import LoraConfig, ModelConfig

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
    return _prepare(_from_pretrained(AutoModelForCausalLM, config), config, task="CAUSAL_LM")


def load_scorer(config: ModelConfig) -> PreTrainedModel:
    """Load a one-label sequence classifier; a language model gets a new head of zeros."""
    _require_one_label(config)
    model = _from_pretrained(AutoModelForSequenceClassification, config, "score.", num_labels=1)
    return _prepare(model, config, task="SEQ_CLS")


def _require_one_label(config: ModelConfig) -> None:
    """Raise if the checkpoint is a classifier with several labels."""
    hf_config = _read_config(config)
    kind = next(iter(hf_config.architectures or ()), "")
    if kind.endswith("ForSequenceClassification") and hf_config.num_labels != 1:
        raise ModelError(
            f"{config.path} is a {kind} with {hf_config.num_labels} labels: a reward model or "
            "critic is a sequence classifier with one label, or a language model to start one from"
        )


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the checkpoint's tokenizer."""
    require_checkpoint(config.path)
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
    return tokenizer


def context_length(config: ModelConfig) -> int | None:
    """Return the checkpoint's longest context in tokens, if its configuration names one."""
    return longest_context(_read_config(config).to_dict())


def _read_config(config: ModelConfig) -> PreTrainedConfig:
    require_checkpoint(config.path)
    try:
        return AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot load {config.path}: {_first_line(error)}") from None


def save_checkpoint(
    directory: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Write weights, configuration and tokenizer in the format of ``transformers``.

    Adapters are merged into the weights, and also saved by themselves in ``directory/adapter``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _quiet_transformers():
        if has_lora(model):
            model.save_pretrained(directory / "adapter")  # type: ignore[operator]
            model = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
        model.save_pretrained(directory)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)


def require_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise if the tokenizer produces tokens that the model has no embedding for.

    Special tokens beyond the embeddings are accepted: some tokenizers have such a padding token,
    and padding is never embedded here.
    """
    embeddings = unwrap_peft(model).get_input_embeddings()
    known = int(embeddings.weight.shape[0])  # type: ignore[arg-type,index,union-attr]
    special = set(tokenizer.all_special_ids)
    needed = max((n for n in tokenizer.get_vocab().values() if n not in special), default=0) + 1
    if needed > known:
        raise ModelError(
            f"the tokenizer of {model.name_or_path} has {needed} tokens, and the model has "
            f"embeddings for {known}: take the tokenizer that belongs to the checkpoint"
        )


def has_lora(model: nn.Module) -> bool:
    """Return whether ``model`` has ``peft`` adapters."""
    return hasattr(model, "peft_config")


def unwrap_peft(model: nn.Module) -> PreTrainedModel:
    """Return the ``transformers`` model, with or without adapters around it."""
    return model.get_base_model() if has_lora(model) else model  # type: ignore[return-value,operator]


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
    kind: Any, config: ModelConfig, new_head: str | None = None, **options: Any
) -> PreTrainedModel:
    """Load weights; those whose names begin with ``new_head`` may be missing."""
    require_checkpoint(config.path)
    directory = local_directory(config.path)
    if directory is not None and (faults := [*weight_faults(directory)]):
        raise ModelError("\n".join(faults))
    try:
        with _quiet_transformers():
            model, report = kind.from_pretrained(
                config.path,
                revision=config.revision,
                dtype=dtype_of(config),
                trust_remote_code=config.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load {config.path}: {_first_line(error)}") from None
    new = {k for k in report["missing_keys"] if new_head is not None and k.startswith(new_head)}
    if missing := sorted(set(report["missing_keys"]) - new):
        raise ModelError(
            f"{config.path} lacks {len(missing)} weights of {type(model).__name__} "
            f"({', '.join(missing[:3])} …): they would be random, so it is not loaded"
        )
    if new:
        nn.init.zeros_(model.score.weight)
    return model


def _prepare(model: PreTrainedModel, config: ModelConfig, *, task: str) -> PreTrainedModel:
    model.to(device_of(config))  # type: ignore[arg-type]
    _copy_from_file(model)
    disable_dropout(model)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model, config)
    model.train()
    return model if config.lora is None else add_adapters(model, config.lora, task)


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


def add_adapters(model: PreTrainedModel, lora: LoraConfig, task: str) -> PreTrainedModel:
    """Add LoRA adapters for a ``peft`` task type (CAUSAL_LM or SEQ_CLS).

    Raises:
        ModelError: ``peft`` is not installed, or the model has no module named in the targets.
    """
    try:
        import peft
    except ImportError:
        raise ModelError("model.lora needs the peft package: pip install 'trivium[lora]'") from None
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=lora.targets,
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )
    kind = model.device.type
    devices = [] if kind == "cpu" else [model.device]
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices, device_type=kind):
            # peft uses names that transformers deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            torch.manual_seed(lora.seed)
            return peft.get_peft_model(model, settings)  # type: ignore[return-value]
    except ValueError as error:
        raise ModelError(f"model.lora.targets is {lora.targets!r}: {_first_line(error)}") from None


@contextmanager
def _quiet_transformers() -> Iterator[None]:
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
