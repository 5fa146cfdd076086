"""``trivium memory``: predict a run's memory stage by stage, and find micro-batches that fit.

Nothing is trained and no weights are read: the run is simulated on tensor shapes
(``trivium.memory``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from trivium.config.base import Configuration
from trivium.hf.loading import device_of
from trivium.memory.fit import FREE_SHARE, free_bytes, largest_fitting_limit
from trivium.memory.lengths import data_lengths
from trivium.memory.report import Lengths, Memory
from trivium.memory.stages import predict
from trivium.monitoring.progress import printable

PARTS = ("parameters", "gradients", "optimizer", "activations", "cache")
ADVICE = (
    "set model.gradient_checkpointing: true, model.lora, or model.dtype: bfloat16 with "
    "optimizer.half_precision: stochastic_rounding, or shorten prompts and responses"
)


@dataclass(frozen=True)
class MemoryReport:
    """Predicted memory of a run, the free memory in bytes, and advice."""

    config: Any
    lengths: Lengths
    memory: Memory
    free: int
    advice: str

    def __rich__(self) -> Group:
        longest = max(self.lengths.prompts), max(self.lengths.responses)
        summary = Text(
            f"{self.memory.kind} of {printable(self.config.model.path)} with prompts of up to "
            f"{longest[0]:,} and responses of up to {longest[1]:,} tokens, "
            f"tokens_per_micro_batch {self.config.tokens_per_micro_batch:,}"
        )
        return Group(summary, self._table(), Text(self.advice))

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD)
        for name in ("stage", "model"):
            table.add_column(name)
        for name in (*PARTS, "MiB"):
            table.add_column(name, justify="right")
        for stage in self.memory.stages:
            style = "bold" if stage is self.memory.peak else ""
            for model in stage.models:
                sizes = [_mib(getattr(model, part)) for part in PARTS]
                table.add_row(stage.name, model.role, *sizes, _mib(model.total), style=style)
        return table


def run(kind: str, config: Configuration) -> MemoryReport:
    """Predict the memory of a run of ``kind`` and compare it with the free memory.

    Raises:
        DataError: the data cannot be read.
        ModelError: the model cannot be read, or has an operation whose memory cannot be predicted.
    """
    settings: Any = config
    device = device_of(settings.model)
    lengths = data_lengths(kind, config)
    memory, free = predict(kind, config, lengths), free_bytes(device)
    needed = (
        f"The run needs {_mib(memory.bytes)} MiB at its peak ({memory.peak.name}), "
        f"{memory.accuracy}"
    )
    comparison = f"{needed}; {_mib(free)} MiB are free on {device}."
    if memory.bytes <= FREE_SHARE * free:
        return MemoryReport(config, lengths, memory, free, f"{comparison} It fits.")
    fit = largest_fitting_limit(kind, config, lengths, int(FREE_SHARE * free))
    if fit is None:
        advice = f"{comparison} No tokens_per_micro_batch makes it fit: {ADVICE}."
    else:
        bound, smaller = fit
        advice = (
            f"{comparison} With tokens_per_micro_batch: {bound} it needs {_mib(smaller.bytes)} MiB "
            "and fits; the gradients stay the same."
        )
    return MemoryReport(config, lengths, memory, free, advice)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"
