"""The reference policy, from which the KL divergence is measured.

A frozen copy of the policy. If the policy trains adapters, the reference is the same weights with
the adapters switched off, which costs no second model. Adapters that were loaded with values, or a
reference that was refreshed, set them to their values at that time instead.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from trivium.data.batch import Batch
from trivium.hf.adapters import has_lora, starts_at_base
from trivium.hf.loading import trained_parameters
from trivium.models.policy import Policy


class Reference:
    """π_ref: equals the policy it is made from, and changes only on ``refresh``.

    Args:
        policy: the policy that it copies.
        enabled: whether log-probs will be computed; if not, no copy is made.
    """

    def __init__(self, policy: Policy, *, enabled: bool = True) -> None:
        self._policy = policy
        self._enabled = enabled
        self._refreshed = False
        self._adapters: list[Tensor] | None = None
        self._copy = frozen_copy(policy) if enabled and not has_lora(policy.model) else None
        if enabled and self._copy is None and not starts_at_base(policy.model):
            self._adapters = self._current_adapters()

    @property
    def frozen_policy(self) -> Policy | None:
        """Copy of the policy; None if the policy has adapters or the reference is disabled."""
        return self._copy

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> Tensor:
        """Return the log-probs of the batch's response tokens under π_ref, ``[T]``; no gradient."""
        assert self._enabled, "the reference was built with enabled=False"
        if self._copy is not None:
            return self._copy.logprobs(batch)
        with self._adapters_of_reference():
            return self._policy.logprobs(batch)

    @torch.no_grad()
    def refresh(self) -> None:
        """``π_ref ← π_θ``."""
        if not self._enabled:
            return
        self._refreshed = True
        if self._copy is None:
            self._adapters = self._current_adapters()
            return
        self._copy.model.load_state_dict(self._policy.model.state_dict())

    def state_dict(self) -> list[Tensor] | None:
        """Return the weights of the last refresh; None if there was none."""
        if not self._refreshed:
            return None
        if self._copy is not None:
            return [p.detach() for p in self._copy.model.parameters()]
        return self._adapters

    @torch.no_grad()
    def load_state_dict(self, state: list[Tensor] | None) -> None:
        """Take the weights of ``state_dict``."""
        if state is None:
            return
        self._refreshed = True
        if self._copy is None:
            self._adapters = state
            return
        for parameter, value in zip(self._copy.model.parameters(), state, strict=True):
            parameter.copy_(value)

    def _current_adapters(self) -> list[Tensor]:
        return [p.detach().clone() for p in trained_parameters(self._policy.model)]

    @contextmanager
    def _adapters_of_reference(self) -> Iterator[None]:
        """Switch the policy's adapters off, or to their values in the reference."""
        if self._adapters is None:
            with self._policy.model.disable_adapter():  # type: ignore[operator]
                yield
            return
        trained = trained_parameters(self._policy.model)
        current = [p.data for p in trained]
        try:
            for parameter, value in zip(trained, self._adapters, strict=True):
                parameter.data = value
            yield
        finally:
            for parameter, value in zip(trained, current, strict=True):
                parameter.data = value


def frozen_copy(policy: Policy) -> Policy:
    """Return a copy of ``policy`` whose weights never change."""
    return Policy(
        copy.deepcopy(policy.model).requires_grad_(False),
        policy.tokenizer,
        temperature=policy.temperature,
        cuda_graphs=policy.cuda_graphs,
        fast_path=policy.fast_path,
    )
