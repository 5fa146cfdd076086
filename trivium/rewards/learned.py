"""Learned rewards: a reward model's score of a response, a process reward model's of its steps.

Used in a configuration as the functions ``reward_model`` and ``process_reward_model`` with
``arguments: {path: …}``. The latter gives each step its probability of being right, or, with
``aggregate: product`` or ``minimum``, the response as a whole that of its steps taken together
(Lightman et al. 2024): a sum over steps pays for every further step, these do not.

Tokens go to the model as they were sampled when it shares the policy's vocabulary; otherwise the
texts are encoded with the model's own tokenizer and chat template.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trivium.config.functions import Function
from trivium.data.batch import Batch, Grouped
from trivium.data.chat import Encoder, step_ends
from trivium.data.group import Group
from trivium.models.model_config import ModelConfig
from trivium.models.oom import run_with_oom_split
from trivium.models.reward_model import RewardModel
from trivium.rewards.reward_config import LEARNED, OUTCOME, PROCESS, Aggregate, RewardConfig

TOKENS_PER_PASS = 16384
AGGREGATES: dict[str, Callable[[list[float]], float]] = {"product": math.prod, "minimum": min}


@dataclass(frozen=True)
class Numbered(Grouped):
    """Groups whose responses know their place, ``place_N``, also after a cut."""

    place_N: Tensor


class LearnedRewards:
    """The reward models that a run's rewards name, loaded once each."""

    def __init__(
        self, configs: Sequence[RewardConfig], policy_tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.is_process = any(config.function == PROCESS for config in configs)
        self.separators = [
            c.arguments.get("separator", "\n") for c in configs if c.function == PROCESS
        ]
        self.vocabulary = policy_tokenizer.get_vocab()
        self.models: dict[str, RewardModel] = {}
        for config in configs:
            if config.function in LEARNED:
                model = _model_of(config)
                self.models[model.path] = RewardModel.load(model)

    @property
    def functions(self) -> dict[str, Function]:
        """The functions by the names that configurations use."""
        return {OUTCOME: self.outcome, PROCESS: self.process}

    @torch.no_grad()
    def outcome(
        self,
        prompts: list[Any],
        responses: list[str],
        prompt_tokens: list[list[int]],
        response_tokens: list[list[int]],
        finish_reasons: list[str],
        *,
        path: str,
        dtype: str = "float32",
        device: str = "auto",
    ) -> list[float]:
        """One score per response, read at its last token."""
        model = self.models[path]
        groups = self._groups(
            model, prompts, responses, prompt_tokens, response_tokens, finish_reasons
        )
        data = Grouped(groups)
        scores = [0.0] * len(groups)
        for whole in data.split(TOKENS_PER_PASS):
            for part, values in run_with_oom_split(
                data, whole, lambda d: model.scores(Batch.of(d.groups))
            ):
                for index, value in zip(part, values.tolist(), strict=True):
                    scores[index] = value
        return scores

    @torch.no_grad()
    def process(
        self,
        prompts: list[Any],
        responses: list[str],
        prompt_tokens: list[list[int]],
        response_tokens: list[list[int]],
        finish_reasons: list[str],
        *,
        path: str,
        separator: str = "\n",
        aggregate: Aggregate = "none",
        dtype: str = "float32",
        device: str = "auto",
    ) -> list[list[tuple[tuple[int, int], float]]] | list[float]:
        """The probability that each step is right, for the steps between separators.

        Aggregated, one number per response; a response without steps then gets 0.
        """
        model = self.models[path]
        groups = self._groups(
            model, prompts, responses, prompt_tokens, response_tokens, finish_reasons
        )
        spans = [step_spans(text, separator) for text in responses]
        ends = [
            step_ends(model.tokenizer, group.responses[0], [end for _, end in found])
            for group, found in zip(groups, spans, strict=True)
        ]
        data = Numbered(groups, torch.arange(len(groups)))
        values: list[list[float]] = [[] for _ in groups]

        def chances(part: Numbered) -> Tensor:
            wanted = [ends[i] for i in part.place_N.tolist()]
            if not any(wanted):
                return torch.empty(0)
            return torch.sigmoid(model.step_scores(Batch.of(part.groups), wanted))

        for whole in data.split(TOKENS_PER_PASS):
            for part, found_S in run_with_oom_split(data, whole, chances):
                numbers = iter(found_S.tolist())
                for index in part:
                    values[index] = [next(numbers) for _ in ends[index]]
        if aggregate != "none":
            return [AGGREGATES[aggregate](steps) if steps else 0.0 for steps in values]
        return [list(zip(found, v, strict=True)) for found, v in zip(spans, values, strict=True)]

    def _groups(
        self,
        model: RewardModel,
        prompts: list[Any],
        responses: list[str],
        prompt_tokens: list[list[int]],
        response_tokens: list[list[int]],
        finish_reasons: list[str],
    ) -> list[Group]:
        """Each response with its prompt, in the reward model's tokens."""
        if model.tokenizer.get_vocab() == self.vocabulary:
            pairs = zip(prompt_tokens, response_tokens, strict=True)
            return [Group(prompt, [response]) for prompt, response in pairs]
        encoder, groups = Encoder(model.tokenizer), []
        for prompt, text, how in zip(prompts, responses, finish_reasons, strict=True):
            exchange = encoder.exchange(prompt, text)
            truncated = how == "length" and len(exchange.response) > 1
            groups.append(Group(exchange.prompt, [exchange.response[: -1 if truncated else None]]))
        return groups


def _model_of(config: RewardConfig) -> ModelConfig:
    """Where the model is and how to load it."""
    given = LEARNED[config.function].model_validate(config.arguments)
    return ModelConfig(path=given.path, dtype=given.dtype, device=given.device)


def step_spans(text: str, separator: str) -> list[tuple[int, int]]:
    """Character spans of the non-blank steps between separators, without their closing space.

    A process reward model is read, as it was trained, at a step's last character that is no space.
    """
    spans, start = [], 0
    for piece in text.split(separator):
        if piece.strip():
            spans.append((start, start + len(piece.rstrip())))
        start += len(piece) + len(separator)
    return spans
