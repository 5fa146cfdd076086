"""Sampling the next step's responses while this step's updates run: one step off-policy.

    step k      begin(k + 1): μ ← θ, sampling from μ begins;     updates move θ
    step k + 1  generate(k + 1): the responses of μ, the policy as it was before step k's updates

A thread samples from a copy of the policy whose weights are set when it begins. Tokens are a
function of these weights and of the request, so nothing depends on the thread's speed; and the
weights are all that a run's state needs to hold: one that goes on samples from them again. What the
thread computes counts when its responses are taken. Left out: what corrects for old samples (the
algorithms), and rewards, which are called when the responses are taken.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from trivium.data.prompts import Prompt
from trivium.models import flops
from trivium.models.logprobs import Head
from trivium.models.reference import frozen_copy
from trivium.rollout.engine import Finished, Response
from trivium.rollout.local_engine import LocalEngine, Row
from trivium.rollout.sampling import Sampling


class _Stopped(Exception):
    """Sampling was given up."""


class _SnapshotEngine(LocalEngine):
    """An engine over a frozen copy of another's policy that can be stopped between two tokens."""

    def __init__(self, original: LocalEngine) -> None:
        policy = frozen_copy(original.policy)
        # Tokenizers are not made for two threads.
        policy.tokenizer = copy.deepcopy(policy.tokenizer)
        policy.decode_model()  # Finds out once, here, whether it may sample by a leaner pass.
        super().__init__(policy, original.end_tokens, max_rows=original.max_rows)
        self.stopped = threading.Event()

    def _sample_tokens(
        self, rows: list[Row], head: Head, hidden_RD: Tensor, sampling: Sampling
    ) -> None:
        if self.stopped.is_set():
            raise _Stopped
        super()._sample_tokens(rows, head, hidden_RD, sampling)


@dataclass
class _Result:
    """What a thread leaves: responses, or why there are none; and their cost."""

    responses: list[list[Response]] | None = None
    error: BaseException | None = None
    flops: float = 0.0


class AsyncEngine:
    """An engine that samples what it is asked for now, or gives what it was asked for before.

    Args:
        engine: samples from the policy as it is.
    """

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self._copy = _SnapshotEngine(engine)
        parameters = dict(self._copy.policy.model.named_parameters())
        self._weights = {name: parameters[name] for name in engine.policy.state_dict()}
        self._step: int | None = None
        self._thread: threading.Thread | None = None
        self._ended: SimpleQueue[tuple[int, list[Response]] | None] = SimpleQueue()
        self._result = _Result()

    def begin(
        self, prompts: Sequence[Prompt], samples: int, sampling: Sampling, *, seed: int, step: int
    ) -> None:
        """Begin to sample from the policy as it is now; or as it was when this step was begun
        before the run was stopped."""
        if self._step != step:
            self.close()
            self._set(self._engine.policy.state_dict())
            self._step = step
        if self._thread is None:
            self._start(prompts, samples, sampling, seed, step)

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        finished: Finished | None = None,
    ) -> list[list[Response]]:
        """The responses of a step that was begun; those of any other are sampled now."""
        if self._step != step:
            return self._engine.generate(
                prompts, samples, sampling, seed=seed, step=step, finished=finished
            )
        if self._thread is None:
            self._start(prompts, samples, sampling, seed, step)
        while (group := self._ended.get()) is not None:
            if finished is not None:
                finished(*group)
        self._thread = None
        flops.add(self._result.flops)
        if self._result.error is not None:
            raise self._result.error
        assert self._result.responses is not None, "a thread leaves responses or an error"
        return self._result.responses

    def close(self) -> None:
        """Give up what is being sampled."""
        if self._thread is not None:
            self._copy.stopped.set()
            self._thread.join()
            self._copy.stopped.clear()
            self._thread = None

    def state_dict(self) -> dict[str, Any] | None:
        """The step that was begun last, and the weights it is sampled from."""
        if self._step is None:
            return None
        return {"step": self._step, "weights": {n: p.detach() for n, p in self._weights.items()}}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Have begun what ``state`` says."""
        if state is not None:
            self._set(state["weights"])
            self._step = state["step"]

    @torch.no_grad()
    def _set(self, weights: dict[str, Tensor]) -> None:
        for name, held in self._weights.items():
            held.copy_(weights[name])

    def _start(self, *request: Any) -> None:
        self._ended, self._result = SimpleQueue(), _Result()
        given = (self._ended, self._result, *request)
        self._thread = threading.Thread(
            target=self._sample, args=given, daemon=True, name="trivium sampling ahead"
        )
        self._thread.start()

    def _sample(
        self,
        ended: SimpleQueue[tuple[int, list[Response]] | None],
        result: _Result,
        prompts: Sequence[Prompt],
        samples: int,
        sampling: Sampling,
        seed: int,
        step: int,
    ) -> None:
        try:
            with flops.apart() as counted:
                result.responses = self._copy.generate(
                    prompts, samples, sampling, seed=seed, step=step,
                    finished=lambda *group: ended.put(group),
                )  # fmt: skip
            result.flops = counted.flops
        except BaseException as error:  # Whatever it is must reach who waits, not end a thread.
            result.error = error
        finally:
            ended.put(None)
