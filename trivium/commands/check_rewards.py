"""``trivium check-rewards``: do a run's rewards tell one response from another?

A constant reward, or one that ignores the response, trains nothing and raises no error. Each reward
scores a few responses to each of the first rows: none, an excuse, the row's own answer and the next
row's. No model is sampled from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from trivium.commands.check_rewards_config import CheckRewardsConfig
from trivium.config.functions import Function, load_function
from trivium.data.prompts import Prompt, PromptsConfig, parse_prompt
from trivium.data.response import Response
from trivium.data.rows import Notes, Row, RowReader
from trivium.errors import ConfigurationError, TriviumError
from trivium.monitoring.progress import printable
from trivium.rewards.code_check import data_faults
from trivium.rewards.component import Component
from trivium.rewards.functions import accepted_inputs
from trivium.rewards.reward import REWARD, Rewards
from trivium.rewards.reward_config import LEARNED, RewardConfig

_VERIFIERS = ("code", "gsm8k", "math")
_ANSWERS = ("answer", "reference_solution", "completion", "response", "chosen")
_UNDECIDED = ("format", "length")
_TOKENS = frozenset({"prompt_tokens", "response_tokens", "response_ids"})
_EXCUSE = "I do not know."
_LONG_WORDS = 4096


@dataclass(frozen=True)
class Probe:
    """One response to a row: its text, and whether it is the row's own answer."""

    prompt: Prompt
    where: str
    text: str
    is_answer: bool = False


@dataclass(frozen=True)
class Finding:
    """Values of a reward where it applies, a verdict for the table, and faults."""

    config: RewardConfig
    values: Sequence[float]
    verdict: str
    faults: Sequence[str] = ()


def run(config: CheckRewardsConfig, max_rows: int) -> tuple[Table, list[str]]:
    """Score the probes with each reward; return the table and the faults.

    Raises:
        ConfigurationError: a reward cannot be loaded, or its columns are missing.
        DataError: the rows cannot be read.
    """
    data, configs = config.scored
    assert data is not None and configs, "the configuration has both"
    rows = _rows(data, max_rows)
    tokenizer, functions = _tokenizer(config, configs), {}
    if any(reward.function in LEARNED for reward in configs):
        from trivium.rewards.learned import LearnedRewards

        functions = LearnedRewards(configs, tokenizer).functions
    findings = [_check(reward, rows, data, max_rows, tokenizer, functions) for reward in configs]
    return _table(findings), [fault for finding in findings for fault in finding.faults]


def _rows(data: PromptsConfig, max_rows: int) -> list[tuple[Prompt, str]]:
    """Return the prompts of the first rows, each with its file and line."""
    reader = RowReader(data)

    def convert(row: Row, notes: Notes) -> tuple[Prompt, str]:
        text = parse_prompt(row, data, notes)
        columns = {name: value for name, value in row.columns.items() if name != "prompt"}
        return Prompt([], text, columns, row.index), row.where

    rows = list(reader.items(convert, max_rows))
    reader.report(len(rows))
    return rows


def _tokenizer(config: CheckRewardsConfig, rewards: Sequence[RewardConfig]) -> Any:
    """Return the policy's tokenizer if a reward needs tokens, else None."""
    if not any(_needs_tokens(reward) for reward in rewards):
        return None
    if config.model is None:
        raise ConfigurationError(
            "a reward takes tokens, and there is no `model`, whose tokenizer makes them: add it"
        )
    from trivium.hf.loading import load_tokenizer

    return load_tokenizer(config.model)


def _needs_tokens(reward: RewardConfig) -> bool:
    if reward.function in LEARNED:
        return True
    function = load_function(reward.function, reward.directories, REWARD)
    try:
        inputs = accepted_inputs(function, has_tokenizer=False)
    except ConfigurationError:
        return True
    return bool(reward.arguments.get("special_tokens")) or not _TOKENS.isdisjoint(inputs)


# --- Probes --------------------------------------------------------------------------------------


def _probes(reward: RewardConfig, rows: Sequence[tuple[Prompt, str]]) -> list[Probe]:
    answers = [_answer(reward, prompt) for prompt, _ in rows]
    probes = []
    for index, (prompt, where) in enumerate(rows):
        own, other = answers[index], answers[(index + 1) % len(rows)]
        texts = ["", _EXCUSE, *([other] if other is not None and other != own else [])]
        probes += [Probe(prompt, where, text) for text in texts]
        if own is not None:
            probes.append(Probe(prompt, where, own, is_answer=True))
    limit = reward.arguments.get("limit")
    words = limit if isinstance(limit, int) and limit < 1 << 20 else _LONG_WORDS
    return [*probes, Probe(*rows[0], " ".join(["word"] * (words + 1)))]


def _answer(reward: RewardConfig, prompt: Prompt) -> str | None:
    """Return a response with the row's own answer, if it has one."""
    for name in _ANSWERS:
        value = prompt.columns.get(reward.columns.get(name, name))
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            continue
        text = str(value)
        if name == "reference_solution":
            return text if "```" in text else f"```python\n{text}\n```"
        if name == "answer" and "####" not in text and "\\boxed" not in text:
            return f"The answer is $\\boxed{{{text}}}$.\n#### {text}"
        return text
    return None


# --- Verdicts ------------------------------------------------------------------------------------


def _check(
    reward: RewardConfig,
    rows: Sequence[tuple[Prompt, str]],
    data: PromptsConfig,
    max_rows: int,
    tokenizer: Any,
    functions: dict[str, Function],
) -> Finding:
    name = f"reward {reward.label!r}"
    if reward.function == "code":
        faults = [f"{name}: {fault}" for fault in data_faults(reward, data, max_rows)]
        if faults:
            return Finding(reward, (), "tests that cannot be used", faults)
    probes = _probes(reward, rows)
    columns = {column for prompt, _ in rows for column in prompt.columns}
    Rewards([reward], functions=functions, tokenizer=tokenizer).check(columns)
    kind = replace(REWARD, built_in={**REWARD.built_in, **functions})
    function = load_function(reward.function, reward.directories, kind)
    encoded = [_encoded(probe, data, tokenizer) for probe in probes]
    try:
        found, replaced = Component(reward, function, tokenizer).values(
            [prompt for prompt, _ in encoded], [response for _, response in encoded]
        )
    except TriviumError as error:
        return Finding(reward, (), "fails", [str(error)])
    scored = [(probe, _mean(v)) for probe, v in zip(probes, found, strict=True) if v is not None]
    values = [value for _, value in scored]
    if replaced:
        fault = f"{name}: fails on {replaced} of {len(found)} responses, which get its fallback"
        return Finding(reward, values, "fails", [fault])
    if not scored:
        fault = f"{name}: applies to none of {len(found)} responses: is a `return` missing?"
        return Finding(reward, values, "applies to nothing", [fault])
    return Finding(reward, values, *_verdict(reward, scored))


def _mean(value: float | list[tuple[int, float]]) -> float:
    """Return a value, or the mean of a process reward's steps."""
    if not isinstance(value, list):
        return value
    return sum(number for _, number in value) / len(value) if value else 0.0


def _encoded(probe: Probe, data: PromptsConfig, tokenizer: Any) -> tuple[Prompt, Response]:
    tokens: list[int] = []
    prompt = probe.prompt
    if tokenizer is not None:
        from trivium.data.encoder import Encoder

        encoder = Encoder(tokenizer, data.template_arguments)
        prompt = replace(prompt, tokens=encoder.prompt(prompt.text))
        tokens = [*encoder.encode_plain(probe.text), tokenizer.eos_token_id]
    return prompt, Response(tokens, [0.0] * len(tokens), "eos", probe.text)


def _verdict(reward: RewardConfig, scored: Sequence[tuple[Probe, float]]) -> tuple[str, list[str]]:
    """Return a reward's verdict in a few words, and its faults."""
    name = f"reward {reward.label!r} ({reward.function})"
    by_row: dict[str, set[float]] = {}
    for probe, value in scored:
        by_row.setdefault(probe.where, set()).add(value)
    if all(len(found) == 1 for found in by_row.values()):
        if reward.function in _UNDECIDED:
            return "the same for these responses", []
        if len({value for _, value in scored}) == 1:
            fault = (
                f"gives {scored[0][1]:g} to each of {len(scored)} responses, so it trains nothing"
            )
            return "constant", [f"{name}: {fault}: correct the function, or its columns"]
        fault = "gives all responses to a prompt the same value, so it trains nothing"
        return "ignores the response", [f"{name}: {fault}: use the responses in the function"]
    if reward.function in _VERIFIERS:
        refused = [probe for probe, value in scored if probe.is_answer and value < 1]
        faults = [
            f"{name}: {p.where}: refuses the row's own answer {p.text!r:.80}" for p in refused
        ]
        if faults:
            rest = [f"{name}: and {len(faults) - 10} rows more"] if len(faults) > 10 else []
            return f"refuses the answers of {len(faults)} rows", faults[:10] + rest
    return "differs between responses", []


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(title="Rewards of a few responses to the first rows", box=SIMPLE, pad_edge=False)
    for heading in ("reward", "function", "responses", "lowest", "mean", "highest", "verdict"):
        numeric = heading in ("responses", "lowest", "mean", "highest")
        table.add_column(heading, justify="right" if numeric else "left")
    for finding in findings:
        values = finding.values
        numbers = (min(values), sum(values) / len(values), max(values)) if values else ()
        table.add_row(
            Text(printable(finding.config.label)),
            Text(printable(finding.config.function)),
            str(len(values)),
            *([f"{number:.3g}" for number in numbers] or ["–"] * 3),
            Text(finding.verdict),
        )
    return table
