"""Startup of a training run: check the device and the run directory before anything slow.

This also seeds the random generators and starts the measurement of peak memory. A resumed run
restores the choices of ``trivium.numerics`` and the time that chat templates see here, before its
data and models are loaded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from trivium import distributed
from trivium.config.base import Configuration
from trivium.data.template import set_template_time
from trivium.errors import ModelError
from trivium.hf.loading import device_of, dtype_of
from trivium.hf.model_config import FastPath, ModelConfig
from trivium.models.fast_path import install_fast_path, register_choices
from trivium.numerics import load_numerics_state, numerics_state
from trivium.runs.checkpointing import NUMERICS
from trivium.runs.peak_memory import PeakMemory
from trivium.runs.provenance import environment
from trivium.runs.startup import PreparedRun, prepare_directory
from trivium.runs.store import RunConfig
from trivium.training.rank_states import seed_rank


class TrainingConfig(Protocol):
    """The configuration of a training command."""

    @property
    def run(self) -> RunConfig: ...
    @property
    def model(self) -> ModelConfig: ...


def prepare_run(kind: str, config: TrainingConfig) -> PreparedRun:
    """Check that a run can be written or resumed, and start the measurement of its memory.

    Under a launcher such as torchrun, the processes join here.

    Raises:
        ModelError: the model's device cannot be used, or not with this configuration.
        ConfigurationError: the directory is in use, or a tracker is not installed.
        CheckpointError: a run was stopped there, and none of its checkpoints is complete.
    """
    assert isinstance(config, Configuration), "config is the whole configuration of a command"
    distributed.join()
    device = device_of(config.model)
    if distributed.size() > 1:
        _require_equal_ranks(config, device)
    half_precision = dtype_of(config.model) == torch.bfloat16
    prepared = prepare_directory(kind, config.run, config)
    prepared = replace(prepared, half_precision=half_precision)
    set_template_time(prepared.started)
    if prepared.checkpoint is not None:
        load_numerics_state(prepared.checkpoint.load(NUMERICS))
    if distributed.size() > 1:
        register_choices(device, config.model.fast_path)
        load_numerics_state(distributed.from_rank_0("choices of numerics", numerics_state))
    seed_rank(config.run.seed)
    if not config.run.measure_memory:
        return prepared
    with torch.random.fork_rng(devices=[]):
        load_libraries(config.model.fast_path)
    return replace(prepared, peak_memory=PeakMemory(device))


def _require_equal_ranks(config: Configuration, device: torch.device) -> None:
    """Raise unless every process reads the same files and has a device of its own.

    Raises:
        ModelError: the processes of this machine would share one GPU.
        TrainingError: configuration, input files, versions or kinds of devices differ.
    """
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if device.index is not None or distributed.local_rank() >= count:
            raise ModelError(
                f"model.device is {device}, and this machine has {count} GPUs for its processes, "
                "each of which needs its own: write model.device: cuda without a number, and start "
                "no more processes than GPUs (--nproc-per-node)"
            )
    found = environment(config)
    same = (config.model_dump(mode="json"), found["inputs"], found["packages"], found["source"])
    distributed.agree("the configuration, its input files and the versions", (*same, device.type))


def load_libraries(fast_path: FastPath) -> None:
    """Train a tiny model for one step, so that the memory baseline includes library code.

    Otherwise about 30 MiB that belong to no model would count as memory of the run.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    install_fast_path(model, fast_path)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.zeros(2, 128, dtype=torch.long)
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
