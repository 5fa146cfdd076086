"""Asynchronous sampling: the next step's responses are sampled while this step's updates run.

    step k      begin(k + 1): μ ← θ, sampling from μ begins;     updates change θ
    step k + 1  generate(k + 1): return the responses of μ, the policy before step k's updates

Training is therefore one step off-policy. A thread samples from a snapshot of the policy, whose
weights are copied when sampling begins. The tokens depend only on these weights and on the request,
not on the thread's speed. A checkpoint therefore stores only the weights, and a resumed run samples
from them again. The FLOPs of the thread are counted when its responses are returned. The
algorithms correct for old samples. The caller scores the returned responses.
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
from trivium.data.response import Response
from trivium.models import flops
from trivium.models.logprobs import Head
from trivium.models.reference import frozen_copy
from trivium.rollout.engine import Finished
from trivium.rollout.local_engine import LocalEngine, Row
from trivium.rollout.sampling import Sampling


class _SamplingCanceled(Exception):
    """Raised in the thread to end sampling."""


class _SnapshotEngine(LocalEngine):
    """Engine over a frozen copy of another engine's policy, which can stop between two tokens."""

    def __init__(self, original: LocalEngine) -> None:
        policy = frozen_copy(original.policy)
        # Tokenizers are not thread-safe.
        policy.tokenizer = copy.deepcopy(policy.tokenizer)
        policy.decode_model()  # Select the decode path here, once, not in the thread.
        super().__init__(policy, original.end_tokens, max_rows=original.max_rows)
        self.stopped = threading.Event()

    def _sample_tokens(
        self, rows: list[Row], head: Head, hidden_RD: Tensor, sampling: Sampling
    ) -> None:
        if self.stopped.is_set():
            raise _SamplingCanceled
        super()._sample_tokens(rows, head, hidden_RD, sampling)


@dataclass
class _ThreadResult:
    """Responses of a thread, or the error that ended it, and the FLOPs spent."""

    responses: list[list[Response]] | None = None
    error: BaseException | None = None
    flops: float = 0.0


class AsyncEngine:
    """Engine that can sample the responses of one step in the background.

    Args:
        engine: engine that samples from the current policy.
    """

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self._snapshot = _SnapshotEngine(engine)
        parameters = dict(self._snapshot.policy.model.named_parameters())
        self._weights = {name: parameters[name] for name in engine.policy.state_dict()}
        self._step: int | None = None
        self._thread: threading.Thread | None = None
        self._finished_groups: SimpleQueue[tuple[int, list[Response]] | None] = SimpleQueue()
        self._result = _ThreadResult()

    def begin(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        first_samples: Sequence[int] | None = None,
    ) -> None:
        """Start sampling the responses of ``step`` in the background.

        Sampling uses the current weights. If a checkpoint holds weights for this step, sampling
        uses those weights.
        """
        if self._step != step:
            self.close()
            self._load_weights(self._engine.policy.state_dict())
            self._step = step
        if self._thread is None:
            self._start(prompts, samples, sampling, seed, step, first_samples)

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        first_samples: Sequence[int] | None = None,
        finished: Finished | None = None,
    ) -> list[list[Response]]:
        """Return the responses of ``step``: those sampled since ``begin``, or sampled now."""
        if self._step != step:
            return self._engine.generate(
                prompts, samples, sampling, seed=seed, step=step,
                first_samples=first_samples, finished=finished,
            )  # fmt: skip
        if self._thread is None:
            self._start(prompts, samples, sampling, seed, step, first_samples)
        while (group := self._finished_groups.get()) is not None:
            if finished is not None:
                finished(*group)
        self._thread = None
        flops.add(self._result.flops)
        if self._result.error is not None:
            raise self._result.error
        assert self._result.responses is not None, "the thread set neither responses nor an error"
        return self._result.responses

    def close(self) -> None:
        """Stop background sampling and discard its responses."""
        if self._thread is not None:
            self._snapshot.stopped.set()
            self._thread.join()
            self._snapshot.stopped.clear()
            self._thread = None

    def state_dict(self) -> dict[str, Any] | None:
        """Return the last step passed to ``begin`` and the weights that it is sampled from."""
        if self._step is None:
            return None
        return {"step": self._step, "weights": {n: p.detach() for n, p in self._weights.items()}}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore the step and the weights of ``state_dict``."""
        if state is not None:
            self._load_weights(state["weights"])
            self._step = state["step"]

    @torch.no_grad()
    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._weights.items():
            parameter.copy_(weights[name])

    def _start(self, *request: Any) -> None:
        self._finished_groups, self._result = SimpleQueue(), _ThreadResult()
        arguments = (self._finished_groups, self._result, *request)
        self._thread = threading.Thread(
            target=self._sample, args=arguments, daemon=True, name="trivium async sampling"
        )
        self._thread.start()

    def _sample(
        self,
        finished_groups: SimpleQueue[tuple[int, list[Response]] | None],
        result: _ThreadResult,
        prompts: Sequence[Prompt],
        samples: int,
        sampling: Sampling,
        seed: int,
        step: int,
        first_samples: Sequence[int] | None,
    ) -> None:
        try:
            with flops.apart() as counter:
                result.responses = self._snapshot.generate(
                    prompts, samples, sampling, seed=seed, step=step,
                    first_samples=first_samples,
                    finished=lambda *group: finished_groups.put(group),
                )  # fmt: skip
            result.flops = counter.flops
        except BaseException as error:  # `generate` raises the error in the caller's thread.
            result.error = error
        finally:
            finished_groups.put(None)
