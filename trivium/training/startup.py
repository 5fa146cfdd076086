"""Startup of a training run: check the device and the run directory before anything slow.

This also seeds the random generators and starts the measurement of peak memory. A resumed run
restores the choices of ``trivium.numerics`` and the time that chat templates see here, before its
data and models are loaded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from trivium.config.base import Configuration
from trivium.data.template import set_template_time
from trivium.hf.loading import device_of, dtype_of
from trivium.hf.model_config import FastPath, ModelConfig
from trivium.models.fast_path import install_fast_path
from trivium.numerics import load_numerics_state
from trivium.runs import rng
from trivium.runs.checkpointing import NUMERICS
from trivium.runs.peak_memory import PeakMemory
from trivium.runs.startup import PreparedRun, prepare_directory
from trivium.runs.store import RunConfig


class TrainingConfig(Protocol):
    """The configuration of a training command."""

    @property
    def run(self) -> RunConfig: ...
    @property
    def model(self) -> ModelConfig: ...


def prepare_run(kind: str, config: TrainingConfig) -> PreparedRun:
    """Check that a run can be written or resumed, and start the measurement of its memory.

    Raises:
        ModelError: the model's device cannot be used, or not with this configuration.
        ConfigurationError: the directory is in use, or a tracker is not installed.
        CheckpointError: a run was stopped there, and none of its checkpoints is complete.
    """
    assert isinstance(config, Configuration), "config is the whole configuration of a command"
    device = device_of(config.model)
    half_precision = dtype_of(config.model) == torch.bfloat16
    prepared = prepare_directory(kind, config.run, config)
    prepared = replace(prepared, half_precision=half_precision)
    set_template_time(prepared.started)
    if prepared.checkpoint is not None:
        load_numerics_state(prepared.checkpoint.load(NUMERICS))
    rng.seed(config.run.seed)
    if not config.run.measure_memory:
        return prepared
    with torch.random.fork_rng(devices=[]):
        load_libraries(config.model.fast_path)
    return replace(prepared, peak_memory=PeakMemory(device))


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
