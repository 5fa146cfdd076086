"""Interface of rollout engines, and reproducible sampling of tokens.

An engine samples responses for prompts, from token ids to token ids. Every sampled token is a pure
function of the distribution and of (run seed, step, prompt index, sample index, position). It does
not depend on the other rows of the batch, on the number of processes, or on whether the run was
interrupted and resumed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from trivium.data.prompts import Prompt
from trivium.data.response import Response
from trivium.rollout.sampling import Sampling

EVAL_STEP = -1
"""Step number of sampling outside training, which gives it separate random numbers."""


Finished = Callable[[int, list[Response]], None]
"""Callback for a finished group: index of its prompt in the batch, and its responses."""


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
        first_samples: Sequence[int] | None = None,
        finished: Finished | None = None,
    ) -> list[list[Response]]:
        """Return ``samples`` responses for each prompt, in the order of the prompts.

        ``first_samples`` holds the number of each prompt's first sample, which keys its random
        numbers. By default it is ``number_samples`` of these prompts.

        Calls ``finished`` in the calling thread for each group that finishes before the whole
        batch. The order of the calls depends only on the arguments and the policy. An engine that
        gets all groups at once need not call it.
        """
        ...


def number_samples(prompts: Sequence[Prompt], samples: int) -> list[int]:
    """Return the number of each prompt's first sample.

    A prompt that occurs twice (a batch can span two epochs) gets new samples.
    """
    num_seen: Counter[int] = Counter()
    first_samples = []
    for prompt in prompts:
        first_samples.append(num_seen[prompt.index] * samples)
        num_seen[prompt.index] += 1
    return first_samples


def row_key(seed: int, step: int, prompt: int, sample: int) -> int:
    """Return the 64-bit key of one sample's stream of random numbers."""
    stream_name = f"{seed}/{step}/{prompt}/{sample}".encode()
    return int.from_bytes(
        hashlib.blake2b(stream_name, digest_size=8).digest(), "little", signed=True
    )


def uniforms(keys_R: Tensor, positions_R: Tensor) -> Tensor:
    """Return float64 uniforms in [0, 1) of (key, position): SplitMix64 (Steele et al. 2014)."""
    state = keys_R + (positions_R + 1) * -7046029254386353131
    state = (state ^ _shift(state, 30)) * -4658895280553007687
    state = (state ^ _shift(state, 27)) * -7723592293110705685
    return _shift(state ^ _shift(state, 31), 11).double() * 2.0**-53


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift signed 64-bit integers right logically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def draw(logits_RV: Tensor, uniforms_R: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Sample one token per row; return tokens and log-probs, both ``[R]``.

    ``logits_RV`` are already divided by the temperature. The token is the inverse of the
    cumulative distribution, in vocabulary order, at the row's uniform number. The log-probs are
    those of ``Response.logprobs``.
    """
    log_p_RV = logits_RV.log_softmax(-1)
    if sampling.greedy:
        token_R = log_p_RV.argmax(-1)
    else:
        filtered_RV = filter_top_k_top_p(log_p_RV.exp(), sampling)
        cumulative_RV = filtered_RV.cumsum(-1, dtype=torch.float64)
        target_R1 = uniforms_R[:, None] * cumulative_RV[:, -1:]
        token_R = torch.searchsorted(cumulative_RV, target_R1, right=True)[:, 0]
        if bool((token_R == filtered_RV.shape[1]).any()):
            # A uniform close to 1 can round up to the total: take the last possible token.
            last_R = (filtered_RV > 0).int().flip(-1).argmax(-1)
            token_R = token_R.clamp(max=filtered_RV.shape[1] - 1 - last_R)
    return token_R, log_p_RV.gather(1, token_R[:, None])[:, 0]


def filter_top_k_top_p(p_RV: Tensor, sampling: Sampling) -> Tensor:
    """Return probabilities with tokens outside top-k, min-p and top-p set to 0, unnormalized."""
    if sampling.top_k and sampling.top_k < p_RV.shape[1]:
        threshold_R1 = p_RV.topk(sampling.top_k, -1).values[:, -1:]
        p_RV = p_RV.where(p_RV >= threshold_R1, 0.0)
    if sampling.min_p > 0:
        p_RV = p_RV.where(p_RV >= sampling.min_p * p_RV.amax(-1, keepdim=True), 0.0)
    if sampling.top_p < 1:
        sorted_RV, order_RV = p_RV.sort(dim=-1, descending=True, stable=True)
        before_RV = sorted_RV.cumsum(-1) - sorted_RV
        mass_R1 = sampling.top_p * sorted_RV.sum(-1, keepdim=True)
        sorted_RV = sorted_RV.where(before_RV < mass_R1, 0.0)
        p_RV = torch.zeros_like(p_RV).scatter(-1, order_RV, sorted_RV)
    return p_RV
