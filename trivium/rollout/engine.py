"""What a rollout engine is, and how a token is drawn.

An engine turns prompts into sampled responses, token ids in and token ids out. Every drawn token
is a pure function of the distribution and of (run seed, step, prompt index, sample index,
position): it does not matter which other rows shared the batch, in how many processes, or whether
the run was interrupted in between.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from trivium.data.prompts import Prompt
from trivium.rollout.sampling import Sampling
from trivium.serialization import serializable

FinishReason = Literal["eos", "stop", "length"]
EVAL_STEP = -1
"""The step of what is sampled by no training step: its random numbers are its own."""


@serializable
@dataclass(frozen=True)
class Response:
    """One sampled response.

    Attributes:
        tokens: its token ids, the ending token included.
        logprobs: of each token under ``softmax(logits / temperature)`` (1 when greedy), before
            top-p, top-k and min-p cut the distribution.
        finish_reason: by its EOS (or a stop token), by a stop text, or cut off by the length limit.
        text: the tokens decoded, without special tokens.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    text: str


Finished = Callable[[int, list[Response]], None]
"""Is told of a group that has ended: its prompt's place, and its responses."""


class Engine(Protocol):
    """Samples responses from the current policy."""

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
        """``samples`` responses for each prompt, in order.

        Tells ``finished``, in the calling thread, of groups that end while others go on, in an
        order that is a function of the arguments and the policy. An engine that learns of all
        groups together need not tell of any.
        """
        ...


def row_key(seed: int, step: int, prompt: int, sample: int) -> int:
    """A 64-bit key of one sample's stream of random numbers."""
    identity = f"{seed}/{step}/{prompt}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "little", signed=True)


def uniforms(keys_R: Tensor, positions_R: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) from (key, position), float64: SplitMix64 (Steele et al. 2014)."""
    state = keys_R + (positions_R + 1) * -7046029254386353131
    state = (state ^ _shift(state, 30)) * -4658895280553007687
    state = (state ^ _shift(state, 27)) * -7723592293110705685
    return _shift(state ^ _shift(state, 31), 11).double() * 2.0**-53


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of signed 64-bit integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def draw(logits_RV: Tensor, uniforms_R: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob, both ``[R]``; see ``Response.logprobs``.

    ``logits_RV`` are divided by the temperature already. The token is the inverse of the
    cumulative distribution, in vocabulary order, at the row's uniform number.
    """
    log_p_RV = logits_RV.log_softmax(-1)
    if sampling.greedy:
        token_R = log_p_RV.argmax(-1)
    else:
        kept_RV = filter_top_k_top_p(log_p_RV.exp(), sampling)
        total_RV = kept_RV.cumsum(-1, dtype=torch.float64)
        target_R1 = uniforms_R[:, None] * total_RV[:, -1:]
        token_R = torch.searchsorted(total_RV, target_R1, right=True)[:, 0]
        if bool((token_R == kept_RV.shape[1]).any()):
            # A uniform next to 1 may round up to the total: then the last possible token is meant.
            last_R = (kept_RV > 0).int().flip(-1).argmax(-1)
            token_R = token_R.clamp(max=kept_RV.shape[1] - 1 - last_R)
    return token_R, log_p_RV.gather(1, token_R[:, None])[:, 0]


def filter_top_k_top_p(p_RV: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities with what top-k, min-p and top-p leave out set to 0, not renormalized."""
    if sampling.top_k and sampling.top_k < p_RV.shape[1]:
        least_R1 = p_RV.topk(sampling.top_k, -1).values[:, -1:]
        p_RV = p_RV.where(p_RV >= least_R1, 0.0)
    if sampling.min_p > 0:
        p_RV = p_RV.where(p_RV >= sampling.min_p * p_RV.amax(-1, keepdim=True), 0.0)
    if sampling.top_p < 1:
        sorted_RV, order_RV = p_RV.sort(dim=-1, descending=True, stable=True)
        before_RV = sorted_RV.cumsum(-1) - sorted_RV
        share_R1 = sampling.top_p * sorted_RV.sum(-1, keepdim=True)
        sorted_RV = sorted_RV.where(before_RV < share_R1, 0.0)
        p_RV = torch.zeros_like(p_RV).scatter(-1, order_RV, sorted_RV)
    return p_RV
