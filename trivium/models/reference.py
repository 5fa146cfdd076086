"""The reference policy: what the KL divergence is measured from.

A frozen copy of the policy; or, when the policy trains adapters, the same weights with the
adapters switched off (or, after a refresh, set to the values they had then), which costs no
second model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from trivium.data.batch import Batch
from trivium.models.loading import has_lora, trained_parameters
from trivium.models.policy import Policy


class Reference:
    """π_ref: starts as the policy it is made from and moves only on ``refresh``.

    Args:
        policy: what it starts as.
        enabled: whether anything will be asked of it; if not, no copy of the policy is made.
    """

    def __init__(self, policy: Policy, *, enabled: bool = True) -> None:
        self._policy = policy
        self._enabled = enabled
        self._refreshed = False
        self._adapters: list[Tensor] | None = None
        self._copy = frozen_copy(policy) if enabled and not has_lora(policy.model) else None

    @property
    def frozen_policy(self) -> Policy | None:
        """Copy of the policy; None if the policy has adapters or the reference is disabled."""
        return self._copy

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> Tensor:
        """Log-probs of the batch's response tokens under π_ref, ``[T]``; no gradient."""
        assert self._enabled, "reference was built with enabled=False"
        if self._copy is not None:
            return self._copy.logprobs(batch)
        with self._as_reference():
            return self._policy.logprobs(batch)

    @torch.no_grad()
    def refresh(self) -> None:
        """``π_ref ← π_θ``."""
        if not self._enabled:
            return
        self._refreshed = True
        if self._copy is None:
            self._adapters = [p.detach().clone() for p in trained_parameters(self._policy.model)]
            return
        current = self._policy.model.state_dict()
        self._copy.model.load_state_dict(current)

    def state_dict(self) -> list[Tensor] | None:
        """What it was refreshed to; None where it is still what it started as."""
        if not self._refreshed:
            return None
        if self._copy is not None:
            return [p.detach() for p in self._copy.model.parameters()]
        return self._adapters

    @torch.no_grad()
    def load_state_dict(self, state: list[Tensor] | None) -> None:
        """Be as it was when ``state`` was asked for."""
        if state is None:
            return
        self._refreshed = True
        if self._copy is None:
            self._adapters = state
            return
        for parameter, value in zip(self._copy.model.parameters(), state, strict=True):
            parameter.copy_(value)

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        if self._adapters is None:
            with self._policy.model.disable_adapter():  # type: ignore[operator]
                yield
            return
        trained = trained_parameters(self._policy.model)
        current = [p.data for p in trained]
        try:
            for parameter, kept in zip(trained, self._adapters, strict=True):
                parameter.data = kept
            yield
        finally:
            for parameter, mine in zip(trained, current, strict=True):
                parameter.data = mine


def frozen_copy(policy: Policy) -> Policy:
    """A copy of ``policy`` whose weights never change."""
    model = copy.deepcopy(policy.model).requires_grad_(False)
    return Policy(
        model,
        policy.tokenizer,
        temperature=policy.temperature,
        cuda_graphs=policy.cuda_graphs,
    )
