"""Model card of a finished run: what was trained, from what, on what, and how it measures.

Every figure comes from the run's own files. The card is ``final/README.md``, where the Hugging Face
Hub looks for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trivium.config.base import Configuration, dump, sections_of
from trivium.config.paths import looked_up
from trivium.data.rows import RowsConfig
from trivium.data.sources import MixedSource, SourceConfig
from trivium.errors import one_line
from trivium.hf.checkpoint_files import adapter_at, holds_only_adapters
from trivium.hf.model_config import ModelConfig
from trivium.monitoring.metrics import EVALUATIONS, METRICS
from trivium.rewards.reward_config import RewardConfig
from trivium.runs.files import write_text
from trivium.runs.store import read_evaluations, read_events, read_metrics, read_run

CARD, BAR = "README.md", "\\|"
TITLES = {
    "sft": "supervised fine-tuning (SFT)",
    "reward-model": "reward modeling",
    "ppo": "PPO",
    "dpo": "DPO",
    "grpo": "GRPO",
}
SHOWN = (
    "loss",
    "nll",
    "accuracy",
    "reward/mean",
    "implicit_reward/accuracy",
    "implicit_reward/margin",
    "kl/response",
    "length/mean",
)
"""Training metrics of the card."""
_AVERAGED = 10
"""Number of first and last steps over which a training metric is averaged, as one is noisy."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(run: Path, config: Configuration) -> None:
    """Write the card of a run's final model, if it has one."""
    if (run / "final").is_dir():
        write_text(run / "final" / CARD, model_card(run, config))


def model_card(run: Path, config: Configuration) -> str:
    """Return the card of a run: metadata for the Hub, facts, figures and the command."""
    record, rows = read_run(run), read_metrics(run)
    kind = str(record["kind"])
    only_adapters = holds_only_adapters(run / "final")
    model: ModelConfig = config.model  # type: ignore[attr-defined]
    parts = [
        f"---\n{yaml.safe_dump(_metadata(kind, config, model, only_adapters), sort_keys=False)}---",
        f"# {run.resolve().name}",
        _introduction(kind, model, only_adapters),
        _table(("", ""), _facts(run, config, model, rows)),
        *_figures(read_evaluations(run), rows),
        "## Command",
        f"    trivium {kind} config.yaml",
        "with this `config.yaml`, in which defaults are included:",
        f"```yaml\n{dump(config).rstrip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(
    kind: str, config: Configuration, model: ModelConfig, only_adapters: bool
) -> dict[str, Any]:
    """Return what the Hub reads: names that are on the Hub, and how the model is loaded."""
    base = _base(model)
    sections = [s for _, s in sections_of(config) if isinstance(s, RowsConfig)]
    paths = [source.path for section in sections for source in section.sources]
    datasets = [path for path in dict.fromkeys(paths) if _is_hub_name(path)]
    on_hub: dict[str, Any] = {}
    if _is_hub_name(base):
        relation = "adapter" if only_adapters else "finetune"
        on_hub = {"base_model": base, "base_model_relation": relation}
    return {
        "library_name": "peft" if only_adapters else "transformers",
        "pipeline_tag": "text-classification" if kind == "reward-model" else "text-generation",
        "tags": ["trivium", kind],
        **on_hub,
        **({"datasets": datasets} if datasets else {}),
    }


def _introduction(kind: str, model: ModelConfig, only_adapters: bool) -> str:
    what = "LoRA adapters" if only_adapters else "A model"
    return f"{what} trained by {TITLES.get(kind, kind)} with Trivium, from {_code(_base(model))}."


def _facts(
    run: Path, config: Configuration, model: ModelConfig, rows: Sequence[Mapping[str, float]]
) -> Iterator[tuple[str, str]]:
    """Yield the facts of a run, as rows of a table."""
    record, events = read_run(run), read_events(run)
    yield "base", _code(_base(model)) + (f" at {model.revision}" if model.revision else "")
    if model.path != _base(model):
        yield "adapters at the start", _code(model.path)
    kind = str(record["kind"])
    yield "method", TITLES.get(kind, kind) + _choices(config)
    yield "weights", _weights(model, events)
    for name, section in sections_of(config):
        if isinstance(section, RowsConfig):
            limit = f", first {section.limit:,} rows" if section.limit else ""
            yield f"data: `{name}`", "; ".join(map(_source, section.sources)) + limit
    rewards: Sequence[RewardConfig] = getattr(config, "rewards", ())
    if rewards:
        yield "rewards", ", ".join(f"{_code(r.function)} × {r.weight:g}" for r in rewards)
    yield "steps", _steps(rows, events)
    if rows:
        yield "time", _duration(rows[-1]["elapsed"])
    trained = sum(row.get("tokens/trained", 0) for row in rows)
    if trained:
        yield "trained tokens", f"{trained:,.0f}"
    packages = {n: v for n, v in record["packages"].items() if v is not None}
    yield "versions", ", ".join(f"{name} {version}" for name, version in packages.items())


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 3600 else f"{seconds / 3600:.3g} h"


def _choices(config: Configuration) -> str:
    """Return the settings that name a method's variant, where the method has them."""
    names = [n for n in ("loss", "surrogate", "advantage", "kl", "beta") if hasattr(config, n)]
    return "".join(f", `{name}: {getattr(config, name)}`" for name in names)


def _weights(model: ModelConfig, events: Iterable[Mapping[str, Any]]) -> str:
    lora, found = model.lora, "all"
    if lora is not None:
        found = "LoRA" if lora.initial == "loaded" else f"LoRA of rank {lora.rank}"
        found += (", DoRA" if lora.dora else "") + (", rsLoRA" if lora.rslora else "")
    checks = [e for e in events if e["kind"] == "compared" and e.get("name") == "final"]
    return f"{found}; saved in {checks[-1]['dtype']}" if checks else found


def _steps(rows: Sequence[Mapping[str, float]], events: Iterable[Mapping[str, Any]]) -> str:
    done = f"{int(rows[-1]['step']):,}" if rows else "0"
    reasons = [str(e.get("message", "")) for e in events if e["kind"] == "stopped"]
    return f"{done} ({reasons[-1]})" if reasons else done


# --- figures --------------------------------------------------------------------------------------


def _figures(
    evaluations: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, float]]
) -> Iterator[str]:
    """Yield the figures of the held-out evaluations and of training, first and last."""
    if evaluations:
        shown = [evaluations[0], evaluations[-1]] if len(evaluations) > 1 else [evaluations[0]]
        names = [name for name in EVALUATIONS if _is_number(shown[-1].get(name))]
        yield "## Held-out evaluation"
        yield _table(
            ("", *(f"after step {row['step']}" for row in shown)),
            ((EVALUATIONS[n].title, *(_measured(row, n) for row in shown)) for n in names),
        )
        if any(_is_number(row.get(f"{name}_low")) for row in shown for name in names):
            yield "Brackets are 95 % confidence intervals."
    names = [name for name in SHOWN if rows and _is_number(rows[-1].get(name))]
    if names:
        window = max(1, min(_AVERAGED, len(rows) // 2))
        steps = "step" if window == 1 else f"{window} steps, mean"
        yield "## Training"
        yield _table(
            ("", f"first {steps}", f"last {steps}"),
            ((METRICS[n].title, _mean(rows[:window], n), _mean(rows[-window:], n)) for n in names),
        )


def _measured(row: Mapping[str, Any], name: str) -> str:
    if not _is_number(row.get(name)):
        return "–"
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    interval = f" [{low:.4g}, {high:.4g}]" if _is_number(low) and _is_number(high) else ""
    return f"{row[name]:.4g}{interval}"


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> str:
    values = [row[name] for row in rows if _is_number(row.get(name))]
    return f"{sum(values) / len(values):.4g}" if values else "–"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# --- text -----------------------------------------------------------------------------------------


def _base(model: ModelConfig) -> str:
    """Return the checkpoint that a run started from; that of its adapters, if it is a directory
    of adapters."""
    adapter = adapter_at(model.path)
    return model.path if adapter is None else adapter.base


def _is_hub_name(path: str) -> bool:
    return _HUB_NAME.fullmatch(path) is not None and not looked_up(path).exists()


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', BAR) for cell in line)} |" for line in lines)


def _source(source: SourceConfig) -> str:
    """Return a source of rows, with its split, its limit and its weight in a mixture."""
    parts = [_code(source.path)]
    parts += [source.split] if source.split else []
    if isinstance(source, MixedSource):
        parts += [f"first {source.limit:,} rows"] if source.limit else []
        parts += [f"weight {source.weight:g}"] if source.weight else []
    return ", ".join(parts)


def _code(text: str) -> str:
    """Return text as code, on one line."""
    return "`" + one_line(text).replace("`", "'") + "`"
