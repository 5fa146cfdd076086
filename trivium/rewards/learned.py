"""Learned rewards: a reward model scores responses, a process reward model scores their steps.

A configuration uses them as the functions ``reward_model`` and ``process_reward_model`` with
``arguments: {path: …}``. ``process_reward_model`` returns the probability that each step is
correct. With ``aggregate: product`` or ``minimum`` it returns the product or minimum over the steps
for the whole response (Lightman et al. 2024): unlike a sum over steps, these do not reward extra
steps.

If the model has the policy's vocabulary, it receives the sampled tokens. Otherwise the texts are
encoded with the model's own tokenizer and chat template.
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
from trivium.data.chat import step_ends
from trivium.data.encoder import Encoder
from trivium.data.group import Group
from trivium.data.oom import run_with_oom_split
from trivium.errors import ConfigurationError
from trivium.hf.model_config import ModelConfig
from trivium.models.reward_model import RewardModel
from trivium.rewards.reward_config import LEARNED, OUTCOME, PROCESS, Aggregate, RewardConfig

TOKENS_PER_PASS = 16384
AGGREGATES: dict[str, Callable[[list[float]], float]] = {"product": math.prod, "minimum": min}


@dataclass(frozen=True)
class IndexedGroups(Grouped):
    """Groups with the index of each response, ``index_N``, which splitting keeps."""

    index_N: Tensor


class LearnedRewards:
    """Reward models of a run's rewards, each loaded once."""

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
                model = reward_model_config(config)
                self.models[model.path] = RewardModel.load(model)
                self._require_use(config, self.models[model.path].tokenizer)

    def _require_use(self, config: RewardConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ConfigurationError for template arguments that the model's texts do not use."""
        arguments = config.arguments.get("template_arguments")
        if arguments and tokenizer.get_vocab() == self.vocabulary:
            raise ConfigurationError(
                f"template_arguments of the reward {config.label!r} are not used: its model has "
                "the policy's vocabulary and reads the policy's tokens; set them beside the data's "
                "path"
            )
        Encoder(tokenizer, arguments)

    @property
    def functions(self) -> dict[str, Function]:
        """Reward functions by their names in configurations."""
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
        tools: list[Any] | None = None,
        template_arguments: dict[str, Any] | None = None,
        path: str,
        dtype: str = "float32",
        device: str = "auto",
    ) -> list[float]:
        """Return one score per response, computed at its last token."""
        model = self.models[path]
        groups = self._groups(
            model,
            prompts,
            responses,
            prompt_tokens,
            response_tokens,
            finish_reasons,
            tools,
            template_arguments,
        )
        data = Grouped(groups)
        scores = [0.0] * len(groups)
        for chunk in data.split(TOKENS_PER_PASS):
            for part, values in run_with_oom_split(
                data, chunk, lambda d: model.scores(Batch.of(d.groups))
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
        tools: list[Any] | None = None,
        template_arguments: dict[str, Any] | None = None,
        path: str,
        separator: str = "\n",
        aggregate: Aggregate = "none",
        dtype: str = "float32",
        device: str = "auto",
    ) -> list[list[tuple[tuple[int, int], float]]] | list[float]:
        """Return the probability that each step is correct; separators delimit the steps.

        With `aggregate`, return one number per response, and 0 for a response without steps.
        """
        model = self.models[path]
        groups = self._groups(
            model,
            prompts,
            responses,
            prompt_tokens,
            response_tokens,
            finish_reasons,
            tools,
            template_arguments,
        )
        spans = [step_spans(text, separator) for text in responses]
        ends = [
            step_ends(model.tokenizer, group.responses[0], [end for _, end in spans_of_one])
            for group, spans_of_one in zip(groups, spans, strict=True)
        ]
        data = IndexedGroups(groups, torch.arange(len(groups)))
        values: list[list[float]] = [[] for _ in groups]

        def probabilities(part: IndexedGroups) -> Tensor:
            step_ends_per_response = [ends[i] for i in part.index_N.tolist()]
            if not any(step_ends_per_response):
                return torch.empty(0)
            return torch.sigmoid(model.step_scores(Batch.of(part.groups), step_ends_per_response))

        for chunk in data.split(TOKENS_PER_PASS):
            for part, probability_S in run_with_oom_split(data, chunk, probabilities):
                probabilities_left = iter(probability_S.tolist())
                for index in part:
                    values[index] = [next(probabilities_left) for _ in ends[index]]
        if aggregate != "none":
            return [AGGREGATES[aggregate](steps) if steps else 0.0 for steps in values]
        return [
            list(zip(spans_of_one, v, strict=True))
            for spans_of_one, v in zip(spans, values, strict=True)
        ]

    def _groups(
        self,
        model: RewardModel,
        prompts: list[Any],
        responses: list[str],
        prompt_tokens: list[list[int]],
        response_tokens: list[list[int]],
        finish_reasons: list[str],
        tools: list[Any] | None,
        template_arguments: dict[str, Any] | None,
    ) -> list[Group]:
        """Return each response with its prompt, in the reward model's tokens."""
        if model.tokenizer.get_vocab() == self.vocabulary:
            pairs = zip(prompt_tokens, response_tokens, strict=True)
            return [Group(prompt, [response]) for prompt, response in pairs]
        encoder, groups = Encoder(model.tokenizer, template_arguments), []
        tools = tools or [None] * len(prompts)
        rows = zip(prompts, responses, finish_reasons, tools, strict=True)
        for prompt, text, finish_reason, tools_of_one in rows:
            exchange = encoder.exchange(prompt, text, tools_of_one)
            truncated = finish_reason == "length" and len(exchange.response) > 1
            groups.append(Group(exchange.prompt, [exchange.response[: -1 if truncated else None]]))
        return groups


def reward_model_config(config: RewardConfig) -> ModelConfig:
    """Return the configuration of the model that a learned reward names."""
    given = LEARNED[config.function].model_validate(config.arguments)
    return ModelConfig(
        path=given.path, dtype=given.dtype, device=given.device, fast_path=given.fast_path
    )


def step_spans(text: str, separator: str) -> list[tuple[int, int]]:
    """Return character spans of the non-blank steps, without trailing white space.

    As in training, the score of a step is computed at its last character that is not white space.
    """
    spans, start = [], 0
    for piece in text.split(separator):
        if piece.strip():
            spans.append((start, start + len(piece.rstrip())))
        start += len(piece) + len(separator)
    return spans
